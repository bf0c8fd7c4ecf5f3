"""evaluate.py: overlapping windows, other context lengths, and tables of several checkpoints."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
from lightning_gpt.checkpoint import open_checkpoint
from lightning_gpt.cli import parse_evaluate
from lightning_gpt.data.streams import EvalBatches
from lightning_gpt.data.tasks.sort import Sort
from lightning_gpt.data.tokens.token_files import write_token_files
from lightning_gpt.evaluation.report import HarnessScore, Report
from lightning_gpt.tokenizers import ByteTokenizer, CharTokenizer
from tests.launching import REPO, run_python

CHARS = CharTokenizer("abc\n ")  # the tokenizer of `saved_model`; BLOCK is its block size
BLOCK = 12

MODEL = """
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    vocab_size: int
    block_size: int
    has_rows: bool = False


class Mean(nn.Module):
    extends_context = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.embedding = nn.Embedding(config.vocab_size, 8)
        self.head = nn.Linear(8, config.vocab_size)
        self.rows = nn.Parameter(torch.zeros(config.block_size, 8)) if config.has_rows else None

    def forward(self, idx, targets=None):
        if idx.shape[1] > self.block_size:
            raise ValueError("too long")
        counts = torch.arange(1, idx.shape[1] + 1, device=idx.device)
        logits = self.head(self.embedding(idx).cumsum(1) / counts[:, None])
        return logits, None if targets is None else F.cross_entropy(logits.mT, targets, ignore_index=-1)
