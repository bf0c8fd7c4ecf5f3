"""What a run will need, before anything is built: parameters, FLOPs, and bytes per device and on the host.

The model is built and run once on FakeTensors, which have shapes and no memory, and every storage that a real run
would allocate is counted while it lives. So what autograd saves is not estimated but taken from the operations
themselves, for any model, under autocast, and with recomputation (Chen et al. 2016, "Training Deep Nets with Sublinear
Memory Cost"; for GPTs compare Korthikanti et al. 2022, arXiv:2205.05198). How a strategy divides it is in
``strategies/memory.py``.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_gpt.config import UserError
from lightning_gpt.implementations.compilation import recompute_blocks
from lightning_gpt.implementations.registry import Implementation, refused_by
from lightning_gpt.models import GPTModule
from lightning_gpt.strategies.memory import Memory, MemoryRules, Moment, StepTrace

SOURCES = (
    "shares: ZeRO, arXiv:1910.02054; activations: counted on FakeTensors (cf. arXiv:2205.05198);"
    " FLOPs: 6N + 12 n_layer n_embd T, PaLM, arXiv:2204.02311, appendix B"
)


@dataclass(frozen=True)
class Plan:
    """What a run needs. All memory is bytes of one device, but ``host``, which is bytes of one node.

    Attributes:
        parameters: Elements, tied ones once.
        tokens_per_step: Tokens of an optimizer step over all devices.
        flops_per_step: The model's FLOPs in an optimizer step over all devices; recomputation is not counted.
        steps: Optimizer steps.
        memory: Per device, and the host's share of one device.
        host: The host's memory for offloading at its highest, for all devices of a node.
    """

    parameters: int
    tokens_per_step: int
    flops_per_step: float
    steps: int
    memory: Memory
    host: int

    def table(self) -> str:
        """The plan as lines of text."""
        m = self.memory
        rows = [
            ("parameters", f"{self.parameters:,}"),
            ("tokens per step", f"{self.tokens_per_step:,}"),
            ("FLOPs per step", f"{self.flops_per_step:.3e}"),
            ("steps", f"{self.steps:,} ({self.steps * self.tokens_per_step:,} tokens)"),
            ("weights", f"{_size(m.weights)} per device"),
            ("gradients", _size(m.gradients)),
            ("optimizer", _size(m.optimizer)),
            ("activations", _size(m.activations)),
            ("buffers", _size(m.buffers)),
            ("peak", f"{_size(m.peak)} per device; parts do not all peak at once"),
        ]
        if self.host:
            rows.append(("host", f"{_size(self.host)} per node, for offloading"))
        return "\n".join(f"{name:<16}{value}" for name, value in [*rows, ("formulas", SOURCES)])


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def flops_per_token(model: nn.Module, *, block_size: int) -> float:
    """Training FLOPs per token: 6 N + 12 n_layer n_embd T (PaLM, Chowdhery et al. 2022, appendix B).

    N counts the parameters without position embeddings, as nanoGPT does. A model whose config lacks n_layer or n_embd
    is counted without its attention term.

    Args:
        model: The whole model, on any device, also meta or fake; a model that DeepSpeed divided has lost its shapes.
        block_size: Tokens of a sequence.
    """
    config = getattr(model, "config", None)
    n_layer, n_embd = getattr(config, "n_layer", 0) or 0, getattr(config, "n_embd", 0) or 0
    n = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("wpe.weight"))
    return 6 * n + 12 * n_layer * n_embd * block_size


def plan(
    module: GPTModule,
    *,
    rules: MemoryRules,
    world_size: int,
    devices_per_node: int,
    batch_size: int,
    block_size: int,
    accumulate: int,
    steps: int,
    precision: str,
    recompute: bool,
    device_type: str,
) -> Plan:
    """Counts what a run needs, without building it.

    Args:
        module: The module, whose model may be on the meta device; only its implementation and config are used.
        rules: The strategy's.
        world_size: Devices of all nodes.
        devices_per_node: Devices of one node.
        batch_size: Sequences per device and micro-batch.
        block_size: Tokens of a sequence.
        accumulate: Micro-batches per optimizer step.
        steps: Optimizer steps.
        precision: Lightning's name of it.
        recompute: Whether blocks compute their activations again.
        device_type: "cpu" or "cuda", which attend differently under dropout.

    Raises:
        UserError: The model cannot be run on FakeTensors.
    """
    implementation = module.implementation
    try:
        with FakeTensorMode():
            dtype = _dtypes(rules, precision)[1]
            # It is counted on the CPU, where a kernel of GPUs gives way to one that keeps as much.
            fields = module.model_config | refused_by(module.model, device_type="cpu", dtype=dtype)[1]
            model = _build(implementation, fields, dtype=dtype)
            flops = flops_per_token(model, block_size=block_size)
            trace = trace_step(
                model,
                optimizer=optimizer_bytes(module, model, dtype=_dtypes(rules, precision)[0]),
                block_class=implementation.block_class(),
                rules=rules,
                shape=(batch_size, block_size),
                accumulate=accumulate,
                precision=precision,
                recompute=recompute,
                device_type=device_type,
            )
    except UserError:
        raise
    except Exception as error:  # a foreign model may do anything, such as look at a value
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"--dry_run cannot run --implementation {implementation.name} without memory:"
            f" {type(error).__name__}: {reason}"
        ) from error
    memory = rules.memory(trace, ranks=world_size)
    tokens = batch_size * block_size * accumulate * world_size
    return Plan(
        parameters=trace.total,
        tokens_per_step=tokens,
        flops_per_step=flops * tokens,
        steps=steps,
        memory=memory,
        host=memory.host_peak * devices_per_node,
    )


def trace_step(
    model: nn.Module,
    *,
    optimizer: tuple[int, int],
    block_class: type[nn.Module] | None,
    rules: MemoryRules,
    shape: tuple[int, int],
    accumulate: int,
    precision: str,
    recompute: bool,
    device_type: str,
) -> StepTrace:
    """Runs a fake model forward and backward, and keeps what was alive after each operation.

    Args:
        model: The model, made of FakeTensors in the precision that it computes in; call this under their mode.
        optimizer: What ``optimizer_bytes`` says.
        block_class: The unit that is gathered and recomputed; None where there is none.
        rules: The strategy's, which say in what precision the model computes.
        shape: (B, T) of a micro-batch.
        accumulate: Micro-batches per optimizer step.
        precision: Lightning's name of it.
        recompute: Whether blocks compute their activations again.
        device_type: "cpu" or "cuda".
    """
    model.train()
    blocks = [m for m in model.modules() if block_class is not None and isinstance(m, block_class)]
    if recompute:
        recompute_blocks(model, block_class=block_class)
    unit_of = {p: i for i, block in enumerate(blocks) for p in block.parameters()}
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
        parameter.grad = None  # counted from here on as made, no longer as alive

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(made)
    kept, computed = _dtypes(rules, precision)
    autocast = torch.autocast("cpu", dtype=_half(precision), enabled=rules.autocasts(precision))
    attention = _attention_as_on_gpu() if device_type == "cuda" else nullcontext()
    with live, attention:
        with autocast:
            _, loss = model(idx, idx)
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
        state=optimizer[0],
        step=optimizer[1],
    )


def optimizer_bytes(module: GPTModule, model: nn.Module, *, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the optimizer's state, and at the highest of what one of its steps makes for a while.

    Args:
        module: Says which optimizer.
        model: The model, made of FakeTensors; call this under their mode.
        dtype: Of the weights that are kept.
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
        state, live.moments = live.bytes, []
        optimizer.step()
    return state, max(moment.activations for moment in live.moments) - state


def _half(precision: str) -> torch.dtype:
    return torch.float16 if precision.startswith("16") else torch.bfloat16


def _dtypes(rules: MemoryRules, precision: str) -> tuple[torch.dtype, torch.dtype]:
    """Of the weights that are kept, and of those that are computed with."""
    wide = torch.float64 if precision.startswith("64") else torch.float32
    kept = _half(precision) if rules.keeps_half(precision) else wide
    return kept, _half(precision) if rules.computes_in_half(precision) else wide


def _build(implementation: Implementation, fields: dict[str, Any], *, dtype: torch.dtype) -> nn.Module:
    """A model whose parameters have a type from the start: those of a FakeTensor model cannot be converted."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return implementation.build(fields)
    finally:
        torch.set_default_dtype(default)


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, from the operation to the end of their last tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.made = self.open = self.closed = 0
        self.moments: list[Moment] = []
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        # A view or an in-place result shares its input's storage, which is either counted or a parameter's.
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
        self.moments.append(Moment(self.bytes, self.made, self.open, self.closed))
        return out

    def _freed(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key)


@contextmanager
def _attention_as_on_gpu() -> Iterator[None]:
    """No kernel there keeps the dropped-out probabilities (B, n_head, T, T), which the CPU's does.

    The function itself is exchanged, since a TorchFunctionMode does not reach what is recomputed in the backward pass.
    """
    attend = nn.functional.scaled_dot_product_attention

    def without_dropout(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **rest: Any
    ) -> Tensor:
        return attend(query, key, value, attn_mask, 0.0, **rest)

    nn.functional.scaled_dot_product_attention = without_dropout
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = attend
