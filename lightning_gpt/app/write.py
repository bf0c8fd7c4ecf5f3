"""The Write page: text from any checkpoint, streamed."""

import time
from collections.abc import Iterator
from pathlib import Path

import streamlit as st

from lightning_gpt.checkpoint import ensure_canonical, find_checkpoint
from lightning_gpt.config import UserError
from lightning_gpt.config.commands import AppOptions
from lightning_gpt.implementations.generation import GenerationSettings
from lightning_gpt.models import GPTModule
from lightning_gpt.sampling import encode_prompt, stream_text
from lightning_gpt.tokenizers import Tokenizer

_REDRAW_SECONDS = 0.05


def show(options: AppOptions) -> None:
    """Draw the page."""
    names = runs_with_checkpoints(Path(options.runs))
    with st.form("write"):
        left, right = st.columns(2)
        run = left.selectbox("Run", names, key="run", placeholder=f"no run in {options.runs}/ yet")
        path = right.text_input("Or any checkpoint", key="path", placeholder="folder or file")
        prompt = st.text_area("Prompt", "\n", key="prompt", height=100)
        first, second, third, fourth = st.columns(4)
        settings = GenerationSettings(
            max_new_tokens=int(first.number_input("New tokens", 1, 100_000, 300, key="max_new_tokens")),
            temperature=float(second.number_input("Temperature", 0.01, 10.0, 0.8, key="temperature")),
            top_k=int(third.number_input("Top k", 0, 1_000_000, 200, key="top_k", help="0 for all tokens")) or None,
            seed=int(fourth.number_input("Seed", 0, 2**31 - 1, 1337, key="seed")),
        )
        pressed = st.form_submit_button("Write", type="primary")
    if not pressed:
        return
    name = path.strip() or (run and str(Path(options.runs, run)))
    if not name:
        st.warning("Choose a run, or give the path of a checkpoint.")
        return
    place = st.empty()
    try:
        started, drawn, text, tokens = time.perf_counter(), 0.0, "", 0
        for piece, count in pieces(name, prompt, settings):
            text, tokens = text + piece, tokens + count
            if time.perf_counter() - drawn > _REDRAW_SECONDS:
                place.code(text, language=None, wrap_lines=True)
                drawn = time.perf_counter()
        place.code(text, language=None, wrap_lines=True)
        seconds = time.perf_counter() - started
        st.caption(f"{tokens:,} tokens in {seconds:.2f} s, {tokens / seconds:,.1f} tokens/s")
    except UserError as error:
        st.error(str(error))


def runs_with_checkpoints(folder: Path) -> list[str]:
    """Return the names of runs that have a checkpoint, the latest first."""
    found = {path.parent: path.stat().st_mtime for path in folder.glob("*/checkpoints")}
    return [path.name for path in sorted(found, key=lambda path: found[path], reverse=True)]


def pieces(name: str, prompt: str, settings: GenerationSettings) -> Iterator[tuple[str, int]]:
    """Yield the prompt, and then the new text in pieces, each with its number of new tokens.

    Args:
        name: As for ``find_checkpoint``.
        prompt: Text to continue.
        settings: How tokens are chosen.

    Raises:
        UserError: There is no such checkpoint, it has no tokenizer, or the prompt cannot be encoded.
    """
    path = find_checkpoint(name, which="best")
    module, tokenizer = _load(str(path), path.stat().st_mtime)
    if tokenizer is None:
        raise UserError(f"{path} does not record its tokenizer")
    ids = encode_prompt(tokenizer, prompt).tolist()
    yield tokenizer.decode(ids), 0
    for _, piece, count in stream_text(module, tokenizer, [ids], settings):
        yield piece, max(count, 0)


@st.cache_resource(max_entries=2, show_spinner="Loading the checkpoint")
def _load(path: str, saved_at: float) -> tuple[GPTModule, Tokenizer | None]:
    """Return the model and its tokenizer; loaded once for each state of the file."""
    checkpoint = ensure_canonical(Path(path))
    return checkpoint.module().eval(), checkpoint.tokenizer