"""


@pytest.fixture
def letters(tmp_path) -> Path:
    """Write a text of 1300 characters that a `saved_model` knows; its validation split has 130."""
    draw = np.random.default_rng(0)
    file = tmp_path / "letters.txt"
    file.write_text("".join(draw.choice(list("abc\n "), size=1300)))
    return file


@pytest.fixture
def mean_model(tmp_path, monkeypatch) -> str:
    """Write a user's model that extends its context, and return its --implementation."""
    (tmp_path / "mean_model.py").write_text(MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mean_model", raising=False)
    return "mean_model:Mean"


@pytest.fixture
def scored(tmp_path, capsys):
    """Return a function that calls evaluate.py and returns the content of --json."""

    def score(*flags):
        file = tmp_path / "score.json"
        evaluate.main([*map(str, flags), "--accelerator=cpu", f"--json={file}"])
        return json.loads(file.read_text())

    return score


def token_by_token(checkpoint: Path, tokens: list[int], *, block_size: int, stride: int) -> float:
    """Return the mean loss; each token is scored in a forward pass of its own, after its expected context."""
    module = open_checkpoint(checkpoint, trust=True).module().eval()
    module.model.block_size = max(block_size, getattr(module.model, "block_size", 0))
    losses = []
    for t in range(1, len(tokens)):
        start = max(0, math.ceil((t - block_size) / stride)) * stride
        idx = torch.tensor([tokens[start:t]])
        assert block_size - stride < idx.shape[1] <= block_size or start == 0
        with torch.no_grad():
            logits, _ = module.model(idx, torch.zeros_like(idx))
        losses.append(-logits[0, -1].double().log_softmax(-1)[tokens[t]].item())
    return sum(losses) / len(losses)


def held_out(file: Path) -> list[int]:
    return CHARS.encode(file.read_text()[-130:]).tolist()


@given(st.data(), st.integers(2, 200), st.integers(1, 20), st.integers(1, 4), st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_windows_score_every_token_once_with_the_most_context(data, n_tokens, block_size, batch_size, world_size):
    stride = data.draw(st.integers(1, block_size))
    context = {}
    for rank in range(world_size):
        batches = EvalBatches(
            lambda: np.arange(n_tokens),
            n_tokens=n_tokens,
            block_size=block_size,
            stride=stride,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
        )
        for idx, targets in batches:
            for row, column in (targets >= 0).nonzero().tolist():
                token = targets[row, column].item()
                assert token not in context and idx[row, : column + 1].tolist() == list(
                    range(token - column - 1, token)
                )
                context[token] = column + 1
    starts = range(0, n_tokens, stride)
    most = {t: max(t - s for s in starts if s < t <= s + block_size) for t in range(1, n_tokens)}
    assert context == most


@pytest.mark.parametrize("implementation", ["mingpt", "nanogpt"])
def test_loss_equals_token_by_token_loss_for_any_stride_and_block_size(implementation, saved_model, letters, scored):
    checkpoint = saved_model(implementation)
    given = ("--checkpoint", checkpoint, "--data", letters)
    for block_size, stride in ((BLOCK, 1), (BLOCK, 5), (7, 7), (7, 3)):
        found = scored(*given, f"--block_size={block_size}", f"--stride={stride}")
        expected = token_by_token(checkpoint, held_out(letters), block_size=block_size, stride=stride)
        assert found["loss"] == pytest.approx(expected, rel=1e-6)
        assert (found["tokens"], found["block_size"], found["stride"]) == (129, block_size, stride)
        assert found["bits_per_byte"] == pytest.approx(expected * 129 / 130 / math.log(2), rel=1e-6)
    plain = scored(*given)
    assert plain == scored(*given, f"--stride={BLOCK}", f"--block_size={BLOCK}") and plain["stride"] == BLOCK
    assert plain["loss"] != found["loss"]
    part = scored(*given, "--stride=5", "--eval_batches=2", "--batch_size=3")
    assert part["tokens"] == BLOCK + 5 * 5 and part["bits_per_byte"] is None
    expected = token_by_token(checkpoint, held_out(letters)[: part["tokens"] + 1], block_size=BLOCK, stride=5)
    assert part["loss"] == pytest.approx(expected, rel=1e-6)


def test_stride_equals_the_transformers_guide(tmp_path, scored):
    """Compare with the loop in transformers' guide "Perplexity of fixed-length models"."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "hf")
    tokens = np.random.default_rng(0).integers(0, 50, 101)
    kept = {"tokenizer": None, "vocab_size": 50, "source": "noise", "train_bytes": None, "val_bytes": None}
    write_token_files(tmp_path / "tokens", train=tokens, val=tokens, **kept)
    total, before = 0.0, 0
    for begin in range(0, len(tokens), 6):
        end = min(begin + 16 + 1, len(tokens))  # one more target than inputs
        labels = torch.tensor(tokens[begin:end])[None].clone()
        if begin:
            labels[:, : before - begin] = -100
        with torch.no_grad():
            logits = model(torch.tensor(tokens[begin : end - 1])[None]).logits
        total += torch.nn.functional.cross_entropy(logits[0].double(), labels[0, 1:], reduction="sum").item()
        before = end
        if end == len(tokens):
            break
    found = scored("--checkpoint", tmp_path / "hf", "--data", tmp_path / "tokens", "--stride=6", "--batch_size=4")
    assert found["loss"] == pytest.approx(total / 100, rel=1e-5) and found["tokens"] == 100


def test_longer_context_with_a_model_that_extends(saved_model, mean_model, letters, scored, evaluation_refused):
    checkpoint = saved_model(mean_model)
    given = ("--checkpoint", checkpoint, "--data", letters, "--trust_checkpoint")
    for stride in (30, 4):
        found = scored(*given, "--block_size=30", f"--stride={stride}")
        expected = token_by_token(checkpoint, held_out(letters), block_size=30, stride=stride)
        assert found["loss"] == pytest.approx(expected, rel=1e-6) and found["block_size"] == 30
    assert found["loss"] != scored(*given)["loss"]
    # A model that declares extends_context although a weight depends on the length.
    evaluation_refused(
        "--checkpoint", saved_model(mean_model, has_rows=True), *given[2:], "--block_size=30", mentions=["rows"]
    )


@pytest.mark.parametrize("implementation", ["mingpt", "nanogpt"])
def test_longer_context_refused_by_learned_positions(implementation, saved_model, letters, evaluation_refused):
    given = ("--checkpoint", saved_model(implementation), "--data", letters)
    evaluation_refused(
        *given, "--block_size=13", mentions=["--block_size 13", "positions", f"--implementation {implementation}"]
    )


@pytest.mark.parametrize(
    ("flags", "mentions"),
    [
        (["--stride=13"], ["--stride 13", "12"]),
        (["--stride=8", "--block_size=7"], ["--stride 8", "7"]),
        (["--stride=0"], ["--stride 0"]),
        (["--data=sort", "--stride=2"], ["--stride 2", "--data sort"]),
        (["--data=sort", "--block_size=2"], ["--block_size 2", "--data sort"]),
        (["--checkpoint", "nowhere"], ["nowhere"]),
        (["--convert_only", "--checkpoint", "b"], ["--convert_only", "any.ckpt, b"]),
    ],
)
def test_wrong_options_are_refused(flags, mentions, saved_model, letters, evaluation_refused):
    evaluation_refused("--checkpoint", saved_model("mingpt"), f"--data={letters}", *flags, mentions=mentions)


def test_several_checkpoints_from_flags_and_yaml(tmp_path):
    file = tmp_path / "evaluate.yaml"
    file.write_text("checkpoint: [a, b c]\n")
    for flags in (["--checkpoint", "a", "b c"], ["--checkpoint=a", "--which=best", "--checkpoint", "b c"]):
        assert parse_evaluate(flags).checkpoint == ["a", "b c"]
    assert parse_evaluate([f"--config={file}"]).checkpoint == ["a", "b c"]
    assert parse_evaluate([f"--config={file}", "--checkpoint", "c,d"]).checkpoint == "c,d"


@pytest.fixture
def two_kinds(saved_model, letters) -> list[Path]:
    """Save a checkpoint with a char tokenizer and one with a byte tokenizer."""
    folders = []
    for name, tokenizer in (("chars", CHARS), ("bytes", ByteTokenizer())):
        folders.append(letters.parent / f"{name}.ckpt")
        saved_model("mingpt", tokenizer).rename(folders[-1])
    return folders


def test_several_checkpoints_make_a_table_with_notes(two_kinds, saved_model, letters, scored, capsys):
    chars, bytes_ = two_kinds
    singles = [scored("--checkpoint", path, "--data", letters) for path in two_kinds]
    capsys.readouterr()
    assert scored("--checkpoint", chars, bytes_, "--data", letters) == singles
    header, *rows, note = capsys.readouterr().out.splitlines()
    assert header.split() == "checkpoint step loss perplexity bits_per_byte tokens block_size stride".split()
    for row, path, score in zip(rows, two_kinds, singles, strict=True):
        numbers = (f"{score[name]:.4f}" for name in ("loss", "perplexity", "bits_per_byte"))
        assert row.split() == [path.name, "7", *numbers, "129", "12", "12"]
    assert note.startswith("note: ") and "tokenizers differ" in note and "bits_per_byte" in note

    other = saved_model("nanogpt")
    scored("--checkpoint", chars, other, "--data", letters)
    assert "note" not in capsys.readouterr().out
    scored(
        "--checkpoint",
        chars,
        saved_model("nanogpt", block_size=6),
        "--data",
        letters,
        "--eval_batches=1",
        "--batch_size=2",
    )
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")] == [
        "note: the numbers of scored tokens differ",
        "note: the context lengths differ, and a longer context lowers the loss",
    ]


def test_table_shows_accuracy_of_tasks(saved_model, scored, capsys):
    checkpoint = saved_model("mingpt", Sort().tokenizer, block_size=Sort().block_size)
    found = scored("--checkpoint", checkpoint, checkpoint, "--data=sort", "--eval_batches=1")
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split()[4] == "accuracy" and first == second
    assert f"{found[0]['accuracy']:.4f}" == first.split()[4]


@pytest.mark.slow
def test_two_ranks_score_the_same_as_one(two_kinds, letters, scored, tmp_path):
    flags = ["--checkpoint", *two_kinds, "--data", letters, "--batch_size=3", "--stride=5"]
    file = tmp_path / "ranks.json"
    flags += ["--accelerator=cpu", "--strategy=ddp", "--devices=2"]
    done = run_python(REPO / "evaluate.py", *flags, f"--json={file}", ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4  # only one rank prints
    for found, expected in zip(json.loads(file.read_text()), scored(*flags[:-3]), strict=True):
        for name in ("loss", "perplexity", "bits_per_byte"):
            assert found.pop(name) == pytest.approx(expected.pop(name), rel=1e-6)
        assert found == expected


def test_plot_shows_every_checkpoint_and_note(two_kinds, letters, scored, tmp_path):
    from lightning_gpt.evaluation import chart

    pytest.importorskip("matplotlib")
    flags = ("--checkpoint", *two_kinds, "--data", letters)
    found = scored(*flags, f"--plot={tmp_path / 'scores.svg'}")
    drawn = (tmp_path / "scores.svg").read_text()
    assert drawn.startswith("<?xml") and "note: loss and perplexity are per token" in drawn
    for path, score in zip(two_kinds, found, strict=True):
        for text in (path.name, f"{score['loss']:.4f}", f"{score['bits_per_byte']:.4f}", "loss (nats per token)"):
            assert text in drawn
    scored(*flags, f"--plot={tmp_path / 'scores.png'}")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")

    tasks = {"quiz": {"acc,none": 0.5, "acc_stderr,none": 0.1}}
    harness = [HarnessScore(name, "", 0, 8, "0.4", tasks) for name in ("a/x", "a/y")]
    assert chart.panels(Report(harness)) == [chart.Panel("quiz: acc,none", [0.5, 0.5], [0.1, 0.1])]


@pytest.mark.parametrize(
    ("flags", "mentions"),
    [
        (["--plot=chart.gif"], ["--plot chart.gif", ".png or .svg"]),
        (["--plot=nowhere/chart.svg"], ["--plot nowhere/chart.svg", "make it first"]),
        (["--plot=chart.svg", "--convert_only"], ["--plot chart.svg", "--convert_only"]),
    ],
)
def test_plots_that_cannot_be_drawn_are_refused(flags, mentions, evaluation_refused):
    pytest.importorskip("matplotlib")
    evaluation_refused("--checkpoint", "any", *flags, mentions=mentions)
