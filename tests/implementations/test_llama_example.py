"""The Llama of docs/extending.md: a user's model that accepts the cache, trained and sampled."""

import re
import sys
from pathlib import Path

import pytest
import torch

import sample
import train
from lightning_gpt.checkpoint import find_checkpoint, open_checkpoint
from lightning_gpt.implementations.generation import GenerationSettings
from lightning_gpt.implementations.loss import HeadLoss

DOCS = Path(__file__).parents[2] / "docs" / "extending.md"
BLOCK = 16
SIZES = f"--n_layer=2 --n_head=4 --n_kv_head=2 --n_embd=32 --block_size={BLOCK}".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write the page's my_llama.py to a folder, which becomes the working directory."""
    code = re.search(r"```python\n(# my_llama\.py\n.*?)```", DOCS.read_text(encoding="ascii"), re.DOTALL)
    assert code
    folder = tmp_path_factory.mktemp("llama")
    (folder / "my_llama.py").write_text(code[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        yield folder
        sys.modules.pop("my_llama", None)


@pytest.fixture(scope="module")
def module(folder, text_file):
    """Return the module of a short run, in eval mode."""
    flags = "--batch_size=8 --max_steps=30 --eval_interval=30 --warmup_steps=0 --learning_rate=1e-2 --logger=none"
    options = [*flags.split(), f"--data={text_file}", "--accelerator=cpu", "--sample_tokens=8", "--out_dir=runs/llama"]
    train.main(["--implementation=my_llama:Llama", *SIZES, *options])
    checkpoint = open_checkpoint(find_checkpoint("runs/llama", which="last"), trust=True)
    assert checkpoint.step == 30
    return checkpoint.module().eval()


@pytest.fixture
def input_shapes(module, monkeypatch):
    """Record the shape of idx in each call of forward."""
    shapes, forward = [], type(module.model).forward

    def watched(self, idx, targets=None, *, cache=None):
        shapes.append(tuple(idx.shape))
        return forward(self, idx, targets, cache=cache)

    monkeypatch.setattr(type(module.model), "forward", watched)
    return shapes


def generated(module, prompts, new):
    rows = [[] for _ in prompts]
    for step in module.stream_tokens(prompts, GenerationSettings(max_new_tokens=new, greedy=True)):
        for row, token in step:
            rows[row].append(token)
    return rows


@torch.no_grad()
def generated_without_cache(module, prompt, new):
    text = list(prompt)
    for _ in range(new):
        text.append(int(module.model(torch.tensor([text[-BLOCK:]]))[0][0, -1].argmax()))
    return text[len(prompt) :]


PROMPTS = {
    "one": [[3, 1, 4]],
    "same length": [[3, 1, 4], [2, 7, 1]],
    "different lengths": [[3, 1, 4, 1, 5], [2], [7, 1, 8]],
    "beyond the block": [[3, 1, 4], list(range(BLOCK)), [5, *range(BLOCK)]],
}


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_greedy_text_is_unchanged_by_the_cache(module, prompts):
    found = generated(module, prompts, 2 * BLOCK)
    assert found == [generated_without_cache(module, prompt, 2 * BLOCK) for prompt in prompts]
    assert len(set(found[0])) > 2


def test_cached_step_reads_one_token_per_row(module, input_shapes):
    generated(module, PROMPTS["different lengths"], 6)
    assert input_shapes == [(3, 5)] + 5 * [(3, 1)]


def test_sample_uses_the_cache(module, input_shapes, capsys):
    sample.main(["--checkpoint=runs/llama", "--accelerator=cpu", "--prompt=the cat", "--max_new_tokens=9", "--greedy"])
    out = capsys.readouterr().out
    assert out.startswith("the cat") and len(out) == 7 + 9 + 1
    assert input_shapes == [(1, 7)] + 8 * [(1, 1)]


def test_compiled_text_is_unchanged(module):
    expected = generated(module, PROMPTS["same length"], 10)
    assert module.compile_generation("eager")
    try:
        assert generated(module, PROMPTS["same length"], 10) == expected
    finally:
        module.compile_generation(False)


def test_chunked_loss_equals_the_full_one(module):
    idx = torch.randint(0, module.model_config["vocab_size"], (3, BLOCK))
    full, (logits, chunked) = module.model(idx, idx)[1], module.model(idx, idx, head_loss=HeadLoss())
    assert logits is None
    torch.testing.assert_close(chunked, full, rtol=1e-6, atol=1e-6)
