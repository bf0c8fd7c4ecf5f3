"""Checkpoints of every strategy: lazy reading, conversion, checks and refusals."""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lightning_gpt.checkpoint import canonical_folder, convert, ensure_canonical, find_checkpoint, open_checkpoint
from lightning_gpt.checkpoint.base import Checkpoint, empty_model, tied_names
from lightning_gpt.checkpoint.read.mapped import MappedFile
from lightning_gpt.checksums import verify_checksums
from lightning_gpt.config import UserError
from lightning_gpt.models import GPTModule
from lightning_gpt.trust import remember_run
from tests.launching import run_python

REPO = Path(__file__).parents[2]
RUNS = {
    "fsdp": ("fsdp", "nanogpt"),
    "zero1": ("deepspeed_stage_1", "mingpt"),
    "zero2": ("deepspeed_stage_2", "nanogpt"),
    "zero3": ("deepspeed_stage_3", "nanogpt"),
}
HAS_DEEPSPEED = find_spec("deepspeed") is not None
# Odd sizes, which two ranks do not divide.
SIZES = "--n_layer=2 --n_head=3 --n_embd=9 --block_size=15 --batch_size=4 --max_steps=3 --eval_interval=3"

# Script: read each checkpoint folder in the arguments with DeepSpeed's own tools, and save the result beside it.
DEEPSPEED_TOOLS = """
import sys, types
from pathlib import Path
import torch
from deepspeed.checkpoint.ds_to_universal import main
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

for argument in sys.argv[1:]:
    folder = Path(argument)
    out = folder.parent / "universal"
    settings = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    paths = {"input_folder": str(folder / "checkpoint"), "output_folder": str(out)}
    main(types.SimpleNamespace(**settings, **paths, inject_missing_state=True))
    found = {}
    for name, weight in get_fp32_state_dict_from_zero_checkpoint(folder).items():
        found[name] = {"weight": weight}
        for key in ("exp_avg", "exp_avg_sq"):
            file = out / "zero" / name / f"{key}.pt"
            if file.exists():
                state = torch.load(file, weights_only=False)
                found[name][key] = (state["param"] if isinstance(state, dict) else state).view(weight.shape)
    torch.save(found, folder.parent / "reference.pt")
"""


@pytest.fixture(scope="session")
def runs(tmp_path_factory, text_file) -> dict[str, Path]:
    """Train with each sharded strategy on two ranks; return the checkpoints, read-only."""
    folder = tmp_path_factory.mktemp("formats")
    found = {}
    for kind, (strategy, implementation) in RUNS.items():
        if strategy != "fsdp" and not HAS_DEEPSPEED:
            continue
        flags = [f"--strategy={strategy}", f"--implementation={implementation}", f"--out_dir={folder / kind}"]
        rest = ["--accelerator=cpu", "--devices=2", "--logger=none", "--sample_tokens=0", f"--data={text_file}"]
        done = run_python(REPO / "train.py", *SIZES.split(), *flags, *rest, ranks=2)
        assert done.returncode == 0, done.stderr[-3000:]
        found[kind] = folder / kind / "checkpoints" / "last.ckpt"
    return found


@pytest.fixture(scope="session")
def references(runs, tmp_path_factory) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """Return weight, exp_avg and exp_avg_sq of each parameter, read with torch's and DeepSpeed's own tools."""
    file = tmp_path_factory.mktemp("dcp") / "all.pt"
    dcp_to_torch_save(runs["fsdp"], file)
    merged = torch.load(file, weights_only=False)
    states = merged["optimizer_0"]["state"]
    found = {"fsdp": {n: {"weight": w} | states.get(n, {}) for n, w in merged["state_dict"].items()}}
    folders = [path for kind, path in runs.items() if kind != "fsdp"]
    if folders:
        done = run_python("-c", DEEPSPEED_TOOLS, *folders, env={"DS_ACCELERATOR": "cpu"}, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    for kind, path in runs.items():
        if kind != "fsdp":
            tensors = torch.load(path.parent / "reference.pt")
            found[kind] = {n: {k: t.detach() for k, t in state.items()} for n, state in tensors.items()}
    return {kind: {n.removeprefix("model."): s for n, s in states.items()} for kind, states in found.items()}


@pytest.fixture(params=list(RUNS))
def kind(request) -> str:
    if request.param != "fsdp" and not HAS_DEEPSPEED:
        pytest.skip("DeepSpeed is not installed")
    return request.param


@pytest.fixture
def copied(runs, tmp_path):
    """Return a function that copies a checkpoint, so that a test may change it."""

    def copy(kind: str) -> Path:
        return Path(shutil.copytree(runs[kind], tmp_path / kind / "checkpoints" / "last.ckpt"))

    return copy


@pytest.fixture
def single(tiny_run) -> Path:
    return tiny_run / "checkpoints" / "last.ckpt"


@pytest.fixture
def tied_file(tmp_path):
    """Return a function that changes the weights of a tied model and writes its checkpoint file."""
    config = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 5, "block_size": 4}
    header = {"hyper_parameters": {"implementation": "nanogpt", "model_config": config}, "global_step": 1}

    def write(change=lambda weights: None) -> Path:
        torch.manual_seed(0)
        weights = {k: v.clone() for k, v in GPTModule("nanogpt", model_config=config).state_dict().items()}
        change(weights)
        file = tmp_path / f"tied{len(list(tmp_path.iterdir()))}.ckpt"
        torch.save(header | {"state_dict": weights}, file)
        return file

    return write


