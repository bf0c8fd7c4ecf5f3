"""Damaged and malicious checkpoints: one line for each, before anything large is built."""

import enum
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.checkpoint import metadata, save

import sample
import train
from lightning_gpt.checkpoint import convert, open_checkpoint
from lightning_gpt.checkpoint.read.deepspeed import _STAND_INS
from lightning_gpt.checkpoint.read.mapped import MappedFile
from lightning_gpt.config import UserError

SHORT = ["--max_steps=6", "--accelerator=cpu"]


@pytest.fixture
def content(tiny_run) -> dict:
    """Return the content of a checkpoint of one file."""
    return torch.load(tiny_run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture
def dcp(content, tmp_path) -> Path:
    """Return a folder as FSDP training writes it, from one rank."""
    optimizer = {name: {"exp_avg": torch.zeros_like(weight)} for name, weight in content["state_dict"].items()}
    folder = tmp_path / "dcp"
    save({"state_dict": content["state_dict"], "optimizer_0": {"state": optimizer}}, checkpoint_id=folder, no_dist=True)
    torch.save({k: v for k, v in content.items() if k not in ("state_dict", "optimizer_states")}, folder / "meta.pt")
    return folder


def cannot_be_read(path: Path, *mentions: object) -> None:
    """Check that a checkpoint is refused in one line, when it is opened or when it is read."""
    with pytest.raises(UserError) as raised:
        checkpoint = open_checkpoint(path)
        checkpoint.module()
        checkpoint.hash()
    for text in (path, *mentions):
        assert str(text) in str(raised.value)


# Sizes, compared with what is stored before anything is built

SIZES = [
    ("n_layer", 10**6),
    ("vocab_size", 10**9),
    ("n_embd", 10**9),
    ("n_embd", "16"),
    ("n_head", 0),
    ("n_layer", 2**80),
]
SIZES += [("attn_pdrop", float("nan")), ("block_size", 10**12), ("n_layer", [[1]])]


@pytest.mark.parametrize(("field", "value"), SIZES)
@pytest.mark.parametrize("form", ["single", "canonical"])
def test_declared_sizes_are_compared_with_the_stored_weights(form, field, value, content, tiny_run, tmp_path):
    if form == "single":
        content["hyper_parameters"]["model_config"][field] = value
        path = tmp_path / "a.ckpt"
        torch.save(content, path)
    else:
        path = convert(open_checkpoint(tiny_run / "checkpoints" / "last.ckpt"), tmp_path / "canonical")
        config = json.loads((path / "config.json").read_text())
        config["model_config"][field] = value
        (path / "config.json").write_text(json.dumps(config))
    cannot_be_read(path)


def test_sizes_of_other_programs_are_compared(content, saved_model, export, tmp_path):
    args = {"n_layer": 10**6, "n_head": 1, "n_embd": 16, "block_size": 16, "vocab_size": 20}
    torch.save({"model_args": args, "model": content["state_dict"]}, tmp_path / "ckpt.pt")
    cannot_be_read(tmp_path / "ckpt.pt", "n_layer is 1000000")
    folder, _ = export(saved_model("nanogpt"), "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 10**9}))
    cannot_be_read(folder, "vocab_size is 1000000000")


def test_sizes_in_saved_settings_are_compared(tiny_run, tmp_path, refused):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    refused(train.main, f"--resume={run}", "--n_layer=1000000", *SHORT, mentions="n_layer is 1000000")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"n_layer": 10**6}))
    train.main([f"--resume={run}", *SHORT])  # the sizes are the checkpoint's


