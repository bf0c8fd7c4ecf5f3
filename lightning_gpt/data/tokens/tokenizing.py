"""Tokenize a corpus of any size into a token folder, in constant memory, continuing after an interruption."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from lightning_gpt.config import UserError
from lightning_gpt.data.text.corpora import Corpus
from lightning_gpt.data.text.documents import Block, ending_in_newline
from lightning_gpt.data.tokens.encoding import (
    LIMIT_BYTES,
    UNIT_BYTES,
    Encoder,
    Position,
    Unit,
    encode_in_order,
    pieces,
    units,
)
from lightning_gpt.data.tokens.splitting import Reader, Span, Survey, by_document, by_tail, survey
from lightning_gpt.data.tokens.token_files import describe, token_dtype
from lightning_gpt.data.tokens.writing import SPLITS, Split, TokenWriter
from lightning_gpt.tokenizers import CharTokenizer, Tokenizer, build_tokenizer

COMMIT_SECONDS = 5.0


@dataclass(frozen=True)
class Plan:
    """How to turn a corpus into tokens.

    Attributes:
        tokenizer: The value of ``--tokenizer``, or a tokenizer.
        split: "tail": all documents form one text whose last characters are for validation; "document": each document
            ends in the end-of-text token and is assigned to a split at random.
        val_fraction: Share of the characters, or of the documents, for validation.
        seed: Seed of the assignment.
        workers: Encoding threads; None for one per core. The tokens do not depend on it.
    """

    tokenizer: str | Tokenizer
    split: Literal["tail", "document"] = "tail"
    val_fraction: float = 0.1
    seed: int | None = None
    workers: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything that the tokens depend on, in JSON types."""
        tokenizer = self.tokenizer
        if isinstance(tokenizer, Tokenizer):
            tokenizer = hashlib.sha256(json.dumps(tokenizer.to_dict(), sort_keys=True).encode()).hexdigest()
        return {
            "tokenizer": tokenizer,
            "split": self.split,
            "val_fraction": self.val_fraction,
            "seed": self.seed,
            "pieces": [UNIT_BYTES, LIMIT_BYTES],
        }


@dataclass
class _State:
    """The progress of a job, as the journal stores it."""

    survey: dict[str, Any] | None = None
    position: tuple[int, int] = (0, 0)
    disk: int = 0
    rough_cuts: int = 0
    n_bytes: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    n_documents: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))

    def add(self, unit: Unit) -> None:
        for piece in unit.pieces:
            self.n_bytes[piece.split] += len(piece.data)
            self.n_documents[piece.split] += piece.ends_text
            self.rough_cuts += piece.rough
        self.position, self.disk = unit.pieces[-1].after, unit.pieces[-1].disk


def write_corpus(
    folder: Path, *, corpus: Corpus, plan: Plan, say: Callable[[str], object] = lambda line: None
) -> dict[str, Any]:
    """Tokenize a corpus into a token folder, which appears only when it is complete.

    If the job was interrupted at any point, by a full disk or a crash, the same call continues it, with the same
    result, byte for byte.

    Args:
        folder: The folder to create; an existing one must be empty or hold only token files, which are replaced.
        corpus: The text.
        plan: How to split and tokenize it.
        say: Called with each message for the user.

    Returns:
        The content of `meta.json`.

    Raises:
        UserError: The tokenizer cannot encode the text, the text is too short to split, or the folder cannot be
            written.
    """
    try:
        documents = corpus.documents.identity()
        job = {"documents": documents, "plan": plan.to_dict()}
        with TokenWriter(folder, job=job) as writer:
            if writer.finished:
                writer.discard()
                return json.loads((folder / "meta.json").read_text(encoding="ascii"))
            if writer.discarded:
                say("deleted unfinished work for other inputs or settings; starting over")
            return _write(writer, corpus, plan, say, documents=documents)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: {error.strerror or error}; run the same command again to continue"
        ) from error


