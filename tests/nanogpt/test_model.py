"""nanogpt.model, with transformers' GPT-2 as the independent reference."""

import copy
import dataclasses
import inspect
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nanogpt.model import GPT, Block, GPTConfig

L, H, C, V, S = 2, 4, 32, 61, 16
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def tiny_config(**changes) -> GPTConfig:
    sizes = {"block_size": S, "vocab_size": V, "n_layer": L, "n_head": H, "n_embd": C}
    return GPTConfig(**(sizes | changes))


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Add noise to all parameters, including norms and biases, so that every term affects the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.15)
    return model


def tokens(B: int = 3, T: int = S, seed: int = 1) -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def expected_shapes(bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (S, C)}
    for i in range(L):
        h = f"transformer.h.{i}."
        for norm in ("ln_1", "ln_2"):
            shapes |= {h + norm + ".weight": (C,), h + norm + ".bias": (C,)}
        for name, n_out, n_in in (
            ("attn.c_attn", 3 * C, C),
            ("attn.c_proj", C, C),
            ("mlp.c_fc", 4 * C, C),
            ("mlp.c_proj", C, 4 * C),
        ):
            shapes |= {h + name + ".weight": (n_out, n_in), h + name + ".bias": (n_out,)}
    shapes |= {"transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,), "lm_head.weight": (V, C)}
    return {name: shape for name, shape in shapes.items() if bias or not name.endswith(".bias")}


def reference_model() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=V,
        n_positions=S,
        n_embd=C,
        n_layer=L,
        n_head=H,
        activation_function="gelu",
        attn_implementation="eager",
    )
    return randomised(GPT2LMHeadModel(config).eval())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "manual"])
def test_matches_transformers(attention, bias):
    reference = reference_model()
    assert reference.lm_head.weight is reference.transformer.wte.weight
    if not bias:
        with torch.no_grad():
            for name, p in reference.named_parameters():
                if name.endswith(".bias"):
                    p.zero_()
    state = {k: v.t() if k.endswith(TRANSPOSED) else v for k, v in reference.state_dict().items()}
    model = GPT(tiny_config(attention=attention, bias=bias)).eval()
    model.load_state_dict({k: v for k, v in state.items() if bias or not k.endswith(".bias")}, strict=True)
    idx = tokens()
    targets = torch.cat((idx[:, 1:], torch.full((len(idx), 1), -1)), dim=1)
    expected = reference(idx, labels=idx)
    logits, loss = model(idx, targets)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)
    last, no_loss = model(idx)
    assert no_loss is None
    assert last.shape == (3, 1, V)
    torch.testing.assert_close(last, expected.logits[:, -1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "manual"])
def test_state_dict_names_and_shapes(attention, bias):
    model = GPT(tiny_config(attention=attention, bias=bias))
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected_shapes(bias)
    assert all(isinstance(block, Block) for block in model.transformer.h)
    assert not list(model.buffers())


def test_loads_checkpoint_with_mask_buffers():
    model = GPT(tiny_config())
    state = randomised(copy.deepcopy(model)).state_dict()
    for i in range(L):
        state[f"transformer.h.{i}.attn.bias"] = torch.tril(torch.ones(S, S)).view(1, 1, S, S)
    given = list(state)
    model.load_state_dict(state, strict=True)
    assert list(state) == given
    torch.testing.assert_close(model.transformer.h[1].attn.c_attn.bias, state["transformer.h.1.attn.c_attn.bias"])
    assert model.lm_head.weight is model.transformer.wte.weight
    state["transformer.h.0.attn.other"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="attn.other"):
        model.load_state_dict(state, strict=True)


def test_sdpa_equals_manual_with_gradients():
    fused = randomised(GPT(tiny_config())).eval()
    manual = GPT(tiny_config(attention="manual")).eval()
    manual.load_state_dict(fused.state_dict())
    results = []
    for model in (fused, manual):
        logits, loss = model(tokens(), tokens(seed=2))
        loss.backward()
        results.append((logits, loss, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "manual"])
def test_future_tokens_do_not_reach_earlier_logits(attention):
    model = randomised(GPT(tiny_config(attention=attention))).eval()
    idx = tokens()
    changed = idx.clone()
    changed[:, 9] = (changed[:, 9] + 1) % V
    before, after = model(idx, idx)[0], model(changed, idx)[0]
    torch.testing.assert_close(after[:, :9], before[:, :9])
    assert (after[:, 9:] - before[:, 9:]).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "manual"])
def test_dropout_acts_in_training_only(attention):
    model = randomised(GPT(tiny_config(attention=attention, dropout=0.5)))
    assert not torch.equal(model(tokens())[0], model(tokens())[0])
    x = torch.randn(2, S, C)
    attn = model.transformer.h[0].attn
    attn.resid_dropout.p = 0.0
    assert not torch.equal(attn(x), attn(x))
    model.eval()
    assert torch.equal(model(tokens())[0], model(tokens())[0])


def check_init(model: GPT) -> None:
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, p in model.named_parameters():
        if "ln_" in name:
            assert torch.all(p == (1 if name.endswith("weight") else 0)), name
        elif name.endswith("bias"):
            assert torch.all(p == 0), name
        else:
            std = 0.02 / math.sqrt(2 * model.config.n_layer) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.08), name
            assert abs(p.mean().item()) < std * 0.1, name


