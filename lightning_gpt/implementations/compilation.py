"""Apply torch.compile and activation recomputation to a model.

The order is recomputation, compilation, sharding.
"""

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any, TypedDict

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_gpt.config import UserError
from lightning_gpt.implementations.cache import accepts_cache

# Inductor options on x86 CPUs: make weights constants, and generate a C++ kernel for the shape of each product.
FROZEN = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP"}


_WITHOUT_CUDA_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


class CompileArguments(TypedDict):
    """Keyword arguments of ``torch.compile``."""

    backend: str
    mode: str | None


def compile_model(model: nn.Module, *, block_class: type[nn.Module] | None, setting: bool | str) -> None:
    """Compile every block in place, or the whole model if it has no block class.

    Compiling in place (``module.compile()``) keeps the state-dict keys. All blocks share the compiled code, so
    compiling 48 layers takes as long as compiling one.

    Args:
        model: The plain model.
        block_class: The class of the modules to compile.
        setting: See ``compile_arguments``.

    Raises:
        UserError: See ``compile_arguments``.
    """
    arguments = compile_arguments(setting)
    if arguments is not None:
        for unit in _units(model, block_class):
            if isinstance(unit.forward, functools.partial):  # recomputed
                # Compile inside `checkpoint`: outside, FSDP's hooks break the graph, and the block runs uncompiled.
                unit.forward = _recomputed(torch.compile(unit.forward.args[0], **arguments))
            else:
                unit.compile(**arguments)


def compile_arguments(setting: bool | str) -> CompileArguments | None:
    """Return the arguments of ``torch.compile`` for a setting, or None for no compilation.

    Args:
        setting: False or "false" for none; True, "dynamo" or "inductor" for the default backend; one of its modes,
            such as "max-autotune", without CUDA graphs; otherwise the name of a torch backend.

    Raises:
        UserError: The backend is unknown, or the default one finds no C++ compiler on a CPU.
    """
    name = str(setting).lower()
    if name in ("false", "none", "no", "off"):
        return None
    is_mode = name in torch._inductor.list_mode_options()
    # CUDA graphs overwrite the outputs of blocks that are compiled one by one, so modes lose only their graphs.
    mode = _WITHOUT_CUDA_GRAPHS.get(name, name) if is_mode else None
    backend = "inductor" if is_mode or name in ("true", "yes", "on", "dynamo") else str(setting)
    backends = torch.compiler.list_backends(exclude_tags=())
    if backend not in backends:
        choices = ", ".join([*torch._inductor.list_mode_options(), *backends])
        raise UserError(f"--compile {setting} is unknown; choose dynamo, or a mode or backend of torch's: {choices}")
    compiler = os.environ.get("CXX", "c++")  # on a GPU, Triton compiles its launchers
    if backend == "inductor" and not shutil.which(compiler):
        raise UserError(f"--compile needs a C++ compiler, and there is no {compiler} here; install g++ or leave it out")
    return CompileArguments(backend=backend, mode=mode)


def compile_step(model: nn.Module, *, setting: bool | str) -> Callable[..., Any] | None:
    """Return the model's forward, compiled for decoding: one token per row, with a cache, without gradients.

    It is compiled once for all text lengths. The weights must not change after the first call, because on x86 CPUs
    inductor (``freezing``) copies the matrices into the compiled code.

    Args:
        model: The plain model.
        setting: See ``compile_arguments``.

    Returns:
        A callable with the model's signature, or None if the setting means no compilation.

    Raises:
        UserError: See ``compile_arguments``; or the model does not accept a cache.
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
        # Patched globally, because Dynamo reads these, too, and ignores torch.compile(options=...).
        with torch._inductor.config.patch(FROZEN):
            return compiled(*args, **kwargs)

    return step


def recompute_blocks(model: nn.Module, *, block_class: type[nn.Module] | None) -> None:
    """Make every block keep only its input and recompute its activations in the backward pass, in place.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost". Dropout repeats its random draws.
    """
    for unit in _units(model, block_class):
        unit.forward = _recomputed(unit.forward)


def _recomputed(forward: Callable[..., Any]) -> functools.partial:
    return functools.partial(checkpoint, forward, use_reentrant=False)


def _units(model: nn.Module, block_class: type[nn.Module] | None) -> list[nn.Module]:
    return [m for m in model.modules() if block_class is not None and isinstance(m, block_class)] or [model]
