"""Compare strategies, plan runs, watch them, and write text, in a browser: ``python app.py``."""

import sys
from collections.abc import Sequence

from lightning_gpt.cli import parse_options, reporting_errors
from lightning_gpt.config.commands import AppOptions


@reporting_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Serve the pages; or, in the process that Streamlit has started, draw one."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse_options(AppOptions, argv, description="Compare strategies, plan and watch runs, and write text.")
    from lightning_gpt.app.server import is_page, serve  # imports streamlit, which --help must not

    if not is_page():
        serve(__file__, argv, options)
        return
    from lightning_gpt.app.pages import show

    show(options)


if __name__ == "__main__":
    main()
