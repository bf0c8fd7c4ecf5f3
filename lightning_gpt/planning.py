"""Plan a run before anything is built: parameters, FLOPs, and memory per device and on the host.

The model runs once on FakeTensors, which have shapes but no memory, and every storage that a real run would allocate is
counted until it is freed. So activations are counted, not estimated, for any model, under autocast and with
recomputation (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"; for GPTs compare Korthikanti et al.
2022, arXiv:2205.05198). ``strategies/memory.py`` divides them among the ranks of a strategy.
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
from lightning_gpt.implementations.loss import HeadLoss
from lightning_gpt.implementations.registry import Implementation, refused_by
from lightning_gpt.models import GPTModule
from lightning_gpt.strategies.memory import Memory, MemoryRules, Moment, StepTrace

SOURCES = (
    "shares: ZeRO, arXiv:1910.02054; activations: counted on FakeTensors (cf. arXiv:2205.05198);"
    " FLOPs: 6N + 12 n_layer n_embd T, PaLM, arXiv:2204.02311, appendix B"
)


@dataclass(frozen=True)
class Plan:
    """What a run needs. Memory is in bytes per device; ``host`` is in bytes per node.

    Attributes:
        parameters: Number of parameters; tied ones count once.
        tokens_per_step: Tokens per optimizer step over all devices.
        flops_per_step: The model's FLOPs per optimizer step over all devices, without recomputation.
        steps: Optimizer steps.
        memory: Memory of one device, and its share of host memory.
        host: Peak host memory for offloading, for all devices of a node.
    """

    parameters: int
    tokens_per_step: int
    flops_per_step: float
    steps: int
    memory: Memory
    host: int

    def table(self) -> str:
        """Return the plan as lines of text."""
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
    """Return the training FLOPs per token: 6 N + 12 n_layer n_embd T (PaLM, Chowdhery et al. 2022, appendix B).

    N is the number of parameters without position embeddings, as in nanoGPT. If the model's config lacks n_layer or
    n_embd, the attention term is left out.

    Args:
        model: The unsharded model, on any device, including meta and fake ones.
        block_size: Tokens per sequence (T).
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
    """Compute what a run needs, without allocating it.

    Args:
        module: The module; its model may be on the meta device, since only implementation, config and optimizer count.
        rules: The strategy's memory rules.
        world_size: Number of devices of all nodes.
        devices_per_node: Number of devices of one node.
        batch_size: Sequences per device and micro-batch.
        block_size: Tokens per sequence.
        accumulate: Micro-batches per optimizer step.
        steps: Optimizer steps.
        precision: Lightning's name of the precision.
        recompute: Whether blocks recompute their activations.
        device_type: "cpu" or "cuda"; with dropout, their attention kernels keep different activations.

    Raises:
        UserError: The model cannot be run on FakeTensors.
    """
    implementation = module.implementation
    try:
        with FakeTensorMode():
            dtype = _dtypes(rules, precision)[1]
            # FakeTensors run on the CPU, so a GPU-only kernel is replaced by one that keeps as much memory.
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
                chunked_loss=module.head_loss is not None,
                device_type=device_type,
            )
    except UserError:
        raise
    except Exception as error:  # a user's model may do anything, such as reading a value
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
    chunked_loss: bool,
    device_type: str,
) -> StepTrace:
    """Run a fake model forward and backward, and record the live memory after each operation.

    Must be called under FakeTensorMode.

    Args:
        model: The model, made of FakeTensors in the dtype that it computes in.
        optimizer: Bytes of state and of temporaries, from ``optimizer_bytes``.
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
    kept, computed = _dtypes(rules, precision)
    autocast = torch.autocast("cpu", dtype=_half(precision), enabled=rules.autocasts(precision))
    attention = _attention_as_on_gpu() if device_type == "cuda" else nullcontext()
    with live, attention:
        with autocast:
            _, loss = model(idx, idx, **({"head_loss": HeadLoss()} if chunked_loss else {}))
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
    """Return the bytes of the optimizer's state, and the peak bytes of temporaries in one of its steps.

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
        state, live.moments = live.bytes, []
        optimizer.step()
    return state, max(moment.activations for moment in live.moments) - state


def _half(precision: str) -> torch.dtype:
    return torch.float16 if precision.startswith("16") else torch.bfloat16


def _dtypes(rules: MemoryRules, precision: str) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of the stored weights, and of the weights used in computation."""
    wide = torch.float64 if precision.startswith("64") else torch.float32
    kept = _half(precision) if rules.keeps_half(precision) else wide
    return kept, _half(precision) if rules.computes_in_half(precision) else wide


def _build(implementation: Implementation, fields: dict[str, Any], *, dtype: torch.dtype) -> nn.Module:
    """Build a model in a dtype; FakeTensor parameters cannot be converted later."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return implementation.build(fields)
    finally:
        torch.set_default_dtype(default)


class _LiveBytes(TorchDispatchMode):
    """Count the bytes of all storages that operations allocate, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.made = self.open = self.closed = 0
        self.moments: list[Moment] = []
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        # Views and in-place results share their input's storage, which is already counted or belongs to a parameter.
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
    """Disable attention dropout, because only the CPU's kernel stores the dropped-out probabilities (B, nh, T, T).

    Replaces the function itself, because a TorchFunctionMode does not reach recomputation in the backward pass.
    """
    attend = nn.functional.scaled_dot_product_attention

    def without_dropout(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **rest: Any
    ) -> Tensor:
        return attend(query, key, value, attn_mask, 0.0, **rest)

    nn.functional.scaled_dot_product_attention = without_dropout  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = attend
