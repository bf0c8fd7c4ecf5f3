"""Generate tokens with any model, one per step, for prompts of any number and lengths."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gpt.implementations.cache import Cache, accepts_cache

SWAPPED_ROWS = range(6, 24)  # numbers of rows of x for which MKL computes W @ x.T faster than x @ W.T


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How new tokens are chosen, and when a row ends.

    Attributes:
        max_new_tokens: Maximum number of new tokens per row.
        greedy: Take the likeliest token instead of drawing one.
        temperature: Divides the logits.
        top_k: Draw among this many likeliest tokens, and those that tie with the last of them.
        top_p: Draw among the fewest likeliest tokens whose probabilities add up to this.
        repetition_penalty: Divides positive and multiplies negative logits of tokens that are already in the row.
        stop_tokens: Tokens that end a row; they are not part of it.
        seed: Row r draws from its own generator, seeded with ``seed + r``.

    Raises:
        ValueError: A value is out of range.
    """

    max_new_tokens: int
    greedy: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    seed: int = 1337

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(
                f"temperature must be positive, got {self.temperature}; use greedy for the likeliest token"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be positive, got {self.repetition_penalty}")


def generate_tokens(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    block_size: int,
    vocab_size: int,
    device: torch.device,
    step: Callable[..., tuple[Tensor, Tensor | None]] | None = None,
    is_over: Callable[[int, int], bool] | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """Continue every prompt, one token per step, in the model's current mode (train or eval).

    A row's draws depend only on the seed, its index and its own tokens, and do not change the global random state. A
    row longer than ``block_size`` is continued from its last ``block_size`` tokens, which are read in full at each
    step, because their positions change. All ranks of a sharded model must call this with the same arguments.

    Args:
        model: Any model; its parameters may be sharded.
        prompts: Token ids of each row.
        settings: How tokens are chosen and when rows end.
        block_size: Maximum number of tokens that the model reads.
        vocab_size: Size of the vocabulary without padding; larger ids are never chosen.
        device: Device of the model.
        step: Replaces the model in one-token steps, such as a compiled forward.
        is_over: ``(row, token) -> bool``, called with each new token: whether the row ends with it.

    Yields:
        For each step, (row, token) of every row that has a new token.

    Raises:
        ValueError: A prompt is empty.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt needs at least one token")
    texts = [list(map(int, prompt)) for prompt in prompts]
    max_new_tokens = settings.max_new_tokens
    next_logits = NextLogits(
        model, texts, block_size=block_size, max_new_tokens=max_new_tokens, device=device, step=step
    )
    linears = _swappable_linears(model, device) if step is None else []
    uniforms = None if settings.greedy else _uniform_numbers(len(texts), settings)
    seen = None
    if settings.repetition_penalty != 1:
        seen = torch.zeros(len(texts), vocab_size, dtype=torch.bool)
        for row, text in enumerate(texts):
            seen[row, text] = True
    rows = list(range(len(texts)))
    for t in range(max_new_tokens):
        with torch.no_grad(), _swapped_products(linears, rows=len(rows)):
            logits = next_logits.logits(rows)[:, :vocab_size].float()  # (R, V)
            if seen is not None:
                logits = penalise(logits, _sent(seen[rows], device), penalty=settings.repetition_penalty)
            if uniforms is None:
                chosen = logits.argmax(-1).tolist()
            else:
                chosen = draw(warp(logits, settings), uniforms[rows, t]).tolist()
        if seen is not None:
            seen[rows, chosen] = True
        new = [(row, token) for row, token in zip(rows, chosen, strict=True) if token not in settings.stop_tokens]
        for row, token in new:
            texts[row].append(token)
        rows = [row for row, token in new if is_over is None or not is_over(row, token)]
        yield new
        if not rows:
            return


def penalise(logits: Tensor, seen: Tensor, *, penalty: float) -> Tensor:
    """Make the tokens that a row already holds less likely: logits (R, V), seen (R, V) bool.

    As in Keskar et al. 2019, "CTRL", section 4.1, but negative logits are multiplied, as in Hugging Face's version.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def warp(logits: Tensor, settings: GenerationSettings) -> Tensor:
    """Apply temperature, top_k and top_p to logits (R, V), in Hugging Face's order; excluded tokens become -inf."""
    logits = logits / settings.temperature
    if settings.top_k is not None:
        kept = torch.topk(logits, min(settings.top_k, logits.size(-1))).values
        logits = logits.masked_fill(logits < kept[:, -1:], -math.inf)
    if settings.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        # Exclude a token if the likelier ones already reach top_p; this never excludes the likeliest.
        excluded = probabilities.cumsum(-1) - probabilities >= settings.top_p
        logits = logits.masked_fill(excluded.scatter(-1, order, excluded), -math.inf)
    return logits


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """Draw a token per row by inverse transform sampling: logits (R, V), numbers (R,) in [0, 1); tokens (R,)."""
    if logits.device.type == "mps":  # no float64 there, and float32 sums over a large vocabulary are too coarse
        logits = logits.cpu()
    sums = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    at = _sent(numbers, sums.device)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, at, right=True)[:, 0].clamp(max=logits.size(-1) - 1)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to a device; the host does not wait for a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _uniform_numbers(rows: int, settings: GenerationSettings) -> Tensor:
    """Return uniform numbers in [0, 1), float64 (rows, max_new_tokens), the same for every kind of device."""
    generators = [torch.Generator().manual_seed(settings.seed + row) for row in range(rows)]
    return torch.stack([torch.rand(settings.max_new_tokens, generator=g, dtype=torch.float64) for g in generators])


@contextmanager
def _swapped_products(linears: Sequence[nn.Linear], *, rows: int) -> Iterator[None]:
    """Make Linear layers compute W @ x.T, which MKL does faster than x @ W.T for few rows."""
    swapped = linears if rows in SWAPPED_ROWS else ()
    for linear in swapped:  # through __dict__, since nn.Module's setattr is slow
        linear.__dict__["forward"] = partial(_swapped_linear, linear)
    try:
        yield
    finally:
        for linear in swapped:
            linear.__dict__.pop("forward", None)


def _swappable_linears(model: nn.Module, device: torch.device) -> list[nn.Linear]:
    if torch.device(device).type != "cpu" or not torch.backends.mkl.is_available():
        return []
    return [m for m in model.modules() if type(m) is nn.Linear and "forward" not in m.__dict__]


def _swapped_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    rows = x.shape[:-1].numel()
    if rows not in SWAPPED_ROWS or x.dtype != torch.float32:  # for example, when a prompt is read
        return F.linear(x, linear.weight, linear.bias)
    y = linear.weight @ x.reshape(rows, -1).T
    if linear.bias is not None:
        y += linear.bias[:, None]
    return y.T.reshape(*x.shape[:-1], -1).contiguous()


class NextLogits:
    """Compute the logits of the next token of growing texts, with a cache where the model accepts one.

    Texts within ``block_size`` share one cache. Longer ones, and all texts of a model without a cache, are read in full
    for each token, in groups of equal length, so that no padding is needed.

    Args:
        model: Any model.
        texts: Token ids of each row; the caller appends the new tokens to them.
        block_size: Maximum number of tokens that the model reads.
        max_new_tokens: Maximum number of tokens by which a text grows.
        device: Device of the model.
        step: Replaces the model in one-token steps.
    """

    def __init__(
        self,
        model: nn.Module,
        texts: list[list[int]],
        *,
        block_size: int,
        max_new_tokens: int,
        device: torch.device,
        step: Callable[..., tuple[Tensor, Tensor | None]] | None,
    ) -> None:
        self.model = model
        self.step = step or model
        self.texts = texts
        self.block_size = block_size
        self.max_new_tokens = max_new_tokens
        self.device = device
        self.has_cache = accepts_cache(model)
        self.cache: Cache | None = None
        self.cached_rows: list[int] = []

    def logits(self, rows: list[int]) -> Tensor:
        """Return the next token's logits of these rows, (R, V). A row once left out must not be passed again."""
        groups: dict[int, list[int]] = {}  # rows by the number of tokens to read in full; 0: use the cache
        for row in rows:
            length = len(self.texts[row])
            fits = self.has_cache and length <= self.block_size
            is_cached = fits and (self.cache is None or row in self.cached_rows)
            groups.setdefault(0 if is_cached else min(length, self.block_size), []).append(row)
        parts = [self._read_in_full(group, n) if n else self._read_cached(group) for n, group in groups.items()]
        if len(parts) == 1:
            return parts[0]
        order = [row for group in groups.values() for row in group]
        return torch.cat(parts)[[order.index(row) for row in rows]]

    def _read_in_full(self, rows: list[int], n: int) -> Tensor:
        return self.model(self._tensor([self.texts[row][-n:] for row in rows]))[0][:, -1]

    def _read_cached(self, rows: list[int]) -> Tensor:
        if self.cache is None:  # prefill: read the prompts, padded on the right
            lengths = [len(self.texts[row]) for row in rows]
            longest = max(lengths)
            idx = self._tensor([self.texts[row] + [0] * (longest - len(self.texts[row])) for row in rows])
            # One more than needed, because a compiled step is recompiled when the keys fill their buffer.
            capacity = min(longest + self.max_new_tokens, self.block_size) + 1
            self.cache = Cache(capacity, self._tensor(lengths) if min(lengths) < longest else None)
            read: Callable[..., tuple[Tensor, Tensor | None]] = self.model
        else:
            if rows != self.cached_rows:
                self.cache.keep([self.cached_rows.index(row) for row in rows])
            idx = self._tensor([self.texts[row][-1:] for row in rows])
            # The second token is read uncompiled: torch.compile specialises on a cache of length 1.
            read = self.step if max(len(self.texts[row]) for row in rows) > 2 else self.model
        self.cached_rows = rows
        return self.cache.last(read(idx, cache=self.cache)[0])[:, 0]

    def _tensor(self, values: list[Any]) -> Tensor:
        return _sent(torch.tensor(values, dtype=torch.long), self.device)
