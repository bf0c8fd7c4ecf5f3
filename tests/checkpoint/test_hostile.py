"""Files from a stranger run no code: a name in them is imported only if the user typed it, or made the file."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

import evaluate
import lightning_gpt
import prepare
import sample
import train
from lightning_gpt.checkpoint import convert, open_checkpoint
from lightning_gpt.checksums import MANIFEST
from lightning_gpt.config import UserError
from lightning_gpt.models import GPTModule
from lightning_gpt.trust import is_own, remember_run

EVIL = "from pathlib import Path\nPath(__file__).with_name('mark').touch()\n"
MODEL = """
from dataclasses import dataclass
import torch.nn.functional as F
from torch import nn

@dataclass
class Sizes:
    vocab_size: int
    block_size: int
    {field}: int = 8

class MyGPT(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocab_size, 8)
        self.head = nn.Linear(8, sizes.vocab_size)

    def forward(self, idx, targets=None):
        logits, loss = self.head(self.embedding(idx)), None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss
"""
SHORT = ["--max_steps=6", "--accelerator=cpu", "--sample_tokens=0"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """Work in an empty folder that is searched for modules, as the folder of train.py is, with an empty cache."""
    monkeypatch.setenv("LIGHTNING_GPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(str(tmp_path / "here"))
    before = set(sys.modules)
    yield tmp_path / "here"
    for name in set(sys.modules) - before:  # modules of the same names come with other tests
        if name.partition(".")[0] in ("dl", "mine"):
            del sys.modules[name]


@pytest.fixture
def dl(tiny_run, here) -> Path:
    """Return a copy of a run, as if downloaded, with dl/evil.py."""
    folder = Path(shutil.copytree(tiny_run, here / "dl"))
    (folder / "evil.py").write_text(EVIL)
    return folder


def change_header(file: Path, **changes: object) -> None:
    content = torch.load(file, weights_only=True)
    for part in ("hyper_parameters", "TokenData"):
        content[part] |= {name: value for name, value in changes.items() if name in content[part]}
    torch.save(content, file)


def change_config(run: Path, **changes: object) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | changes))


LAST = "dl/checkpoints/last.ckpt"
DOORS = {
    "resume": (train, ["--resume=dl", *SHORT], "type --implementation dl.evil:GPT"),
    "resume another's settings": (train, [f"--resume={LAST}", "--implementation=nanogpt", *SHORT], "type --implem"),
    "init_from": (train, [f"--init_from={LAST}"], "type --implementation dl.evil:GPT"),
    "init_from for another": (train, [f"--init_from={LAST}", "--implementation=mingpt"], "type --implementation"),
    "embeddings of another": (train, [f"--pretrained_embeddings={LAST}", "--data=dl/config.yaml"], "--trust"),
    "evaluate": (evaluate, [f"--checkpoint={LAST}"], "--trust_checkpoint"),
    "convert": (evaluate, [f"--checkpoint={LAST}", "--convert_only"], "--trust_checkpoint"),
    "export": (evaluate, [f"--checkpoint={LAST}", "--export=pt", "--out=out"], "--trust_checkpoint"),
    "sample": (sample, ["--checkpoint=dl"], "--trust_checkpoint"),
    "embeddings": (prepare, ["embeddings", LAST, "--out=wte.npy"], "--trust_checkpoint"),
}


@pytest.mark.parametrize("door", DOORS)
def test_header_names_no_code(door, dl, refused):
    for name in ("best", "last"):
        change_header(dl / "checkpoints" / f"{name}.ckpt", implementation="dl.evil:GPT")
    main, flags, mentions = DOORS[door]
    refused(main.main, *flags, mentions=["dl.evil:GPT", mentions])
    assert not (dl / "mark").exists()


def test_python_interface_imports_no_code(dl):
    file = dl / "checkpoints" / "last.ckpt"
    change_header(file, implementation="dl.evil:GPT")
    for load in (lightning_gpt.load, GPTModule.load_from_checkpoint):
        with pytest.raises(UserError, match=r"dl\.evil:GPT"):
            load(file)
    assert not (dl / "mark").exists()
    with pytest.raises(UserError, match="has no class GPT"):  # imported now
        GPTModule.load_from_checkpoint(file, implementation="dl.evil:GPT")
    assert (dl / "mark").exists()


@pytest.mark.parametrize("field", ["implementation", "data"])
def test_saved_settings_name_no_code(field, dl, refused):
    change_config(dl, **{field: "dl.evil:GPT"})
    mentions = ["dl/config.yaml", f"type --{field} dl.evil:GPT"]
    refused(train.main, "--resume=dl", *SHORT, mentions=mentions)
    other = {"implementation": "--data=stdlib", "data": "--implementation=mingpt"}[field]
    refused(train.main, "--resume=dl", other, *SHORT, mentions=mentions)
    assert not (dl / "mark").exists()
    # A file that the user typed counts as typed.
    refused(train.main, "--resume=dl", "--config=dl/config.yaml", *SHORT, mentions="dl.evil has no")
    assert (dl / "mark").exists()


def test_saved_settings_choose_no_deepspeed_config(dl, refused):
    """DeepSpeed imports the classes that torch_autocast.lower_precision_safe_modules names."""
    (dl / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    change_config(dl, deepspeed_config="dl/ds.json")
    refused(train.main, "--resume=dl", *SHORT, mentions="type --deepspeed_config dl/ds.json")


def test_saved_settings_do_not_declare_trust(dl, refused):
    file, mark = dl / "checkpoints" / "last.ckpt", dl / "unpickled"

    class Foreign:
        def __reduce__(self):
            return Path.touch, (mark,)

    torch.save(torch.load(file, weights_only=True) | {"extra": Foreign()}, file)
    change_config(dl, trust_checkpoint=True)
    refused(train.main, "--resume=dl", *SHORT, mentions="--trust_checkpoint")
    assert not mark.exists()


def test_task_in_header_is_not_imported(dl, refused, text_file):
    change_header(dl / "checkpoints" / "best.ckpt", data="dl.evil:Task")
    refused(evaluate.main, "--checkpoint=dl", "--accelerator=cpu", mentions=["dl.evil:Task", "type --data"])
    sample.main(["--checkpoint=dl", "--max_new_tokens=1", "--accelerator=cpu"])  # needs no data
    evaluate.main(["--checkpoint=dl", f"--data={text_file}", "--accelerator=cpu"])
    assert not (dl / "mark").exists()


def test_converted_folder_names_no_code(dl, refused):
    folder = convert(open_checkpoint(dl / "checkpoints" / "last.ckpt"), dl / "checkpoints" / "last")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"implementation": "dl.evil:GPT"}))
    refused(sample.main, f"--checkpoint={folder}", mentions=["dl.evil:GPT", "--trust_checkpoint"])
    assert not (dl / "mark").exists()


def test_hugging_face_folder_runs_no_code(saved_model, export, here, byte_level_file):
    """Check that what makes transformers import a folder's own code is not read."""
    from lightning_gpt.tokenizers import build_tokenizer

    tokenizer = build_tokenizer(str(byte_level_file), corpus=None, source="")
    folder, _ = export(saved_model("nanogpt", tokenizer), "hf", here / "dl")
    (folder / "evil.py").write_text(EVIL)
    for name in ("lightning_gpt_tokenizer.json", MANIFEST):
        (folder / name).unlink()
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        content |= {"auto_map": dict.fromkeys(("AutoModelForCausalLM", "AutoTokenizer"), "dl.evil--evil.GPT")}
        content |= {"tokenizer_class": "dl.evil.GPT", "architectures": ["dl.evil.GPT"]}
        (folder / name).write_text(json.dumps(content))
    module, found = lightning_gpt.load(folder)
    assert found.vocab_size == tokenizer.vocab_size and module.model_config["n_layer"] == 2
    assert not (folder / "mark").exists()