def assert_cannot_be_read(path: Path, *mentions: object, **settings: bool) -> None:
    """Check that opening the checkpoint or reading its weights raises a UserError of one line."""
    with pytest.raises(UserError) as caught:
        checkpoint = open_checkpoint(path, **settings)
        checkpoint.hash()
    message = str(caught.value)
    assert "\n" not in message and all(str(m) in message for m in mentions), message


def equal(a: Checkpoint, b: Checkpoint) -> bool:
    """Return whether two checkpoints are bit-identical."""
    for name in a.names():
        ours, theirs = a.optimizer_state(name), b.optimizer_state(name)
        assert torch.equal(a.weight(name), b.weight(name)) and a.weight(name).dtype == b.weight(name).dtype
        assert ours.keys() == theirs.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key in ours:
            assert torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype
    return a.names() == b.names()


def test_weights_and_moments_equal_the_reference_tools(runs, references, kind):
    checkpoint, seen = open_checkpoint(runs[kind]), 0
    shapes = checkpoint.shapes()
    for name, expected in references[kind].items():
        state = checkpoint.optimizer_state(name)
        assert name not in shapes or shapes[name] == expected["weight"].shape
        assert torch.equal(checkpoint.weight(name), expected["weight"]) and not checkpoint.weight(name).requires_grad
        assert state["step"].shape == () and state["step"] == 3 and state["step"].dtype == torch.float32
        for key in expected.keys() & {"exp_avg", "exp_avg_sq"}:
            assert torch.equal(state[key], expected[key])
            seen += 1
    assert checkpoint.names() == sorted(n for n in references[kind] if n not in checkpoint.ties)
    assert seen >= 2 * len(checkpoint.names()) and checkpoint.step == 3 and checkpoint.has_optimizer


def test_hash_and_module_are_equal_for_every_form(runs, references, kind, tmp_path):
    checkpoint = open_checkpoint(runs[kind])
    weights = {f"model.{name}": state["weight"].clone() for name, state in references[kind].items()}
    torch.save(checkpoint.header | {"state_dict": weights}, tmp_path / "one.ckpt")
    one = open_checkpoint(tmp_path / "one.ckpt")
    assert not one.has_optimizer and one.optimizer_state("transformer.wte.weight") == {}
    assert checkpoint.hash() == one.hash() == open_checkpoint(convert(checkpoint, tmp_path / "c")).hash()
    for name, tensor in checkpoint.module().model.state_dict().items():
        assert torch.equal(tensor, references[kind][name]["weight"])
    weights["model.transformer.wpe.weight"][0, 0] += 1
    torch.save(checkpoint.header | {"state_dict": weights}, tmp_path / "one.ckpt")
    assert open_checkpoint(tmp_path / "one.ckpt").hash() != checkpoint.hash()


def test_conversion_round_trip_of_shards(runs, kind, tmp_path):
    _assert_round_trip(open_checkpoint(runs[kind]), tmp_path / "out")


def test_conversion_round_trip_of_a_file(single, tmp_path):
    _assert_round_trip(open_checkpoint(single), tmp_path / "out")


def _assert_round_trip(checkpoint: Checkpoint, folder: Path) -> None:
    assert convert(checkpoint, folder, optimizer=True, pt=True) == folder
    again = open_checkpoint(folder)
    assert equal(checkpoint, again) and again.hash() == checkpoint.hash()
    assert again.header.keys() == checkpoint.header.keys() and again.header["loops"] == checkpoint.header["loops"]
    assert again.tokenizer.to_dict() == checkpoint.tokenizer.to_dict() and again.data == checkpoint.data
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == checkpoint.names()  # tied weights are stored once
    config = json.loads((folder / "config.json").read_text())
    assert config["format"] == "lightning-gpt" and config["ties"] == checkpoint.ties
    model = empty_model(checkpoint.implementation, model_config=checkpoint.model_config).to_empty(device="cpu")
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True), strict=True)
    assert all(torch.equal(tensor, checkpoint.weight(name)) for name, tensor in model.state_dict().items())
    convert(again, folder)  # in place, which replaces the older conversion
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name]
    assert not open_checkpoint(folder).has_optimizer and open_checkpoint(folder).step == checkpoint.step


