"""Exported weights: the target programs open what ``evaluate.py --export`` writes."""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import evaluate
import train
from lightning_gpt.checkpoint import open_checkpoint
from lightning_gpt.models import GPTModule
from lightning_gpt.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer
from lightning_gpt.tokenizers.tables import load_encoding
from lightning_gpt.trust import remember_run
from tests.launching import run_python

transformers = pytest.importorskip("transformers")

REPO = Path(__file__).parents[2]
EXACT = {"gelu": "exact"}
MODELS = {
    "mingpt": ("mingpt", {}),
    "mingpt padded": ("mingpt", {"vocab_padding": 5}),
    "nanogpt": ("nanogpt", EXACT),
    "nanogpt tanh": ("nanogpt", {"gelu": "tanh"}),
    "nanogpt no bias": ("nanogpt", EXACT | {"bias": False}),
    "nanogpt padded, tanh, no bias": ("nanogpt", {"gelu": "tanh", "bias": False, "vocab_padding": 5}),
}
CHAR = CharTokenizer("abc\n ")


@pytest.fixture(scope="session")
def nano_run(tmp_path_factory, text_file, tiny_flags) -> Path:
    """Train a tiny nanogpt and return its run folder; read-only."""
    out_dir = tmp_path_factory.mktemp("runs") / "nano"
    train.main([*tiny_flags, "--implementation=nanogpt", f"--data={text_file}", f"--out_dir={out_dir}"])
    return out_dir


def logits(checkpoint: Path, idx: torch.Tensor, vocab_size: int) -> torch.Tensor:
    model = open_checkpoint(checkpoint).module().model.eval()
    with torch.no_grad():
        return model(idx, idx)[0][..., :vocab_size]


def assert_opens_in_hf(folder: Path, checkpoint: Path) -> torch.nn.Module:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    idx = torch.randint(model.config.vocab_size, (2, model.config.max_position_embeddings))
    with torch.no_grad():
        theirs = model.eval()(idx).logits
    torch.testing.assert_close(theirs, logits(checkpoint, idx, model.config.vocab_size), atol=1e-4, rtol=0)
    return model


# Hugging Face


@pytest.mark.parametrize("name", MODELS)
def test_hf_export_has_the_same_logits(saved_model, export, name):
    implementation, fields = MODELS[name]
    checkpoint = saved_model(implementation, **fields)
    folder, _ = export(checkpoint, "hf")
    model = assert_opens_in_hf(folder, checkpoint)
    tied = implementation == "nanogpt"
    assert model.config.vocab_size == model.transformer.wte.weight.shape[0] == 5
    assert model.config.tie_word_embeddings == tied == (model.lm_head.weight is model.transformer.wte.weight)
    assert (model.transformer.ln_f.bias.abs().max() == 0) == (fields.get("bias") is False)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) != tied
    # The generation config must not have GPT-2's end-of-text id, which a vocabulary of 5 lacks.
    assert model.generate(torch.zeros(1, 2, dtype=torch.long), max_new_tokens=3, do_sample=False).shape == (1, 5)
    assert model.config.eos_token_id is None


def test_hf_export_keeps_the_dtype(saved_model, export):
    folder, _ = export(saved_model("nanogpt", dtype=torch.bfloat16, bias=False), "hf")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()) and {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("run", ["tiny_run", "nano_run"])
def test_hf_export_of_a_run(request, export, run):
    checkpoint = request.getfixturevalue(run) / "checkpoints" / "best.ckpt"
    folder, stderr = export(request.getfixturevalue(run), "hf")
    assert_opens_in_hf(folder, checkpoint)
    assert stderr == "" and open_checkpoint(folder).hash() == open_checkpoint(checkpoint).hash()
    tokenizer, theirs = open_checkpoint(checkpoint).tokenizer, transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("the cat sat\n\n on  a mat", "moon", " "):
        ids = tokenizer.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text
    assert len(theirs) == tokenizer.vocab_size and theirs.eos_token is None
    assert open_checkpoint(checkpoint).tokenizer.to_dict() == json.loads(
        (folder / "lightning_gpt_tokenizer.json").read_text()
    )
    assert theirs("\u00fc")["input_ids"] == tokenizer.encode(" ").tolist()


def test_hf_export_without_a_tokenizer_warns(saved_model, export):
    checkpoint = saved_model("mingpt", None)
    folder, stderr = export(checkpoint, "hf")
    assert_opens_in_hf(folder, checkpoint)
    assert stderr.count("\n") == 1 and "AutoTokenizer cannot open" in stderr and str(checkpoint) in stderr


@pytest.mark.parametrize("implementation", ["mingpt", "nanogpt"])
def test_hf_export_of_a_fine_tuned_gpt2(export, text_file, byte_level_file, tmp_path, implementation):
    """Fine-tune a GPT-2 of transformers with a padded vocabulary, and export it again."""
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=300, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config)
    theirs.save_pretrained(tmp_path / "gpt2")
    shutil.copy(byte_level_file, tmp_path / "gpt2" / "tokenizer.json")
    run = tmp_path / "run"
    flags = "--block_size=16 --batch_size=4 --max_steps=4 --eval_interval=4 --eval_batches=2 --learning_rate=1e-2"
    flags += " --warmup_steps=0 --logger=none --accelerator=cpu --sample_tokens=0 --pad_vocab"
    start = [f"--init_from={tmp_path / 'gpt2'}", f"--implementation={implementation}"]
    train.main([*flags.split(), *start, f"--data={text_file}", f"--out_dir={run}"])
    checkpoint = run / "checkpoints" / "best.ckpt"
    folder, _ = export(checkpoint, "hf")
    tuned = assert_opens_in_hf(folder, checkpoint)
    assert tuned.config.vocab_size == 300 and open_checkpoint(checkpoint).model_config["vocab_size"] == 320
    assert tuned.config.activation_function in ("gelu_new", "gelu_pytorch_tanh") and tuned.config.eos_token_id == 0
    idx = transformers.AutoTokenizer.from_pretrained(folder)(text_file.read_text()[:200], return_tensors="pt").input_ids
    idx = idx[:, :16]
    with torch.no_grad():
        before, after = (model.eval()(idx, labels=idx).loss for model in (theirs, tuned))
    assert after < before - 0.1


