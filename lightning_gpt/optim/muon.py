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

    Under FSDP each rank keeps its shard of the momentum. The matrices of a batch are divided among the ranks: each rank
    receives its matrices whole, orthogonalises them, and returns to every rank that rank's rows.

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
        division = _Division(sharded) if sharded else None
        whole = division.gather(updates) if division else updates
        like = updates[0].new_empty(0)
        del updates
        parts = group["parts"]
        matrices = [matrix for update in whole for matrix in update.chunk(parts)]
        del whole
        _orthogonalise_all(matrices)
        if parts > 1:
            matrices = [torch.cat(matrices[i : i + parts]) for i in range(0, len(matrices), parts)]
        updates = division.scatter(matrices, like) if division else matrices
        lr, decay = group["lr"], group["weight_decay"]
        for p, update in zip(parameters, updates, strict=True):
            weight = _local(p)
            rate = lr * math.sqrt(max(1, p.size(0) / parts / p.size(1)))
            _replace(weight, (weight * (1 - lr * decay)).add_(update, alpha=-rate), skip)


def _replace(tensor: Tensor, new: Tensor, skip: Tensor | None) -> None:
    """Write new values into a tensor, unless ``skip``, a boolean scalar on its device, is true."""
    if skip is None:
        tensor.copy_(new)
    else:
        torch.where(skip, tensor, new, out=tensor)


class _Division:
    """A division of sharded matrices among ranks, and the two exchanges that it needs.

    Each matrix has one owner, so that every rank owns about as many elements. Rows are those of torch.chunk: the last
    ranks may have fewer or none, so blocks of rows are padded while they travel.

    Args:
        parameters: Matrices with the same mesh, sharded along dim 0.
    """

    def __init__(self, parameters: list[DTensor]) -> None:
        mesh = parameters[0].device_mesh
        self._group, self._ranks, self._rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()
        self._shapes = [(p.size(0), p.size(1)) for p in parameters]
        self._rows = [-(-p.size(0) // self._ranks) for p in parameters]  # of a block
        self._owned: list[list[int]] = [[] for _ in range(self._ranks)]  # indices of the matrices, by rank
        loads = [0] * self._ranks
        for index in sorted(range(len(parameters)), key=lambda index: -parameters[index].numel()):
            owner = loads.index(min(loads))
            loads[owner] += parameters[index].numel()
            self._owned[owner].append(index)
        self._sizes = [sum(self._elements(i) for i in owned) for owned in self._owned]  # of what each owner receives

    def gather(self, shards: list[Tensor]) -> list[Tensor]:
        """Exchange this rank's rows of every matrix, (h, C) each, for the whole matrices (H, C) that it owns."""
        blocks = [self._padded(shard, rows).flatten() for shard, rows in zip(shards, self._rows, strict=True)]
        send = torch.cat([blocks[i] for owned in self._owned for i in owned])
        mine = self._owned[self._rank]
        received = self._exchange(send, self._sizes, [self._sizes[self._rank]] * self._ranks)
        pieces = received.view(self._ranks, -1).split([self._elements(i) for i in mine], dim=1)
        return [
            piece.reshape(-1, self._shapes[i][1])[: self._shapes[i][0]] for i, piece in zip(mine, pieces, strict=True)
        ]

    def scatter(self, whole: list[Tensor], like: Tensor) -> list[Tensor]:
        """Exchange the whole matrices that this rank owns, (H, C) each, for its rows (h, C) of every matrix.

        Args:
            whole: The matrices, as from ``gather``.
            like: A tensor of their dtype and device, for a rank that owns none.
        """
        mine = self._owned[self._rank]
        padded = [self._padded(x, self._ranks * self._rows[i]) for x, i in zip(whole, mine, strict=True)]
        blocks = [x.reshape(self._ranks, -1) for x in padded]  # one row for each rank
        send = torch.cat(blocks, dim=1).flatten() if blocks else like.new_empty(0)
        received = self._exchange(send, [self._sizes[self._rank]] * self._ranks, self._sizes)
        order = [i for owned in self._owned for i in owned]
        pieces = received.split([self._elements(i) for i in order])
        rows: list[Tensor] = [send] * len(order)
        for i, piece in zip(order, pieces, strict=True):
            held = min(self._rows[i], max(0, self._shapes[i][0] - self._rank * self._rows[i]))
            rows[i] = piece.view(-1, self._shapes[i][1])[:held]
        return rows

    def _elements(self, index: int) -> int:
        """Return the elements of a matrix's block of rows."""
        return self._rows[index] * self._shapes[index][1]

    def _exchange(self, send: Tensor, sizes: list[int], received_sizes: list[int]) -> Tensor:
        received = send.new_empty(sum(received_sizes))
        dist.all_to_all_single(received, send, received_sizes, sizes, group=self._group)
        return received

    @staticmethod
    def _padded(matrix: Tensor, rows: int) -> Tensor:
        return F.pad(matrix, (0, 0, 0, rows - matrix.size(0)))


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