def test_tied_weights_are_read_from_either_name(tied_file):
    wte, head = "model.transformer.wte.weight", "model.lm_head.weight"
    whole = open_checkpoint(tied_file())
    assert whole.ties == {"lm_head.weight": "transformer.wte.weight"}
    on_meta = GPTModule("nanogpt", model_config=whole.model_config)
    on_meta.model = empty_model("nanogpt", model_config=whole.model_config)
    for missing in (wte, head):
        part = open_checkpoint(tied_file(lambda weights, key=missing: weights.pop(key)))
        part.require_fit(on_meta)
        assert part.hash() == whole.hash() and torch.equal(part.weight("lm_head.weight"), whole.weight(wte[6:]))
        model = part.module().model
        assert model.lm_head.weight is model.transformer.wte.weight
    with pytest.raises(UserError, match="one weight in the model and differ"):
        open_checkpoint(tied_file(lambda weights: weights[head].add_(1))).require_fit(on_meta)
    with pytest.raises(UserError, match="lm_head.weight has shape none|wte.weight has shape none"):
        open_checkpoint(tied_file(lambda weights: (weights.pop(wte), weights.pop(head)))).require_fit(on_meta)


def test_empty_model_uses_no_memory_and_no_randomness():
    config = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 5, "block_size": 4}
    before = torch.get_rng_state()
    model = empty_model("nanogpt", model_config=config)
    assert all(p.is_meta for p in model.parameters()) and torch.equal(before, torch.get_rng_state())
    assert tied_names(model) == {"lm_head.weight": "transformer.wte.weight"}


