"""Evaluate, sample, convert and resume checkpoints under any strategy and on any number of ranks."""

import csv
import json
import os
import shutil
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import safetensors.torch
import torch

import evaluate
import lightning_gpt.checkpoint
import sample
import train
from lightning_gpt.checkpoint import ensure_canonical, open_checkpoint
from lightning_gpt.checksums import MANIFEST, files_in, folder_digests, write_manifest
from tests.launching import run_calls

REPO = Path(__file__).parents[2]
HAS_DEEPSPEED = find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed")

# Odd sizes, which two ranks do not divide.
SIZES = "--n_layer=2 --n_head=3 --n_embd=9 --block_size=15 --learning_rate=1e-2".split()
RUN = "--eval_interval=2 --accelerator=cpu --sample_tokens=0 --logger=csv --log_every_n_steps=1".split()
NO_DROPOUT = {"nanogpt": ["--dropout=0"], "mingpt": ["--embd_pdrop=0", "--resid_pdrop=0", "--attn_pdrop=0"]}
LEGS = [("ddp", 2), ("fsdp", 2), ("deepspeed_stage_3", 2), ("deepspeed_stage_1", 2), ("auto", 1)]
LEGS = [leg for leg in LEGS if HAS_DEEPSPEED or "deepspeed" not in leg[0]]
STEPS = 2 + 2 * len(LEGS)
STRATEGIES = ["ddp", "fsdp", *(f"deepspeed_stage_{stage}" for stage in (1, 2, 3) if HAS_DEEPSPEED)]
OFFLOADED = ["deepspeed_stage_2_offload", "deepspeed_stage_3_offload"]
PRINTED = "checkpoint hash step loss perplexity bits_per_byte tokens data block_size stride".split()


def processes(*calls, ranks=2, cwd=REPO):
    """Make calls of entry points in one group of processes and return their stdout."""
    done = run_calls(*calls, ranks=ranks, cwd=cwd)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def log(run: Path) -> dict[int, tuple[float, float, float]]:
    """Return loss, gradient norm and learning rate by optimizer step, from all log files of a run."""
    found = {}
    for file in sorted(run.glob("logs/version_*/metrics.csv")):
        for row in csv.DictReader(file.open()):
            if row["train_loss"]:
                columns = ("train_loss", "grad_norm", "learning_rate")
                found[int(float(row["step"]))] = tuple(float(row[column]) for column in columns)
    return found


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


def snapshot(run: Path, to: Path) -> None:
    """Copy the current settings and last checkpoint of a run folder."""
    (to / "checkpoints").mkdir(parents=True)
    shutil.copy(run / "config.yaml", to)
    copy = shutil.copytree if last(run).is_dir() else shutil.copy
    copy(last(run), last(to))


def assert_same_training(run: Path, whole: Path) -> None:
    """Compare the logs of each step, and the final weights and moments, with those of an uninterrupted run."""
    ours, expected = log(run), log(whole)
    assert set(ours) <= set(expected) and max(ours) == max(expected) == STEPS
    for step, (loss, norm, rate) in ours.items():
        assert (loss, norm) == pytest.approx(expected[step][:2], rel=1e-5), step
        assert rate == expected[step][2], step
    a, b = open_checkpoint(last(run)), open_checkpoint(last(whole))
    assert a.names() == b.names() and a.step == b.step == STEPS
    assert a.header["TokenData"] == b.header["TokenData"]
    for name in a.names():
        torch.testing.assert_close(a.weight(name), b.weight(name), rtol=1e-4, atol=1e-5)
        ours, expected = a.optimizer_state(name), b.optimizer_state(name)
        assert ours.keys() == expected.keys() == {"step", "exp_avg", "exp_avg_sq"} and ours["step"] == STEPS
        for key in ours:
            scale = expected[key].abs().max().item()
            torch.testing.assert_close(ours[key], expected[key], rtol=1e-4, atol=1e-5 * scale)