HEADERS = {
    "hyper_parameters": [None, [], {"implementation": ["mingpt"], "model_config": {}}],
    "global_step": [-1, 2**70, "1", None],
    "TokenData": [1, {"tokenizer": 5}, {"data": ["x"]}, {"task": "x"}, {"consumed_samples": -1}],
    "callbacks": [[1]],
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_other_types_are_refused(name, content, tmp_path):
    for value in HEADERS[name]:
        torch.save(content | {name: value}, tmp_path / "a.ckpt")
        cannot_be_read(tmp_path / "a.ckpt", "is not a checkpoint that train.py wrote")


# Files of torch.save


def test_compressed_and_repeated_bytes_are_refused(content, tmp_path):
    file = tmp_path / "a.ckpt"
    torch.save(content | {"text": " " * 10**6}, file)
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile(tmp_path / "b.ckpt", "w", zipfile.ZIP_DEFLATED) as packed:
        for record in whole.infolist():
            packed.writestr(record.filename, whole.read(record))
    cannot_be_read(tmp_path / "b.ckpt", "compressed")
    name = next(iter(content["state_dict"]))
    for value in (torch.zeros(1).expand(10**10, 10**6), torch.zeros(2, 2).to_sparse(), torch.empty(9, device="meta")):
        torch.save(content | {"state_dict": content["state_dict"] | {name: value}}, file)
        cannot_be_read(file, "tensor")


def test_nested_header_is_refused(tmp_path):
    # The opcodes of a list in 99,999 others.
    write_pickle(tmp_path / "a.ckpt", b"\x80\x02}X\x01\x00\x00\x00a" + b"]" * 100_000 + b"a" * 99_999 + b"s.")
    cannot_be_read(tmp_path / "a.ckpt")


# Folders of torch.distributed.checkpoint


def test_distributed_folder_is_read(dcp, content):
    checkpoint = open_checkpoint(dcp)
    for name, weight in content["state_dict"].items():
        assert torch.equal(checkpoint.weight(name.removeprefix("model.")), weight)
    assert checkpoint.hash()


def index_of(folder: Path) -> metadata.Metadata:
    return pickle.loads((folder / ".metadata").read_bytes())


def change_index(folder: Path, change) -> None:
    index = index_of(folder)
    key = next(key for key, entry in index.state_dict_metadata.items() if len(getattr(entry, "size", ())) == 2)
    change(index, key)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def grow(index, key):
    index.state_dict_metadata[key].size = torch.Size([10**9, 10**3])


def grow_chunk(index, key):
    grow(index, key)
    index.state_dict_metadata[key].chunks[0].sizes = torch.Size([10**9, 10**3])


def elsewhere(index, key):
    for info in index.storage_data.values():
        info.relative_path = f"../{info.relative_path}"


def not_a_number(index, key):
    next(iter(index.storage_data.values())).offset = "0"


def no_storage(index, key):
    index.storage_data = None


@pytest.mark.parametrize("change", [grow, grow_chunk, elsewhere, not_a_number, no_storage])
def test_wrong_index_is_refused(change, dcp):
    change_index(dcp, change)
    cannot_be_read(dcp)


def test_damaged_shards_are_refused(dcp):
    shard = next(dcp.glob("*.distcp"))
    whole = shard.read_bytes()
    for key, place in index_of(dcp).storage_data.items():
        if key.fqn.startswith("state_dict."):
            shard.write_bytes(whole[: place.offset] + bytes(place.length) + whole[place.offset + place.length :])
            cannot_be_read(dcp, "not a readable checkpoint")
    shard.write_bytes(whole[: len(whole) // 2])
    cannot_be_read(dcp, "is cut off")


def test_index_that_asks_for_memory_is_refused(dcp):
    """LONG_BINPUT makes CPython's unpickler allocate a table of that many entries."""
    (dcp / ".metadata").write_bytes(b"\x80\x02}r\xff\xff\xff\x7f.")
    cannot_be_read(dcp, "index")


# Enums, as Python 3.11.0 to 3.11.3 pickles them


class ThroughGetattr(pickle.Pickler):
    """Pickle enums as Debian 12's Python 3.11.2 does."""

    def reducer_override(self, value):
        """Reduce a member to getattr(class, name)."""
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def test_enums_of_python_3_11_2_are_read(dcp):
    before = open_checkpoint(dcp).hash()
    with (dcp / ".metadata").open("rb") as file:
        index = pickle.load(file)
    for protocol in (2, 4):
        with (dcp / ".metadata").open("wb") as file:
            ThroughGetattr(file, protocol).dump(index)
        assert b"getattr" in (dcp / ".metadata").read_bytes()
        assert open_checkpoint(dcp).hash() == before


# Bytes that Python 3.11.2 wrote, for getattr(KIND, NAME).
BYTES = b"\x80\x02c__builtin__\ngetattr\nq\x00c%s\n%s\nq\x01X%s%sq\x02\x86q\x03R."


def through_getattr(module: str, kind: str, name: str) -> bytes:
    return BYTES % (module.encode(), kind.encode(), len(name).to_bytes(4, "little"), name.encode())


@pytest.mark.parametrize(
    ("module", "kind", "name"),
    [
        (metadata.__name__, "Metadata", "__init__"),
        (metadata.__name__, "_MEM_FORMAT_ENCODING", "__class__"),
        (metadata.__name__, "_MEM_FORMAT_ENCODING", "mro"),
        ("torch", "Size", "__new__"),
        ("os", "path", "os"),
    ],
)
def test_getattr_of_anything_else_is_refused(module, kind, name, dcp, tmp_path):
    attack = through_getattr(module, kind, name)
    (dcp / ".metadata").write_bytes(attack)
    cannot_be_read(dcp)
    write_pickle(tmp_path / "states.pt", attack)
    with pytest.raises(UserError, match=r"states\.pt"):
        MappedFile(tmp_path / "states.pt", trust=False, stand_ins=_STAND_INS)


def write_pickle(file: Path, data: bytes) -> None:
    """Write a file of torch.save with a given pickle and no tensors."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in (("data.pkl", data), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", text)


def test_deepspeed_stage_of_python_3_11_2_is_read(tmp_path):
    file = tmp_path / "states.pt"
    stage = "deepspeed.runtime.zero.config", "ZeroStageEnum"
    write_pickle(file, through_getattr(*stage, "gradients"))
    assert MappedFile(file, trust=False, stand_ins=_STAND_INS).content == 2
    write_pickle(file, through_getattr(*stage, "__class__"))
    with pytest.raises(UserError, match="--trust_checkpoint"):
        MappedFile(file, trust=False, stand_ins=_STAND_INS)


# JSON and YAML

TEXTS = {"nested": "[" * 100_000, "digits": '{"a": %s}' % ("9" * 5000), "not UTF-8": '"\xff"', "not JSON": "{"}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["config.json", "lightning_gpt_tokenizer.json"])
def test_json_in_a_checkpoint(name, text, tiny_run, tmp_path, refused):
    folder = convert(open_checkpoint(tiny_run / "checkpoints" / "last.ckpt"), tmp_path / "canonical")
    (folder / name).write_bytes(TEXTS[text].encode("latin-1"))
    refused(sample.main, f"--checkpoint={folder}", mentions=[folder])


@pytest.mark.parametrize("text", TEXTS)
def test_json_of_other_flags(text, tmp_path, refused, text_file):
    file = tmp_path / "a.json"
    file.write_bytes(TEXTS[text].encode("latin-1"))
    refused(train.main, f"--tokenizer={file}", f"--data={text_file}", *SHORT, mentions=[file])
    refused(train.main, "--strategy=auto", f"--deepspeed_config={file}", f"--data={text_file}", *SHORT)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
YAMLS = {
    "nested": "seed: " + "[" * 10_000,
    "digits": "seed: " + "9" * 5000,
    "hexadecimal": "seed: 0x" + "f" * 5000,
    "aliases": BOMB,
    "contains itself": "seed: &a [*a]",
    "large": "a: 1\n" * 200_000,
    "date": "seed: 2026-99-99",
    "not UTF-8": "seed: \xff",
}


@pytest.mark.parametrize("text", YAMLS)
def test_yaml(text, tmp_path, tiny_run, refused):
    file = tmp_path / "run" / "config.yaml"
    shutil.copytree(tiny_run, file.parent)
    file.write_bytes(YAMLS[text].encode("latin-1"))
    refused(train.main, f"--config={file}", *SHORT, mentions=[file])
    refused(train.main, f"--resume={file.parent}", *SHORT, mentions=[file])
