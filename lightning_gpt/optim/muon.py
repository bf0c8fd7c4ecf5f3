"""Muon for hidden matrices and AdamW for all other parameters, as one optimizer.

Muon orthogonalises the momentum of a matrix, so that all its directions learn at the same rate (Jordan et al. 2024,
"Muon: An optimizer for hidden layers in neural networks"). The constants are those of ``torch.optim.Muon``.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lightning_gpt.implementations.sharding import shard_like
from lightning_gpt.optim.adamw import adamw

_MOMENTUM = 0.95
_A, _B, _C = 3.4445, -4.7750, 2.0315  # coefficients of the quintic, chosen for the steepest slope at 0
_ITERATIONS = 5
_EPS = 1e-7
# Maximum elements of a batch to orthogonalise: one matrix at a time is slow, and all at once takes much memory.
_BATCH_ELEMENTS = 2**24


class Muon(torch.optim.Optimizer):
    """Train groups with ``parts`` by Muon with Nesterov momentum, and the other groups by torch's fused AdamW.

    Weight decay is decoupled: a step multiplies a weight by ``1 - lr * weight_decay``, with the group's ``lr``.

    Under FSDP each rank keeps its shard of the momentum. Whole matrices are gathered in batches; each rank
    orthogonalises all of them and keeps its own rows.

    Args:
        groups: Parameter groups. ``parts`` says how many matrices, stacked along dim 0, each parameter holds.
        learning_rate: AdamW's learning rate.
        betas: AdamW's betas.
        muon_learning_rate: Muon's learning rate, multiplied by ``sqrt(rows / columns)`` for tall matrices.

    Attributes:
        skip: Float32 scalar on the parameters' device; 1 skips a step, as in ``AdamW``.
    """

    skip: Tensor | None = None

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        learning_rate: float,
        betas: tuple[float, float],
        muon_learning_rate: float,
    ) -> None:
        groups = list(groups)
        rest = [group for group in groups if "parts" not in group]
        hidden = [group | {"lr": muon_learning_rate, "momentum": _MOMENTUM} for group in groups if "parts" in group]
        # AdamW rejects an empty list, which `rest` is if all other parameters are frozen.
        adamw_groups = rest or [{"params": [torch.empty(0)]}]
        self._adamw = adamw(adamw_groups, learning_rate=learning_rate, betas=betas)
        super().__init__([*rest, *hidden], {"lr": learning_rate, "fused": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one optimizer step and return the loss of ``closure``, which computes the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Set in every step, because load_state_dict replaces both.
        self._adamw.param_groups = [group for group in self.param_groups if "parts" not in group]
        self._adamw.state = self.state
        self._adamw.skip = self.skip
        self._adamw.step()
        for group in self.param_groups:
            if "parts" in group:
                for batch in _batches([p for p in group["params"] if p.grad is not None]):
                    self._update(batch, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        grads = []
        for p in parameters:
            assert p.grad is not None
            grads.append(_local(p.grad))
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
        skip = None if self.skip is None else self.skip.bool()
        buffers = [_local(self.state[p]["momentum_buffer"]) for p in parameters]
        momenta = list(torch._foreach_lerp(buffers, grads, 1 - group["momentum"]))
        for buffer, momentum in zip(buffers, momenta, strict=True):
            _replace(buffer, momentum, skip)
        # On CPUs bfloat16 is at best as fast as float32, and often many times slower.
        dtype = torch.bfloat16 if grads[0].is_cuda else torch.float32
        updates = [update.to(dtype) for update in torch._foreach_lerp(grads, momenta, group["momentum"])]
        sharded = [p for p in parameters if isinstance(p, DTensor)]
        if sharded:
            updates = _all_gather(updates, sharded)
        matrices = [matrix for update in updates for matrix in update.chunk(group["parts"])]
        del updates
        _orthogonalise_all(matrices)
        lr, decay = group["lr"], group["weight_decay"]
        for p, first in zip(parameters, range(0, len(matrices), group["parts"]), strict=True):
            own = matrices[first : first + group["parts"]]
            rate = lr * math.sqrt(max(1, own[0].size(0) / own[0].size(1)))
            update = torch.cat(own) if len(own) > 1 else own[0]
            weight = _local(p)
            update = _local(shard_like(p, update)) if isinstance(p, DTensor) else update
            _replace(weight, (weight * (1 - lr * decay)).add_(update, alpha=-rate), skip)


def _replace(tensor: Tensor, new: Tensor, skip: Tensor | None) -> None:
    """Write new values into a tensor, unless ``skip``, a boolean scalar on its device, is true."""
    if skip is None:
        tensor.copy_(new)
    else:
        torch.where(skip, tensor, new, out=tensor)


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _batches(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the parameters in order, in batches of at most ``_BATCH_ELEMENTS`` elements."""
    batch: list[Tensor] = []
    for p in parameters:
        if batch and sum(q.numel() for q in (*batch, p)) > _BATCH_ELEMENTS:
            yield batch
            batch = []
        batch.append(p)
    if batch:
        yield batch


def _all_gather(shards: list[Tensor], parameters: list[DTensor]) -> list[Tensor]:
    """Gather whole tensors from the rows on each rank, in one collective.

    Args:
        shards: This rank's rows of each tensor.
        parameters: Parameters with the same shapes and the same sharding along dim 0.
    """
    mesh = parameters[0].device_mesh
    # Rows per rank, as in torch.chunk: the last ranks may have fewer or none, so shards are padded.
    rows = [-(-p.size(0) // mesh.size()) for p in parameters]
    mine = torch.cat([F.pad(s, (0, 0, 0, r - s.size(0))).flatten() for s, r in zip(shards, rows, strict=True)])
    everyone = mine.new_empty(mesh.size() * mine.numel())
    dist.all_gather_into_tensor(everyone, mine, group=mesh.get_group())
    pieces = everyone.view(mesh.size(), -1).split([r * p.size(1) for r, p in zip(rows, parameters, strict=True)], dim=1)
    return [piece.reshape(-1, p.size(1))[: p.size(0)] for piece, p in zip(pieces, parameters, strict=True)]


def _orthogonalise_all(matrices: list[Tensor]) -> None:
    """Replace each matrix in the list by its orthogonalisation, batching equal and transposed shapes."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(index)
    for indices in by_shape.values():
        tall = [matrices[i].size(0) > matrices[i].size(1) for i in indices]
        wide = [matrices[i].mT if is_tall else matrices[i] for i, is_tall in zip(indices, tall, strict=True)]
        for i, is_tall, done in zip(indices, tall, orthogonalise(torch.stack(wide)), strict=True):
            matrices[i] = done.mT if is_tall else done


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices near 1, by five Newton-Schulz iterations on a quintic polynomial.

    The result is P X, and P (m, m) depends on X X^T alone. For float32 matrices with n >= 2 m, the iterations therefore
    compute only P, at most two thirds of the work. Half precision is too inexact for that.

    Args:
        matrices: (B, m, n) with m <= n.

    Returns:
        (B, m, n), in the dtype of ``matrices``.
    """
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=_EPS)
    gram = x @ x.mT
    if x.size(2) < 2 * x.size(1) or x.dtype != torch.float32:
        for remaining in reversed(range(_ITERATIONS)):
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
            if remaining:
                gram = x @ x.mT
        return x
    product: Tensor | None = None
    for remaining in reversed(range(_ITERATIONS)):
        factor = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        factor.diagonal(dim1=1, dim2=2).add_(_A)
        product = factor if product is None else factor @ product
        if remaining:
            gram = factor @ (factor @ gram)
    assert product is not None
    return product @ x
