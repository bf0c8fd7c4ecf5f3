"""The key-value cache: with it, a model reads each token of a text once.

A model opts in by accepting a cache: ``forward(idx, targets=None, *, cache=None)``. Then ``forward`` reads only the new
tokens ``idx`` (B, T):

    positions = cache.extend(T, idx.device)  # once per forward, before the blocks
    k, v = cache.append(k, v)                # once in each attention layer: all keys and values so far
    mask = cache.mask                        # the attention mask of one-token steps, if rows differ in length

It returns the logits of all new positions, or of each row's last one (``cache.last``), which is cheaper.

The first call reads the prompts, padded on the right where they differ in length; each later call reads one token per
row. Layers are identified by the order of their calls, so blocks need no layer index.
"""

import inspect

import torch
from torch import Tensor, nn


def accepts_cache(model: nn.Module) -> bool:
    """Return whether the model's ``forward`` has a parameter ``cache``."""
    return "cache" in inspect.signature(type(model).forward).parameters  # an instance's may be wrapped


class Cache:
    """Keys and values of the tokens read so far, for each attention layer of a model.

    Not a dataclass, because FSDP2's mixed precision replaces dataclass arguments of a block by copies.

    Args:
        capacity: Maximum number of tokens per row.
        lengths: Length of each prompt (B,) int64 if they differ; the first call's ``idx`` is padded to the longest.

    Attributes:
        length: Number of tokens of the longest row, including those of the last ``extend``.
        mask: Keys that each row's new token attends to, bool (B, 1, 1, length). None if all rows have the same length,
            and in the first call, where the causal mask hides the padding.
    """

    def __init__(self, capacity: int, lengths: Tensor | None = None) -> None:
        self.capacity = capacity
        self.lengths = lengths
        self.length = 0
        self.mask: Tensor | None = None
        self._layers: list[tuple[Tensor, Tensor]] = []  # keys and values, each (B, n_kv_head, capacity, head_size)
        self._previous: list[Tensor] = []  # see `previous`, each (B, 1, ...)
        self._layer = self._slot = 0  # the entry that the next call of `append` and of `previous` uses
        self._ends: tuple[Tensor | slice, ...] = ()  # with a mask: index of each row's new token in keys and values

    def extend(self, T: int, device: torch.device) -> Tensor:
        """Make room for T new tokens per row.

        Returns:
            Positions of the new tokens, int64: (T,), or (B, 1) if rows differ in length.

        Raises:
            ValueError: The rows exceed the capacity, or T is not 1 after the first call.
        """
        self._layer = self._slot = 0
        start = self.length
        if start + T > self.capacity:
            raise ValueError(f"the cache holds {start} of {self.capacity} tokens, which leaves no room for {T}")
        if start and T > 1:
            raise ValueError(f"after the prompt the cache takes one token at a time, not {T}")
        self.length = start + T
        if self.lengths is None or start == 0:
            return torch.arange(start, self.length, device=device)
        self.lengths = self.lengths + 1
        self.mask = (torch.arange(self.length, device=device) < self.lengths[:, None])[:, None, None]
        positions = self.lengths - 1
        self._ends = torch.arange(len(positions), device=device), slice(None), positions
        return positions[:, None]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, each (B, n_kv_head, T, head_size); return all so far, with T = length.

        Every attention layer calls this once per forward, always in the same order.
        """
        if self._layer == len(self._layers):
            # Zeros, because attention multiplies the unused slots of shorter rows by 0, and 0 * NaN is NaN.
            keys, values = (x.new_zeros(x.size(0), x.size(1), self.capacity, x.size(3)) for x in (k, v))
            self._layers.append((keys, values))
        keys, values = self._layers[self._layer]
        self._layer += 1
        if self.mask is None:
            start, T = self.length - k.size(2), k.size(2)
            keys.narrow(2, start, T).copy_(k)
            values.narrow(2, start, T).copy_(v)
        else:
            keys[self._ends] = k[:, :, 0]
            values[self._ends] = v[:, :, 0]
        return keys.narrow(2, 0, self.length), values.narrow(2, 0, self.length)

    def previous(self, x: Tensor, *, fill: float) -> Tensor:
        """Return the entry that precedes x (B, 1, ...), and keep x's last entry for the next forward.

        For models that mix a token with the one before it. Several calls per forward are identified by their order.

        Args:
            x: Any per-token values of the new tokens (B, T, ...).
            fill: The value before the first token of a text.
        """
        # Cloned to fixed strides, because other strides would recompile a compiled step.
        last = self.last(x).clone(memory_format=torch.contiguous_format)
        if self._slot == len(self._previous):
            previous = torch.full_like(last, fill)
            self._previous.append(last)
        else:
            previous, self._previous[self._slot] = self._previous[self._slot], last
        self._slot += 1
        return previous

    def last(self, x: Tensor) -> Tensor:
        """Return each row's last entry (B, 1, ...) of x (B, T, ...), per-token values of the new tokens."""
        if self.lengths is None or x.size(1) == 1:
            return x[:, -1:]
        return x[torch.arange(len(x), device=x.device), self.lengths - 1][:, None]

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows, in this order."""
        self._layers = [(keys[rows], values[rows]) for keys, values in self._layers]
        self._previous = [x[rows] for x in self._previous]
        if self.lengths is not None:
            self.lengths = self.lengths[rows]
            self.length = int(self.lengths.max())
