"""``--dry_run`` of the published commands for billions of parameters, word for word, on a machine without a GPU."""

import os
import re
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
def test_recipe_is_what_its_name_and_the_manual_say(recipe, text_file, tmp_path, monkeypatch, capsys):
    printed = _dry_run([f"--config={recipe}"], text_file, tmp_path, monkeypatch, capsys)
    billions = float(recipe.stem.split("_")[1].removesuffix("b"))
    parameters = int(printed["parameters"].replace(",", ""))
    assert parameters / 1e9 == pytest.approx(billions, rel=0.06)
    manual = (REPO / "docs" / "strategies.md").read_text()
    [row] = re.findall(rf"^\| `configs/{recipe.name}` \| (.*) \| (.*) GiB \| (.*) GiB \|$", manual, re.MULTILINE)
    peak, host = float(printed["peak"].split()[0]), float(printed["host"].split()[0])
    assert row[1:] == (f"{peak:.1f}", f"{host:.0f}")
    assert int(row[0].replace(",", "")) == pytest.approx(parameters, rel=1e-3)  # another vocabulary


def test_dry_run_ignores_missing_devices_but_refuses_mistakes(text_file, tmp_path, monkeypatch, capsys):
    printed = _dry_run(["--gpus=64", "--strategy=fsdp"], text_file, tmp_path, monkeypatch, capsys)
    assert printed["tokens per step"] == f"{64 * 12 * 64:,}"
    for wrong, message in ((["--precision=12"], "--precision 12"), (["--trainer.colour=red"], "--trainer.colour")):
        with pytest.raises(SystemExit) as stop:
            _dry_run(wrong, text_file, tmp_path, monkeypatch, capsys)
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_dry_run_all_compares_strategies_on_a_named_machine(text_file, tmp_path, monkeypatch, capsys):
    sizes = "--n_layer=1 --n_head=2 --n_embd=64 --block_size=64 --batch_size=8".split()
    monkeypatch.chdir(tmp_path)

    def lines(*flags):
        train.main([*sizes, f"--data={text_file}", *flags])
        assert os.listdir() == [], "nothing is written"
        return capsys.readouterr().out.splitlines()

    printed = lines("--dry_run=all", "--on=T4:2x3", "--price_per_gpu_hour=0.5", "--max_steps=300000")
    assert any(line.startswith("strategy  ddp, 16-mixed, gpu") for line in printed)
    assert any("8 x 64 x 1 micro-batches x 6 devices" in line for line in printed)
    table, costs = (place for place, line in enumerate(printed) if line.split()[:2] == ["strategy", "recompute"])
    assert max(map(len, printed[table:])) <= 120  # the lines above it name files
    parameters = int(next(line.split()[1] for line in printed if line.startswith("parameters")).replace(",", ""))
    assert f"compute-optimal {20 * parameters:,} tokens, 20 per parameter (arXiv:2203.15556)" in printed
    printed, costs = printed[:costs], printed[costs:]
    [refused] = [line for line in printed if line.startswith("fsdp")]
    assert "--precision 16-mixed does not work under --strategy fsdp" in refused
    rows = {(line[:26].strip(), line[26:36].strip()): line[36:].split() for line in printed}
    assert len([key for key in rows if key[1] in ("yes", "no")]) == 12
    columns, limit = rows["deepspeed_stage_2", "yes"], (14.5 - 1) * 2**10  # MiB
    largest = int(columns[-1].replace(",", ""))
    titles, cost = costs[0][36:].split(), next(line for line in costs if line.startswith("deepspeed_stage_2 "))
    cost = dict(zip(titles, cost[36:].replace(",", "").split(), strict=False))
    hours = float(cost["ms/step"]) * 300000 / 3.6e6
    assert float(cost["tokens/s"]) == pytest.approx(8 * 64 * 6 / float(cost["ms/step"]) * 1e3, rel=1e-3)
    assert float(cost["hours"]) == pytest.approx(hours, rel=0.01)
    assert float(cost["kWh"]) == pytest.approx(hours * 6 * 0.07, rel=0.01)
    assert float(cost["price"]) == pytest.approx(hours * 6 * 0.5, rel=0.01)
    assert cost["bound"] == "python"
    assert len(costs) == 1 + 12 + 4 and costs[-2].endswith("NVIDIA T4 data sheet")
    on_its_own = ["--dry_run", "--gpus=2", "--num_nodes=3", "--precision=16", "--recompute"]
    on_its_own.append("--strategy=deepspeed_stage_2")

    def peak(batch_size):
        line = next(line for line in lines(*on_its_own, f"--batch_size={batch_size}") if line.startswith("peak"))
        return float(line.split()[1].replace(",", "")) * {"MiB": 1, "GiB": 1024}[line.split()[2]]

    alone = lines("--dry_run", "--on=t4:2", "--price_per_gpu_hour=1")
    [step] = [line for line in alone if line.startswith("time  ")]
    assert re.search(r" [\d.]+ ms per step, [\d,]+ tokens/s \(python \d+%, ", step)
    assert any(re.match(r"run .* hours, .* kWh .*, .* at 1 per GPU and hour$", line) for line in alone)
    assert float(columns[5]) == pytest.approx(peak(8) / 1024, rel=0.02)
    assert peak(largest) == pytest.approx(limit, rel=0.02)


@pytest.mark.parametrize(
    ("flags", "mentions"),
    [
        (["--dry_run", "--on=h100"], ["--on h100", "h100:8"]),
        (["--dry_run", "--on=h100:0"], ["--on h100:0", "CARD:GPUS"]),
        (["--dry_run", "--on=abacus:8"], ["--on abacus:8", "a100-40"]),
        (["--on=h100:8"], ["--on h100:8", "--dry_run"]),
        (["--dry_run", "--on=h100:8", "--gpus=4"], ["--gpus 4", "leave it out"]),
        (["--dry_run", "--on=t4:8", "--precision=bf16"], ["t4 has no bfloat16", "--precision 16"]),
        (
            ["--dry_run=all", "--strategy=deepspeed", "--deepspeed_config=d.json"],
            ["--deepspeed_config d.json", "alone"],
        ),
        (["--price_per_gpu_hour=2"], ["--price_per_gpu_hour 2", "--dry_run"]),
        (["--dry_run", "--price_per_gpu_hour=-1"], ["--price_per_gpu_hour -1", "from 0"]),
        (["--dry_run=some"], ["--dry_run some", "--dry_run all"]),
    ],
)
def test_wrong_machines_are_refused(flags, mentions, text_file, refused):
    refused(train.main, f"--data={text_file}", *flags, mentions=mentions)


def test_a_machine_in_a_file(text_file, tmp_path, capsys, refused):
    for text in ("on: h100:1\n", '"on": "4090:1"\n'):
        (tmp_path / "a.yaml").write_text(text)
        train.main([f"--config={tmp_path / 'a.yaml'}", "--dry_run", f"--data={text_file}"])
        assert "12 x 64 x 1 micro-batches x 1 devices" in capsys.readouterr().out
    (tmp_path / "a.yaml").write_text("on: 4090:1\n")
    refused(train.main, f"--config={tmp_path / 'a.yaml'}", "--dry_run", mentions=["a.yaml", "needs quotes"])
