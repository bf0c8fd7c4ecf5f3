"""Architecture adapters: config and weights map both ways; NanoChat folders are read and written."""

import json
from ast import literal_eval
from pathlib import Path

import pytest
import torch

import evaluate
import sample
import train
from lightning_gpt.checkpoint import open_checkpoint
from lightning_gpt.checkpoint.architectures import ARCHITECTURES, architecture_of, to_hugging_face
from lightning_gpt.checkpoint.base import empty_model
from lightning_gpt.checkpoint.write.hf_tokenizer import tokenizer_json
from lightning_gpt.implementations.registry import IMPLEMENTATIONS, get_implementation
from lightning_gpt.tokenizers import CharTokenizer

transformers = pytest.importorskip("transformers")

SIZES = {"n_layer": 11, "n_head": 2, "n_embd": 12, "vocab_size": 7, "block_size": 6}
NANOCHAT = {
    "vocab_size": 8,
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 12,
    "final_logit_softcapping": 3.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def nanochat(folder: Path, *, shard_size: str = "1GB", **changes):
    """Save a random NanoChat and a tokenizer of its 8 tokens, and return the model."""
    torch.manual_seed(1)
    model = transformers.NanoChatForCausalLM(transformers.NanoChatConfig(**NANOCHAT | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    model.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "tokenizer.json").write_text(tokenizer_json(CharTokenizer("abcdefg ")))
    return model


def assert_same_logits(model, theirs, vocab_size: int) -> None:
    idx = torch.randint(vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = theirs(idx).logits, model.eval()(idx, idx)[0][..., :vocab_size]
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# Weight tables


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weight_names_map_both_ways(implementation):
    architecture = architecture_of(get_implementation(implementation))
    model = empty_model(implementation, model_config=SIZES)
    rows = {weight.ours for weight in architecture.weights}
    for name in model.state_dict():
        number = next((part for part in name.split(".") if part.isdecimal()), "-")
        assert name.replace(f".{number}.", ".*.") in rows
        theirs = architecture.hf_name(name)
        assert architecture.our_name(theirs) == name and (number == "-" or f".{number}." in theirs)
    assert len({architecture.hf_name(name) for name in model.state_dict()}) == len(model.state_dict())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_import_inverts_export(implementation):
    row = get_implementation(implementation)
    architecture = architecture_of(row)
    assert architecture is ARCHITECTURES[architecture.model_type]
    model = row.build(SIZES)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    hf_config, state_dict = to_hugging_face(row, fields=SIZES, state_dict=model.state_dict())
    assert hf_config["model_type"] == architecture.model_type
    again, fields = architecture.implementation_for(architecture.settings_from_hf(hf_config))
    complete = row.complete(SIZES)
    complete["n_kv_head"] = SIZES["n_head"]  # what moderngpt's default None means
    assert again is row and fields.items() <= complete.items() and SIZES.items() <= fields.items()
    layout, read = architecture.imported(state_dict, state_dict.__getitem__)
    assert layout.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert layout[name].is_meta and layout[name].shape == tensor.shape and torch.equal(read(name), tensor)


# NanoChat


@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": None}, {"num_key_value_heads": 1}, {"shard_size": "4KB"}]
)
def test_nanochat_folder_has_the_same_logits(tmp_path, changes):
    theirs = nanochat(tmp_path / "hf", **changes)
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1) == ("shard_size" in changes)
    checkpoint = open_checkpoint(tmp_path / "hf")
    assert (checkpoint.implementation, checkpoint.model_config["softcap"], checkpoint.step) == ("moderngpt", 3.0, 0)
    assert checkpoint.tokenizer.vocab_size == 8
    assert_same_logits(checkpoint.module().model, theirs, 8)


@pytest.mark.parametrize("fields", [{}, {"n_kv_head": 1, "softcap": 3.0, "vocab_padding": 5}], ids=["plain", "all"])
def test_moderngpt_export_round_trip_through_nanochat(saved_model, export, fields):
    path = saved_model("moderngpt", **fields)
    folder, _ = export(path, "hf")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()) and isinstance(theirs, transformers.NanoChatForCausalLM)
    assert theirs.config.vocab_size == 5 == len(transformers.AutoTokenizer.from_pretrained(folder))
    ours, again = open_checkpoint(path), open_checkpoint(folder)
    for checkpoint in (ours, again):
        assert_same_logits(checkpoint.module().model, theirs.eval(), 5)
    assert again.implementation == "moderngpt" and again.tokenizer.to_dict() == ours.tokenizer.to_dict()
    assert again.model_config["vocab_size"] == 5 and all(
        torch.equal(again.weight(name), ours.weight(name)[: len(again.weight(name))]) for name in ours.names()
    )


