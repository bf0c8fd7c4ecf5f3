"""Tasks: rows, splits, accuracy, training and resuming."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import sample
import train
from lightning_gpt.checkpoint import convert, ensure_canonical, open_checkpoint
from lightning_gpt.cli import parse_train
from lightning_gpt.data.streams import TrainBatches
from lightning_gpt.data.tasks.adder import Adder
from lightning_gpt.data.tasks.sort import Sort
from lightning_gpt.models.scoring import ScoreSums, count_right
from tests.launching import run_python

REPO = Path(__file__).parents[2]
NANO = "--implementation=nanogpt --dropout=0 --accelerator=cpu --logger=none".split()
TINY = [*NANO, *"--n_layer=1 --n_head=1 --n_embd=16 --batch_size=8".split()]
SPLITS = ("train", "val")


def all_rows(task, split):
    return task.rows(split, np.arange(task.n_rows(split)))


def mingpt_adder(ndigit):
    """Build the rows of both splits as minGPT does, one at a time."""
    order = torch.randperm(100**ndigit, generator=torch.Generator().manual_seed(1337)).tolist()
    held_out = min(int(len(order) * 0.2), 500)
    rows = []
    for number in order:
        a, b = number // 10**ndigit, number % 10**ndigit
        text = f"{a:0{ndigit}d}{b:0{ndigit}d}" + f"{a + b:0{ndigit + 1}d}"[::-1]
        rows.append([int(digit) for digit in text])
    return {"train": rows[held_out:], "val": rows[:held_out]}


@pytest.mark.parametrize("ndigit", [1, 2])
def test_adder_rows_equal_mingpt(ndigit):
    task, expected = Adder(ndigit=ndigit), mingpt_adder(ndigit)
    for split in SPLITS:
        assert all_rows(task, split).tolist() == expected[split]
    idx, targets = task.batch("val", np.array([3, 0]))
    rows = [expected["val"][3], expected["val"][0]]
    for row, inputs, wanted in zip(rows, idx.tolist(), targets.tolist(), strict=True):
        assert inputs == row[:-1] and len(inputs) == task.block_size == 3 * ndigit
        assert wanted == [-1] * (2 * ndigit - 1) + row[2 * ndigit :]


@pytest.mark.parametrize(("length", "num_symbols"), [(6, 3), (3, 4), (1, 2), (2, 2)])
def test_sort_rows_cover_all_sequences(length, num_symbols):
    task = Sort(length=length, num_symbols=num_symbols)
    rows = {split: all_rows(task, split).tolist() for split in SPLITS}
    for row in rows["train"] + rows["val"]:
        assert row[length:] == sorted(row[:length]) and set(row) <= set(range(num_symbols))
    sequences = [tuple(row[:length]) for row in rows["train"] + rows["val"]]
    assert len(sequences) == len(set(sequences)) == num_symbols**length
    assert rows["train"] and len(rows["val"]) == max(num_symbols**length // 4, 1)


def test_sort_rows_of_a_huge_task():
    task = Sort(length=10, num_symbols=40)
    assert task.n_rows("val") == 5000 and task.n_rows("train") == 40**10 - 5000
    held_out = {tuple(row) for row in all_rows(task, "val")[:, :10].tolist()}
    drawn = np.random.default_rng(0).integers(task.n_rows("train"), size=50_000)
    drawn[:2] = 0, task.n_rows("train") - 1
    trained = task.rows("train", drawn)
    assert len(held_out) == 5000 and not held_out & {tuple(row) for row in trained[:, :10].tolist()}
    assert np.bincount(trained[:, :10].ravel(), minlength=40).min() > 11_500  # of 12,500 expected


@pytest.mark.parametrize("task", [Adder(ndigit=1), Sort(length=4, num_symbols=3)], ids=repr)
def test_training_pass_visits_each_row_once(task):
    expected = sorted(map(tuple, all_rows(task, "train").tolist()))
    n = len(expected)
    passes = []
    for first in (0, n):
        rows = []
        for rank in range(2):
            stream = task.train_stream(block_size=task.block_size, seed=5)
            batches = iter(TrainBatches(stream, batch_size=1, rank=rank, world_size=2, first_sample=first))
            for _ in range(rank, n, 2):
                idx, targets = next(batches)
                rows.append((*idx[0].tolist(), targets[0, -1].item()))
        assert sorted(rows) == expected
        passes.append(rows)
    assert passes[0] != passes[1]


@pytest.mark.parametrize(("limit", "scored"), [(None, 20), (7, 7)])
def test_validation_scores_each_row_once_on_three_ranks(limit, scored):
    task = Adder(ndigit=1)
    seen, lengths = [], set()
    for rank in range(3):
        share = dict(batch_size=4, rank=rank, world_size=3, limit_sequences=limit)
        batches = list(task.val_pass(block_size=task.block_size, **share))
        lengths.add(len(batches))
        for idx, targets in batches:
            assert idx.shape == targets.shape == (4, task.block_size)
            present = (targets != -1).any(1)
            seen += [(*i.tolist(), t[-1].item()) for i, t in zip(idx[present], targets[present], strict=True)]
    assert len(lengths) == 1
    assert sorted(seen) == sorted(tuple(row) for row in all_rows(task, "val")[:scored].tolist())


def test_count_right_requires_whole_answers():
    targets = torch.tensor([[-1, 2, 1], [-1, 2, 1], [-1, 0, 0], [-1, -1, -1]])
    predicted = torch.tensor([[0, 2, 1], [1, 2, 0], [2, 0, 0], [0, 0, 0]])  # answers: right, half right, right, padding
    assert count_right(torch.nn.functional.one_hot(predicted).float(), targets).tolist() == [2, 3]


def train_sort(folder, *, steps):
    """Train a small model to sort 4 of 4 symbols; 64 of the 256 sequences are held out."""
    flags = "--data=sort --length=4 --num_symbols=4 --n_layer=1 --n_head=4 --n_embd=32 --batch_size=64".split()
    flags += ["--learning_rate=2e-2", f"--max_steps={steps}", "--eval_interval=100", "--lr_decay_steps=100"]
    train.main([*NANO, *flags, "--sample_tokens=0", f"--out_dir={folder}"])


def test_accuracy_ignores_vocabulary_padding():
    logits = torch.tensor([[[0.0, 1.0, 2.0]]])  # token 2 may be padding; then 1 is the likeliest
    for padding, accuracy in ((1, 1.0), (0, 0.0)):
        sums = ScoreSums(torch.device("cpu"), has_answers=True, padding=padding)
        sums.add(logits, torch.tensor(0.5), torch.tensor([[1]]))
        sums.add(logits, torch.tensor(float("nan")), torch.tensor([[-1]]))  # a batch of padding
        assert sums.result(lambda values: values) == ({"val_loss": 0.5, "val_accuracy": accuracy}, 1)


@pytest.fixture(scope="module")
def sort_run(tmp_path_factory):
    """Train a run that has learned to sort; read-only."""
    folder = tmp_path_factory.mktemp("sort") / "run"
    train_sort(folder, steps=100)
    return folder


def score(tmp_path, *flags):
    result = tmp_path / "score.json"
    evaluate.main([*map(str, flags), "--accelerator=cpu", f"--json={result}"])
    return json.loads(result.read_text())


def greedy_accuracy(folder, *, which):
    """Return the share of held-out sequences that the saved model sorts, token by token."""
    module = ensure_canonical(folder / "checkpoints" / f"{which}.ckpt").module().eval()
    prompts = torch.tensor(all_rows(Sort(length=4, num_symbols=4), "val"))[:, :4]
    answers = module.generate(prompts, 4, do_sample=False)[:, 4:]
    return (answers == prompts.sort(dim=1).values).all(1).double().mean().item()


def test_sort_learns_and_reports_accuracy(sort_run, tmp_path, capsys):
    found = score(tmp_path, "--checkpoint", sort_run)  # needs neither --length nor --num_symbols
    assert f"accuracy      {found['accuracy']:.4f}" in capsys.readouterr().out
    assert found["tokens"] == 64 * 4 and found["accuracy"] > 0.9
    assert found["accuracy"] == greedy_accuracy(sort_run, which="best")


def test_accuracy_equals_greedy_generation_early_in_training(tmp_path, capsys):
    values = []
    for steps in (15, 30):
        folder = tmp_path / str(steps)
        train_sort(folder, steps=steps)
        printed = capsys.readouterr().out.partition("val_accuracy ")[2].split()[0]
        values.append(score(tmp_path, "--checkpoint", folder, "--which=last")["accuracy"])
        assert values[-1] == greedy_accuracy(folder, which="last") and printed == f"{values[-1]:.4f}"
    assert any(0.05 < value < 0.95 for value in values), values


def test_accuracy_with_fewer_batches_and_after_conversion(sort_run, tmp_path):
    whole = score(tmp_path, "--checkpoint", sort_run, "--batch_size=3")
    assert score(tmp_path, "--checkpoint", sort_run, "--batch_size=3", "--eval_batches=2")["tokens"] == 6 * 4
    source = open_checkpoint(sort_run / "checkpoints" / "best.ckpt")
    for optimizer in (False, True):
        converted = score(tmp_path, "--checkpoint", convert(source, tmp_path / "converted", optimizer=optimizer))
        assert (converted["accuracy"], converted["tokens"]) == (whole["accuracy"], whole["tokens"])


def test_run_prints_accuracy_and_answers_a_question(capsys, tmp_path):
    train.main([*TINY, "--data=sort", "--length=3", "--max_steps=2", f"--out_dir={tmp_path / 'run'}"])
    out = capsys.readouterr().out
    assert "Sort (length 3, num_symbols 3): 21 training and 6 validation rows, vocabulary 3" in out
    assert "val_accuracy" in next(line for line in out.splitlines() if line.startswith("step 2:"))
    question = "".join(map(str, all_rows(Sort(length=3), "val")[0, :3]))
    written = out.partition("--- sample ---\n")[2].partition("\n")[0]
    assert written.startswith(question) and len(written) == 6
    flags = ["--prompt=210", "--max_new_tokens=3", "--accelerator=cpu"]
    sample.main([f"--checkpoint={tmp_path / 'run'}", *flags])
    written = capsys.readouterr().out.strip()
    assert written.startswith("210") and len(written) == 6 and set(written) <= set("012")


def test_resume_is_bit_identical(tmp_path):
    flags = [*TINY, "--data=sort", "--length=3", "--num_symbols=2", "--sample_tokens=0", "--lr_decay_steps=6"]
    train.main([*flags, "--max_steps=6", f"--out_dir={tmp_path / 'whole'}"])
    train.main([*flags, "--max_steps=3", f"--out_dir={tmp_path / 'parts'}"])
    train.main(["--resume", str(tmp_path / "parts"), "--max_steps=6"])
    ours, theirs = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "parts")
    )
    assert ours["TokenData"] == theirs["TokenData"]
    assert ours["TokenData"]["task"] == {"length": 3, "num_symbols": 2} and ours["global_step"] == 6
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], rtol=0, atol=0)


def test_task_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main([*TINY, "--data=adder", "--ndigit=1", "--max_steps=1", "--out_dir=adder"])
    train.main(["--resume=adder", "--max_steps=2"])
    evaluate.main(["--checkpoint=adder", "--accelerator=cpu"])
    assert "accuracy" in capsys.readouterr().out
    assert parse_train(["--data=./adder"]).task_fields == {}


def test_task_determines_flags_and_block_size(tmp_path):
    config = parse_train(["--data=adder", "--ndigit=3"])
    assert config.task_fields == {"ndigit": 3} and config.model.block_size == 9
    saved = tmp_path / "config.yaml"
    saved.write_text("\n".join(f"{k}: {json.dumps(v)}" for k, v in config.flat().items()))
    assert parse_train([f"--config={saved}"]) == config
    assert parse_train([f"--config={saved}", "--ndigit=3", "--block_size=9"]) == config
    assert parse_train(["--data=sort", "--length=4"]).task_fields == {"length": 4, "num_symbols": 3}


REFUSED = {
    "digits": ("--data=adder --ndigit=4", "--ndigit 4"),
    "no digits": ("--data=adder --ndigit=0", "--ndigit 0"),
    "another task's flag": ("--data=sort --ndigit=2", "--ndigit"),
    "a task's flag for a text": ("--data=stdlib --ndigit=2", "--ndigit"),
    "length": ("--data=sort --length=0", "--length 0"),
    "a long length": ("--data=sort --length=1000000000", "--length 1000000000"),
    "symbols": ("--data=sort --num_symbols=1", "--num_symbols 1"),
    "too many": ("--data=sort --length=60 --num_symbols=60", "2**62"),
    "block size": ("--data=adder --block_size=64", "--block_size 64"),
    "tokenizer": ("--data=adder --tokenizer=byte", "--tokenizer byte"),
    "prompt": ("--data=adder --prompt=x", "--prompt"),
    "unknown prefix": ("--data=charrnn:text.txt", "--data charrnn:text.txt"),
    "unknown module": ("--data=nowhere:Task", "--data nowhere:Task"),
    "no task": ("--data=json:JSONEncoder", "--data json:JSONEncoder"),
    "chargpt of nothing": ("--data=chargpt:nowhere.txt", "nowhere.txt"),
    "chargpt by bytes": ("--data=chargpt:nowhere.txt --tokenizer=byte", "--tokenizer byte"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_task_options_are_refused(case, tmp_path, monkeypatch, refused):
    flags, mention = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    refused(train.main, *NANO, *flags.split(), mentions=mention)
    assert not list(tmp_path.iterdir())


def test_evaluating_a_task_on_other_data_is_refused(sort_run, tmp_path, text_file, capsys):
    for data, mention in (("adder", "--data adder"), (text_file, "vocabulary"), (f"chargpt:{text_file}", "vocab")):
        with pytest.raises(SystemExit):
            score(tmp_path, "--checkpoint", sort_run, f"--data={data}")
        assert mention in capsys.readouterr().err


def test_chargpt_equals_a_text_with_char_tokenizer(text_file, tiny_flags, tmp_path):
    for name, data in (("a", [f"--data=chargpt:{text_file}"]), ("b", [f"--data={text_file}", "--tokenizer=char"])):
        train.main([*tiny_flags, *data, f"--out_dir={tmp_path / name}"])
    ours, theirs = (torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("a", "b"))
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], rtol=0, atol=0)
    assert score(tmp_path, "--checkpoint", tmp_path / "a")["bits_per_byte"] > 0


def test_task_of_the_docs_trains(tmp_path, monkeypatch, capsys):
    code, _, rest = (REPO / "docs" / "extending.md").read_text().partition("# my_task.py\n")[2].partition("```\n")
    (tmp_path / "my_task.py").write_text(code)
    command = rest.partition("```bash\n")[2].partition("\n")[0].split()
    assert command[:2] == ["python", "train.py"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    train.main([*command[2:], *TINY, "--max_steps=2", "--out_dir=out"])
    assert "Reverse (letters 7): 16,334 training and 50 validation rows" in capsys.readouterr().out
    assert score(tmp_path, "--checkpoint=out")["tokens"] == 50 * 7
    monkeypatch.delitem(sys.modules, "my_task")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_3"])
def test_two_ranks_agree_with_a_single_process(strategy, tmp_path, capsys):
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    flags = "--data=sort --length=4 --num_symbols=4 --n_layer=1 --n_head=4 --n_embd=32 --max_steps=30".split()
    flags += ["--learning_rate=2e-2", "--eval_interval=15", "--sample_tokens=0", *NANO]
    one, two = tmp_path / "one", tmp_path / "two"
    ranks = [f"--strategy={strategy}", "--devices=2", "--accelerator=cpu"]
    train.main([*flags, "--batch_size=64", f"--out_dir={one}"])
    printed = [capsys.readouterr().out, two_ranks("train.py", *flags, "--batch_size=32", *ranks, f"--out_dir={two}")]
    lines = [[line for line in out.splitlines() if line.startswith("step ")] for out in printed]
    numbers = [[float(word.rstrip(",")) for word in " ".join(found).split() if "." in word] for found in lines]
    assert len(numbers[0]) == 6 and numbers[0][-1] > 0.05
    assert numbers[0] == pytest.approx(numbers[1], abs=0.02)
    alone = score(tmp_path, "--checkpoint", two, "--batch_size=7")
    two_ranks("evaluate.py", f"--checkpoint={two}", "--batch_size=3", *ranks, f"--json={tmp_path / 'ranks.json'}")
    together = json.loads((tmp_path / "ranks.json").read_text())
    assert together["accuracy"] == alone["accuracy"] and together["tokens"] == alone["tokens"] == 64 * 4
    assert together["loss"] == pytest.approx(alone["loss"], abs=1e-5)


def two_ranks(entry_point, *flags):
    """Run an entry point on two ranks and return its stdout."""
    done = run_python(REPO / entry_point, *flags, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
