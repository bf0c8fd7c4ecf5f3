"""The pages, and how to get from one to another."""

from collections.abc import Callable

import streamlit as st

from lightning_gpt.app import compare, plan, runs, write
from lightning_gpt.config.commands import AppOptions

PAGES: dict[str, Callable[[AppOptions], None]] = {
    "Compare": compare.show,
    "Plan": plan.show,
    "Runs": runs.show,
    "Write": write.show,
}


def show(options: AppOptions) -> None:
    """Draw the page that the address names."""
    st.set_page_config(page_title="lightning-gpt", layout="wide")
    pages: list[st.Page] = []
    for title, draw in PAGES.items():
        pages.append(st.Page(_bound(draw, options), title=title, url_path=title.lower(), default=not pages))
    chosen = st.navigation(pages, position="top")
    st.title(chosen.title)
    chosen.run()


def _bound(draw: Callable[[AppOptions], None], options: AppOptions) -> Callable[[], None]:
    return lambda: draw(options)