def test_nanochat_folder_is_scored_sampled_and_fine_tuned(tmp_path, text_file, capsys):
    theirs = nanochat(tmp_path / "hf")
    text = tmp_path / "text.txt"
    text.write_text("a bad cab fed a dab ace egg " * 60)
    evaluate.main(
        [f"--checkpoint={tmp_path / 'hf'}", f"--data={text}", "--accelerator=cpu", f"--json={tmp_path}/score"]
    )
    score = json.loads((tmp_path / "score").read_text())
    ids = torch.tensor(open_checkpoint(tmp_path / "hf").tokenizer.encode(text.read_text()[-168:]).tolist())
    windows = [ids[start : start + 13] for start in range(0, 167, 12)]
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(theirs(w[None, :-1]).logits[0], w[1:], reduction="sum") for w in windows
        ]
    assert score["tokens"] == 167 and score["loss"] == pytest.approx(float(sum(losses)) / 167, rel=1e-5)
    capsys.readouterr()
    sample.main(
        [f"--checkpoint={tmp_path / 'hf'}", "--accelerator=cpu", "--prompt=bad", "--max_new_tokens=9", "--greedy"]
    )
    greedy = theirs.generate(torch.tensor([[1, 0, 3]]), max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert capsys.readouterr().out == "".join("abcdefg "[i] for i in greedy[0]) + "\n"
    flags = "--batch_size=4 --max_steps=4 --eval_interval=4 --learning_rate=1e-2 --logger=none --accelerator=cpu"
    flags += f" --implementation=moderngpt --sample_tokens=0 --init_from={tmp_path / 'hf'} --data={text}"
    train.main([*flags.split(), f"--out_dir={tmp_path / 'run'}", "--eval_batches=0"])
    out = capsys.readouterr().out
    assert f"step 0: val_loss {score['loss']:.4f}" in out
    tuned = open_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert tuned.model_config["n_kv_head"] == 2 and tuned.model_config["softcap"] == 3.0


@pytest.mark.parametrize(
    "changed",
    [
        {"rms_norm_eps": 1e-5},
        {"intermediate_size": 60},
        {"attention_bias": True},
        {"hidden_act": "gelu"},
        {"tie_word_embeddings": True},
        {"final_logit_softcapping": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"rope_parameters": None, "rope_theta": 5e5},
        {"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"head_dim": 8},
        {"hidden_size": "16"},
        {"num_hidden_layers": True},
    ],
    ids=str,
)
def test_unsupported_nanochat_settings_are_refused(tmp_path, refused, changed):
    nanochat(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | changed))
    name, value = next((name, value) for name, value in changed.items() if value is not None or len(changed) == 1)
    if isinstance(value, dict):
        name = "rope_theta" if value.get("rope_theta") == 5e5 else "rope_type"
    refused(
        sample.main, f"--checkpoint={tmp_path / 'hf'}", "--accelerator=cpu", mentions=[f"{tmp_path / 'hf'}: {name} is "]
    )


def test_moderngpt_is_not_exported_for_nanogpt(saved_model, evaluation_refused, tmp_path):
    flags = [f"--checkpoint={saved_model('moderngpt')}", "--export=nanogpt", f"--out={tmp_path / 'out'}"]
    evaluation_refused(*flags, mentions=["moderngpt is not a GPT-2", "use --export safetensors or pt"])


def test_nanochat_without_its_head_is_refused(tmp_path, refused):
    nanochat(tmp_path / "hf").model.save_pretrained(tmp_path / "headless")
    (tmp_path / "hf" / "tokenizer.json").rename(tmp_path / "headless" / "tokenizer.json")
    flags = [f"--checkpoint={tmp_path / 'headless'}", "--accelerator=cpu", "--prompt=a"]
    refused(sample.main, *flags, mentions="lm_head.weight has shape none")


@pytest.mark.parametrize("flag", ["--window 4", "--bigram 25", "--smear True"])
def test_export_of_options_that_nanochat_lacks_is_refused(saved_model, export, evaluation_refused, tmp_path, flag):
    name, value = flag.removeprefix("--").split()
    path = saved_model("moderngpt", vocab_padding=3, **{name: literal_eval(value)})
    flags = (f"--checkpoint={path}", "--export=hf", f"--out={tmp_path / 'hf'}")
    evaluation_refused(*flags, mentions=[path, flag, "--export safetensors"])
    folder, _ = export(path, "safetensors")
    idx = torch.randint(5, (2, 12))
    with torch.no_grad():
        before, after = (open_checkpoint(p).module().model.eval()(idx, idx)[0][..., :5] for p in (path, folder))
    torch.testing.assert_close(after, before)