def _write(
    writer: TokenWriter, corpus: Corpus, plan: Plan, say: Callable[[str], object], *, documents: list[Any]
) -> dict[str, Any]:
    state = _State(**writer.state)
    if writer.resumed and state.disk:
        say(f"continuing an interrupted run: {state.disk / 1e6:,.0f} MB already done")
    tokenizer, is_char = plan.tokenizer, plan.tokenizer == CharTokenizer.name
    if isinstance(tokenizer, str):
        tokenizer = CharTokenizer("a") if is_char else build_tokenizer(tokenizer, corpus=None, source=corpus.source)
    tokenizer.encode("a")  # report missing tables now, not after reading a long text
    read: Reader = corpus.documents.blocks
    if plan.split == "tail":
        read = corpus.joined
    elif tokenizer.end_of_text is None:
        read = functools.partial(ending_in_newline, corpus.documents)
    if state.survey is None and (is_char or plan.split == "tail"):
        state.survey = asdict(_survey(corpus, read, plan, tokenizer, alphabet=is_char))
        writer.commit(asdict(state))
    found = Survey(**state.survey) if state.survey else None
    if found and found.n_bytes == 0:
        raise UserError(f"{corpus.source}: there is no text in it")
    if found and is_char:
        tokenizer = CharTokenizer(found.alphabet)
    start = Position(*state.position)
    if plan.split == "tail":
        assert found is not None
        if not 0 < found.boundary < found.n_bytes:
            raise UserError(f"{corpus.source} is too short to split into training and validation text; give more text")
        spans = by_tail(read, found=found, start=start, done=sum(state.n_bytes.values()))
    else:
        spans = by_document(read, val_fraction=plan.val_fraction, seed=plan.seed or 0, start=start)
    _encode(writer, state, spans, tokenizer, plan, corpus)
    if corpus.documents.identity() != documents:
        raise UserError(f"{corpus.source} changed while it was read; start again when it is complete")
    return _finish(writer, state, tokenizer, plan, corpus)


def _survey(corpus: Corpus, read: Reader, plan: Plan, tokenizer: Tokenizer, *, alphabet: bool) -> Survey:
    def not_utf8(block: Block, wrong: bytes) -> None:
        # Raises if the tokenizer needs UTF-8.
        at = block.offset + max(0, block.data.find(wrong))
        tokenizer.encode_bytes(wrong, source=block.where, offset=at)

    with _progress(corpus, "reading", 0) as bar:
        return survey(
            read,
            val_fraction=plan.val_fraction,
            alphabet=alphabet,
            progress=lambda disk: bar.update(disk - bar.n),
            not_utf8=not_utf8,
        )


def _encode(
    writer: TokenWriter, state: _State, spans: Iterator[Span], tokenizer: Tokenizer, plan: Plan, corpus: Corpus
) -> None:
    end = tokenizer.end_of_text if plan.split == "document" else None
    encoder = Encoder(tokenizer, token_dtype(tokenizer.vocab_size), end)
    todo = units(pieces(spans, tokenizer=tokenizer, start=Position(*state.position)))
    committed = time.monotonic()
    with _progress(corpus, "tokenizing", state.disk) as bar:
        for unit, tokens in encode_in_order(todo, encoder, workers=plan.workers or _cores()):
            for split in SPLITS:
                writer.append(split, tokens[split])
            state.add(unit)
            bar.update(state.disk - bar.n)
            if time.monotonic() - committed >= COMMIT_SECONDS:
                writer.commit(asdict(state))
                committed = time.monotonic()


def _finish(writer: TokenWriter, state: _State, tokenizer: Tokenizer, plan: Plan, corpus: Corpus) -> dict[str, Any]:
    dtype = token_dtype(tokenizer.vocab_size)
    n_tokens = {split: writer.size(split) * 8 // int(dtype[4:]) for split in SPLITS}
    split: dict[str, Any] = {"by": plan.split, "val_fraction": plan.val_fraction}
    if plan.split == "document":
        split |= {"seed": plan.seed or 0} | {f"{name}_documents": state.n_documents[name] for name in SPLITS}
        for name in SPLITS:
            if not n_tokens[name]:
                raise UserError(
                    f"{corpus.source}: none of the {sum(state.n_documents.values())} documents fell to {name}.bin; "
                    "give more documents, or another --val_fraction or --seed"
                )
    meta = describe(
        n_tokens=n_tokens,
        n_bytes=state.n_bytes,
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        source=corpus.source,
    ) | {"split": split, "rough_cuts": state.rough_cuts}
    writer.publish(meta)
    return meta


@contextlib.contextmanager
def _progress(corpus: Corpus, what: str, done: int) -> Iterator[tqdm]:
    size = corpus.documents.size
    with tqdm(total=size, initial=done, desc=what, unit="B", unit_scale=True, delay=1, disable=None) as bar:
        yield bar


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