def test_reading_shards_uses_no_collectives(runs, monkeypatch):
    def talk(*args: object, **kwargs: object) -> None:
        raise AssertionError("a collective")

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for name in ("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "barrier"):
            monkeypatch.setattr(dist, name, talk)
        for name in ("all_reduce", "all_gather", "broadcast"):
            monkeypatch.setattr(dist, name, talk)
        for path in runs.values():
            open_checkpoint(path).hash()
    finally:
        monkeypatch.undo()
        dist.destroy_process_group()


class Foreign:
    """Create a file when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("part", ["meta.pt", ".metadata", "checkpoint/zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_foreign_objects_are_refused(copied, tmp_path, part):
    import pickle

    if part.startswith("checkpoint") and not HAS_DEEPSPEED:
        pytest.skip("DeepSpeed is not installed")
    path = copied("zero2" if part.startswith("checkpoint") else "fsdp")
    mark = tmp_path / "mark"
    if part == ".metadata":
        content = pickle.loads((path / part).read_bytes())
        content.storage_meta.modules = [Foreign(mark)]
        (path / part).write_bytes(pickle.dumps(content))
    else:
        torch.save(torch.load(path / part, weights_only=False) | {"extra": Foreign(mark)}, path / part)
    assert_cannot_be_read(path, part.rpartition("/")[2], "--trust_checkpoint")
    assert not mark.exists()
    assert open_checkpoint(path, trust=True).hash() and mark.exists()


def test_own_runs_are_trusted(single, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_GPT_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    own, others = run / "checkpoints" / "best.ckpt", [run / "checkpoints" / "x.ckpt", run / "x" / "best.ckpt"]
    for file in (own, *others):
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.load(single, weights_only=True) | {"extra": Foreign(tmp_path / "mark")}, file)
    assert_cannot_be_read(own, "--trust_checkpoint")
    remember_run(run)
    remember_run(run)
    assert open_checkpoint(own).hash()
    for file in others:  # anybody may have put them there
        assert_cannot_be_read(file, "--trust_checkpoint")
    assert (tmp_path / "cache" / "runs.txt").read_text().splitlines() == [str(run)]
    monkeypatch.setenv("LIGHTNING_GPT_CACHE", str(single))  # a file, so that nothing can be written below it
    remember_run(run)
    assert_cannot_be_read(own, "--trust_checkpoint")


def test_checksums_of_all_ranks_cover_the_folder(runs, kind):
    files = [path for path in runs[kind].rglob("*") if path.is_file()]
    assert verify_checksums(runs[kind]).files == len(files) - 1


@pytest.mark.parametrize("cut", [False, True], ids=["missing", "cut off"])
def test_incomplete_folders_are_refused(copied, kind, cut):
    path = copied(kind)
    files = [f for f in path.rglob("*") if f.is_file() and f.name != "latest" and not f.name.endswith(".py")]
    if kind == "zero3":
        files = [f for f in files if "rank_1_mp_rank_00_model" not in f.name]  # only rank 0's file is needed
    assert len(files) >= 3
    for file in files:
        whole = file.read_bytes()
        file.unlink()
        if cut:
            file.write_bytes(whole[: len(whole) // 2])
        assert_cannot_be_read(path, path)
        file.write_bytes(whole)
    assert open_checkpoint(path).hash()


def test_damaged_and_unknown_folders_are_refused(single, tmp_path):
    folder = convert(open_checkpoint(single), tmp_path / "out", optimizer=True)
    for name in ("model.safetensors", "optimizer.safetensors", "config.json", "training.pt"):
        whole = (folder / name).read_bytes()
        for content in (whole[: len(whole) // 2], b"", b"x" * 99):
            (folder / name).write_bytes(content)
            assert_cannot_be_read(folder, folder)
        (folder / name).write_bytes(whole)
    (tmp_path / "empty").mkdir()
    assert_cannot_be_read(tmp_path / "empty", "not a checkpoint")
    assert_cannot_be_read(tmp_path / "none", "not a checkpoint")
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"format": "another"}')
    assert_cannot_be_read(tmp_path / "other", "config.json")
    with pytest.raises(UserError, match="is it a run folder"):
        find_checkpoint(str(tmp_path / "empty"), which="best")


def test_conversion_is_cached_beside_the_checkpoint(copied, single):
    assert ensure_canonical(single).path == single
    path = copied("fsdp")
    assert find_checkpoint(str(path), which="best") == find_checkpoint(str(path.parent.parent), which="best") == path
    folder = canonical_folder(path)
    assert folder.name == "last" and canonical_folder(folder).name == "last-converted"
    first = ensure_canonical(path)
    assert first.path == folder == find_checkpoint(str(folder), which="best")
    made = (folder / "config.json").stat().st_mtime_ns
    assert ensure_canonical(path).hash() == first.hash() and (folder / "config.json").stat().st_mtime_ns == made
    os.utime(path / "meta.pt")  # as if saved again
    ensure_canonical(path)
    assert (folder / "config.json").stat().st_mtime_ns > made
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(UserError, match="is not a converted checkpoint"):
        ensure_canonical(path)


def test_failed_conversion_leaves_nothing(runs, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(runs["fsdp"])
    read = checkpoint._read
    monkeypatch.setattr(checkpoint, "_read", lambda name: read(name) if "wte" in name else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(checkpoint, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        convert(checkpoint, tmp_path / "file" / "out")
    with pytest.raises(UserError, match="no optimizer state"):
        checkpoint.moments = {}
        convert(checkpoint, tmp_path / "out", optimizer=True)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_mapped_file_is_reopened_and_checked(tied_file, monkeypatch):
    monkeypatch.setattr(MappedFile, "_RENEW_AFTER", 0)
    file = tied_file()
    checkpoint = open_checkpoint(file)
    assert checkpoint.hash() == open_checkpoint(file).hash()
    os.utime(file, (0, 0))
    with pytest.raises(UserError, match="replaced while it was read"):
        checkpoint.hash()


def test_entry_points_open_sharded_folders(runs, references, kind, text_file, capsys):
    import evaluate
    import sample

    # Expected score: the validation windows with the weights that torch's or DeepSpeed's own tools read.
    checkpoint = open_checkpoint(runs[kind])
    model = GPTModule(checkpoint.implementation, model_config=checkpoint.model_config).model.eval()
    model.load_state_dict({name: state["weight"] for name, state in references[kind].items()})
    text = text_file.read_text()
    ids = torch.tensor(checkpoint.tokenizer.encode(text[int(0.9 * len(text)) :]).tolist())
    with torch.no_grad():
        windows = [ids[start : start + 16] for start in range(0, len(ids) - 1, 15)]
        total = sum(float(model(w[None, :-1], w[None, 1:])[1]) * (len(w) - 1) for w in windows)

    evaluate.main(["--checkpoint", str(runs[kind]), "--accelerator=cpu"])
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert float(printed["loss"]) == pytest.approx(total / (len(ids) - 1), abs=1e-4)
    assert (printed["step"], printed["tokens"]) == ("3", str(len(ids) - 1))
    prompt = ["--accelerator=cpu", "--prompt=the cat", "--max_new_tokens=4", "--greedy"]
    sample.main(["--checkpoint", str(runs[kind].parent.parent), *prompt])
    idx = checkpoint.tokenizer.encode("the cat").tolist()
    for _ in range(4):
        with torch.no_grad():
            idx.append(int(model(torch.tensor([idx]))[0][0, -1].argmax()))
    assert capsys.readouterr().out == checkpoint.tokenizer.decode(idx) + "\n"
