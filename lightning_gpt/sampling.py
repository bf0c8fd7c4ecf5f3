"""Write text with a trained model, streaming each piece as soon as no later token can change it."""

import contextlib
import itertools
import os
import select
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from lightning_gpt.checkpoint import Checkpoint, ensure_canonical, find_checkpoint
from lightning_gpt.checkpoint.initial import fitted_vocabulary
from lightning_gpt.config import TrainerOptions, UserError
from lightning_gpt.config.commands import SampleOptions
from lightning_gpt.data.tasks import find_task
from lightning_gpt.data.tokens.preparation import prepare
from lightning_gpt.implementations.generation import GenerationSettings
from lightning_gpt.models import GPTModule
from lightning_gpt.strategies import find_devices
from lightning_gpt.tokenizers import CharTokenizer, Tokenizer, build_tokenizer

REPLACEMENT = "\ufffd"  # the replacement character, which stands for incomplete UTF-8


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """Return the tokens of a prompt, int64 of shape (T,).

    Raises:
        UserError: The prompt is empty, or holds a character that the tokenizer lacks.
    """
    try:
        ids = tokenizer.encode(prompt)
    except UserError as error:
        raise UserError(f"--prompt: {error}") from error
    if len(ids) == 0:
        raise UserError("--prompt is empty; give at least one character to continue")
    return ids


class GrowingText:
    """Decode tokens one by one, and release text only when no later token can change it.

    The released pieces add up to the text of all tokens, cut before the first stop string.

    Args:
        tokenizer: Decoding must be concatenative: if a list of tokens ends with a complete character, the text of any
            further tokens is appended to its text.
        stop: Strings that end the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.is_over = False
        self._pending: list[int] = []  # tokens since the last complete character
        self._decoded = 0  # number of characters of `_pending` that are already in `_text`
        self._text = ""  # decoded but not released

    def add(self, token: int) -> bool:
        """Add a token; return whether the text has reached a stop string."""
        self._pending.append(token)
        text = self.tokenizer.decode(self._pending)
        # Only the last character can be incomplete.
        certain = text.removesuffix(REPLACEMENT)
        self._text += certain[self._decoded :]
        self._decoded = len(certain)
        if certain == text:
            self._pending, self._decoded = [], 0
        return self._find_stop()

    def take(self) -> str:
        """Return the text that has become final since the last call."""
        held = 0 if self.is_over else self._partial_stop()
        piece, self._text = self._text[: len(self._text) - held], self._text[len(self._text) - held :]
        return piece

    def end(self) -> str:
        """Return the rest after the last token; an incomplete character becomes U+FFFD."""
        if not self.is_over and self._pending:
            self._text += self.tokenizer.decode(self._pending)[self._decoded :]
            self._pending = []
            self._find_stop()
        piece, self._text = self._text, ""
        return piece

    def _find_stop(self) -> bool:
        found = [at for at in map(self._text.find, self.stop) if at >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.is_over = True
        return self.is_over

    def _partial_stop(self) -> int:
        """Return the length of the longest suffix that may be the beginning of a stop string."""
        lengths = (n for stop in self.stop for n in range(len(stop) - 1, 0, -1) if self._text.endswith(stop[:n]))
        return max(lengths, default=0)


def stream_text(
    module: GPTModule,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    stop: Sequence[str] = (),
) -> Iterator[tuple[int, str, int]]:
    """Continue prompts and yield the new text in pieces.

    Args:
        module: The model, in eval mode.
        tokenizer: The model's tokenizer.
        prompts: Token ids of each row.
        settings: How tokens are chosen.
        stop: Strings that end a row; its text stops before them. They may span several tokens.

    Yields:
        (row, piece of text, number of new tokens); the number is -1 for the last piece of a row.
    """
    texts = [GrowingText(tokenizer, stop=stop) for _ in prompts]
    live = list(range(len(prompts)))
    for step in module.stream_tokens(prompts, settings, is_over=lambda row, token: texts[row].add(token)):
        for row, _ in step:
            yield row, texts[row].take(), 1
        for row in set(live) - {row for row, _ in step if not texts[row].is_over}:
            yield row, texts[row].end(), -1
        live = [row for row, _ in step if not texts[row].is_over]
    for row in live:
        yield row, texts[row].end(), -1


def complete(
    module: GPTModule,
    *,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    seed: int,
    temperature: float,
    top_k: int,
) -> str:
    """Return the prompt with its continuation, without changing the global random state.

    Raises:
        UserError: The prompt is empty, or holds a character that the tokenizer does not know.
    """
    ids = encode_prompt(tokenizer, prompt)
    was_training = module.training
    module.eval()
    settings = GenerationSettings(max_new_tokens=max_new_tokens, seed=seed, temperature=temperature, top_k=top_k)
    pieces = [piece for _, piece, _ in stream_text(module, tokenizer, [ids.tolist()], settings)]
    module.train(was_training)
    return tokenizer.decode(ids) + "".join(pieces)


class _Writer:
    """Write the rows of a batch one after another; with `stream`, write the current row as it grows."""

    def __init__(self, out: TextIO, prompt: str, rows: int, *, stream: bool) -> None:
        self.out = out
        self.stream = stream
        self.texts = [prompt] * rows
        self.ended = [False] * rows
        self.row = 0  # the first row that is not completely written
        self._flush()

    def add(self, row: int, piece: str, *, is_last: bool) -> None:
        """Add a piece of a row's text."""
        self.texts[row] += piece
        self.ended[row] = is_last
        self._flush()

    def _flush(self) -> None:
        try:
            self._write()
        except BrokenPipeError:  # the reader has closed the pipe, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.out.fileno())  # so that closing stdout does not fail again
            sys.exit(0)

    def _write(self) -> None:
        while self.row < len(self.texts) and (self.stream or self.ended[self.row]):
            self.out.write(self.texts[self.row])
            self.texts[self.row] = ""
            if not self.ended[self.row]:
                break
            self.out.write("\n")
            self.row += 1
        self.out.flush()