def run_chain(folder: Path, text: Path, implementation: str) -> Path:
    """Train one uninterrupted run, and one that changes its strategy every two steps; snapshot each leg."""
    flags = [*SIZES, *RUN, *NO_DROPOUT[implementation], f"--implementation={implementation}", f"--data={text}"]
    flags += ["--batch_size=4", f"--lr_decay_steps={STEPS}"]
    train.main([*flags, f"--max_steps={STEPS}", f"--out_dir={folder / 'whole'}"])
    train.main([*flags, "--max_steps=2", f"--out_dir={folder / 'parts'}"])
    for number, (strategy, ranks) in enumerate(LEGS):
        resumed = [f"--resume={folder / 'parts'}", f"--max_steps={4 + 2 * number}"]
        resumed += [f"--strategy={strategy}", f"--devices={ranks}", f"--batch_size={4 // ranks}"]
        if ranks == 1:
            train.main(resumed)
        else:
            processes(["train", *resumed])
        snapshot(folder / "parts", folder / strategy)
    return folder


@pytest.fixture(scope="module")
def chain(tmp_path_factory, text_file) -> Path:
    """Return the folder of `run_chain` for nanogpt: "whole", "parts" and a snapshot per leg; read-only."""
    return run_chain(tmp_path_factory.mktemp("chain"), text_file, "nanogpt")


@pytest.fixture
def fsdp(chain, tmp_path) -> Path:
    """Return a run folder with an FSDP checkpoint of two ranks, which a test may change."""
    snapshot(chain / "fsdp", tmp_path / "fsdp-run")
    return tmp_path / "fsdp-run"


@pytest.fixture
def zero3(chain, tmp_path) -> Path:
    """Return a run folder with a ZeRO-3 checkpoint of two ranks, which a test may change."""
    if not HAS_DEEPSPEED:
        pytest.skip("DeepSpeed is not installed")
    snapshot(chain / "deepspeed_stage_3", tmp_path / "zero3-run")
    return tmp_path / "zero3-run"


@pytest.fixture
def scored(tmp_path, capsys):
    """Return a function that calls evaluate.py, checks that it prints what --json holds, and returns that."""

    def score(checkpoint, *flags):
        file = tmp_path / "scored.json"
        capsys.readouterr()
        evaluate.main([f"--checkpoint={checkpoint}", "--accelerator=cpu", *flags, f"--json={file}"])
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        score = json.loads(file.read_text())
        assert [name for name, _ in lines] == list(score) == PRINTED
        for name, value in lines:
            stored = f"{score[name]:.4f}" if isinstance(score[name], float) else str(score[name])
            assert value == stored or (name, value, stored) == ("perplexity", "inf", "None")
        return score

    return score


@pytest.fixture
def refused(refused):
    """Return a function that calls an entry point on the CPU and checks that it refuses."""
    return lambda main, *flags, mentions: refused(main, *flags, "--accelerator=cpu", mentions=mentions)


# Resuming


def test_resume_under_changing_strategies_equals_an_uninterrupted_run(chain):
    assert sorted(log(chain / "parts")) == list(range(1, STEPS + 1))
    assert_same_training(chain / "parts", chain / "whole")


