"""Parameter groups: which parameters decay, and which are hidden matrices."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


def parameter_groups(
    model: nn.Module,
    *,
    decays: Callable[[nn.Module, str], bool],
    weight_decay: float,
    hidden: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a model into groups with and without weight decay.

    The rule gets the module that owns a parameter and the parameter's name in it, not its shape, which a sharded
    parameter does not show. A tied parameter belongs to its first owner only.

    Args:
        model: The model, sharded or not.
        decays: ``(module, parameter name) -> bool``, the implementation's rule.
        weight_decay: Decay of the groups that decay.
        hidden: Names of hidden matrices, each with its number of ``parts``; they get groups of their own.

    Returns:
        Groups with the keys ``params``, ``param_names`` and ``weight_decay``, and ``parts`` for hidden matrices.
    """
    hidden = hidden or {}
    groups: dict[tuple[int, bool], dict[str, nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            full_name = f"{prefix}.{name}".lstrip(".")
            key = hidden.get(full_name, 0), not decays(module, name)
            groups.setdefault(key, {})[full_name] = parameter
    return [
        {
            "params": list(groups[parts, exempt].values()),
            "param_names": list(groups[parts, exempt]),
            "weight_decay": 0.0 if exempt else weight_decay,
            **({"parts": parts} if parts else {}),
        }
        for parts, exempt in sorted(groups)
    ]
