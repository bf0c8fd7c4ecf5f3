"""Open thousands of damaged files of every format that the project reads; each must load or be refused in one line."""

import contextlib
import gzip
import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_gpt.bench.forked import ForkedRun, in_child, peak_memory
from lightning_gpt.bench.kills import FLAGS, RANKS
from lightning_gpt.checkpoint import convert, find_checkpoint, load, open_checkpoint
from lightning_gpt.checkpoint.write.export import export
from lightning_gpt.cli import parse_prepare, parse_train
from lightning_gpt.config import UserError
from lightning_gpt.data.tokens.preparation import prepare, prepare_folder

_BATCH = 25  # mutations per process
_HANG_SECONDS = 60
_EXPORTS = ("hf", "nanogpt", "safetensors")


@dataclass
class Mutations:
    """What mutated files of one format did.

    Attributes:
        form: Name of the format.
        outcomes: Number of files by outcome: "loaded", "refused", "hung", or the name of an exception that is a defect.
        slowest: Seconds of the slowest file.
        largest: Peak growth of memory for one file, in bytes.
        examples: For each kind of defect the first mutation that showed it.
    """

    form: str
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    largest: int = 0
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def defects(self) -> int:
        """Number of files that neither loaded nor were refused in one line."""
        return sum(count for outcome, count in self.outcomes.items() if outcome not in ("loaded", "refused"))

    def row(self) -> str:
        """Return one line of the table."""
        good, refused = self.outcomes["loaded"], self.outcomes["refused"]
        return (
            f"{self.form:20}{sum(self.outcomes.values()):6}{good:8}{refused:9}{self.defects:9}{self.slowest:10.1f}"
            f"{self.largest / 2**20:9.0f}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the result, ready for JSON."""
        return {
            "form": self.form,
            "outcomes": dict(self.outcomes),
            "slowest_seconds": self.slowest,
            "largest_bytes": self.largest,
            "examples": self.examples,
        }


HEADING = f"{'mutated files':20}{'count':>6}{'loaded':>8}{'refused':>9}{'defects':>9}{'slowest s':>10}{'MiB':>9}"


def mutate_files(*, count: int, data: Path, folder: Path, seed: int) -> list[Mutations]:
    """Mutate files of every format, open each as a command does, and count what happens.

    Args:
        count: Number of mutated files over all formats.
        data: Training text.
        folder: Folder to work in.
        seed: Seed of the mutations.
    """
    samples = _samples(data, folder)
    results = []
    for number, (form, (sample, door)) in enumerate(samples.items()):
        whole = in_child(_outcome, door, sample)
        assert whole == "loaded", f"{sample}: {whole}"
        result = Mutations(form)
        wanted = count // len(samples) + (number < count % len(samples))
        for start in range(0, wanted, _BATCH):
            seeds = range(start, min(start + _BATCH, wanted))
            for outcome in _open_batch(sample, door, folder / "mutated", [f"{seed}/{form}/{n}" for n in seeds]):
                result.outcomes[outcome.kind] += 1
                result.slowest = max(result.slowest, outcome.seconds)
                result.largest = max(result.largest, outcome.memory)
                if outcome.kind not in ("loaded", "refused"):
                    result.examples.setdefault(outcome.kind, outcome.mutation)
        results.append(result)
    return results


@dataclass(frozen=True)
class _Outcome:
    kind: str
    seconds: float
    memory: int
    mutation: str


def _open_batch(sample: Path, door: Callable[[Path], object], target: Path, seeds: list[str]) -> list[_Outcome]:
    """Open one mutated copy for each seed, in a child process; after a crash or a hang, continue behind it."""
    outcomes: list[_Outcome] = []
    log = target.with_name("outcomes.txt")
    while len(outcomes) < len(seeds):
        log.unlink(missing_ok=True)
        try:
            outcomes += in_child(_open_all, sample, door, target, seeds[len(outcomes) :], log, timeout=_HANG_SECONDS)
        except RuntimeError as error:
            # The log holds the mutations that were begun.
            begun = log.read_text(encoding="utf-8").splitlines() if log.exists() else [""]
            outcomes += in_child(_open_all, sample, door, target, seeds[len(outcomes) :][: len(begun) - 1], log)
            outcomes.append(_Outcome("hung" if "None" in str(error) else "crashed", _HANG_SECONDS, 0, begun[-1]))
    return outcomes


def _open_all(
    sample: Path, door: Callable[[Path], object], target: Path, seeds: list[str], log: Path
) -> list[_Outcome]:
    outcomes = []
    with open(os.devnull, "w") as null, log.open("w", encoding="utf-8") as begun:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
        for seed in seeds:
            shutil.rmtree(target, ignore_errors=True)
            copy = target / sample.name
            (shutil.copytree if sample.is_dir() else shutil.copyfile)(sample, _made(copy))
            mutation = _mutate(copy, random.Random(seed))
            begun.write(f"{seed}: {mutation}\n")
            begun.flush()
            started = time.monotonic()
            with peak_memory() as growth:
                kind = _outcome(door, copy)
                outcomes.append(_Outcome(kind, time.monotonic() - started, growth(), f"{seed}: {mutation}"))
    return outcomes


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _outcome(door: Callable[[Path], object], path: Path) -> str:
    try:
        door(path)
    except UserError as error:
        return "refused" if str(error) else "empty message"
    except BaseException as error:  # any other one would be a traceback
        return type(error).__name__
    return "loaded"


# Mutations


def _mutate(path: Path, draw: random.Random) -> str:
    """Damage a file, or one file of a folder; return what was done."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    file = draw.choice(files)
    content = bytearray(file.read_bytes())
    if path.is_dir() and draw.random() < 0.1:
        file.unlink()
        return f"delete {file.name}"
    name = draw.choice(list(_MUTATIONS))
    file.write_bytes(_MUTATIONS[name](content, draw))
    return f"{name} {file.name}"


def _flip(content: bytearray, draw: random.Random) -> bytes:
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        if content:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def _flip_head(content: bytearray, draw: random.Random) -> bytes:
    """Flip bits of the first 256 bytes, where formats keep their sizes."""
    return _flip(content[:256], draw) + bytes(content[256:])


def _cut(content: bytearray, draw: random.Random) -> bytes:
    return bytes(content[: draw.randrange(len(content) + 1)])


def _zero(content: bytearray, draw: random.Random) -> bytes:
    start = draw.randrange(len(content) + 1)
    length = min(draw.choice((1, 16, 512, 4096)), len(content) - start)
    content[start : start + length] = bytes(length)
    return bytes(content)


def _insert(content: bytearray, draw: random.Random) -> bytes:
    start = draw.randrange(len(content) + 1)
    return bytes(content[:start]) + draw.randbytes(draw.choice((1, 7, 1000))) + bytes(content[start:])


def _repeat(content: bytearray, draw: random.Random) -> bytes:
    start = draw.randrange(len(content) + 1)
    block = bytes(content[start : start + draw.choice((1, 64, 4096))])
    return bytes(content[:start]) + block * draw.choice((2, 50)) + bytes(content[start:])


def _number(content: bytearray, draw: random.Random) -> bytes:
    """Replace a number in a text by another, large, negative or of another type."""
    digits = [i for i, byte in enumerate(content) if 48 <= byte <= 57]
    if not digits:
        return _flip(content, draw)
    start = end = draw.choice(digits)
    while end < len(content) and 48 <= content[end] <= 57:
        end += 1
    new = draw.choice((b"0", b"-1", b"999999999", b"1" * 5000, b"1e400", b"NaN", b"null", b'"x"', b"[]", b"[" * 5000))
    return bytes(content[:start]) + new + bytes(content[end:])


_MUTATIONS: dict[str, Callable[[bytearray, random.Random], bytes]] = {
    "flip bits of": _flip,
    "flip bits in the head of": _flip_head,
    "cut": _cut,
    "zero part of": _zero,
    "insert into": _insert,
    "repeat part of": _repeat,
    "replace a number in": _number,
}


# Samples: one of each format, made by the project itself


def _load(path: Path) -> None:
    load(path)


def _train_on(path: Path) -> None:
    prepare(str(path), tokenizer=None, tokenizer_file=None, block_size=8)


def _tokenize_with(path: Path) -> None:
    text = path.parent / "text.txt"
    text.write_text("hello world " * 50, encoding="ascii")
    prepare(str(text), tokenizer=str(path), tokenizer_file=None, block_size=8)


def _configure(path: Path) -> None:
    parse_train([f"--config={path}"])


def _samples(data: Path, folder: Path) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """Make a sample of each format; return it with the function that opens it."""
    short = [*FLAGS, f"--data={data}", "--max_steps=2", "--n_layer=1", "--n_embd=16"]
    output = folder / "samples.txt"
    found: dict[str, tuple[Path, Callable[[Path], object]]] = {}
    for form in ("single", "fsdp", "deepspeed_stage_2", "deepspeed_stage_3"):
        ranks = RANKS[form]
        flags = [] if ranks == 1 else [f"--strategy={form}", f"--devices={ranks}"]
        run = folder / "samples" / form
        codes = ForkedRun([*short, *flags, f"--out_dir={run}"], ranks=ranks, output=output).join()
        if codes != [0] * ranks:
            raise UserError(f"a run under {form} failed; see {output}")
        # Away from the user's own runs, whose files are trusted.
        found[form] = (shutil.copytree(run, folder / "downloads" / form) / "checkpoints" / "last.ckpt", _load)
    in_child(_export_all, found["single"][0], folder)
    for form in _EXPORTS:
        found[f"export {form}"] = (folder / "exports" / form, _load)
    found["canonical"] = (folder / "exports" / "canonical", _load)
    inputs = folder / "inputs"
    in_child(_write_inputs, data, inputs)
    found["token files"] = (inputs / "tokens", _train_on)
    for name in ("rows.jsonl", "rows.parquet", "text.txt", "text.txt.gz"):
        if (inputs / name).exists():
            found[name] = (inputs / name, _train_on)
    found["tokenizer.json"] = (folder / "exports" / "hf" / "tokenizer.json", _tokenize_with)
    found["config.yaml"] = (folder / "samples" / "single" / "config.yaml", _configure)
    return {form: sample for form, sample in found.items() if sample[0].exists()}


def _export_all(checkpoint: Path, folder: Path) -> None:
    opened = open_checkpoint(find_checkpoint(str(checkpoint), which="last"))
    for form in _EXPORTS:
        export(opened, _made(folder / "exports" / form), form=form)
    convert(opened, folder / "exports" / "canonical", optimizer=True)


def _write_inputs(data: Path, inputs: Path) -> None:
    """Write the same text as plain, compressed, JSON lines and Parquet, and as token files."""
    inputs.mkdir()
    text = data.read_text(encoding="utf-8")[:20_000]
    (inputs / "text.txt").write_text(text, encoding="utf-8")
    (inputs / "text.txt.gz").write_bytes(gzip.compress(text.encode()))
    rows = [{"text": line} for line in text.splitlines()]
    (inputs / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with contextlib.suppress(ImportError):  # without pyarrow there are no Parquet files to read either
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), inputs / "rows.parquet")
    flags = [str(inputs / "text.txt"), f"--out={inputs / 'tokens'}", "--tokenizer=char"]
    prepare_folder(parse_prepare(flags))