@pytest.mark.slow
def test_hf_export_of_a_sharded_checkpoint(export, text_file, tmp_path):
    flags = "--strategy=fsdp --devices=2 --accelerator=cpu --implementation=nanogpt --n_layer=2 --n_head=3 --n_embd=9"
    flags += " --block_size=15 --max_steps=2 --eval_interval=2 --eval_batches=1 --sample_tokens=0 --logger=none"
    command = [REPO / "train.py", *flags.split(), f"--data={text_file}", f"--out_dir={tmp_path / 'run'}"]
    done = run_python(*command, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert checkpoint.is_dir()
    assert_opens_in_hf(export(checkpoint, "hf")[0], checkpoint)
    content = torch.load(export(checkpoint, "nanogpt")[0] / "ckpt.pt")
    assert len(content["optimizer"]["state"]) == sum(len(g["params"]) for g in content["optimizer"]["param_groups"])


# Our own forms


@pytest.mark.parametrize("run", ["tiny_run", "nano_run"])
def test_safetensors_export_is_the_canonical_form(request, export, run):
    checkpoint = request.getfixturevalue(run) / "checkpoints" / "best.ckpt"
    folder, _ = export(checkpoint, "safetensors")
    before, after = open_checkpoint(checkpoint), open_checkpoint(folder)
    assert after.hash() == before.hash() and after.step == before.step == 4 and after.data == before.data
    assert after.tokenizer.to_dict() == before.tokenizer.to_dict()


def test_pt_export_keeps_the_number_of_heads(saved_model, export):
    path = saved_model("mingpt", n_layer=3, n_head=4, n_embd=48)  # the preset gpt-nano of this size has 3 heads
    assert open_checkpoint(export(path, "pt")[0] / "model.pt").model_config["n_head"] == 4


@pytest.mark.parametrize("implementation", ["mingpt", "nanogpt"])
@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_export_removes_vocabulary_padding(saved_model, export, implementation, form):
    checkpoint = saved_model(implementation, vocab_padding=5)
    folder, _ = export(checkpoint, form)
    config = json.loads((folder / "config.json").read_text())["model_config"]
    assert config["vocab_size"] == 5 and config["vocab_padding"] == 0
    idx = torch.tensor([[0, 4, 2]])
    model = GPTModule(implementation, model_config=config).model
    if form == "pt":
        state = torch.load(folder / "model.pt")
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in state.values())
        model.load_state_dict(state)
    else:
        model = open_checkpoint(folder).module().model
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(idx, idx)[0], logits(checkpoint, idx, 5))


MY_MODEL = """
from dataclasses import dataclass
from torch import nn

@dataclass
class Sizes:
    vocab_size: int
    block_size: int

class MyGPT(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.all = nn.Embedding(sizes.vocab_size, sizes.vocab_size)

    def forward(self, idx, targets=None):
        return self.all(idx), None
"""


