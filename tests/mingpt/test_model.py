"""mingpt.model, with transformers' GPT-2 as the independent reference."""

import copy
import dataclasses
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mingpt.model import GPT, PRESETS, Block, GPTConfig
from mingpt.utils import CfgNode

L, H, C, V, S = 2, 4, 32, 61, 16
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def tiny_config(**changes) -> GPTConfig:
    config = GPT.get_default_config()
    config.n_layer, config.n_head, config.n_embd, config.vocab_size, config.block_size = L, H, C, V, S
    config.embd_pdrop = config.resid_pdrop = config.attn_pdrop = 0.0
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Add noise to all parameters, including norms and biases, so that every term affects the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.15)
    return model


def tokens(B: int = 3, T: int = S, seed: int = 1) -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def expected_shapes() -> dict[str, tuple[int, ...]]:
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
    return shapes | {"transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,), "lm_head.weight": (V, C)}


@pytest.mark.parametrize("attention", ["sdpa", "manual"])
def test_matches_transformers(attention):
    reference = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V,
            n_positions=S,
            n_embd=C,
            n_layer=L,
            n_head=H,
            activation_function="gelu_new",
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    )
    randomised(reference.eval())
    assert reference.lm_head.weight is not reference.transformer.wte.weight
    state = {k: v.t() if k.endswith(TRANSPOSED) else v for k, v in reference.state_dict().items()}
    model = GPT(tiny_config(attention=attention)).eval()
    model.load_state_dict(state, strict=True)
    idx = tokens()
    targets = torch.cat((idx[:, 1:], torch.full((len(idx), 1), -1)), dim=1)
    expected = reference(idx, labels=idx)
    logits, loss = model(idx, targets)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)
    logits, loss = model(idx)
    assert loss is None
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "manual"])
def test_state_dict_names_and_shapes(attention):
    model = GPT(tiny_config(attention=attention))
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected_shapes()
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
    torch.testing.assert_close(model.transformer.h[1].mlp.c_fc.weight, state["transformer.h.1.mlp.c_fc.weight"])
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
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(after[:, :9], before[:, :9])
    assert (after[:, 9:] - before[:, 9:]).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "manual"])
def test_dropout_acts_in_training_only(attention):
    for field in ("embd_pdrop", "resid_pdrop", "attn_pdrop"):
        model = randomised(GPT(tiny_config(attention=attention, **{field: 0.5})))
        assert not torch.equal(model(tokens())[0], model(tokens())[0]), field
        model.eval()
        assert torch.equal(model(tokens())[0], model(tokens())[0]), field


def check_init(model: GPT) -> None:
    for name, p in model.named_parameters():
        if "ln_" in name:
            assert torch.all(p == (1 if name.endswith("weight") else 0)), name
        elif name.endswith("bias"):
            assert torch.all(p == 0), name
        else:
            std = 0.02 / math.sqrt(2 * model.config.n_layer) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.08), name
            assert abs(p.mean().item()) < std * 0.1, name


def test_initial_weights():
    torch.manual_seed(0)
    check_init(GPT(tiny_config(n_embd=64, n_layer=3, block_size=64)))


def test_init_weights_after_meta_device():
    torch.manual_seed(0)
    with torch.device("meta"):
        model = GPT(tiny_config(n_embd=64, n_layer=3, block_size=64))
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.constant_(p, math.nan)
    model.apply(model._init_weights)
    check_init(model)


def test_ignored_targets_and_strided_targets():
    model = randomised(GPT(tiny_config())).eval()
    idx, targets = tokens(), tokens(seed=2)
    targets[:, ::3] = -1
    logits, loss = model(idx, targets)
    picked = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(loss, -picked[targets != -1].mean())
    strided = targets.t().contiguous().t()
    assert not strided.is_contiguous()
    torch.testing.assert_close(model(idx, strided)[1], loss)


