"""Start Streamlit with app.py as its script."""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NoReturn

from lightning_gpt.config import UserError
from lightning_gpt.config.commands import AppOptions

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
        script: Path of app.py.
        argv: Its flags, which each page reads again.
        options: The same flags, parsed.

    Raises:
        UserError: Streamlit is not installed.
    """
    if find_spec("streamlit") is None:
        raise UserError("app.py needs Streamlit; pip install -r requirements/app.txt")
    settings = _SETTINGS | {"server.port": str(options.port), "server.address": options.address}
    command = ["-m", "streamlit", "run", script, *(f"--{k}={v}" for k, v in settings.items())]
    os.execv(sys.executable, [sys.executable, *command, "--", *argv])
