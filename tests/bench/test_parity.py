"""Every strategy trains the same model as a single process: the matrix that ``bench.py parity`` prints."""

from functools import partial

import pytest
import torch

import bench
from lightning_gpt.bench import parity
from lightning_gpt.bench.parity import Case, cases, deviations
from lightning_gpt.implementations.registry import IMPLEMENTATIONS
from lightning_gpt.strategies import STRATEGIES

ACCELERATOR = "gpu" if torch.cuda.is_available() else "cpu"
DEVICES = min(2, torch.cuda.device_count() or 2)
PLAIN = ("fsdp", "deepspeed_stage_2")  # one of each kind; the others take their time in CI


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Keeps the runs, so that a single process trains each case once."""
    return tmp_path_factory.mktemp("parity")


def _check(strategy: str, folder, text_file) -> None:
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    settings = dict(devices=DEVICES, accelerator=ACCELERATOR, steps=10, data=str(text_file))
    # Offloading moves what no model computes, and two of them show it.
    names = ("nanogpt", "moderngpt") if strategy.endswith("offload") else tuple(IMPLEMENTATIONS)
    which = cases(strategy, implementations=names)
    assert any(case.optimizer == "muon" for case in which) != strategy.startswith("deepspeed")
    found = deviations(strategy, folder=folder, which=which, **settings)
    assert [d.case for d in found] == which and all(len(d.losses) == 10 for d in found)
    for deviation in found:
        print(deviation)
        assert deviation.loss < 1e-5
        assert deviation.norm < 1e-4
        assert deviation.weights < 1e-3
    by_case = {d.case: d.losses for d in found}
    for case, losses in by_case.items():
        # The cases differ from one another by more than they may from the single process, or they would show nothing.
        other = by_case[Case(case.implementation, case.accumulate, 0.0)]
        assert other is losses or abs(losses[-1] / other[-1] - 1) > 5e-5


@pytest.mark.parametrize(
    "strategy",
    [name if name in PLAIN else pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES if name != "auto"],
)
def test_matrix(strategy, folder, text_file):
    """All implementations, with and without accumulation and clipping, and with each optimizer."""
    _check(strategy, folder, text_file)


def test_bench_prints_the_table(text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parity, "cases", partial(cases, implementations=["nanogpt"]))
    out = tmp_path / "parity.json"
    bench.main(["parity", "--strategies=ddp", "--steps=2", f"--data={text_file}", f"--json={out}"])
    header, *rows, _, _ = capsys.readouterr().out.splitlines()
    assert header.split() == ["strategy", "loss,", "relative", "norm,", "relative", "weight,", "absolute", "runs"]
    found = {row[:28].strip(): row[28:].split() for row in rows}
    assert {name: numbers.pop() for name, numbers in found.items()} == {"ddp": "4", "ddp, muon": "1"}
    assert all(float(number) < 1e-4 for numbers in found.values() for number in numbers)
    assert out.exists()
