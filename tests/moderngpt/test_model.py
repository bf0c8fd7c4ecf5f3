"""moderngpt.model, with transformers' NanoChat as the independent reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import NanoChatConfig, NanoChatForCausalLM

import train
from moderngpt.model import GPT, GPTConfig
from moderngpt.window import flex_window, window_mask

L, H, C, V, S = 3, 4, 32, 61, 16


def model_of(**fields) -> GPT:
    """Build a model in eval mode with random weights, so that every term affects the logits."""
    sizes = {"n_layer": L, "n_head": H, "n_embd": C, "vocab_size": V, "block_size": S}
    model = GPT(GPTConfig(**(sizes | fields)))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * 0.3)
    return model.eval()


def tokens(B: int = 3, T: int = S) -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    return model(idx, idx)[0]


THEIRS = {
    "transformer.wte.": "model.embed_tokens.",
    "transformer.h.": "model.layers.",
    "attn.c_proj": "self_attn.o_proj",
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


@pytest.mark.parametrize("n_kv_head", [None, 2, 1])
@pytest.mark.parametrize("softcap", [15.0, 2.0])
def test_matches_transformers(n_kv_head, softcap):
    model = model_of(n_kv_head=n_kv_head, softcap=softcap)
    reference = NanoChatForCausalLM(
        NanoChatConfig(
            vocab_size=V,
            hidden_size=C,
            intermediate_size=4 * C,
            num_hidden_layers=L,
            num_attention_heads=H,
            num_key_value_heads=n_kv_head or H,
            max_position_embeddings=S,
            final_logit_softcapping=softcap,
        )
    ).eval()
    weights = model.state_dict()
    for ours, theirs in THEIRS.items():
        weights = {name.replace(ours, theirs): w for name, w in weights.items()}
    reference.load_state_dict(weights)
    idx = tokens()
    with torch.no_grad():
        expected = reference(idx, labels=idx)
        logits, _ = model(idx)
    torch.testing.assert_close(logits_of(model, idx), expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, expected.logits[:, -1:], atol=1e-5, rtol=0)
    assert logits.abs().max() < softcap < 20 * logits.abs().max()


def test_loss_ignores_targets_of_minus_one():
    model, idx = model_of(), tokens()
    targets = idx.roll(-1, 1)
    targets[:, -3:] = -1
    logits, loss = model(idx, targets)
    expected = -torch.log_softmax(logits[:, :-3], -1).gather(-1, targets[:, :-3, None]).mean()
    torch.testing.assert_close(loss, expected)


def test_initial_weights():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=H, n_embd=256, vocab_size=4096, block_size=S, bigram=5000, smear=True))
    _, loss = model(tokens(), tokens())
    assert loss.item() == pytest.approx(math.log(4096), rel=1e-6)  # the head is zero
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight") or name in ("lm_head.weight", "transformer.smear.weight"):
            assert not p.any()
        elif "h." in name:
            assert p.std().item() == pytest.approx(256**-0.5, rel=0.02)
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("window", [1, 4, S, S + 9])
def test_window_limits_attention(window):
    """Check five layers: the first three have the window, the fourth and the last attend to all tokens."""
    model, idx = model_of(n_layer=5, window=window), tokens(1)
    seen: dict[int, torch.Tensor] = {}
    for layer, block in enumerate(model.transformer.h):
        block.register_forward_hook(lambda _, inputs, out, layer=layer: seen.update({layer: out - inputs[0]}))
    logits_of(model, idx)
    before = dict(seen)
    other = idx.clone()
    other[0, 3] = (other[0, 3] + 1) % V
    logits_of(model, other)
    changed = [(before[layer] != seen[layer]).any(-1)[0].nonzero()[:, 0].tolist() for layer in range(5)]
    reach = [min(S, 3 + window + layer * (window - 1)) for layer in range(3)]
    assert changed == [*(list(range(3, end)) for end in reach), list(range(3, S)), list(range(3, S))]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("window", [1, 100, 300])
def test_flex_attention_equals_masked_sdpa(window):
    """Run the attention that a GPU would compile, here eagerly, on a sequence of more than one block."""
    T, draw = 256, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, T, 16, generator=draw) for heads in (4, 2, 2))
    with torch.compiler.set_stance("force_eager"):
        found = flex_window(window, T, q.device)(q, k, v, enable_gqa=True)
    mask = window_mask(torch.arange(T), T, window)
    expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 7])
def test_bigram_row_affects_only_its_pair(padding):
    """Change one row of the table: only logits from the pair's second token on change, only in texts with the pair."""
    model = model_of(vocab_size=V + padding, vocab_padding=padding, bigram=V * (V + 1))
    idx = torch.arange(S)[None] * 3
    before, first = logits_of(model, idx), logits_of(model, idx[:, 5:])
    with torch.no_grad():
        model.transformer.bigram.weight[(idx[0, 4] + 1) * V + idx[0, 5]] += 1
    after = logits_of(model, idx)
    changed = (before != after).any(-1)[0]
    assert not changed[:5].any() and changed[5:].all()
    assert torch.equal(logits_of(model, idx[:, 5:]), first)  # as the first token it is not part of a pair


