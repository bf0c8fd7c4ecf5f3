"""Models make every tensor on a device that they name; on a GPU, one made on the default device would stop them."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from lightning_gpt.models import GPTModule

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 97}


class NamedDevices(TorchFunctionMode):
    """Fail where a tensor is made without naming its device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func not in _device_constructors() or kwargs.get("device") is not None, func
        return func(*args, **kwargs)


@pytest.mark.parametrize("loss", ["full", "chunked"])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mingpt", {}),
        ("nanogpt", {"bias": False, "dropout": 0.1}),
        ("nanogpt", {"attention": "manual", "vocab_padding": 3}),
        ("nanogpt", {"position": "alibi", "gelu": "exact"}),
        ("moderngpt", {}),
        ("moderngpt", {"window": 4, "bigram": 51, "smear": True, "n_kv_head": 1, "dropout": 0.1}),
    ],
    ids=str,
)
def test_every_tensor_is_made_on_a_named_device(name, fields, loss):
    module = GPTModule(name, model_config=SIZES | fields, loss=loss)
    idx = torch.zeros(3, 16, dtype=torch.long)
    with NamedDevices():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, found = module.compute_loss(idx, idx)
        found.backward()
        module.model(idx[:, :3])
    assert found.isfinite()


def test_an_unnamed_device_is_noticed():
    with NamedDevices(), pytest.raises(AssertionError, match="arange"):
        torch.arange(3)
