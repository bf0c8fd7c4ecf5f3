"""``--dry_run`` of the published commands for billions of parameters, word for word, on a machine without a GPU."""

import os
from pathlib import Path

import pytest

import train

REPO = Path(__file__).parents[2]
PUBLISHED = "--gpus 8 --precision 16 --batch_size 1 --strategy deepspeed_stage_3_offload"


def _dry_run(argv, text_file, tmp_path, monkeypatch, capsys) -> dict[str, str]:
    """Return the printed values by their labels."""
    monkeypatch.chdir(tmp_path)
    train.main([*argv, f"--data={text_file}", "--dry_run"])
    assert os.listdir() == [], "nothing is written"
    lines = capsys.readouterr().out.splitlines()
    return {line[:16].strip(): line[16:].strip() for line in lines}


@pytest.mark.parametrize("sizes", [(15, 16, 3072), (13, 16, 8192)], ids=["1.7B", "10B"])
def test_dry_run_of_published_commands(sizes, text_file, tmp_path, monkeypatch, capsys):
    n_layer, n_head, n_embd = sizes
    argv = f"--n_layer {n_layer} --n_head {n_head} --n_embd {n_embd} {PUBLISHED}".split()
    printed = _dry_run(argv, text_file, tmp_path, monkeypatch, capsys)
    matrices = 12 * n_layer * n_embd**2
    parameters = int(printed["parameters"].replace(",", ""))
    assert matrices < parameters < matrices * 1.002
    assert printed["tokens per step"] == "512"
    assert float(printed["FLOPs per step"]) == pytest.approx(6 * parameters * 512, rel=0.01)
    assert printed["optimizer"] == "0.0 MiB"  # it is on the host
    # Bytes per parameter: float32 weights, two moments and gradients, and half-precision shards.
    size, unit = printed["host"].split()[:2]
    assert unit == "GiB" and 18 < float(size.replace(",", "")) * 2**30 / parameters < 22


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted((REPO / "configs").glob("mingpt_*b_offload.yaml")), ids=lambda p: p.stem)
def test_recipe_size_matches_its_name(recipe, text_file, tmp_path, monkeypatch, capsys):
    printed = _dry_run([f"--config={recipe}"], text_file, tmp_path, monkeypatch, capsys)
    billions = float(recipe.stem.split("_")[1].removesuffix("b"))
    assert int(printed["parameters"].replace(",", "")) / 1e9 == pytest.approx(billions, rel=0.06)


def test_dry_run_ignores_missing_devices_but_refuses_mistakes(text_file, tmp_path, monkeypatch, capsys):
    printed = _dry_run(["--gpus=64", "--strategy=fsdp"], text_file, tmp_path, monkeypatch, capsys)
    assert printed["tokens per step"] == f"{64 * 12 * 64:,}"
    for wrong, message in ((["--precision=12"], "--precision 12"), (["--trainer.colour=red"], "--trainer.colour")):
        with pytest.raises(SystemExit) as stop:
            _dry_run(wrong, text_file, tmp_path, monkeypatch, capsys)
        assert stop.value.code == 2 and message in capsys.readouterr().err