def write_samples(options: SampleOptions, *, out: TextIO) -> None:
    """Write the samples of ``sample.py``, each with its prompt and a line break, and print the speed to stderr.

    Raises:
        UserError: The checkpoint does not exist or has no tokenizer, or a prompt cannot be read or encoded.
    """
    prompts = _prompts(options)
    path = find_checkpoint(options.checkpoint or "latest", which=options.which)
    checkpoint = ensure_canonical(path, trust=options.trust_checkpoint, verify=options.verify)
    tokenizer = _tokenizer(options, checkpoint)
    where = find_devices(TrainerOptions(accelerator=options.accelerator, precision=options.precision))
    checkpoint.compute_on(where.device_type, where.dtype)
    module = checkpoint.module().to(where.device_type, where.dtype).eval()
    to_compile = module.compile_generation(options.compile)
    tokens, seconds = 0, 0.0
    for number, prompt in enumerate(prompts):
        try:
            ids = encode_prompt(tokenizer, prompt).tolist()
            _require_known(ids, module)
        except UserError as error:
            if not options.interactive:
                raise
            print(f"error: {error}", file=sys.stderr)
            continue
        settings = GenerationSettings(
            max_new_tokens=options.max_new_tokens,
            greedy=options.greedy,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            repetition_penalty=options.repetition_penalty,
            seed=options.seed + number * options.num_samples,
        )
        if to_compile:
            _compile(module, [ids] * options.num_samples, settings)
            to_compile = False
        writer = _Writer(out, tokenizer.decode(ids), options.num_samples, stream=options.stream or options.interactive)
        started = time.perf_counter()
        pieces = stream_text(module, tokenizer, [ids] * options.num_samples, settings, stop=options.stop)
        for row, piece, taken in pieces:
            tokens += max(taken, 0)
            writer.add(row, piece, is_last=taken < 0)
        seconds += time.perf_counter() - started
    if seconds:
        print(f"{tokens:,} tokens in {seconds:.2f} s, {tokens / seconds:,.1f} tokens/s", file=sys.stderr)


