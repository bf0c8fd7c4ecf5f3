"""Trace one training step of a model that has shapes but no memory.

The model runs once on FakeTensors, and every storage that a real run would allocate is counted until it is freed. So
activations are counted, not estimated, for any model, under autocast and with recomputation (Chen et al. 2016,
"Training Deep Nets with Sublinear Memory Cost"; for GPTs compare Korthikanti et al. 2022, arXiv:2205.05198).
``strategies/memory.py`` divides them among the ranks of a strategy.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lightning_gpt.implementations.compilation import recompute_blocks
from lightning_gpt.implementations.loss import HeadLoss
from lightning_gpt.implementations.registry import Implementation
from lightning_gpt.models import GPTModule
from lightning_gpt.strategies.memory import MemoryRules
from lightning_gpt.strategies.step import Moment, Operation, StepTrace


class OptimizerTrace(NamedTuple):
    """An optimizer step of all parameters.

    Attributes:
        state: Bytes of the optimizer's state.
        temporaries: Peak bytes of temporaries.
        operations: Kernels, each with its number of runs.
    """

    state: int
    temporaries: int
    operations: tuple[tuple[Operation, int], ...]


def trace_step(
    model: nn.Module,
    *,
    optimizer: OptimizerTrace,
    block_class: type[nn.Module] | None,
    rules: MemoryRules,
    shape: tuple[int, int],
    accumulate: int,
    precision: str,
    recompute: bool,
    chunked_loss: bool,
    device_type: str,
) -> StepTrace:
    """Run a fake model forward and backward, and record the live memory after each operation.

    Must be called under FakeTensorMode.

    Args:
        model: The model, made of FakeTensors in the dtype that it computes in.
        optimizer: The optimizer step, from ``trace_optimizer``.
        block_class: Class of the blocks, which are gathered and recomputed one at a time; None if there are none.
        rules: The strategy's memory rules, which determine the dtypes.
        shape: (B, T) of a micro-batch.
        accumulate: Micro-batches per optimizer step.
        precision: Lightning's name of the precision.
        recompute: Whether blocks recompute their activations.
        chunked_loss: Whether the head and the loss are computed for some tokens at a time.
        device_type: "cpu" or "cuda".
    """
    model.train()
    blocks = [m for m in model.modules() if block_class is not None and isinstance(m, block_class)]
    if recompute:
        recompute_blocks(model, block_class=block_class)
    unit_of: dict[Tensor, int] = {p: i for i, block in enumerate(blocks) for p in block.parameters()}
    missing = [sum(p.requires_grad for p in block.parameters()) for block in blocks]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    idx = torch.zeros(shape, dtype=torch.long)
    live = _LiveBytes()

    def made(parameter: Tensor) -> None:
        live.made += parameter.numel()
        live.open += parameter.numel()
        unit = unit_of.get(parameter)
        if unit is not None:
            missing[unit] -= 1
            if not missing[unit]:
                live.open -= sizes[unit]
                live.closed = sizes[unit]
        parameter.grad = None  # freed, because it is counted in `made` from now on

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(made)
    kept, computed = dtypes(rules, precision)
    # Lightning, too, turns the cache off.
    enabled = rules.autocasts(precision)
    autocast = torch.autocast("cpu", dtype=_half(precision), enabled=enabled, cache_enabled=False)
    kernels = _kernels_as_on_gpu() if device_type == "cuda" else nullcontext()
    with live, kernels:
        with autocast:
            # A step lets go of the logits before the backward pass.
            loss = model(idx, idx, **({"head_loss": HeadLoss()} if chunked_loss else {}))[1]
        forward, live.moments = live.moments, []
        loss.backward()
    return StepTrace(
        parameters=tuple(p.numel() for p in model.parameters()),
        units=tuple(sizes),
        forward=tuple(forward),
        backward=tuple(live.moments),
        accumulate=accumulate,
        weight_bytes=kept.itemsize,
        compute_bytes=computed.itemsize,
        state=optimizer.state,
        step=optimizer.temporaries,
        recomputed=recompute,
        operations=tuple(live.operations.items()),
        updates=optimizer.operations,
    )


def trace_optimizer(module: GPTModule, model: nn.Module, *, dtype: torch.dtype) -> OptimizerTrace:
    """Run a step of a fake optimizer, after one that has made its state.

    Must be called under FakeTensorMode.

    Args:
        module: The module, which builds the optimizer.
        model: The model, made of FakeTensors.
        dtype: Dtype of the stored weights.
    """
    groups = module.parameter_groups(model)
    for group in groups:
        group["params"] = [torch.empty_like(p, dtype=dtype) for p in group["params"]]
        for p in group["params"]:
            p.grad = torch.empty_like(p)
    live = _LiveBytes()
    optimizer = module.build_optimizer(groups)
    with live:
        optimizer.step()
        state, live.moments, live.operations = live.bytes, [], Counter()
        optimizer.step()
    temporaries = max(moment.activations for moment in live.moments) - state
    return OptimizerTrace(state, temporaries, tuple(live.operations.items()))


def _half(precision: str) -> torch.dtype:
    return torch.float16 if precision.startswith("16") else torch.bfloat16


def dtypes(rules: MemoryRules, precision: str) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of the stored weights, and of the weights used in computation."""
    wide = torch.float64 if precision.startswith("64") else torch.float32
    kept = _half(precision) if rules.keeps_half(precision) else wide
    return kept, _half(precision) if rules.computes_in_half(precision) else wide


