"""Parameters that may be spread over ranks: their shapes, their initial values, and writing whole tensors into them.

A parameter is a plain tensor, a DTensor (FSDP2), or partitioned by DeepSpeed (ZeRO-3, where ``shape`` is of no use).
All functions that write are called on every rank, with the same values.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_gpt.config import UserError


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape that a parameter has when it is whole."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def shard_like(parameter: Tensor, full: Tensor) -> Tensor:
    """A new tensor of a whole tensor's values, placed and sharded as the parameter is, in the dtype of ``full``."""
    full = full.to(parameter.device)
    if isinstance(parameter, DTensor):
        # Every rank has the values: it cuts its own share out, and nothing is sent.
        return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return full.clone()


def write_parameter(parameter: Tensor, full: Tensor) -> None:
    """Sets a parameter, or this rank's share of it, to the values of a whole tensor."""
    with torch.no_grad():
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(full)
        elif isinstance(parameter, DTensor):
            parameter.copy_(shard_like(parameter, full.to(parameter.dtype)))
        else:
            parameter.copy_(full)


def give_memory(model: nn.Module, device: torch.device) -> None:
    """Moves a model, or each rank's share of it, from the meta device to another, and initialises it."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((module, name))
    model.to_empty(device=device)  # which parts tied weights
    for (first, first_name), *others in places.values():
        for module, name in others:
            module._parameters[name] = first._parameters[first_name]
    initialise(model)


def initialise(model: nn.Module) -> None:
    """Initialises a model of any placement as ``model.apply(model._init_weights)`` does one that is whole.

    Each module's own parameters are made whole on the CPU, initialised, and written where they belong, in the order of
    ``apply``: from one seed the weights are the same under every strategy, and no rank ever holds more than one
    module's parameters.

    Raises:
        UserError: The model's ``_init_weights`` does not set every parameter.
    """
    for module in _leaves_first(model):
        own = {name: p for name, p in module._parameters.items() if p is not None}
        for name, p in own.items():
            whole = torch.full(full_shape(p), math.nan, dtype=torch.float32, device="cpu")
            module._parameters[name] = nn.Parameter(whole, requires_grad=p.requires_grad)
        model._init_weights(module)
        for name, p in own.items():
            whole = module._parameters[name].detach()
            if whole.isnan().any():
                raise UserError(
                    f"{type(model).__name__}._init_weights leaves {name} of {type(module).__name__} unset;"
                    " let it set every parameter, or set initialises_by_apply to False"
                )
            write_parameter(p, whole)
            module._parameters[name] = p


def _leaves_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _leaves_first(child)
    yield module


def shard_fsdp(
    model: nn.Module, *, mesh: "torch.distributed.DeviceMesh", block_class: type[nn.Module] | None, precision: str
) -> None:
    """Shards each block, and what is left as one more unit, in place.

    Embeddings and head stay in the last unit together, since tied weights must not be in two.

    Args:
        model: The model, whole or on the meta device.
        mesh: One dimension: the ranks that share it.
        block_class: The unit that is gathered at a time; None for the whole model.
        precision: The Trainer's. Under "bf16-mixed" weights are gathered, and computed with, in bfloat16; gradients
            are summed up in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mixed = precision == "bf16-mixed"
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if mixed else None
    settings = {"mesh": mesh, **({"mp_policy": policy} if policy else {})}
    for module in model.modules():
        if block_class is not None and isinstance(module, block_class):
            fully_shard(module, **settings)
    fully_shard(model, **settings)
