"""Weights of other programs: both models compute the logits of transformers, from every format."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import mingpt.model
import nanogpt.model
import sample
import train
from lightning_gpt.checkpoint import find_checkpoint, open_checkpoint
from lightning_gpt.checkpoint.adapted import AdaptedCheckpoint, fields_for
from lightning_gpt.checkpoint.read.huggingface import is_hub_name
from lightning_gpt.checkpoint.write.hf_tokenizer import tokenizer_json
from lightning_gpt.implementations.registry import get_implementation
from lightning_gpt.tokenizers import CharTokenizer

transformers = pytest.importorskip("transformers")

SIZES = {"n_layer": 2, "n_head": 3, "n_embd": 12, "vocab_size": 20, "n_positions": 16}
MODELS = {"mingpt": mingpt.model.GPT, "nanogpt": nanogpt.model.GPT}
TURNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def hugging_face(**changes):
    """Build a random GPT-2 with transformers, in which no bias is 0 and no norm weight is 1."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(**SIZES | {"bos_token_id": 0, "eos_token_id": 0} | changes)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def saved(model, folder: Path, form: str = "safetensors") -> Path:
    if form == "bin":
        folder.mkdir(parents=True)
        model.config.save_pretrained(folder)
        mask = torch.ones(1, 1, 16, 16, dtype=torch.bool)  # older versions of transformers saved it
        torch.save(model.state_dict() | {"transformer.h.0.attn.bias": mask}, folder / "pytorch_model.bin")
    else:
        model.save_pretrained(folder, max_shard_size="8KB" if form == "shards" else "1GB")
    return folder


def original_state_dict(model) -> dict[str, torch.Tensor]:
    """Return the weights with the names and layout of minGPT and nanoGPT, including their attention masks."""
    weights = {name: w.t().contiguous() if name.endswith(TURNED) else w for name, w in model.state_dict().items()}
    mask = torch.ones(16, 16).tril().view(1, 1, 16, 16)
    return weights | {f"transformer.h.{i}.attn.bias": mask for i in range(2)}


def adapted(checkpoint, implementation: str, **fields) -> AdaptedCheckpoint:
    row = get_implementation(implementation)
    return AdaptedCheckpoint(checkpoint, row=row, fields=fields_for(row, checkpoint) | fields)


def logits(model, idx: torch.Tensor) -> torch.Tensor:
    """Return the logits of all positions; nanogpt computes them only if there are targets."""
    with torch.no_grad():
        return model.eval()(idx, idx)[0]