def build_model(implementation: Implementation, fields: dict[str, Any], *, dtype: torch.dtype) -> nn.Module:
    """Build a model in a dtype; FakeTensor parameters cannot be converted later."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return implementation.build(fields)
    finally:
        torch.set_default_dtype(default)


class _LiveBytes(TorchDispatchMode):
    """Count the bytes of all storages that operations allocate, until they are freed, and what operations compute."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.made = self.open = self.closed = 0
        self.moments: list[Moment] = []
        self.operations: Counter[Operation] = Counter()
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        # Views and in-place results share their input's storage, which is already counted or belongs to a parameter.
        given = {t.untyped_storage()._cdata for t in read}
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given]
        operation = _operation(func, args, kwargs, out, read=read, made=made)
        if operation is not None:
            self.operations[operation] += 1
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
        self.moments.append(Moment(self.bytes, self.made, self.open, self.closed))
        return out

    def _freed(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key)


def _operation(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, *, read: list[Tensor], made: list[Tensor]
) -> Operation | None:
    """Return what a call computes and moves; None for views, allocations and calls without a kernel.

    Args:
        func: The operation.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        out: Its result.
        read: The tensors among its arguments.
        made: The tensors in its result that share no storage with these.
    """
    name = func.overloadpacket.__name__
    if func.namespace != "aten" or name.startswith(("empty", "new_empty")):
        return None
    written = list(made)
    if func._schema.is_mutable:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    if not written:
        return None
    flops = 0
    if func.overloadpacket in flop_registry:
        flops = int(flop_registry[func.overloadpacket](*args, **kwargs, out_val=out))
    elif "attention" in name:
        flops = _attention_flops(func, args, read)
    size = sum(t.numel() * t.itemsize for t in (*read, *written))
    return Operation(flops, size, written[0].dtype in (torch.float16, torch.bfloat16))


def _attention_flops(func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> int:
    """Return the FLOPs of a fused attention kernel: two products forward and five backward, halved if it is causal."""
    backward = "backward" in func.overloadpacket.__name__
    query, key = tensors[1:3] if backward else tensors[:2]  # (B, nh, T, hs)
    named = zip(func._schema.arguments, args, strict=False)  # the defaults are not among the values
    causal = any(argument.name == "is_causal" and value for argument, value in named)
    products = 5 if backward else 2
    return products * 2 * query.numel() * key.size(-2) // (2 if causal else 1)


class _FusedRMSNorm(torch.autograd.Function):
    """Keep and move what CUDA's kernel does, which is one operation; the CPU computes several."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return gradient + x, None if weight is None else torch.empty_like(weight)


@contextmanager
def _kernels_as_on_gpu() -> Iterator[None]:
    """Replace functions whose CPU kernels keep more for the backward pass than CUDA's.

    Attention with dropout keeps the dropped-out probabilities (B, nh, T, T); dropout, a mask in the dtype of its input,
    where CUDA's has one byte per element; RMSNorm, its intermediate results. The functions themselves are replaced,
    because a TorchFunctionMode does not reach recomputation in the backward pass.
    """
    functional = nn.functional
    attend, drop, norm = functional.scaled_dot_product_attention, functional.dropout, functional.rms_norm

    def attend_without_dropout(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **rest: Any
    ) -> Tensor:
        return attend(query, key, value, attn_mask, 0.0, **rest)

    def drop_with_narrow_mask(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p else input

    def norm_at_once(
        input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        return _FusedRMSNorm.apply(input, weight)

    functional.scaled_dot_product_attention = attend_without_dropout  # type: ignore[assignment]
    functional.dropout, functional.rms_norm = drop_with_narrow_mask, norm_at_once
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, functional.dropout, functional.rms_norm = attend, drop, norm
