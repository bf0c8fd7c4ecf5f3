"""The names that scripts for lightning-GPT use, in a script like its train.py, shortened."""

import re

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader
from transformers import GPT2Config

import lightning_gpt
from lightning_gpt import bench, callbacks, data, models
from lightning_gpt.implementations.registry import get_implementation

NO_FILES = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 16}


@pytest.mark.parametrize("name", ["MinGPT", "NanoGPT"])
def test_script(name, text_file, capsys):
    torch.manual_seed(0)
    dataset = data.CharDataset(text_file.read_text()[:200], block_size=8)
    loader = DataLoader(dataset, batch_size=48, shuffle=True)
    model = getattr(models, name)(vocab_size=dataset.vocab_size, block_size=dataset.block_size, **SIZES)
    callback = callbacks.CUDAMetricsCallback()
    Trainer(max_epochs=2, callbacks=[callback], accelerator="cpu", **NO_FILES).fit(model, loader)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Average Epoch time: \d+\.\d\d seconds", lines[0])
    memory = re.fullmatch(r"Average Peak memory (\d+\.\d\d)MiB", lines[1])
    assert float(memory[1]) > 50 and len(lines) == 4  # torch alone takes more
    inner = getattr(model, name.lower())
    assert type(inner) is get_implementation(name.lower()).load("GPT") and inner.config.n_layer == 1
    x = dataset.to_tokens("the mat", model.device)
    y = model.generate(x, max_new_tokens=10, temperature=1.0, do_sample=True, top_k=10)
    assert dataset.from_tokens(y).startswith("the mat") and y.shape == (1, 17)


def test_generate_takes_its_arguments_in_lightning_gpts_order():
    model = models.NanoGPT(vocab_size=11, block_size=8, **SIZES).eval()
    idx = torch.tensor([[1, 2]])
    greedy = model.generate(idx, 12, do_sample=False)
    assert torch.equal(model.generate(idx, 12, 1.0, False), greedy)
    assert torch.equal(model.generate(idx, 12, 5.0, True, 1), greedy)
    torch.manual_seed(0)
    assert not torch.equal(model.generate(idx, 12, 5.0, True), greedy)
    with pytest.raises(ValueError, match="do_sample is True or False, not 40; give top_k by its name"):
        model.generate(idx, 12, 1.0, 40)  # nanoGPT's own order


@pytest.mark.parametrize("name", ["MinGPT", "NanoGPT", "ModernGPT", "FSDPMinGPT", "DeepSpeedNanoGPT"])
def test_partial_sizes_need_a_preset(name):
    def sizes(**given):
        config = getattr(models, name)(vocab_size=11, block_size=8, **given).model.config
        return config.n_layer, config.n_head, config.n_embd

    with pytest.raises(
        ValueError, match="got n_layer=2, n_head=None, n_embd=None; give all three sizes, or model_type"
    ):
        sizes(n_layer=2)
    assert sizes(n_layer=2, model_type="gpt-nano") == (2, 3, 48)
    assert sizes(n_layer=2, n_head=2, n_embd=16) == (2, 2, 16)
    assert sizes(n_layer=2, n_head=2, n_embd=16, model_type="gpt-mini") == (2, 2, 16)


def test_default_sizes_are_gpt2s():
    with torch.device("meta"):
        config = models.MinGPT(vocab_size=11, block_size=8).mingpt.config
    assert {name: getattr(config, name) for name in SIZES} == models.MINGPT_PRESETS["gpt2"]


def test_presets_have_the_names_of_transformers():
    config = GPT2Config(**models.MINGPT_PRESETS["gpt2-xl"])
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (48, 25, 1600)


def test_rooms_are_attributes_of_the_package():
    assert lightning_gpt.models is models and lightning_gpt.data is data
    assert lightning_gpt.bench is bench and lightning_gpt.callbacks is callbacks
    with pytest.raises(AttributeError, match=r"module lightning_gpt.data has no attribute CharDatasets"):
        data.CharDatasets  # noqa: B018


def test_char_dataset():
    dataset = data.CharDataset("hello", block_size=2)
    assert (dataset.vocab_size, dataset.stoi, dataset.itos[3]) == (4, {"e": 0, "h": 1, "l": 2, "o": 3}, "o")
    assert [(x.tolist(), y.tolist()) for x, y in dataset] == [([1, 0], [0, 2]), ([0, 2], [2, 2]), ([2, 2], [2, 3])]
    assert dataset.from_tokens(torch.tensor([1, 0])) == dataset.from_tokens(torch.tensor([[1, 0]])) == "he"
    assert len(data.CharDataset("hello", block_size=9)) == 0
    with pytest.raises(ValueError, match="character 'x'"):
        dataset.to_tokens("x", "cpu")