def test_smear_adds_the_gated_previous_embedding():
    plain, smeared = model_of(), model_of(smear=True)
    smeared.load_state_dict(plain.state_dict(), strict=False)
    seen: list[torch.Tensor] = []
    for model in (plain, smeared):
        model.transformer.drop.register_forward_hook(lambda _, inputs, out: seen.append(out))
    idx = tokens()
    logits_of(plain, idx), logits_of(smeared, idx)
    x, y = seen
    gates = torch.tanh(x[:, 1:, :12] @ smeared.transformer.smear.weight[0])
    torch.testing.assert_close(y[:, 0], x[:, 0])
    torch.testing.assert_close(y[:, 1:], x[:, 1:] + gates[..., None] * x[:, :-1])


def test_bigram_with_a_small_table():
    model = model_of(bigram=10)
    assert torch.isfinite(logits_of(model, tokens())).all() and model.transformer.bigram.weight.shape == (10, C)


@pytest.mark.parametrize(
    "fields", [{}, {"window": 5, "bigram": 97, "n_kv_head": 2, "smear": True}], ids=["plain", "all"]
)
def test_future_tokens_do_not_reach_earlier_logits(fields):
    model, idx = model_of(**fields), tokens(1)
    other = idx.clone()
    other[0, 9] = (other[0, 9] + 1) % V
    changed = (logits_of(model, idx) != logits_of(model, other)).any(-1)[0]
    assert not changed[:9].any() and changed[9:].all()


def test_longer_block_size_extends_the_context():
    short, long = model_of(), model_of(block_size=2 * S)
    assert short.extends_context
    long.load_state_dict(short.state_dict())
    idx = tokens(2, 2 * S)
    torch.testing.assert_close(logits_of(long, idx)[:, :S], logits_of(short, idx[:, :S]), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=f"{2 * S} is longer than block_size={S}"):
        short(idx)


def test_dropout_acts_in_training_only():
    model, idx = model_of(dropout=0.5), tokens()
    expected = logits_of(model_of(), idx)
    assert torch.equal(logits_of(model, idx), expected)
    assert not torch.equal(logits_of(model.train(), idx), expected)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n_embd": 36}, "n_embd=36 is not divisible by twice n_head=4"),
        ({"n_kv_head": 3}, "n_head=4 is not divisible by n_kv_head=3"),
        ({"n_kv_head": -1}, "n_kv_head must be at least 1"),
        ({"n_layer": 0}, "n_layer must be at least 1"),
        ({"window": -1}, "window must not be negative"),
        ({"bigram": -1}, "bigram must not be negative"),
        ({"softcap": 0.0}, "softcap must be above 0"),
        ({"vocab_padding": V}, "vocab_padding must be from 0"),
    ],
)
def test_refuses_bad_config(fields, message):
    with pytest.raises(ValueError, match=message):
        model_of(**fields)


@pytest.fixture(scope="module")
def run(tmp_path_factory, text_file, tiny_flags):
    """Train a tiny moderngpt and return its run folder."""
    out_dir = tmp_path_factory.mktemp("runs") / "modern"
    train.main([*tiny_flags, "--implementation=moderngpt", f"--data={text_file}", f"--out_dir={out_dir}"])
    return out_dir


@pytest.mark.parametrize("flag", ["--n_head=2", "--window=3", "--softcap=9", "--block_size=8"])
def test_resume_with_another_model_config_is_refused(run, capsys, flag):
    """Check settings that weight shapes do not reveal."""
    with pytest.raises(SystemExit) as stop:
        train.main([f"--resume={run}", "--max_steps=8", flag])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"{flag.replace('=', ' ')}" in error and error.count("\n") == 1