@needs_deepspeed
def test_resume_in_bf16_uses_float32_weights(tmp_path, text_file):
    """Check that ZeRO-2 in bf16 resumes from the float32 master weights, not from the rounded ones."""
    flags = ["train", *SIZES, *RUN, "--implementation=nanogpt", "--dropout=0.1", f"--data={text_file}"]
    flags += ["--strategy=deepspeed_stage_2", "--precision=bf16", "--batch_size=2", "--lr_decay_steps=6"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    calls = [[*flags, f"--out_dir={whole}", "--max_steps=6"], [*flags, f"--out_dir={parts}", "--max_steps=3"]]
    calls.append(["train", f"--resume={parts}", "--max_steps=6"])
    processes(*calls)
    assert log(parts) == log(whole) and sorted(log(parts)) == list(range(1, 7))
    a, b = open_checkpoint(last(parts)), open_checkpoint(last(whole))
    for name in a.names():
        assert torch.equal(a.weight(name), b.weight(name))
        assert all(torch.equal(a.moment(f"{name}/{key}"), b.moment(f"{name}/{key}")) for key in b.moments[name])
    head = a.weight("lm_head.weight")
    assert head.dtype == torch.float32 and not torch.equal(head, head.bfloat16().float())


def test_resume_from_a_converted_folder(chain, fsdp, refused, capsys):
    evaluate.main([f"--checkpoint={fsdp}", "--convert_only"])
    folder = fsdp / "checkpoints" / "last"
    assert capsys.readouterr().out.split() == ["converted", str(folder)]
    # Refused before anything is written.
    at = open_checkpoint(folder).step
    refused(train.main, f"--resume={folder}", f"--max_steps={at}", mentions=[folder, f"step {at} of {at}"])
    refused(train.main, f"--resume={folder}", "--implementation=mingpt", mentions=[folder, "nanogpt", "mingpt"])
    assert not (fsdp / "logs").exists()
    last(fsdp).rename(fsdp / "moved")
    train.main([f"--resume={folder}", "--strategy=auto", "--devices=1", "--batch_size=4", f"--max_steps={STEPS}"])
    assert sorted(log(fsdp)) == list(range(at + 1, STEPS + 1))
    assert_same_training(fsdp, chain / "whole")


def test_resume_from_weights_only_is_refused(fsdp, scored, refused):
    scored(fsdp)
    folder = fsdp / "checkpoints" / "last"
    refused(train.main, f"--resume={folder}", f"--max_steps={STEPS}", mentions=[folder, "only weights"])


def test_resume_of_a_moved_run_keeps_its_best(chain, tmp_path):
    """Copy a run folder, as from another machine, and resume it with a learning rate that makes it worse."""
    run = Path(shutil.copytree(chain / "whole", tmp_path / "moved"))
    best = (run / "checkpoints" / "best.ckpt").read_bytes()
    train.main([f"--resume={run}", f"--max_steps={STEPS + 2}", "--learning_rate=9", "--min_learning_rate=9"])
    assert open_checkpoint(last(run)).step == STEPS + 2
    assert (run / "checkpoints" / "best.ckpt").read_bytes() == best


# Evaluating


def rounded(score: dict) -> dict:
    """Return a score whose numbers compare approximately."""
    numbers = ("loss", "perplexity", "bits_per_byte")
    return {k: pytest.approx(v, rel=1e-6) if k in numbers and v is not None else v for k, v in score.items()}


def scoring_calls(strategies: list[str], checkpoint: Path, folder: Path) -> list[list[str]]:
    """Return the calls that evaluate a checkpoint on two ranks under each strategy."""
    flags = ["evaluate", f"--checkpoint={checkpoint}", "--accelerator=cpu", "--devices=2"]
    return [[*flags, f"--strategy={strategy}", f"--json={folder / strategy}.json"] for strategy in strategies]


@pytest.fixture(scope="module")
def two_ranks(chain, tmp_path_factory) -> Path:
    """Make all calls in one group of two processes; return the folder with JSON files, stdout and a conversion."""
    folder = tmp_path_factory.mktemp("two-ranks")
    snapshot(chain / "fsdp", folder / "shards")
    flags = ["evaluate", f"--checkpoint={folder / 'shards'}", "--accelerator=cpu"]
    calls = [flags, [*flags, "--convert_only"], *scoring_calls(STRATEGIES, last(chain / "whole"), folder)]
    calls.append([*calls[2], "--eval_batches=3", "--batch_size=2", f"--json={folder}/part.json"])
    (folder / "stdout").write_text(processes(*calls))
    return folder


def test_score_is_equal_under_every_strategy(chain, two_ranks, scored, text_file):
    expected = scored(chain / "whole", "--which=last")
    assert expected["step"] == STEPS and expected["hash"] == open_checkpoint(last(chain / "whole")).hash()
    n_bytes = text_file.stat().st_size
    assert 0.09 * n_bytes < expected["tokens"] < 0.11 * n_bytes
    assert scored(chain / "whole", "--which=last", "--batch_size=1") == rounded(expected)
    for strategy in STRATEGIES:
        assert json.loads((two_ranks / f"{strategy}.json").read_text()) == rounded(expected), strategy
    part = scored(chain / "whole", "--which=last", "--eval_batches=3", "--batch_size=2")
    assert json.loads((two_ranks / "part.json").read_text()) == rounded(part)
    assert part["tokens"] == 3 * 2 * 15 and part["bits_per_byte"] is None


def test_one_rank_prints_and_converts(two_ranks):
    printed = [line.split()[0] for line in (two_ranks / "stdout").read_text().splitlines()]
    assert printed == [*PRINTED, "converted", *PRINTED * (len(STRATEGIES) + 1)]
    folder = two_ranks / "shards" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["last", "last.ckpt"]
    assert open_checkpoint(folder / "last").has_optimizer


@needs_deepspeed
@pytest.mark.slow
def test_score_is_equal_with_offloaded_weights(chain, scored, tmp_path):
    processes(*scoring_calls(OFFLOADED, last(chain / "whole"), tmp_path))
    expected = scored(chain / "whole", "--which=last")
    for strategy in OFFLOADED:
        assert json.loads((tmp_path / f"{strategy}.json").read_text()) == rounded(expected), strategy


@needs_deepspeed
def test_evaluate_prints_only_scores_of_the_newest_run(chain, scored, tmp_path):
    """Evaluate in one process in a working directory with runs/, under DeepSpeed, which prints in bf16 set-up."""
    expected = scored(chain / "whole", "--which=last")
    older = tmp_path / "runs" / "older"
    snapshot(chain / "ddp", older)
    os.utime(last(older), (1, 1))
    snapshot(chain / "whole", tmp_path / "runs" / "newer")
    flags = ["evaluate", "--accelerator=cpu", "--batch_size=1", "--strategy"]
    calls = [[*flags, "deepspeed_stage_1", "--json=stage_1"], [*flags, "deepspeed", "--precision=bf16", "--json=bf16"]]
    out = processes(*calls, ranks=1, cwd=tmp_path)
    assert [line.split()[0] for line in out.splitlines()] == PRINTED * 2
    for name, rounding in (("stage_1", 1e-6), ("bf16", 1e-2)):
        found = json.loads((tmp_path / name).read_text())
        assert found["checkpoint"] == str(last(tmp_path / "runs" / "newer"))
        assert found["loss"] == pytest.approx(expected["loss"], rel=rounding)
        assert (found["tokens"], found["hash"]) == (expected["tokens"], expected["hash"])


def test_evaluate_opens_best_or_last_of_the_newest_run(chain, tmp_path, monkeypatch, capsys):
    shutil.copytree(chain / "whole", tmp_path / "runs" / "one")
    os.utime(last(tmp_path / "runs" / "one"), (time.time() + 9,) * 2)
    snapshot(chain / "ddp", tmp_path / "runs" / "two")
    os.utime(last(tmp_path / "runs" / "two"), (1, 1))
    monkeypatch.chdir(tmp_path)
    for which in ("best", "last"):
        evaluate.main(["--accelerator=cpu", f"--which={which}"])
        assert capsys.readouterr().out.split()[1] == str(tmp_path / "runs" / "one" / "checkpoints" / f"{which}.ckpt")


@needs_deepspeed
@pytest.mark.parametrize(("kind", "later"), [("fsdp", "deepspeed_stage_1"), ("zero3", "fsdp")])
def test_shards_are_converted_once_and_again_after_a_change(kind, later, request, scored, chain):
    """Check that the conversion is cached beside the checkpoint, and repeated when the checkpoint changes."""
    run = request.getfixturevalue(kind)
    folder = run / "checkpoints" / "last"
    first = scored(run)
    assert first["checkpoint"] == str(folder) and first["step"] == open_checkpoint(last(run)).step < STEPS
    assert first["hash"] == open_checkpoint(last(run)).hash()
    made = (folder / "config.json").stat().st_mtime_ns
    assert first == scored(last(run)) == scored(folder) == scored(run, "--which=last")
    assert (folder / "config.json").stat().st_mtime_ns == made
    shutil.rmtree(last(run))
    shutil.copytree(last(chain / later), last(run))
    again = scored(run)
    assert again["checkpoint"] == str(folder) and again["hash"] == open_checkpoint(last(chain / later)).hash()
    assert again["hash"] != first["hash"] and again["loss"] != first["loss"] and again["step"] != first["step"]


def test_concurrent_readers_convert_once(fsdp, monkeypatch):
    """Open a checkpoint in three threads at once, as torchrun's processes do: one converts, the others wait."""
    made = []

    def slowly(checkpoint, folder):
        made.append(folder)
        time.sleep(0.5)
        return convert(checkpoint, folder)

    convert = lightning_gpt.checkpoint.convert
    monkeypatch.setattr(lightning_gpt.checkpoint, "convert", slowly)
    found = []
    ranks = [threading.Thread(target=lambda: found.append(ensure_canonical(last(fsdp)).hash())) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(made) == 1 and len(found) == 3 and len(set(found)) == 1


def test_result_that_cannot_be_written_is_refused_before_scoring(chain, tmp_path, refused, monkeypatch):
    import lightning_gpt.evaluation.evaluate

    monkeypatch.setattr(
        lightning_gpt.evaluation.evaluate, "find_checkpoint", lambda *_, **__: pytest.fail("it went on")
    )
    (tmp_path / "taken").mkdir()
    refused(evaluate.main, f"--checkpoint={chain}", f"--json={tmp_path / 'taken'}", mentions=["--json", "taken"])
    if Path("/proc/self").exists():  # even root cannot create a file here
        refused(evaluate.main, f"--checkpoint={chain}", "--json=/proc/x.json", mentions=["--json /proc/x.json"])


def test_perplexity_overflow_is_null_in_json(chain, tmp_path, scored):
    """Evaluate a diverged model, whose perplexity is infinite, which JSON cannot store."""
    content = torch.load(last(chain / "whole"), weights_only=True)
    for name in ("lm_head", "transformer.wte"):
        content["state_dict"][f"model.{name}.weight"] *= 1e5
    torch.save(content, tmp_path / "astray.ckpt")
    score = scored(tmp_path / "astray.ckpt")
    assert score["loss"] > 1000 and score["perplexity"] is None


# Other programs, and files of other people


def test_converted_weights_load_in_plain_torch(fsdp, capsys):
    from nanogpt.model import GPT, GPTConfig

    evaluate.main([f"--checkpoint={fsdp}", "--convert_only=pt"])
    folder, checkpoint = fsdp / "checkpoints" / "last", open_checkpoint(last(fsdp))
    model = GPT(GPTConfig(**checkpoint.model_config)).eval()
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True), strict=True)
    idx = torch.arange(30).view(2, 15) % checkpoint.model_config["vocab_size"]
    with torch.no_grad():
        assert torch.equal(model(idx)[0], checkpoint.module().model.eval()(idx)[0])
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    assert sorted(weights) == checkpoint.names()
    assert all(torch.equal(weight, checkpoint.weight(name)) for name, weight in weights.items())


