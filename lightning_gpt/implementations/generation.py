"""New tokens from any model, one at a time, for any number of prompts of any lengths.

A model may offer ``new_cache(capacity, lengths=None)``, whose result ``cache`` has

- ``forward(idx, cache=cache)``: reads idx (B, T) after what the rows have read before, and gives the logits of each
  row's last token, (B, 1, V). First come the prompts, T tokens, of which ``lengths`` (B,) count where rows are padded
  on the right; then one token of each row at a time, until a row has ``capacity`` of them;
- ``cache.keep(rows)``: forgets all rows but these.

A model without it reads all tokens of a row again for each new one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEW_ROWS = range(6, 24)  # where MKL multiplies a weight with few columns sooner than few rows with a weight


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How new tokens are chosen, and when they end.

    Attributes:
        max_new_tokens: How many of each row at most.
        greedy: Take the likeliest token, draw none.
        temperature: Divides the logits.
        top_k: Draw among this many likeliest tokens (and those as likely as the last of them).
        top_p: Draw among the likeliest tokens that together have this probability, at least one.
        repetition_penalty: Divides the logits of tokens that are in the row already, and multiplies negative ones.
        stop_tokens: End a row; they are no part of it.
        seed: Row r draws from a generator of its own, seeded with ``seed + r``.

    Raises:
        ValueError: A number makes no sense.
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
            raise ValueError(f"temperature must be positive, got {self.temperature}; use greedy for the likeliest")
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
    """Continues every prompt, in whichever mode (train or eval) the model is in.

    What a row draws depends on the seed, its place and its own tokens, not on the rows beside it; the global random
    state is left as it was. Rows longer than ``block_size`` are continued from their last ``block_size`` tokens, read
    anew at each step since every one has then another position. All ranks of a sharded model call this together, with
    the same prompts and settings.

    Args:
        model: Any model; the parameters may be sharded.
        prompts: Token ids of each row, one or more.
        settings: How tokens are chosen.
        block_size: The most tokens that the model reads.
        vocab_size: How many tokens, from the first, may be chosen: the vocabulary without its padding.
        device: Where the model computes.
        step: Reads one token of each row after a cache in the model's place, such as what was compiled for that.
        is_over: Is told of each row and its new token, and says whether the row ends with it.

    Yields:
        For each step the rows that have a new token, and that token: (row, token).

    Raises:
        ValueError: A prompt is empty.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt needs at least one token")
    texts = [list(map(int, prompt)) for prompt in prompts]
    reader = _Reader(model, texts, block_size=block_size, room=settings.max_new_tokens, device=device, step=step)
    linears = _linears(model, device) if step is None else []
    numbers = None if settings.greedy else _random_numbers(len(texts), settings)
    seen = None
    if settings.repetition_penalty != 1:
        seen = torch.zeros(len(texts), vocab_size, dtype=torch.bool)
        for row, text in enumerate(texts):
            seen[row, text] = True
    rows = list(range(len(texts)))
    for number in range(settings.max_new_tokens):
        with torch.no_grad(), _quick(linears, rows=len(rows)):
            logits = reader.logits(rows)[:, :vocab_size].float()  # (R, V)
            if seen is not None:
                logits = penalise(logits, seen[rows].to(device), penalty=settings.repetition_penalty)
            if numbers is None:
                chosen = logits.argmax(-1).tolist()
            else:
                chosen = draw(warp(logits, settings), numbers[rows, number]).tolist()
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
    """Makes tokens less likely that a row has already: logits (R, V), seen (R, V) bool.

    Keskar et al. 2019, "CTRL", section 4.1, with negative logits multiplied, as in Hugging Face's generation.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def warp(logits: Tensor, settings: GenerationSettings) -> Tensor:
    """Temperature, top_k and top_p, in this order, which is Hugging Face's; what is left out becomes -inf (R, V)."""
    logits = logits / settings.temperature
    if settings.top_k is not None:
        kept = torch.topk(logits, min(settings.top_k, logits.size(-1))).values
        logits = logits.masked_fill(logits < kept[:, -1:], -math.inf)
    if settings.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        # The likelier ones are enough without it. Nothing is likelier than the first.
        left_out = probabilities.cumsum(-1) - probabilities >= settings.top_p
        logits = logits.masked_fill(left_out.scatter(-1, order, left_out), -math.inf)
    return logits


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """The token of each row (R,) at which the summed probabilities pass a number in [0, 1): logits (R, V)."""
    if logits.device.type == "mps":  # it has no float64, and float32 sums over a large vocabulary are too coarse
        logits = logits.cpu()
    sums = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    at = numbers.to(sums.device)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, at, right=True)[:, 0].clamp(max=logits.size(-1) - 1)


