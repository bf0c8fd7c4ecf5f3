"""bench.py parity: every strategy trains the same model as a single process."""

import pytest

import bench
from lightning_gpt.bench import parity
from lightning_gpt.bench.parity import Case, cases, deviations
from lightning_gpt.implementations.registry import IMPLEMENTATIONS
from lightning_gpt.strategies import STRATEGIES
from tests.launching import run_calls

DEVICES = 2
QUICK = ("fsdp", "deepspeed_stage_2")  # one of each kind; CI runs the others


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Return a folder that all strategies share, so that single-process runs are made once."""
    return tmp_path_factory.mktemp("parity")


def launch(commands, ranks):
    done = run_calls(*(["train", *flags] for flags in commands), ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "strategy",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES if name != "auto"],
)
def test_strategy_matches_single_process(strategy, folder, text_file, monkeypatch):
    monkeypatch.setattr(parity, "_launch", launch)  # test_parity_prints_the_table uses torchrun
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    settings = dict(devices=DEVICES, accelerator="cpu", steps=10, data=str(text_file))
    # One strategy of each kind trains all models; the others differ in what they shard, for which two are enough.
    names = tuple(IMPLEMENTATIONS) if strategy in QUICK else ("nanogpt", "moderngpt")
    which = cases(strategy, implementations=names)
    assert any(case.optimizer == "muon" for case in which) != strategy.startswith("deepspeed")
    found = deviations(strategy, folder=folder, which=which, **settings)
    assert [d.case for d in found] == which and all(len(d.losses) == 10 for d in found)
    for deviation in found:
        print(deviation)  # shown if the test fails
        assert deviation.loss < 1e-5
        assert deviation.norm < 1e-4
        assert deviation.weights < 3e-5
    by_case = {d.case: d.losses for d in found}
    for case, losses in by_case.items():
        # Each setting changes the losses by more than the tolerance, so that a strategy that ignores it fails.
        other = by_case[Case(case.implementation, case.accumulate, 0.0)]
        assert other is losses or abs(losses[-1] / other[-1] - 1) > 5e-5


def test_parity_prints_the_table(text_file, tmp_path, capsys, monkeypatch):
    two = [Case("nanogpt", accumulate=1, clip=0.5), Case("nanogpt", accumulate=2, clip=0.5, optimizer="muon")]
    monkeypatch.setattr(parity, "cases", lambda strategy: two)
    monkeypatch.chdir(text_file.parent)
    out = tmp_path / "parity.json"
    bench.main(["parity", "--strategies=ddp", "--steps=2", f"--data={text_file.name}", f"--json={out}"])
    header, *rows, _, _ = capsys.readouterr().out.splitlines()
    assert header.split() == ["strategy", "loss,", "relative", "norm,", "relative", "weight,", "absolute", "runs"]
    found = {row[:28].strip(): row[28:].split() for row in rows}
    assert {name: numbers.pop() for name, numbers in found.items()} == {"ddp": "1", "ddp, muon": "1"}
    assert all(float(number) < 1e-4 for numbers in found.values() for number in numbers)
    assert out.exists()