def test_sample_from_a_sharded_run(fsdp, capsys):
    flags = ["--accelerator=cpu", "--prompt=the cat", "--max_new_tokens=20"]
    sample.main([f"--checkpoint={fsdp}", *flags])
    text = capsys.readouterr().out
    assert text.startswith("the cat") and len(text) == len("the cat") + 20 + 1
    sample.main([f"--checkpoint={fsdp / 'checkpoints' / 'last'}", *flags])
    assert capsys.readouterr().out == text


class Foreign:
    """Create a file when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_pickled_objects_need_trust(zero3, scored, refused, tmp_path, monkeypatch):
    """Check that classes other than DeepSpeed's are loaded only from the user's own run folder, or with the flag."""
    scored(zero3)
    mark, file = tmp_path / "mark", last(zero3) / "checkpoint" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    torch.save(torch.load(file, weights_only=False) | {"extra": Foreign(mark)}, file)
    (last(zero3) / MANIFEST).unlink()
    write_manifest(last(zero3), folder_digests(last(zero3), files_in(last(zero3))))
    mentions = [file.name, "--trust_checkpoint"]
    refused(evaluate.main, f"--checkpoint={zero3}", mentions=mentions)
    refused(evaluate.main, f"--checkpoint={zero3}", "--convert_only", mentions=mentions)
    refused(sample.main, f"--checkpoint={zero3}", mentions=mentions)
    refused(
        train.main, f"--resume={zero3}", f"--max_steps={STEPS}", "--strategy=auto", "--devices=1", mentions=mentions
    )
    assert not mark.exists()
    scored(zero3, "--trust_checkpoint")
    assert mark.exists()
    mark.unlink()
    shutil.rmtree(zero3 / "checkpoints" / "last")
    monkeypatch.setenv("LIGHTNING_GPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "runs.txt").write_text(f"{zero3}\n")
    scored(zero3)
    assert mark.exists()
