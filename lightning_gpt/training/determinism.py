"""The same result twice: only operations whose result does not depend on timing."""

import contextlib
import os
from collections.abc import Iterator

import torch

from lightning_gpt.config import TrainerOptions, UserError


def check_determinism(options: TrainerOptions) -> None:
    """Raise a UserError for options that contradict --deterministic."""
    if not options.deterministic:
        return
    if str(options.compile).startswith("max-autotune"):
        raise UserError(
            f"--deterministic does not work with --compile {options.compile}, which chooses kernels by their timing;"
            " give --compile alone"
        )
    if options.trainer.get("benchmark"):
        raise UserError("--deterministic does not work with --trainer.benchmark, which chooses kernels by their timing")


@contextlib.contextmanager
def deterministic(options: TrainerOptions) -> Iterator[None]:
    """Apply --deterministic to the block: torch refuses operations that have no deterministic implementation.

    Raises:
        UserError: The run uses such an operation.
    """
    if not options.deterministic:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
    before = torch.are_deterministic_algorithms_enabled()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.use_deterministic_algorithms, before)
        if options.compile:
            import torch._inductor.config as inductor  # takes seconds

            stack.callback(setattr, inductor, "deterministic", inductor.deterministic)
            inductor.deterministic = True  # inductor chooses among kernels without timing them
        torch.use_deterministic_algorithms(True)
        try:
            yield
        except RuntimeError as error:
            operation, found, _ = str(error).partition(" does not have a deterministic implementation")
            if not found:
                raise
            raise UserError(
                f"--deterministic: {operation} has no deterministic implementation; leave it out"
            ) from error
