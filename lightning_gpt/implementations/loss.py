"""Head, soft cap and cross entropy in one function, which never holds the logits of all tokens.

A model opts in by accepting it: ``forward(idx, targets=None, *, cache=None, head_loss=None)``. Given one, `forward`
returns no logits:

    x = self.ln_f(x)  # (B, T, C)
    if head_loss is not None:
        return None, head_loss(self.lm_head, x, targets)

The logits of 16 x 1024 tokens over GPT-2's vocabulary take 3 GiB in float32, and as much again for their gradient. Here
they exist for a chunk of tokens at a time: the gradients follow from the logits alone, so the forward pass computes
them with the loss, and the backward pass multiplies them by the gradient of the loss.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gpt.config import UserError
from lightning_gpt.implementations.compilation import CompileArguments, compile_arguments

LOSSES = ("auto", "chunked", "full")
LARGE_VOCABULARY = 8192  # below it, all logits take less memory than a block's activations
_CHUNK_BYTES = 96 * 2**20  # of the float32 logits of a chunk


def accepts_head_loss(model: nn.Module) -> bool:
    """Return whether the model's ``forward`` has a parameter ``head_loss``."""
    return "head_loss" in inspect.signature(type(model).forward).parameters  # an instance's may be wrapped


def make_head_loss(
    model: nn.Module, *, setting: str, vocab_size: int, compile_setting: bool | str = False
) -> "HeadLoss | None":
    """Return the chunked head and loss for a model, or None if it computes all logits.

    Args:
        model: The plain model.
        setting: "chunked", "full", or "auto": chunked if the model accepts it and the vocabulary is large.
        vocab_size: Number of logits per token.
        compile_setting: See ``compile_arguments``.

    Raises:
        UserError: The setting is unknown, or the model does not accept a chunked loss.
    """
    if setting not in LOSSES:
        raise UserError(f"--loss {setting} is unknown; choose one of {', '.join(LOSSES)}")
    accepts = accepts_head_loss(model)
    if setting == "chunked" and not accepts:
        raise UserError(
            f"--loss chunked: {type(model).__name__}.forward has no parameter `head_loss`; add it, or give --loss full"
        )
    if setting == "full" or not accepts or (setting == "auto" and vocab_size < LARGE_VOCABULARY):
        return None
    return HeadLoss(compile_arguments(compile_setting))


class HeadLoss:
    """Callable that a model applies to its last hidden state, instead of its head and cross entropy.

    Args:
        compiled: Arguments of ``torch.compile`` for the arithmetic on a chunk's logits; None for none.
    """

    def __init__(self, compiled: CompileArguments | None = None) -> None:
        self._chunk = _chunk_loss if compiled is None else torch.compile(_chunk_loss, dynamic=True, **compiled)

    def __call__(self, head: nn.Linear, x: Tensor, targets: Tensor, *, softcap: float | None = None) -> Tensor:
        """Return the mean cross entropy in nats over the targets that are not -1; NaN if there is none.

        Args:
            head: Linear layer without a bias, from C to vocab_size. It is called as a module, so that hooks which
                gather a sharded weight run.
            x: Hidden state (B, T, C).
            targets: Next tokens (B, T) int64; positions holding -1 are ignored.
            softcap: Bound of the logits, as ``softcap * tanh(logits / softcap)``.
        """
        assert head.bias is None
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

        def forward(x: Tensor) -> Tensor:
            return _HeadLoss.apply(x, head.weight, targets.reshape(-1), softcap, dtype, self._chunk)

        # The instance's attribute replaces the class's method for this call.
        head.forward = forward
        try:
            return head(x.flatten(0, -2))
        finally:
            del head.forward


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        softcap: float | None,
        dtype: torch.dtype,
        chunk: Callable[..., tuple[Tensor, Tensor | None]],
    ) -> Tensor:
        """Return the loss of x (N, C), weight (V, C) and targets (N,); keep the gradients if any is needed."""
        precise = torch.promote_types(dtype, torch.float32)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=precise, device=x.device)
        scale = (targets != -1).sum().to(precise).reciprocal()  # infinite if there is no target
        head = weight.to(dtype)
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight = torch.zeros(weight.shape, dtype=precise, device=x.device) if needs_weight else None
        rows = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, x.shape[0], rows):
                part, some = x[start : start + rows].to(dtype), targets[start : start + rows]
                loss, grad = chunk(part @ head.T, some, softcap, needs_x or needs_weight)
                total += loss
                if grad is None:
                    continue
                if grad_x is not None:
                    grad_x[start : start + rows] = grad @ head
                if grad_weight is not None:
                    if dtype == precise:
                        grad_weight.addmm_(grad.T, part)
                    else:
                        grad_weight += grad.T @ part
                del grad
        ctx.gradients = grad_x, grad_weight, scale
        ctx.dtype = weight.dtype
        return total * scale

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and weight."""
        grad_x, grad_weight, scale = ctx.gradients
        del ctx.gradients  # they are changed in place, which forbids a second backward pass
        factor = upstream * scale
        if grad_x is not None:
            grad_x.mul_(factor.to(grad_x.dtype))
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(factor).to(ctx.dtype)
        return grad_x, grad_weight, None, None, None, None


def _chunk_loss(
    logits: Tensor, targets: Tensor, softcap: float | None, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the summed loss of some tokens in float32, and its gradient with respect to their logits.

    Args:
        logits: (N, V), in the dtype of the matrix product, which is also that of the gradient.
        targets: (N,) int64; -1 is ignored.
        softcap: See ``HeadLoss``.
        needs_grad: Whether to compute the gradient.
    """
    bounded = None if softcap is None else torch.tanh(logits.float() / softcap)
    capped = logits if softcap is None or bounded is None else softcap * bounded
    log_p = F.log_softmax(capped, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))  # (N, V)
    ignored = (targets == -1)[:, None]
    index = targets.clamp(min=0)[:, None]  # (N, 1)
    loss = -log_p.gather(1, index).masked_fill_(ignored, 0.0).sum()
    if not needs_grad:
        return loss, None
    # d loss / d capped is softmax - one-hot; d capped / d logits is 1 - tanh^2. In place, to hold few copies.
    grad = log_p.exp_()
    grad.scatter_add_(1, index, torch.full_like(index, -1, dtype=grad.dtype))
    if bounded is not None:
        grad.mul_(1 - bounded.square_())
    return loss, grad.masked_fill_(ignored, 0.0).to(logits.dtype)