@pytest.fixture
def foreign(tmp_path, monkeypatch, saved_model):
    """Save a checkpoint of a user's own model."""
    (tmp_path / "exported_model.py").write_text(MY_MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "exported_model", raising=False)
    (tmp_path / "run").mkdir()
    remember_run(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir()
    return saved_model("exported_model:MyGPT").rename(tmp_path / "run" / "checkpoints" / "last.ckpt")


def test_export_of_a_foreign_model(foreign, export):
    weight = open_checkpoint(foreign).weight("all.weight")
    assert torch.equal(torch.load(export(foreign, "pt")[0] / "model.pt")["all.weight"], weight)
    exported = open_checkpoint(export(foreign, "safetensors")[0], typed=["exported_model:MyGPT"])
    assert torch.equal(exported.weight("all.weight"), weight)


# The original nanoGPT


def original_layout(args: dict) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the original nanoGPT's parameters in its order, without the tied head."""
    wide, bias = args["n_embd"], args["bias"]

    def pair(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})

    names = {"transformer.wte.weight": (args["vocab_size"], wide), "transformer.wpe.weight": (args["block_size"], wide)}
    for block in (f"transformer.h.{i}" for i in range(args["n_layer"])):
        names |= pair(f"{block}.ln_1", wide)
        names |= pair(f"{block}.attn.c_attn", 3 * wide, wide) | pair(f"{block}.attn.c_proj", wide, wide)
        names |= pair(f"{block}.ln_2", wide)
        names |= pair(f"{block}.mlp.c_fc", 4 * wide, wide) | pair(f"{block}.mlp.c_proj", wide, 4 * wide)
    return names | pair("transformer.ln_f", wide)


