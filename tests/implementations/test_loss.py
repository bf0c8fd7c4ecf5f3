"""The chunked head and loss against the plain formula: losses, gradients, memory, and models that use it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from lightning_gpt import UserError
from lightning_gpt.checkpoint import open_checkpoint
from lightning_gpt.implementations import loss as losses
from lightning_gpt.implementations.loss import HeadLoss, make_head_loss
from lightning_gpt.implementations.registry import get_implementation

SIZES = {"vocab_size": 96, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}


@pytest.fixture
def small_chunks(monkeypatch):
    """Make chunks of 7 tokens at a vocabulary of 96, so that the last one is shorter."""
    monkeypatch.setattr(losses, "_CHUNK_BYTES", 7 * 96 * 4)


def build(name, **fields):
    torch.manual_seed(0)
    model = get_implementation(name).build(SIZES | fields)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()  # without dropout


def batch(batch_size=3):
    torch.manual_seed(1)
    idx = torch.randint(0, 96, (batch_size, 16))
    targets = torch.randint(0, 96, (batch_size, 16))
    targets[0, 5:] = -1
    return idx, targets


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)), 0)
        return out


@pytest.mark.parametrize("name, fields", [("mingpt", {}), ("nanogpt", {}), ("moderngpt", {"softcap": 2.0})])
def test_losses_and_gradients_equal_the_plain_formula(name, fields, small_chunks):
    model, (idx, targets) = build(name, **fields), batch()
    (3 * model(idx, targets)[1]).backward()
    plain = {key: p.grad for key, p in model.named_parameters()}
    expected = model(idx, targets)[1]
    model.zero_grad()
    logits, found = model(idx, targets, head_loss=HeadLoss())
    assert logits is None
    (3 * found).backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[key], rtol=1e-5, atol=1e-6)


def test_no_tensor_holds_all_logits(small_chunks):
    model, (idx, targets) = build("nanogpt"), batch(batch_size=8)
    for head_loss, holds in (({"head_loss": HeadLoss()}, False), ({}, True)):
        with Largest() as largest:
            model(idx, targets, **head_loss)[1].backward()
        assert (largest.elements >= idx.numel() * 96) == holds


def test_frozen_head_gets_no_gradient(small_chunks):
    head, x = nn.Linear(8, 96, bias=False).requires_grad_(False), torch.randn(2, 9, 8, requires_grad=True)
    targets = torch.randint(0, 96, (2, 9))
    HeadLoss()(head, x, targets).backward()
    (expected,) = torch.autograd.grad(F.cross_entropy(head(x).flatten(0, 1), targets.flatten()), x)
    assert head.weight.grad is None
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-7)


def test_validation_keeps_no_gradients(small_chunks):
    model, (idx, targets) = build("mingpt"), batch()
    with torch.no_grad(), Largest() as largest:
        found = model(idx, targets, head_loss=HeadLoss())[1]
        assert largest.elements < idx.numel() * 96
        torch.testing.assert_close(found, model(idx, targets)[1], rtol=1e-6, atol=1e-6)
    assert not found.requires_grad


def test_batch_of_only_ignored_targets_gives_nan():
    found = HeadLoss()(nn.Linear(8, 96, bias=False), torch.randn(1, 4, 8), torch.full((1, 4), -1))
    assert found.isnan()


def test_loss_under_autocast_is_summed_in_float32(small_chunks):
    torch.manual_seed(0)
    head, x, targets = nn.Linear(64, 96, bias=False), torch.randn(1, 4096, 64), torch.randint(0, 96, (1, 4096))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = HeadLoss()(head, x, targets)
        logits = head(x)
    assert found.dtype == torch.float32 and logits.dtype == torch.bfloat16
    torch.testing.assert_close(found, F.cross_entropy(logits.float().flatten(0, 1), targets[0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["mingpt", "nanogpt", "moderngpt"])
def test_full_loss_of_half_precision_weights_is_float32(name):
    model, (idx, targets) = build(name).to(torch.bfloat16), batch()
    assert model(idx, targets)[1].dtype == torch.float32


def test_compiled_chunks_give_the_same_result(small_chunks):
    model, (idx, targets) = build("moderngpt"), batch()
    compiled = make_head_loss(model, setting="chunked", vocab_size=96, compile_setting="aot_eager")
    torch.testing.assert_close(model(idx, targets, head_loss=compiled)[1], model(idx, targets)[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "setting, vocab_size, chunked",
    [("auto", 65, False), ("auto", 50304, True), ("chunked", 65, True), ("full", 50304, False)],
)
def test_setting_decides_with_the_vocabulary(setting, vocab_size, chunked):
    assert (make_head_loss(build("nanogpt"), setting=setting, vocab_size=vocab_size) is not None) == chunked


def test_settings_are_checked():
    class Old(nn.Module):
        def forward(self, idx, targets=None):
            return idx, None

    assert make_head_loss(Old(), setting="auto", vocab_size=50304) is None
    with pytest.raises(UserError, match="--loss chunked: Old.forward has no parameter `head_loss`"):
        make_head_loss(Old(), setting="chunked", vocab_size=65)
    with pytest.raises(UserError, match="--loss half is unknown; choose one of auto, chunked, full"):
        make_head_loss(Old(), setting="half", vocab_size=65)


def test_training_with_a_chunked_loss_equals_training_with_a_full_one(tiny_flags, text_file, tmp_path, small_chunks):
    weights = []
    for setting in ("full", "chunked"):
        run = tmp_path / setting
        train.main([*tiny_flags, f"--data={text_file}", f"--loss={setting}", f"--out_dir={run}"])
        checkpoint = open_checkpoint(run / "checkpoints" / "last.ckpt")
        weights.append({name: checkpoint.weight(name) for name in checkpoint.names()})
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)
