"""sample.py --compile: the text is unchanged, and one compilation serves texts of all lengths."""

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import sample
from lightning_gpt import GPTModule
from lightning_gpt.config import UserError
from lightning_gpt.implementations.cache import Cache
from lightning_gpt.implementations.compilation import compile_step
from lightning_gpt.implementations.generation import GenerationSettings

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 24, "vocab_size": 37}
MODELS = {
    "mingpt": {},
    "nanogpt": {},
    "alibi": {"position": "alibi"},
    "moderngpt": {"n_kv_head": 1, "window": 5, "bigram": 101, "smear": True, "n_layer": 3},
}


@pytest.fixture
def graphs():
    """Return a function that returns the number of graphs compiled so far."""
    torch.compiler.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch.compiler.reset()


def module_of(name):
    torch.manual_seed(0)
    module = GPTModule("nanogpt" if name == "alibi" else name, model_config=SIZES | MODELS[name]).eval()
    for parameter in module.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.6)
    return module


@pytest.mark.parametrize(("name", "greedy"), [*((name, True) for name in MODELS), ("nanogpt", False)])
def test_compiled_text_is_unchanged_and_compiles_once_per_batch_size(name, greedy, graphs):
    module = module_of(name)
    texts = [torch.randint(37, shape) for shape in [(1, 3), (1, 1), (1, 9), (1, 22), (1, 30)]]
    more = [torch.randint(37, shape) for shape in [(3, 2), (3, 7), (2, 20)]]

    def generate(texts):
        return [module.generate(idx, 18, do_sample=not greedy, seed=1).tolist() for idx in texts]

    expected = generate(texts), generate(more)
    assert graphs() == 0
    assert module.compile_generation("eager")
    assert generate(texts) == expected[0] and graphs() == 1
    assert generate(more) == expected[1] and graphs() == 2  # torch compiles a batch size of 1 separately


def test_compiled_rows_of_different_lengths(graphs):
    module, prompts = module_of("nanogpt"), [[1, 2, 3, 4], [5], [6, 7]]

    def generate():
        # Row r ends after r + 2 tokens.
        new = [[] for _ in prompts]
        settings = GenerationSettings(max_new_tokens=9, greedy=True)
        for step in module.stream_tokens(prompts, settings, is_over=lambda row, token: len(new[row]) == row + 1):
            for row, token in step:
                new[row].append(token)
        return new

    expected = generate()
    assert [len(row) for row in expected] == [2, 3, 4] and graphs() == 0
    module.compile_generation("eager")
    assert generate() == expected and graphs() > 0


def test_generation_compiles_only_on_request(graphs):
    module = module_of("nanogpt")
    module.compile_setting = "eager"  # the setting of training
    idx = torch.tensor([[1, 2, 3]])
    expected = module.generate(idx, 6, do_sample=False)
    assert graphs() == 0
    module.compile_generation("eager")
    assert torch.equal(module.generate(idx, 6, do_sample=False), expected) and graphs() == 1
    assert not module.compile_generation(False)
    assert torch.equal(module.generate(idx, 6, do_sample=False), expected) and graphs() == 1


@needs_compiler
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs torch with MKL, for x86 processors")
def test_compiled_step_freezes_weights_on_a_cpu():
    model = module_of("nanogpt").model
    step = compile_step(model, setting=True)
    idx, next_one = torch.tensor([[1, 2, 3]]), torch.tensor([[4]])
    weight = model.transformer.h[0].mlp.c_fc.weight

    def logits(read, *, factor=1.0):
        cache = Cache(SIZES["block_size"])
        model(idx, cache=cache)
        weight.data.mul_(factor)
        found = read(next_one, cache=cache)[0]
        weight.data.div_(factor)
        return found

    with torch.no_grad():
        expected = logits(model)
        torch.testing.assert_close(logits(step), expected, rtol=1e-5, atol=1e-4)
        assert not torch.allclose(logits(model, factor=2), expected, atol=0.1)
        torch.testing.assert_close(logits(step, factor=2), expected, rtol=1e-5, atol=1e-4)


@needs_compiler
def test_sample_compiles_before_generating(tiny_run, capsys):
    flags = [f"--checkpoint={tiny_run}", "--accelerator=cpu", "--max_new_tokens=20", "--prompt=the", "--top_k=5"]
    sample.main(flags)
    expected = capsys.readouterr().out
    sample.main([*flags, "--compile"])
    out, err = capsys.readouterr()
    assert out == expected
    compiled, speed = err.splitlines()[-2:]
    assert compiled.startswith("compiled in ") and speed.startswith("20 tokens in ")
    assert "AUTOTUNE" not in err


def test_compile_refuses_a_model_without_a_cache():
    assert compile_step(nn.Linear(1, 1), setting=False) is None
    with pytest.raises(
        UserError, match="--compile eager: Linear.forward has no parameter `cache`.*; leave out --compile"
    ):
        compile_step(nn.Linear(1, 1), setting="eager")