# The user's own


def test_own_model_needs_no_flag_and_a_moved_run_one(here, text_file, refused, tiny_flags, capsys):
    (here / "mine.py").write_text(MODEL.format(field="width"))
    flags = [f for f in tiny_flags if not f.startswith("--n_")]
    train.main([*flags, f"--data={text_file}", "--implementation=mine:MyGPT", "--out_dir=run"])
    train.main(["--resume=run", "--max_steps=5"])
    evaluate.main(["--checkpoint=run", "--accelerator=cpu"])
    sample.main(["--checkpoint=run", "--max_new_tokens=1", "--accelerator=cpu"])
    assert GPTModule.load_from_checkpoint("run/checkpoints/last.ckpt").implementation.name == "mine:MyGPT"
    Path("run").rename("moved")
    refused(train.main, "--resume=moved", *SHORT, mentions="type --implementation mine:MyGPT")
    refused(evaluate.main, "--checkpoint=moved", mentions="--trust_checkpoint")
    train.main(["--resume=moved", "--implementation=mine:MyGPT", *SHORT])  # now it is the user's own
    evaluate.main(["--checkpoint=moved", "--accelerator=cpu"])
    shutil.copytree("moved", "copy")
    evaluate.main(["--checkpoint=copy", "--accelerator=cpu", "--trust_checkpoint"])


