"""The one place that says what torch.compile is applied to, and how."""

import shutil

import torch
from torch import nn

from lightning_gpt.config import UserError


def compile_model(model: nn.Module, *, block_class: type[nn.Module] | None, setting: bool | str) -> None:
    """Compiles every block in place, or the whole model where its unit is not known.

    In place (``module.compile()``) keeps the keys of the state dict as they are, and one block's code serves all of
    them, so that compiling takes as long for 48 layers as for one.

    Args:
        model: The plain model.
        block_class: The unit to compile.
        setting: False or "false" for not at all; True, "dynamo" or "inductor" for the default backend; otherwise the
            name of a backend that torch knows.

    Raises:
        UserError: The backend is unknown, or there is no C++ compiler for the default one on a CPU.
    """
    if str(setting).lower() in ("false", "none", "no", "off"):
        return
    backend = "inductor" if str(setting).lower() in ("true", "yes", "on", "dynamo") else str(setting)
    backends = torch.compiler.list_backends(exclude_tags=())
    if backend not in backends:
        raise UserError(f"--compile {setting} is unknown; choose dynamo, or one of torch's: {', '.join(backends)}")
    if backend == "inductor" and not torch.cuda.is_available() and not shutil.which("c++"):
        raise UserError("--compile needs a C++ compiler for the CPU, and there is no c++ here; install g++ or leave it")
    units = [m for m in model.modules() if block_class is not None and isinstance(m, block_class)] or [model]
    for unit in units:
        unit.compile(backend=backend)
