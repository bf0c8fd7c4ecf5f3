"""The methods of nanoGPT's model that its scripts call, in a script like its train.py, shortened."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import nanogpt
from nanogpt.model import GPT, GPTConfig

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "bias": True, "vocab_size": 11, "dropout": 0.0}
SETTINGS = {"weight_decay": 0.3, "learning_rate": 1e-2, "betas": (0.9, 0.95)}


def reference_optimizer(model):
    """Group the parameters as nanoGPT does: in the model's order, decaying ones first."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": SETTINGS["weight_decay"]},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=SETTINGS["learning_rate"], betas=SETTINGS["betas"])


def train(model, optimizer, *, first, last):
    """Take the iterations from first to last, with two micro-batches each, and return their losses."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses = []
    for iteration in range(first, last):
        generator = torch.Generator().manual_seed(iteration)
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS["learning_rate"] / (1 + iteration)
        for _ in range(2):
            tokens = torch.randint(11, (4, 9), generator=generator)
            _, loss = model(tokens[:, :-1], tokens[:, 1:])
            scaler.scale(loss / 2).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("bias", [True, False])
def test_optimizer_has_nanogpts_groups(bias):
    model = GPT(GPTConfig(**SIZES | {"bias": bias}))
    ours = model.configure_optimizers(*SETTINGS.values(), "cpu")
    for group, expected in zip(ours.param_groups, reference_optimizer(model).param_groups, strict=True):
        assert {name: group[name] for name in ("lr", "betas", "weight_decay", "eps")} == {
            name: expected[name] for name in ("lr", "betas", "weight_decay", "eps")
        }
        assert [id(p) for p in group["params"]] == [id(p) for p in expected["params"]]


def test_script_resumes_a_checkpoint_of_nanogpt(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES))
    optimizer = reference_optimizer(model)
    train(model, optimizer, first=0, last=3)
    content = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": SIZES,
        "iter_num": 3,
    }
    torch.save(content, tmp_path / "ckpt.pt")
    expected = train(model, optimizer, first=3, last=6)

    found = torch.load(tmp_path / "ckpt.pt", map_location="cpu")
    model = GPT(GPTConfig(**found["model_args"]))
    model.load_state_dict({name.removeprefix("_orig_mod."): tensor for name, tensor in found["model"].items()})
    assert {name: getattr(model.config, name) for name in SIZES} == SIZES
    optimizer = model.configure_optimizers(0.3, 1e-2, (0.9, 0.95), device_type="cpu")
    optimizer.load_state_dict(found["optimizer"])
    assert train(model, optimizer, first=found["iter_num"], last=6) == pytest.approx(expected, rel=1e-6)


def test_estimate_mfu():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257))  # GPT-2: 124,439,808 parameters, of which 1024 * 768 are positions
    flops = (6 * (124_439_808 - 1024 * 768) + 12 * 12 * 12 * 64 * 1024) * 1024 * 480
    assert model.estimate_mfu(480, 0.25) == pytest.approx(flops / 0.25 / 312e12, rel=1e-12)
    model.crop_block_size(256)
    flops = (6 * (124_439_808 - 1024 * 768) + 12 * 12 * 12 * 64 * 256) * 256 * 480
    assert model.estimate_mfu(fwdbwd_per_iter=480, dt=0.5) == pytest.approx(flops / 0.5 / 312e12, rel=1e-12)


def test_from_pretrained_takes_a_dictionary_of_overrides(tmp_path):
    sizes = {"vocab_size": 11, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=0)).save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path, dict(dropout=0.25)).config.dropout == 0.25
    model = GPT.from_pretrained(tmp_path, override_args={"dropout": 0.25}, block_size=4)
    assert (model.config.dropout, model.config.block_size) == (0.25, 4)
    with pytest.raises(ValueError, match="n_layer cannot be overridden"):
        GPT.from_pretrained(tmp_path, {"n_layer": 2})


def test_modules_of_the_package():
    assert nanogpt.model.GPT is GPT
    with pytest.raises(AttributeError, match="no attribute GPT"):
        nanogpt.GPT  # noqa: B018