def read_as_original_nanogpt(folder: Path) -> tuple[dict, torch.nn.Module]:
    """Return the content of ckpt.pt, and the model; fail where nanoGPT's sample.py would."""
    content = torch.load(folder / "ckpt.pt")
    args = content["model_args"]
    assert set(args) == {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    shapes = original_layout(args)
    state = content["model"]
    assert {k: tuple(v.shape) for k, v in state.items()} == shapes | {
        "lm_head.weight": shapes["transformer.wte.weight"]
    }
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()
    sizes = {name: args[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    config = transformers.GPT2Config(
        **sizes, n_positions=args["block_size"], activation_function="gelu", bos_token_id=None, eos_token_id=None
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        value = state.get(name, torch.zeros_like(parameter))
        square_or_wide = value.dim() == 2 and ".h." in name
        parameter.data = value.t().contiguous() if square_or_wide else value
    return content, model


@pytest.mark.parametrize("fields", [EXACT, EXACT | {"bias": False, "vocab_padding": 5, "dropout": 0.1}])
def test_nanogpt_export_has_the_same_logits(saved_model, export, fields):
    checkpoint = saved_model("nanogpt", **fields)
    folder, _ = export(checkpoint, "nanogpt")
    content, model = read_as_original_nanogpt(folder)
    idx = torch.randint(5, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(model(idx).logits, logits(checkpoint, idx, 5), atol=1e-4, rtol=0)
    assert content["iter_num"] == 7 and content["model_args"]["dropout"] == fields.get("dropout", 0.0)
    # nanoGPT's sample.py opens this path, relative to its own folder.
    meta = pickle.loads(Path(os.path.join("data", content["config"]["dataset"], "meta.pkl")).read_bytes())
    assert meta["vocab_size"] == 5 and [meta["stoi"][c] for c in "cab"] == CHAR.encode("cab").tolist()
    assert "".join(meta["itos"][i] for i in (0, 3, 2)) == CHAR.decode([0, 3, 2])
    again = open_checkpoint(folder / "ckpt.pt")
    assert again.tokenizer is not None and again.tokenizer.to_dict() == CHAR.to_dict()


def test_nanogpt_export_has_the_optimizer_state(nano_run, export):
    checkpoint = nano_run / "checkpoints" / "last.ckpt"
    folder, _ = export(checkpoint, "nanogpt")
    content, _ = read_as_original_nanogpt(folder)
    again = open_checkpoint(folder / "ckpt.pt")
    assert again.hash() == open_checkpoint(checkpoint).hash()
    header = torch.load(checkpoint)
    scores = [state["best_model_score"] for state in header["callbacks"].values() if "best_model_score" in state]
    assert content["best_val_loss"] == pytest.approx(min(float(s) for s in scores if s is not None))
    # nanoGPT's parameter groups: tensors of two dimensions, then the rest.
    shapes = original_layout(content["model_args"])
    groups = [[n for n in shapes if len(shapes[n]) == 2], [n for n in shapes if len(shapes[n]) == 1]]
    parameters = {n: torch.nn.Parameter(content["model"][n].clone()) for n in shapes}
    adamw = torch.optim.AdamW([{"params": [parameters[n] for n in names]} for names in groups])
    adamw.load_state_dict(content["optimizer"])
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1, 0.0]
    theirs = header["optimizer_states"][0]
    names = [name for group in theirs["param_groups"] for name in group["param_names"]]
    indices = [index for group in theirs["param_groups"] for index in group["params"]]
    for name, index in zip(names, indices, strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(adamw.state[parameters[name]][key], theirs["state"][index][key]), name
    sum(p.square().sum() for p in parameters.values()).backward()
    adamw.step()


def test_nanogpt_export_with_gpt2_tokens(saved_model, export):
    folder, _ = export(saved_model("nanogpt", GPT2Tokenizer(), **EXACT), "nanogpt")
    assert not (folder / "meta.pkl").exists()  # without it, nanoGPT uses GPT-2's tokens


# Refusals, and existing folders


@pytest.fixture
def refused(refused, tmp_path):
    """Return a function that calls evaluate.py, and checks that it refuses and creates no file."""

    def call(*flags: object, mentions: Sequence[object]) -> None:
        before = sorted(tmp_path.rglob("*"))
        refused(evaluate.main, *flags, mentions=mentions)
        assert sorted(tmp_path.rglob("*")) == before

    return call


@pytest.mark.parametrize(
    ("implementation", "tokenizer", "fields", "mentions"),
    [
        ("mingpt", CHAR, {}, ["the tanh GELU or an untied head", "mingpt", "--export hf"]),
        ("nanogpt", CHAR, {"gelu": "tanh"}, ["the tanh GELU", "--export hf"]),
        ("nanogpt", ByteTokenizer(), {}, ["byte tokenizer", "char and gpt2"]),
    ],
)
def test_nanogpt_export_refuses_unsupported_models(
    saved_model, refused, tmp_path, implementation, tokenizer, fields, mentions
):
    checkpoint = saved_model(implementation, tokenizer, **fields)
    out = tmp_path / "new" / "out"
    refused(f"--checkpoint={checkpoint}", "--export=nanogpt", f"--out={out}", mentions=(checkpoint, *mentions))


@pytest.mark.parametrize("form", ["hf", "nanogpt"])
def test_export_of_a_foreign_layout_is_refused(foreign, refused, tmp_path, form):
    mentions = ("exported_model:MyGPT", "GPT-2's", "layout")
    refused(f"--checkpoint={foreign}", f"--export={form}", f"--out={tmp_path / 'out'}", mentions=mentions)


def test_export_without_tables_is_refused(saved_model, refused, tmp_path, monkeypatch):
    checkpoint = saved_model("nanogpt", GPT2Tokenizer())
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    load_encoding.cache_clear()
    refused(f"--checkpoint={checkpoint}", "--export=hf", f"--out={tmp_path / 'out'}", mentions=["tiktoken"])


def test_conflicting_export_flags_are_refused(saved_model, refused, tmp_path):
    checkpoint = f"--checkpoint={saved_model('mingpt')}"
    out = f"--out={tmp_path / 'out'}"
    refused(checkpoint, "--export=hf", mentions=["--out", "give both"])
    refused(checkpoint, out, mentions=["--export", "give both"])
    refused(checkpoint, "--export=onnx", out, mentions=["onnx", "hf, safetensors, pt, nanogpt"])
    refused(checkpoint, "--export=hf", out, "--convert_only", mentions=["--convert_only", "give one"])


def test_export_into_other_folders_is_refused(saved_model, refused, export, tmp_path):
    checkpoint = saved_model("mingpt")
    mine = tmp_path / "mine"
    mine.mkdir()
    export(checkpoint, "hf", mine)  # an empty folder is accepted
    export(checkpoint, "pt", mine)
    assert not (mine / "model.safetensors").exists() and (mine / "model.pt").exists()
    (mine / "notes.txt").write_text("my own")
    refused(f"--checkpoint={checkpoint}", "--export=hf", f"--out={mine}", mentions=[mine, "notes.txt"])
    assert (mine / "notes.txt").read_text() == "my own"
    refused(f"--checkpoint={checkpoint}", "--export=hf", f"--out={checkpoint}", mentions=[checkpoint])
    refused(f"--checkpoint={checkpoint}", "--export=hf", f"--out={mine / 'model.pt'}", mentions=["model.pt is a file"])
    whole, _ = export(checkpoint, "safetensors")
    refused(f"--checkpoint={whole}", "--export=hf", f"--out={whole}", mentions=["must not contain"])
    assert open_checkpoint(whole).hash() == open_checkpoint(checkpoint).hash()


def test_failed_export_leaves_the_earlier_one(saved_model, refused, export, tmp_path, monkeypatch):
    checkpoint = saved_model("nanogpt")
    folder, _ = export(checkpoint, "pt")
    state = torch.load(folder / "model.pt")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    refused(f"--checkpoint={checkpoint}", "--export=pt", f"--out={folder}", mentions=["No space left", folder])
    monkeypatch.undo()
    assert torch.load(folder / "model.pt").keys() == state.keys()