def assert_same_logits(model, theirs, *, length: int = 16) -> None:
    idx = torch.randint(0, 20, (3, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(idx).logits
    assert expected.std() > 0.5  # the logits are not trivial
    torch.testing.assert_close(logits(model, idx), expected, rtol=0, atol=1e-4)


@pytest.fixture
def refused(refused):
    """Return a function that calls train.py --dry_run, checks that it refuses, and returns the line."""
    return lambda *flags, mentions=(): refused(train.main, *flags, "--accelerator=cpu", "--dry_run", mentions=mentions)


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin"])
@pytest.mark.parametrize(("tied", "own"), [(True, "nanogpt"), (False, "mingpt")])
def test_hugging_face_folder_has_the_same_logits(tmp_path, form, tied, own):
    theirs = hugging_face(tie_word_embeddings=tied)
    checkpoint = open_checkpoint(find_checkpoint(str(saved(theirs, tmp_path / "hf", form)), which="best"))
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == {"safetensors": 1, "bin": 0}.get(form, 3)
    assert checkpoint.implementation == own and checkpoint.step == 0 and checkpoint.tokenizer is None
    assert_same_logits(checkpoint.module().model, theirs)
    assert_same_logits(adapted(checkpoint, "mingpt").module().model, theirs)
    assert_same_logits(adapted(checkpoint, own, block_size=5).module().model, theirs, length=5)


def test_hugging_face_folder_without_head_and_prefix(tmp_path):
    theirs = hugging_face()
    theirs.transformer.save_pretrained(tmp_path / "hf")
    assert_same_logits(open_checkpoint(tmp_path / "hf").module().model, theirs)


@pytest.mark.parametrize("implementation", MODELS)
def test_from_pretrained_has_the_same_logits(tmp_path, implementation):
    theirs = hugging_face()
    folder, cls = str(saved(theirs, tmp_path / "hf")), MODELS[implementation]
    assert_same_logits(cls.from_pretrained(folder), theirs)
    dropout = {"dropout": 0.3} if implementation == "nanogpt" else {"resid_pdrop": 0.3}
    short = cls.from_pretrained(folder, block_size=7, **dropout)
    assert_same_logits(short, theirs, length=7)
    assert short.config.block_size == 7 and next(iter(dropout)) in vars(short.config)
    assert short.transformer.h[0].mlp.dropout.p == 0.3
    for wrong, override in (("n_layer", {"n_layer": 3}), ("block_size=17", {"block_size": 17})):
        with pytest.raises(ValueError, match=wrong):
            cls.from_pretrained(folder, **override)


def test_from_pretrained_refuses_unsupported_settings(tmp_path):
    untied = str(saved(hugging_face(tie_word_embeddings=False), tmp_path / "untied"))
    assert_same_logits(mingpt.model.GPT.from_pretrained(untied), hugging_face(tie_word_embeddings=False))
    exact = str(saved(hugging_face(activation_function="gelu"), tmp_path / "exact"))
    assert_same_logits(nanogpt.model.GPT.from_pretrained(exact), hugging_face(activation_function="gelu"))
    wide = str(saved(hugging_face(n_inner=20), tmp_path / "wide"))
    for cls, folder, wrong in (
        (nanogpt.model.GPT, untied, "untied head"),
        (mingpt.model.GPT, exact, "tanh GELU"),
        (mingpt.model.GPT, wide, "n_inner"),
        (nanogpt.model.GPT, wide, "n_inner"),
    ):
        with pytest.raises(ValueError, match=wrong):
            cls.from_pretrained(folder)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_original_nanogpt_checkpoint_has_the_same_logits(tmp_path, prefix):
    theirs = hugging_face(activation_function="gelu")
    args = {"n_layer": 2, "n_head": 3, "n_embd": 12, "block_size": 16, "vocab_size": 20, "dropout": 0.2}
    if prefix:
        args["bias"] = True  # old checkpoints lack it
    state = {prefix + name: tensor for name, tensor in original_state_dict(theirs).items()}
    content = {"model": state, "optimizer": {"state": {}, "param_groups": []}, "model_args": args, "iter_num": 7}
    content |= {"best_val_loss": torch.tensor(1.5), "config": {"dataset": "shakespeare_char"}}
    (tmp_path / "out").mkdir()
    torch.save(content, tmp_path / "out" / "ckpt.pt")
    checkpoint = open_checkpoint(find_checkpoint(str(tmp_path / "out"), which="best"))
    assert (checkpoint.implementation, checkpoint.step) == ("nanogpt", 7)
    assert checkpoint.model_config["gelu"] == "exact" and "vocab_padding" not in checkpoint.model_config
    assert_same_logits(checkpoint.module().model, theirs)


def test_original_nanogpt_checkpoint_without_biases(tmp_path, text_file, refused):
    theirs = hugging_face(activation_function="gelu")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    state = {name: w for name, w in original_state_dict(theirs).items() if not name.endswith(".bias")}
    args = {"n_layer": 2, "n_head": 3, "n_embd": 12, "block_size": 16, "vocab_size": 20, "bias": False}
    torch.save({"model": state, "model_args": args}, tmp_path / "ckpt.pt")
    checkpoint = open_checkpoint(tmp_path / "ckpt.pt")
    assert_same_logits(checkpoint.module().model, theirs)
    assert_same_logits(adapted(checkpoint, "nanogpt", bias=True).module().model, theirs)
    with pytest.raises(ValueError, match="exact"):
        adapted(checkpoint, "mingpt")
    flags = ["--gelu=tanh", "--block_size=8", "--data", text_file]
    refused("--init_from", tmp_path / "ckpt.pt", *flags, mentions="--gelu tanh")


def test_padded_gpt2_vocabulary_of_nanogpt_is_detected(tmp_path):
    args = {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 4, "vocab_size": 50304, "bias": False}
    model = nanogpt.model.GPT(nanogpt.model.GPTConfig(**args))
    torch.save({"model": model.state_dict(), "model_args": args}, tmp_path / "ckpt.pt")
    checkpoint = open_checkpoint(tmp_path / "ckpt.pt")
    assert checkpoint.model_config["vocab_padding"] == 47 and checkpoint.tokenizer.name == "gpt2"


@pytest.mark.parametrize("source_of_n_head", ["config", "preset", "flag", None])
def test_original_mingpt_state_dict_has_the_same_logits(tmp_path, source_of_n_head, refused):
    theirs = hugging_face(tie_word_embeddings=False)
    torch.save(original_state_dict(theirs), tmp_path / "model.pt")
    if source_of_n_head == "config":  # minGPT writes the config before it resolves the preset
        theirs = hugging_face(tie_word_embeddings=False, n_layer=3, n_embd=48)
        weights = original_state_dict(theirs) | {"transformer.h.2.attn.bias": torch.ones(1, 1, 16, 16)}
        torch.save(weights, tmp_path / "model.pt")
        config = {"system": {}, "model": {"model_type": "gpt-nano", "n_layer": None, "n_head": None, "n_embd": None}}
        (tmp_path / "config.json").write_text(json.dumps(config))
    elif source_of_n_head == "preset":
        theirs = hugging_face(tie_word_embeddings=False, n_layer=3, n_embd=48)
        torch.save(original_state_dict(theirs), tmp_path / "model.pt")
    if source_of_n_head is None:
        refused("--init_from", tmp_path / "model.pt", mentions="--n_head")
        return
    checkpoint = open_checkpoint(tmp_path / "model.pt", n_head=3 if source_of_n_head == "flag" else None)
    assert (checkpoint.implementation, checkpoint.model_config["n_head"]) == ("mingpt", 3)
    assert_same_logits(checkpoint.module().model, theirs)


def test_tokenizer_of_another_size_than_the_embedding(tmp_path, capsys):
    for name, rows in (("more", 20), ("fewer", 3)):
        folder = saved(hugging_face(vocab_size=rows), tmp_path / name)
        (folder / "tokenizer.json").write_text(tokenizer_json(CharTokenizer("abcdefgh")))
    flags = ["--accelerator=cpu", "--max_new_tokens=300", "--temperature=50", "--prompt=h"]
    sample.main([f"--checkpoint={tmp_path / 'more'}", *flags])  # rows without a token are padding
    assert len(capsys.readouterr().out) == 302
    with pytest.raises(SystemExit):
        sample.main([f"--checkpoint={tmp_path / 'fewer'}", *flags])
    assert "token 7, but the model has 3" in capsys.readouterr().err


@pytest.mark.parametrize("own", ["mingpt", "nanogpt"])
def test_vocabulary_padding_is_never_sampled(tmp_path, own):
    """Check padding where all logits are far below 0, the logit of an all-zero row."""
    theirs = hugging_face(tie_word_embeddings=own == "nanogpt")
    with torch.no_grad():
        theirs.lm_head.weight[:, 0] = 1.0
        theirs.transformer.ln_f.bias[0], theirs.transformer.ln_f.weight[0] = -50.0, 0.0
    checkpoint = open_checkpoint(saved(theirs, tmp_path / "hf"))
    plain = checkpoint.module().model.eval()
    padded = adapted(checkpoint, own, vocab_size=64, vocab_padding=44).module().model.eval()
    idx = torch.randint(0, 20, (4, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = (float(model(idx[:, :-1], idx[:, 1:])[1]) for model in (plain, padded))
    assert logits(plain, idx[:, :4]).max() < -30
    assert 1e-3 < after - before < math.log(64 / 20) + 1e-4
    torch.testing.assert_close(logits(padded, idx[:, :4])[..., :20], logits(plain, idx[:, :4]))
    torch.manual_seed(0)
    assert padded.generate(idx[:, :3], 50, do_sample=True, temperature=50.0).max() < 20
    again = adapted(adapted(checkpoint, own, vocab_size=64, vocab_padding=44), own, vocab_size=20, vocab_padding=0)
    assert_same_logits(again.module().model, theirs)  # the padding is removed again


@pytest.mark.parametrize(
    ("changes", "flags", "words"),
    [
        ({"n_inner": 20}, [], "n_inner is 20"),
        ({"activation_function": "relu"}, [], "activation_function"),
        ({"scale_attn_by_inverse_layer_idx": True}, [], "scale_attn_by_inverse_layer_idx"),
        ({"layer_norm_epsilon": 1e-6}, [], "layer_norm_epsilon"),
        ({"tie_word_embeddings": False, "activation_function": "gelu"}, [], "nanogpt always has tied_head=True"),
        ({"tie_word_embeddings": False}, ["--implementation=nanogpt"], "always has tied_head=True"),
        ({"activation_function": "gelu"}, ["--implementation=mingpt"], "mingpt always has gelu=tanh"),
        ({}, ["--block_size=17"], "--block_size 17"),
        ({}, ["--n_layer=3"], "--n_layer 3"),
        ({}, ["--n_head=4"], "--n_head 4"),
        ({}, ["--model_type=gpt2"], "contradicts"),
        ({}, ["--gelu=exact"], "trained with --gelu tanh, and --gelu exact"),
        ({}, ["--bias=false"], "trained with --bias True, and --bias False"),
        ({}, ["--tokenizer=byte"], "vocabulary of 20"),
        ({}, ["--resume=runs/x"], "--init_from starts a new run"),
        ({}, ["--implementation=tests.checkpoint.test_weights_in:Other"], "layout"),
        ({}, ["--implementation=moderngpt"], "GPT-2's layout, and moderngpt NanoChat's"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, text_file, refused, changes, flags, words):
    folder = saved(hugging_face(**changes), tmp_path / "hf")
    flags = [*flags, "--data", text_file, *([] if any("block" in flag for flag in flags) else ["--block_size=8"])]
    refused("--init_from", folder, *flags, mentions=words)


def test_folders_that_are_not_gpt2_are_refused(tmp_path, text_file, refused):
    folder = saved(hugging_face(), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    for changed, words in (
        (config | {"model_type": "bert"}, "model_type bert is not supported; these are: gpt2, nanochat"),
        (config | {"n_head": "x"}, "n_head"),
    ):
        (folder / "config.json").write_text(json.dumps(changed))
        refused("--init_from", folder, mentions=words)
    (folder / "config.json").write_text(json.dumps(config | {"n_embd": 24}))
    refused("--init_from", folder, "--block_size=8", "--data", text_file, mentions="does not fit")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "other")
    refused("--init_from", folder, mentions="model.safetensors")
    index = {"weight_map": {"transformer.wte.weight": "../other"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("--init_from", folder, mentions="its own folder")


@dataclass
class OtherConfig:
    vocab_size: int
    block_size: int


class Other(torch.nn.Embedding):
    """A model with another layout than GPT-2's."""

    def __init__(self, config: OtherConfig) -> None:
        super().__init__(config.vocab_size, config.vocab_size)

    def forward(self, idx, targets=None):
        logits = super().forward(idx)
        return logits, None if targets is None else torch.nn.functional.cross_entropy(logits.mT, targets)


class Planted:
    """Write a file when unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("name", ["ckpt.pt", "hf/pytorch_model.bin"])
def test_files_that_could_run_code_are_refused(tmp_path, refused, name):
    saved(hugging_face(), tmp_path / "hf", "bin")
    torch.save({"model": Planted(tmp_path / "ran"), "model_args": {}}, tmp_path / name)
    refused("--init_from", (tmp_path / name).parent, mentions="--trust_checkpoint")
    assert not (tmp_path / "ran").exists()


def test_hub_names_are_found_in_the_cache(tmp_path, monkeypatch, refused):
    constants = pytest.importorskip("huggingface_hub.constants")
    names = ("gpt2", "gpt2-xl", "someone/their-gpt2.x", "gpt3", "runs/a/b", "./gpt2", "~/gpt2", "/gpt2")
    assert [is_hub_name(name) for name in names] == [True, True, True, False, False, False, False, False]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    refused("--init_from", "gpt2", mentions="config.json and model.safetensors")
    theirs = hugging_face()
    saved(theirs, tmp_path / "models--gpt2" / "snapshots" / "0123abc")  # the layout of the hub's cache
    (tmp_path / "models--gpt2" / "refs").mkdir()
    (tmp_path / "models--gpt2" / "refs" / "main").write_text("0123abc")
    assert_same_logits(open_checkpoint(find_checkpoint("gpt2", which="best")).module().model, theirs)
    local = saved(hugging_face(tie_word_embeddings=False), tmp_path / "gpt2")
    assert find_checkpoint("gpt2", which="best") == local
