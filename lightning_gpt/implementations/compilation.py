"""The one place that says what torch.compile and recomputation are applied to, and how.

The order of everything that is applied to a model from outside: recomputation, compilation, sharding.
"""

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_gpt.config import UserError
from lightning_gpt.implementations.cache import accepts_cache

# On an x86 CPU: the weights as constants, and each product by a kernel made for its shape; no other is tried beside it.
FROZEN = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP"}


def compile_model(model: nn.Module, *, block_class: type[nn.Module] | None, setting: bool | str) -> None:
    """Compiles every block in place, or the whole model where its unit is not known.

    In place (``module.compile()``) keeps the keys of the state dict as they are, and one block's code serves all of
    them, so that compiling takes as long for 48 layers as for one.

    Args:
        model: The plain model.
        block_class: The unit to compile.
        setting: As for ``compile_arguments``.

    Raises:
        UserError: As for ``compile_arguments``.
    """
    arguments = compile_arguments(setting)
    if arguments is not None:
        for unit in _units(model, block_class):
            if isinstance(unit.forward, functools.partial):
                # Recomputed. A hook of FSDP's would break the graph, and nothing inside of `checkpoint` be compiled.
                unit.forward = _recomputed(torch.compile(unit.forward.args[0], **arguments))
            else:
                unit.compile(**arguments)


def compile_arguments(setting: bool | str) -> dict[str, str | None] | None:
    """The arguments of ``torch.compile`` that a setting means; None for not at all.

    Args:
        setting: False or "false" for not at all; True, "dynamo" or "inductor" for the default backend; one of its
            modes, such as "max-autotune"; otherwise the name of a backend that torch knows.

    Raises:
        UserError: The backend is unknown, or there is no C++ compiler for the default one on a CPU.
    """
    name = str(setting).lower()
    if name in ("false", "none", "no", "off"):
        return None
    mode = name if name in torch._inductor.list_mode_options() else None
    backend = "inductor" if mode or name in ("true", "yes", "on", "dynamo") else str(setting)
    backends = torch.compiler.list_backends(exclude_tags=())
    if backend not in backends:
        choices = ", ".join([*torch._inductor.list_mode_options(), *backends])
        raise UserError(f"--compile {setting} is unknown; choose dynamo, or a mode or backend of torch's: {choices}")
    compiler = os.environ.get("CXX", "c++")  # on a GPU, Triton compiles its launchers
    if backend == "inductor" and not shutil.which(compiler):
        raise UserError(f"--compile needs a C++ compiler, and there is no {compiler} here; install g++ or leave it")
    return {"backend": backend, "mode": mode}


def compile_step(model: nn.Module, *, setting: bool | str) -> Callable[..., Any] | None:
    """The model's forward, compiled to read one token of each row after a cache, without gradients.

    It is compiled once for texts of all lengths. The weights must not change after the first call: on an x86 CPU,
    matrices are part of the code, kept once more in the order in which they are read (inductor's ``freezing``).

    Args:
        model: The plain model.
        setting: As for ``compile_arguments``.

    Returns:
        What is called as the model is; None where the setting means not at all.

    Raises:
        UserError: As for ``compile_arguments``; or the model has no cache.
    """
    arguments = compile_arguments(setting)
    if arguments is None:
        return None
    if not accepts_cache(model):
        raise UserError(
            f"--compile {setting}: {type(model).__name__}.forward has no parameter `cache`, which a compiled step"
            " needs; leave out --compile or add it"
        )
    compiled = torch.compile(model.forward, dynamic=True, **arguments)
    on_cpu = next(model.parameters()).device.type == "cpu"
    if arguments["backend"] != "inductor" or not on_cpu or not torch.backends.mkl.is_available():
        return compiled

    def step(*args: Any, **kwargs: Any) -> Any:
        with torch._inductor.config.patch(FROZEN):  # also Dynamo reads it, to which options of torch.compile do not get
            return compiled(*args, **kwargs)

    return step


def recompute_blocks(model: nn.Module, *, block_class: type[nn.Module] | None) -> None:
    """Makes every block keep its input alone, and compute the rest again in the backward pass, in place.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost". Dropout draws the same again.
    """
    for unit in _units(model, block_class):
        unit.forward = _recomputed(unit.forward)


def _recomputed(forward: Callable[..., Any]) -> functools.partial:
    return functools.partial(checkpoint, forward, use_reentrant=False)


def _units(model: nn.Module, block_class: type[nn.Module] | None) -> list[nn.Module]:
    return [m for m in model.modules() if block_class is not None and isinstance(m, block_class)] or [model]
