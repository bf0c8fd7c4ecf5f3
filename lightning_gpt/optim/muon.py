"""Muon over hidden matrices, and AdamW over all else, as one optimizer.

A matrix moves by its momentum made orthogonal, so that every direction in it is learnt at the same rate (Keller Jordan
et al. 2024, "Muon: An optimizer for hidden layers in neural networks"). Numbers are those of ``torch.optim.Muon``.
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

_MOMENTUM = 0.95
_A, _B, _C = 3.4445, -4.7750, 2.0315  # of the quintic, whose slope at 0 is as steep as it may be
_ITERATIONS = 5
_EPS = 1e-7
# Elements that are made orthogonal together: small matrices take too long one by one, and memory is finite.
_TOGETHER = 2**24


class Muon(torch.optim.Optimizer):
    """Trains groups that have ``parts`` by Muon with Nesterov momentum, and the others by torch's fused AdamW.

    Decay is decoupled: a step takes ``lr * weight_decay`` of a weight away, with the group's own ``lr``.

    Under FSDP each rank keeps its share of the momentum. Whole matrices are gathered, many by one collective, and each
    rank makes them orthogonal and takes its rows of the result.

    Args:
        groups: Parameter groups; ``parts`` says of how many matrices, one above the other, each parameter consists.
        learning_rate: AdamW's.
        betas: AdamW's.
        muon_learning_rate: Muon's, for square and wide matrices; a tall one's is sqrt(rows / columns) times that.
    """

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
        # It insists on a parameter, also where all else is frozen.
        self._adamw = torch.optim.AdamW(rest or [torch.empty(0)], lr=learning_rate, betas=tuple(betas), fused=True)
        super().__init__([*rest, *hidden], {"lr": learning_rate, "fused": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Takes a step; ``closure`` computes the loss and its gradients before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Told each time, since load_state_dict replaces both.
        self._adamw.param_groups = [group for group in self.param_groups if "parts" not in group]
        self._adamw.state = self.state
        self._adamw.step()
        for group in self.param_groups:
            if "parts" in group:
                for together in _portions([p for p in group["params"] if p.grad is not None]):
                    self._move(together, group)
        return loss

    def _move(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        grads = [_local(p.grad) for p in parameters]
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
        momenta = [_local(self.state[p]["momentum_buffer"]) for p in parameters]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        # On a CPU bfloat16 is no faster, and most are many times slower at it.
        dtype = torch.bfloat16 if grads[0].is_cuda else torch.float32
        updates = [update.to(dtype) for update in torch._foreach_lerp(grads, momenta, group["momentum"])]
        if isinstance(parameters[0], DTensor):
            updates = _gathered(updates, parameters)
        matrices = [matrix for update in updates for matrix in update.chunk(group["parts"])]
        del updates
        _orthogonalise_all(matrices)
        lr, decay = group["lr"], group["weight_decay"]
        for p, first in zip(parameters, range(0, len(matrices), group["parts"]), strict=True):
            own = matrices[first : first + group["parts"]]
            rate = lr * math.sqrt(max(1, own[0].size(0) / own[0].size(1)))
            update = torch.cat(own) if len(own) > 1 else own[0]
            weight = _local(p)
            weight.mul_(1 - lr * decay)
            weight.add_(_local(shard_like(p, update)) if isinstance(p, DTensor) else update, alpha=-rate)


def _local(tensor: Tensor) -> Tensor:
    """This rank's rows of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _portions(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    portion: list[Tensor] = []
    for p in parameters:
        if portion and sum(q.numel() for q in (*portion, p)) > _TOGETHER:
            yield portion
            portion = []
        portion.append(p)
    if portion:
        yield portion


def _gathered(shards: list[Tensor], parameters: list[DTensor]) -> list[Tensor]:
    """Whole tensors from every rank's rows of them, placed as the parameters are, by one collective."""
    mesh = parameters[0].device_mesh
    # As torch.chunk has it: every rank has that many rows, but the last ones, which may have fewer or none.
    rows = [-(-p.size(0) // mesh.size()) for p in parameters]
    mine = torch.cat([F.pad(s, (0, 0, 0, r - s.size(0))).flatten() for s, r in zip(shards, rows, strict=True)])
    everyone = mine.new_empty(mesh.size() * mine.numel())
    dist.all_gather_into_tensor(everyone, mine, group=mesh.get_group())
    pieces = everyone.view(mesh.size(), -1).split([r * p.size(1) for r, p in zip(rows, parameters, strict=True)], dim=1)
    return [piece.reshape(-1, p.size(1))[: p.size(0)] for piece, p in zip(pieces, parameters, strict=True)]


def _orthogonalise_all(matrices: list[Tensor]) -> None:
    """Replaces matrices by what ``orthogonalise`` makes of them; those of a shape, turned or not, go together."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(index)
    for indices in by_shape.values():
        tall = [matrices[i].size(0) > matrices[i].size(1) for i in indices]
        wide = [matrices[i].mT if turned else matrices[i] for i, turned in zip(indices, tall, strict=True)]
        for i, turned, done in zip(indices, tall, orthogonalise(torch.stack(wide)), strict=True):
            matrices[i] = done.mT if turned else done


def orthogonalise(matrices: Tensor) -> Tensor:
    """Brings the singular values of matrices (B, m, n), m <= n, near 1, by Newton and Schulz's iteration on a quintic.

    In float32, iterates of a much wider than high matrix are not made themselves: each is P X, where P (m, m) follows
    from X Xt alone, which is a third of the work and more. In half precision that would be too inexact.
    """
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=_EPS)
    gram = x @ x.mT
    if x.size(2) < 2 * x.size(1) or x.dtype != torch.float32:
        for left in reversed(range(_ITERATIONS)):
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
            if left:
                gram = x @ x.mT
        return x
    product: Tensor | None = None
    for left in reversed(range(_ITERATIONS)):
        factor = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        factor.diagonal(dim1=1, dim2=2).add_(_A)
        product = factor if product is None else factor @ product
        if left:
            gram = factor @ (factor @ gram)
    return product @ x