def test_own_is_what_a_run_writes_and_nothing_else(here):
    remember_run(Path())
    written = "best.ckpt last.ckpt best last last.ckpt.old step-360.ckpt step_360.ckpt step=360".split()
    assert all(is_own(Path("checkpoints", name)) for name in written) and is_own(Path("config.yaml"))
    others = ["other.ckpt", "model.pt", "dl/checkpoints/last.ckpt", "dl/config.yaml", "checkpoints/x.ckpt"]
    others += ["checkpoints", "checkpoints/best/x.ckpt", "checkpoints/dl/last.ckpt", "last.ckpt", "checkpoints/best.py"]
    assert not any(is_own(Path(name)) for name in others)
    Path("dl").mkdir()
    Path("dl/link").symlink_to(here, target_is_directory=True)
    assert is_own(Path("dl/link/checkpoints/last.ckpt"))  # the same file


def test_links_out_of_a_checkpoint_are_refused(dl, refused, here, tmp_path):
    folder = convert(open_checkpoint(dl / "checkpoints" / "last.ckpt"), tmp_path / "converted")
    Path("link").symlink_to(folder, target_is_directory=True)
    sample.main(["--checkpoint=link", "--max_new_tokens=1", "--accelerator=cpu"])  # what was typed may be a link
    hub = tmp_path / "models--a--b" / "snapshots" / "1"
    shutil.copytree(folder, hub)
    (hub.parents[1] / "blobs").mkdir()
    for file in (hub / "model.safetensors", folder / "model.safetensors"):
        file.rename(hub.parents[1] / "blobs" / file.parent.name)
        file.symlink_to(hub.parents[1] / "blobs" / file.parent.name)
    sample.main([f"--checkpoint={hub}", "--max_new_tokens=1", "--accelerator=cpu"])
    refused(sample.main, f"--checkpoint={folder}", mentions=["model.safetensors", "symbolic link"])


def test_callbacks_name_no_files_elsewhere(dl, refused):
    """ModelCheckpoint deletes the file that it takes for the earlier best one."""
    file = dl / "checkpoints" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    (state,) = (state for state in content["callbacks"].values() if "best_model_score" in state)
    state["best_model_path"] = "checkpoints/../../victim"
    torch.save(content, file)
    refused(train.main, "--resume=dl", *SHORT, mentions="victim")


@pytest.mark.parametrize("field", ["seed", "data", "config", "max_steps"])
def test_field_named_like_a_flag_is_refused(field, here, refused):
    (here / "mine.py").write_text(MODEL.format(field=field))
    mentions = ["--implementation mine:MyGPT", f"field {field} ", "rename"]
    refused(train.main, "--implementation=mine:MyGPT", mentions=mentions)