def test_presets():
    table = """openai-gpt 12 12 768, gpt2 12 12 768, gpt2-medium 24 16 1024, gpt2-large 36 20 1280, gpt2-xl 48 25 1600,
        gpt2-xxl 96 25 1600, gpt2-xxxl 100 30 1920, gpt2-4xl 190 30 1920, gopher-44m 8 16 512, gpt-mini 6 6 192,
        gpt-micro 4 4 128, gpt-nano 3 3 48"""
    rows = {name: tuple(map(int, sizes)) for name, *sizes in (row.split() for row in table.split(","))}
    assert {k: (v["n_layer"], v["n_head"], v["n_embd"]) for k, v in PRESETS.items()} == rows
    for name, (n_layer, n_head, n_embd) in rows.items():
        with torch.device("meta"):
            model = GPT(GPTConfig(model_type=name, vocab_size=11, block_size=5))
        assert len(model.transformer.h) == n_layer
        assert model.transformer.h[0].attn.n_head == n_head
        blocks = n_layer * (12 * n_embd**2 + 13 * n_embd)
        assert sum(p.numel() for p in model.parameters()) == (2 * 11 + 5 + 2) * n_embd + blocks


def test_gpt2_parameter_count():
    with torch.device("meta"):
        model = GPT(GPTConfig(model_type="gpt2", vocab_size=50257, block_size=1024))
    assert sum(p.numel() for p in model.parameters()) == 124_439_808 + 50257 * 768


def test_preset_sizes_can_be_replaced_and_config_is_not_mutated():
    config = GPTConfig(model_type="gpt-nano", n_layer=1, vocab_size=V, block_size=S)
    before = dataclasses.asdict(config)
    model = GPT(config)
    assert dataclasses.asdict(config) == before
    resolved = model.config
    assert (resolved.n_layer, resolved.n_head, resolved.n_embd) == (1, 3, 48)
    assert len(model.transformer.h) == 1
    assert dataclasses.asdict(GPT(resolved).config) == dataclasses.asdict(resolved)


def test_default_config():
    config = GPT.get_default_config()
    assert isinstance(config, CfgNode)
    assert config.to_dict() == dataclasses.asdict(GPTConfig())
    assert (config.embd_pdrop, config.resid_pdrop, config.attn_pdrop) == (0.1, 0.1, 0.1)
    assert all(getattr(config, n) is None for n in ("model_type", "n_layer", "n_head", "n_embd", "vocab_size"))
    config.n_layer = 7
    assert GPT.get_default_config().n_layer is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt9"}, "unknown model_type 'gpt9'; choose one of: openai-gpt, gpt2, .*gpt-nano"),
        ({"n_layer": None, "n_head": None}, "missing n_layer, n_head;"),
        ({"vocab_size": None}, "missing vocab_size;"),
        ({"model_type": "gpt2", "block_size": None}, "missing block_size;"),
        ({"n_embd": 50}, "n_embd=50 is not divisible by n_head=4; choose a width that is a multiple"),
        ({"n_head": 0}, "n_head must be at least 1, got 0"),
        ({"attention": "flash"}, "unknown attention 'flash'; choose one of: sdpa, manual"),
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
    out = model.generate(idx, 8)
    assert out.shape == (3, S + 5)
    torch.testing.assert_close(out[:, : S - 3], idx)
    for t in range(S - 3, S + 5):
        torch.testing.assert_close(out[:, t], model(out[:, max(0, t - S) : t])[0][:, -1].argmax(-1))
    torch.testing.assert_close(model.generate(idx, 8, 1.0, True, 1), out)
    assert not model.training


def test_sampling_follows_the_distribution():
    model = randomised(GPT(tiny_config())).eval()
    row = tokens(B=1, T=5)
    logits = model(row)[0][0, -1].detach() / 1.5
    top = logits.topk(5)
    torch.manual_seed(0)
    drawn = model.generate(row.expand(4000, -1), 1, temperature=1.5, do_sample=True, top_k=5)[:, -1]
    frequency = torch.bincount(drawn, minlength=V) / 4000
    expected = torch.zeros(V).scatter(0, top.indices, top.values.softmax(-1))
    torch.testing.assert_close(frequency, expected, rtol=0, atol=0.04)
    assert set(drawn.tolist()) <= set(top.indices.tolist())


def test_generation_options():
    model = GPT(tiny_config())
    idx = tokens()
    torch.manual_seed(0)
    everything = model.generate(idx, 4, do_sample=True)
    torch.manual_seed(0)
    torch.testing.assert_close(model.generate(idx, 4, do_sample=True, top_k=10 * V), everything)
    assert model.training
    assert not everything.requires_grad
    torch.testing.assert_close(model.generate(idx, 0), idx)
    assert model.generate(idx, 1, temperature=0.0).shape == (3, S + 1)
    with pytest.raises(ValueError, match="temperature must be positive"):
        model.generate(idx, 1, temperature=0.0, do_sample=True)
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        model.generate(idx, 1, do_sample=True, top_k=0)
