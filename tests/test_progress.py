"""Progress on stderr: a bar in a terminal, lines elsewhere, and what train.py shows of a run."""

import io
import re
import shutil
import tempfile
from pathlib import Path

import pytest

import evaluate
import train
from lightning_gpt import progress
from lightning_gpt.progress import Progress


class Terminal(io.StringIO):
    """A terminal whose width COLUMNS says."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Return a clock of which tests set the time."""

    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_line_every_half_minute_where_stderr_is_no_terminal(clock, capsys):
    with Progress("score", total=1000, unit="batches") as shown:
        for done in range(1, 101):
            clock.now += 1
            shown.update(done, "loss 1.5")
    assert capsys.readouterr().err.splitlines() == [
        "score: 30/1,000 batches, loss 1.5, 16:10 left",
        "score: 60/1,000 batches, loss 1.5, 15:40 left",
        "score: 90/1,000 batches, loss 1.5, 15:10 left",
    ]


def test_time_left_does_not_count_the_first_update(clock, monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    shown = Progress("train", total=11)
    for now in (100, 101):  # the first step compiles
        clock.now = now
        shown.update(now - 99)
    assert shown._text("").endswith("00:09 left")


@pytest.fixture
def near_folder(monkeypatch):
    """Work in a folder whose path is short, because the header names the data by its whole path.

    The temporary folder that the environment names may be deep.
    """
    root = Path("/tmp")
    with tempfile.TemporaryDirectory(dir=root if root.is_dir() else None) as folder:
        monkeypatch.chdir(folder)
        yield
        monkeypatch.undo()


@pytest.mark.usefixtures("near_folder")
@pytest.mark.parametrize("columns", [80, 120])
def test_terminal_shows_no_line_that_is_longer(columns, tiny_flags, text_file, monkeypatch):
    """Train in a terminal: a header without broken words, a bar that fits, and lines above it."""
    monkeypatch.setenv("COLUMNS", str(columns))
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    shutil.copy(text_file, "text.txt")
    flags = [*tiny_flags, "--data=text.txt", "--sample_tokens=0", "--log_every_n_steps=1", "--grad_accum=2"]
    train.main([*flags, "--out_dir=run", "--max_steps=2", "--eval_interval=1"])
    train.main(["--resume=run", "--max_steps=4"])
    lines = screen.getvalue().split("\n")
    header = [line for line in lines if re.match(r"(model|data|steps|strategy| +)  ", line)]
    assert header and all(len(line) <= columns for line in header)
    words = [word for line in header for word in line.split()]
    assert {"micro-batches", "validation", "vocabulary"} <= set(words)
    frames = [frame for line in lines for frame in line.split("\r") if frame.startswith("train ")]
    assert frames and all(len(frame) <= columns for frame in frames), frames
    assert re.search(r"train 100%\|.*\| 4/4 steps, loss \d\.\d{4}, [\d,]+ tokens/s$", frames[-1].strip()), frames
    assert any("| 2/4 steps" in frame for frame in frames)  # the bar of a resumed run starts at its step
    assert all(line.split("\r")[-1].startswith("step ") for line in lines if "val_loss" in line and "step " in line)


def test_evaluation_and_conversion_show_progress_on_stderr(tiny_run, tmp_path, monkeypatch, capsys):
    for name, value in {"progress.LINE_SECONDS": 0, "evaluation.evaluate.PATIENCE": 0}.items():
        monkeypatch.setattr(f"lightning_gpt.{name}", value)
    monkeypatch.setattr("lightning_gpt.checkpoint.write.canonical.PATIENCE", 0)
    checkpoint = shutil.copy(tiny_run / "checkpoints" / "last.ckpt", tmp_path)
    evaluate.main(["--checkpoint", str(checkpoint), str(checkpoint), "--accelerator=cpu", "--batch_size=20"])
    out, err = capsys.readouterr()
    assert "score" not in out and re.findall(r"score \d of 2: \d/\d batches", err) == [
        f"score {checkpoint} of 2: {batch}/2 batches" for checkpoint in (1, 2) for batch in (1, 2)
    ]
    evaluate.main(["--checkpoint", str(checkpoint), "--convert_only"])
    written = re.findall(r"write: ([\d,]+)/([\d,]+) bytes", capsys.readouterr().err)
    assert written and written[-1][0] == written[-1][1]