def _random_numbers(rows: int, settings: GenerationSettings) -> Tensor:
    """One number for each row and step, uniform in [0, 1), the same on every kind of device."""
    generators = [torch.Generator().manual_seed(settings.seed + row) for row in range(rows)]
    return torch.stack([torch.rand(settings.max_new_tokens, generator=g, dtype=torch.float64) for g in generators])


@contextmanager
def _quick(linears: Sequence[nn.Linear], *, rows: int) -> Iterator[None]:
    """Lets Linear layers take the product of few rows the quicker way round, where there is one."""
    swapped = linears if rows in FEW_ROWS else ()
    for linear in swapped:  # past its slow setattr
        linear.__dict__["forward"] = partial(_linear, linear)
    try:
        yield
    finally:
        for linear in swapped:
            linear.__dict__.pop("forward", None)


def _linears(model: nn.Module, device: torch.device) -> list[nn.Linear]:
    """Those that have a quicker way round."""
    if torch.device(device).type != "cpu" or not torch.backends.mkl.is_available():
        return []
    return [m for m in model.modules() if type(m) is nn.Linear and "forward" not in m.__dict__]


def _linear(linear: nn.Linear, x: Tensor) -> Tensor:
    rows = x.shape[:-1].numel()
    if rows not in FEW_ROWS or x.dtype != torch.float32:  # such as a prompt's
        return F.linear(x, linear.weight, linear.bias)
    y = linear.weight @ x.reshape(rows, -1).T
    if linear.bias is not None:
        y += linear.bias[:, None]
    return y.T.reshape(*x.shape[:-1], -1).contiguous()


class _Reader:
    """The logits that follow texts which grow at their ends."""

    def __init__(
        self,
        model: nn.Module,
        texts: list[list[int]],
        *,
        block_size: int,
        room: int,
        device: torch.device,
        step: Callable[..., tuple[Tensor, Tensor | None]] | None,
    ) -> None:
        self.model = model
        self.step = step or model
        self.texts = texts
        self.block_size = block_size
        self.room = room
        self.device = device
        self.cache = None
        self.cached: list[int] | None = None if hasattr(model, "new_cache") else []

    def logits(self, rows: list[int]) -> Tensor:
        """Of the next token of each of these rows, (R, V); rows that were left out once do not come back."""
        groups: dict[int, list[int]] = {}  # by how many tokens are read; 0 for those that the cache knows
        for row in rows:
            length = len(self.texts[row])
            is_cached = length <= self.block_size and (self.cached is None or row in self.cached)
            groups.setdefault(0 if is_cached else min(length, self.block_size), []).append(row)
        parts = [self._new(group) if n == 0 else self._all(group, n) for n, group in groups.items()]
        if len(parts) == 1:
            return parts[0]
        order = [row for group in groups.values() for row in group]
        return torch.cat(parts)[[order.index(row) for row in rows]]

    def _all(self, rows: list[int], n: int) -> Tensor:
        """Reads the last n tokens of each row."""
        return self.model(self._tensor([self.texts[row][-n:] for row in rows]))[0][:, -1]

    def _new(self, rows: list[int]) -> Tensor:
        """Reads what the cache has not."""
        if self.cache is None:
            lengths = [len(self.texts[row]) for row in rows]
            longest = max(lengths)
            idx = self._tensor([self.texts[row] + [0] * (longest - len(self.texts[row])) for row in rows])
            # One more than are ever read: a compiled step would be compiled again for keys that fill their memory.
            capacity = min(longest + self.room, self.block_size) + 1
            self.cache = self.model.new_cache(capacity, self._tensor(lengths) if min(lengths) < longest else None)
            read = self.model
        else:
            if rows != self.cached:
                self.cache.keep([self.cached.index(row) for row in rows])
            idx = self._tensor([self.texts[row][-1:] for row in rows])
            # Or for a cache of one token: torch takes 0 and 1 for constants, where other lengths vary.
            read = self.step if max(len(self.texts[row]) for row in rows) > 2 else self.model
        self.cached = rows
        return read(idx, cache=self.cache)[0][:, -1]

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)