def _tokenizer(options: SampleOptions, checkpoint: Checkpoint) -> Tokenizer:
    """Return the tokenizer of the checkpoint, or for one that does not record it, of --data or --tokenizer.

    Raises:
        UserError: It is unknown, recorded and given, or does not fit the weights.
    """
    given = " ".join(f"--{name} {value}" for name in ("data", "tokenizer") if (value := getattr(options, name)))
    if checkpoint.tokenizer is not None:
        if given:
            raise UserError(f"{given}: {checkpoint.path} records its tokenizer; leave it out")
        return checkpoint.tokenizer
    if options.data:
        task = find_task(options.data)
        source = task() if task else prepare(options.data, tokenizer=options.tokenizer, block_size=1)
        fitted_vocabulary(source, pad=False, start=checkpoint, goes_on=True)
        if source.tokenizer is None:
            raise UserError(f"--data {options.data} does not record its tokenizer either; give --tokenizer")
        return source.tokenizer
    if not given:
        raise UserError(
            f"{checkpoint.path} does not record its tokenizer; give --data, the model's training data, or --tokenizer"
        )
    assert options.tokenizer is not None
    if options.tokenizer == CharTokenizer.name:
        raise UserError(f"{given}: the text that the model was trained on determines it; give it as --data")
    tokenizer = build_tokenizer(options.tokenizer, corpus=None, source="--tokenizer")
    rows = checkpoint.model_config["vocab_size"] - checkpoint.model_config.get("vocab_padding", 0)
    if tokenizer.vocab_size > rows:
        raise UserError(f"{given} has {tokenizer.vocab_size:,} tokens, but {checkpoint.path} knows {rows:,}")
    return tokenizer


def _compile(module: GPTModule, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> None:
    """Trigger compilation by generating three tokens; the step that reads a text's second token is never compiled."""
    started = time.perf_counter()
    for _ in itertools.islice(module.stream_tokens(prompts, settings), 3):
        pass
    print(f"compiled in {time.perf_counter() - started:.1f} s", file=sys.stderr)


def _require_known(ids: Sequence[int], module: GPTModule) -> None:
    """Raise a UserError for tokens outside the model's vocabulary, which may be smaller than the tokenizer's."""
    rows = module.model_config["vocab_size"]
    if max(ids) >= rows:
        raise UserError(
            f"--prompt holds token {max(ids)}, but the model has {rows}; the tokenizer does not match the model"
        )


def _prompts(options: SampleOptions) -> Iterator[str]:
    """Yield the prompts: one text, or each line that is typed.

    Raises:
        UserError: More than one source is given, or the file cannot be read.
    """
    names = ("prompt", "prompt_file", "interactive")
    given = [name for name in names if getattr(options, name) != getattr(SampleOptions, name)]
    if len(given) > 1:
        raise UserError(f"{' and '.join('--' + name for name in given)} exclude each other; give one of them")
    if "" in options.stop:
        raise UserError("--stop is empty; give at least one character to stop at")
    if options.interactive:
        return _typed()
    if options.prompt != SampleOptions.prompt:
        return iter([options.prompt])
    if options.prompt_file not in (None, "-"):
        try:
            return iter([Path(options.prompt_file).read_bytes().decode()])
        except UnicodeDecodeError as error:
            raise UserError(f"--prompt_file {options.prompt_file} is not UTF-8; convert it") from error
        except OSError as error:
            raise UserError(f"--prompt_file {options.prompt_file}: {error.strerror}; name a text file") from error
    return iter([_piped(asked_for=options.prompt_file == "-")])


def _piped(*, asked_for: bool) -> str:
    """Return the text in stdin, or the default prompt if stdin is a terminal or empty."""
    try:
        is_there = sys.stdin is not None and (asked_for or not sys.stdin.isatty())
        if is_there:
            _warn_if_waiting()
        text = sys.stdin.read() if is_there else ""
    except UnicodeDecodeError as error:
        raise UserError("the prompt in stdin is not UTF-8; convert it") from error
    except OSError:  # stdin is closed
        text = ""
    return text or ("" if asked_for else SampleOptions.prompt)


def _warn_if_waiting() -> None:
    """Warn that the program waits for stdin."""
    with contextlib.suppress(OSError, ValueError):  # stdin is not a file, or the system cannot poll pipes
        if not select.select([sys.stdin], [], [], 0)[0]:
            print("waiting for a prompt on stdin; give --prompt instead", file=sys.stderr, flush=True)


def _typed() -> Iterator[str]:
    """Yield the lines of stdin; the input prompt goes to stderr, because stdout is for the text.

    Raises:
        UserError: stdin is closed, as under nohup, or not UTF-8.
    """
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise UserError("the text typed in stdin is not UTF-8; convert it") from error
        except (AttributeError, OSError) as error:
            raise UserError("--interactive reads stdin, which is closed; give --prompt") from error
        if not line:
            print(file=sys.stderr)
            return
        yield line.removesuffix("\n")