@pytest.mark.parametrize("bias", [True, False])
def test_initial_weights(bias):
    torch.manual_seed(0)
    check_init(GPT(tiny_config(n_embd=64, n_layer=3, block_size=64, bias=bias)))


def test_init_weights_after_meta_device():
    torch.manual_seed(0)
    with torch.device("meta"):
        model = GPT(tiny_config(n_embd=64, n_layer=3, block_size=64))
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.constant_(p, math.nan)
    model.apply(model._init_weights)
    check_init(model)


def test_tied_weight_gets_both_gradients():
    model = randomised(GPT(tiny_config()))
    assert model.lm_head.weight is model.transformer.wte.weight
    idx = torch.zeros(1, 4, dtype=torch.long)
    model(idx, idx)[1].backward()
    # Tokens that never appear in idx get a gradient only through the output head.
    assert model.transformer.wte.weight.grad[1:].abs().sum() > 0
    copied = copy.deepcopy(model)
    assert copied.lm_head.weight is copied.transformer.wte.weight


def test_ignored_targets_and_strided_targets():
    model = randomised(GPT(tiny_config())).eval()
    idx, targets = tokens(), tokens(seed=2)
    targets[:, ::3] = -1
    logits, loss = model(idx, targets)
    assert logits.shape == (3, S, V)
    picked = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(loss, -picked[targets != -1].mean())
    strided = targets.t().contiguous().t()
    assert not strided.is_contiguous()
    torch.testing.assert_close(model(idx, strided)[1], loss)


def test_gpt2_parameter_count():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257))
    assert model.get_num_params(non_embedding=False) == 124_439_808
    assert model.get_num_params() == 124_439_808 - 1024 * 768


def test_config_fields_and_defaults():
    values = {f.name: f.default for f in dataclasses.fields(GPTConfig)}
    assert list(values.items()) == [
        ("block_size", 1024),
        ("vocab_size", 50304),
        ("n_layer", 12),
        ("n_head", 12),
        ("n_embd", 768),
        ("dropout", 0.0),
        ("bias", True),
        ("attention", "sdpa"),
        ("position", "learned"),
        ("gelu", "exact"),
        ("vocab_padding", 0),
    ]


def test_config_is_copied():
    config = tiny_config()
    before = dataclasses.asdict(config)
    model = GPT(config)
    assert dataclasses.asdict(config) == before == dataclasses.asdict(model.config)
    config.block_size = 1
    assert model(tokens())[0].shape == (3, 1, V)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 50}, "n_embd=50 is not divisible by n_head=4; choose a multiple"),
        ({"n_head": 0}, "n_head must be at least 1, got 0"),
        ({"attention": "best"}, "unknown attention 'best'; choose one of: sdpa, flash, manual"),
        ({"position": "rotary"}, "unknown position 'rotary'; choose one of: learned, alibi"),
        ({"attention": "flash", "position": "alibi"}, "attention=flash is not available with position=alibi: "),
        (
            {"attention": "flash", "n_embd": 1028},
            "attention=flash is not available: the kernel takes heads of up to 256",
        ),
    ],
)
def test_refuses_bad_config(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        GPT(tiny_config(**changes))
    assert "\n" not in str(error.value)


def test_refuses_long_sequence():
    with pytest.raises(ValueError, match="length 17 is longer than block_size=16"):
        GPT(tiny_config())(tokens(T=S + 1))


def test_greedy_generation_crops_the_context():
    model = randomised(GPT(tiny_config())).eval()
    idx = tokens(T=S - 3)
    out = model.generate(idx, 8, do_sample=False)
    assert out.shape == (3, S + 5)
    torch.testing.assert_close(out[:, : S - 3], idx)
    for t in range(S - 3, S + 5):
        torch.testing.assert_close(out[:, t], model(out[:, max(0, t - S) : t])[0][:, -1].argmax(-1))
    torch.testing.assert_close(model.generate(idx, 8, 1.0, 1), out)
    assert not model.training


def test_sampling_follows_the_distribution():
    model = randomised(GPT(tiny_config())).eval()
    row = tokens(B=1, T=5)
    top = (model(row)[0][0, -1].detach() / 1.5).topk(5)
    torch.manual_seed(0)
    drawn = model.generate(row.expand(4000, -1), 1, temperature=1.5, top_k=5)[:, -1]
    frequency = torch.bincount(drawn, minlength=V) / 4000
    expected = torch.zeros(V).scatter(0, top.indices, top.values.softmax(-1))
    torch.testing.assert_close(frequency, expected, rtol=0, atol=0.04)
    assert set(drawn.tolist()) <= set(top.indices.tolist())


def test_generation_options():
    model = GPT(tiny_config())
    idx = tokens()
    torch.manual_seed(0)
    everything = model.generate(idx, 4)
    torch.manual_seed(0)
    torch.testing.assert_close(model.generate(idx, 4, top_k=10 * V), everything)
    assert model.training
    assert not everything.requires_grad
    torch.testing.assert_close(model.generate(idx, 0), idx)
    names = list(inspect.signature(model.generate).parameters)
    assert names == ["idx", "max_new_tokens", "temperature", "top_k", "do_sample"]
    with pytest.raises(ValueError, match="temperature must be positive"):
        model.generate(idx, 1, temperature=0.0)
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        model.generate(idx, 1, top_k=0)
