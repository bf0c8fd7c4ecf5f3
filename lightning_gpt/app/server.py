"""Start Streamlit with commands/app.py as its script."""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NoReturn

from lightning_gpt.config import UserError
from lightning_gpt.config.commands import AppOptions
from lightning_gpt.invocation import ROOT, install_line, usage

# No usage statistics, no question for an e-mail address, and no button that deploys to a cloud.
_SETTINGS = {
    "browser.gatherUsageStats": "false",
    "server.headless": "true",
    "server.fileWatcherType": "none",
    "client.toolbarMode": "minimal",
}


def is_page() -> bool:
    """Return whether Streamlit runs this code to draw a page."""
    if sys.modules.get("streamlit") is None:
        return False
    from streamlit.runtime.scriptrunner import get_script_run_ctx

    return get_script_run_ctx(suppress_warning=True) is not None


def serve(script: str, argv: Sequence[str], options: AppOptions) -> NoReturn:
    """Become the process that serves the pages.

    Args:
        script: File that draws the pages.
        argv: Its flags, which each page reads again.
        options: The same flags, parsed.

    Raises:
        UserError: Streamlit is not installed.
    """
    if find_spec("streamlit") is None:
        raise UserError(f"{usage('app')} needs Streamlit; {install_line('app')}")
    settings = _SETTINGS | {"server.port": str(options.port), "server.address": options.address}
    command = ["-m", "streamlit", "run", script, *(f"--{k}={v}" for k, v in settings.items())]
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep)
    os.execve(sys.executable, [sys.executable, *command, "--", *argv], os.environ | {"PYTHONPATH": path})
