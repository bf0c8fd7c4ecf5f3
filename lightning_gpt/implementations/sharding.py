"""Handle parameters that may be sharded over ranks: full shapes, initialisation, writing full tensors into them.

A parameter is a plain tensor, a DTensor (FSDP2), or partitioned by DeepSpeed (ZeRO-3), where ``shape`` is not the full
shape. Functions that write must be called on every rank, with the same values.
"""

import math
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_gpt.config import UserError


def full_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of the unsharded parameter."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def shard_like(parameter: Tensor, full: Tensor) -> Tensor:
    """Return a copy of a full tensor, placed and sharded like a parameter, in the dtype of ``full``."""
    full = full.to(parameter.device)
    if isinstance(parameter, DTensor):
        # Every rank has the full tensor and slices its own shard, so nothing is sent.
        return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return full.clone()


def write_parameter(parameter: Tensor, full: Tensor) -> None:
    """Copy a full tensor into a parameter, or into this rank's shard of it."""
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
    """Allocate a meta-device model, or this rank's shards of it, on a device, and initialise it."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((module, name))
    model.to_empty(device=device)  # unties tied weights
    for (first, first_name), *others in places.values():
        for module, name in others:
            module._parameters[name] = first._parameters[first_name]
    initialise(model)


def initialise(model: nn.Module) -> None:
    """Initialise a model, sharded or not, as ``model.apply(model._init_weights)`` initialises an unsharded one.

    In the order of ``apply``, initialises each module's own parameters in full on the CPU and writes them to their
    shards. One seed therefore gives the same weights under every strategy, and no rank holds the full parameters of
    more than one module.

    Raises:
        UserError: The model's ``_init_weights`` does not set every parameter.
    """
    init_weights = cast(Callable[[nn.Module], None], model._init_weights)
    for module in _leaves_first(model):
        own = {name: p for name, p in module._parameters.items() if p is not None}
        for name, p in own.items():
            whole = torch.full(full_shape(p), math.nan, dtype=torch.float32, device="cpu")
            module._parameters[name] = nn.Parameter(whole, requires_grad=p.requires_grad)
        init_weights(module)
        for name, p in own.items():
            whole = module.get_parameter(name).detach()
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
    """Shard each block, and the rest of the model as one more unit, in place.

    The last unit holds both embeddings and head, because tied weights must not be in two units.

    Args:
        model: The model, allocated or on the meta device.
        mesh: One-dimensional mesh of the ranks to shard over.
        block_class: The unit that is gathered at a time; None makes the whole model one unit.
        precision: The Trainer's precision. Under "bf16-mixed" weights are gathered and used in bfloat16, and gradients
            are reduced in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if precision == "bf16-mixed":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in model.modules():
        if block_class is not None and isinstance(module, block_class):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
