"""A modern GPT: rotary positions, RMSNorm, normed queries and keys, squared ReLU, no biases, a soft-capped head.

The parts, as far as the defaults go, are those of Karpathy's nanochat; the options come from the nanoGPT speed runs
(Jordan et al., modded-nanogpt). Norms have no parameters.
"""

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

ROTARY_BASE = 10000.0
# With windows, every so many layers one sees everything, and the last one does.
WHOLE_EVERY = 4
# Entries of an embedding by which a gate decides.
GATE = 12


@dataclass
class GPTConfig:
    """Sizes and options of the model."""

    block_size: int = 1024
    """Longest sequence the model can read."""
    vocab_size: int = 50304
    """Number of distinct tokens."""
    n_layer: int = 12
    """Number of transformer blocks."""
    n_head: int = 12
    """Number of attention heads in each block."""
    n_embd: int = 768
    """Width of the residual stream; an even multiple of n_head."""
    n_kv_head: int | None = None
    """Number of key and value heads, each shared by as many query heads; a divisor of n_head (default: n_head)."""
    window: int = 0
    """Tokens that a layer sees, itself included; 0: all. Every fourth layer and the last one see all."""
    bigram: int = 0
    """Rows of a table of embeddings for pairs of tokens, which are added to those of single ones; 0: none."""
    smear: bool = False
    """Whether each token's embedding takes in, or takes out, some of that of the token before it."""
    softcap: float = 15.0
    """Logits are bent to stay between minus and plus this."""
    dropout: float = 0.0
    """Dropout probability on embeddings, attention weights and residual branches."""
    vocab_padding: int = 0
    """How many tokens at the end of the vocabulary are padding, which is never sampled."""


@dataclass
class Cache:
    """What the layers and the pair embeddings need of the tokens that a batch has read, to read a next one alone."""

    capacity: int
    """The most tokens that a row will have."""
    lengths: torch.Tensor | None = None
    """Tokens of each row (B,) where they differ: the first batch is then padded on the right, which no token sees."""
    length: int = 0  # of the longest row
    layers: list[tuple[torch.Tensor, ...]] = field(default_factory=list)  # each (B, n_kv_head, capacity, head_size)
    before: tuple[torch.Tensor, ...] | None = None  # each row's last token (B, 1), and its embedding (B, 1, C)

    def extend(self, T: int, device: torch.device) -> torch.Tensor:
        """Make room for the next T tokens of each row; return their positions, (T,), or (B, 1) where rows differ."""
        read = self.length
        if read + T > self.capacity or (read and T > 1):
            raise ValueError(f"a cache that holds {read} of {self.capacity} tokens takes one more at a time, not {T}")
        self.length += T
        if self.lengths is None or read == 0:
            return torch.arange(read, self.length, device=device)
        self.lengths = self.lengths + 1
        return self.lengths[:, None] - 1

    def append(self, layer: int, *new: torch.Tensor) -> list[torch.Tensor]:
        """Keep a layer's new keys and values, each (B, n_kv_head, T, head_size), and return all that it has."""
        if layer == len(self.layers):
            self.layers.append(tuple(x.new_zeros(*x.shape[:2], self.capacity, x.size(3)) for x in new))
        for kept, x in zip(self.layers[layer], new, strict=True):
            if self.lengths is None or x.size(2) > 1:
                kept[:, :, self.length - x.size(2) : self.length] = x
            else:
                kept[torch.arange(len(x), device=x.device), :, self.lengths - 1] = x[:, :, 0]
        return [kept[:, :, : self.length] for kept in self.layers[layer]]

    def last(self, x: torch.Tensor) -> torch.Tensor:
        """Each row's last entry (B, 1, ...) of what was just read (B, T, ...)."""
        if self.lengths is None or x.size(1) == 1:
            return x[:, -1:]
        return x[torch.arange(len(x), device=x.device), self.lengths - 1][:, None]

    def keep(self, rows: list[int]) -> None:
        """Forget all rows but these."""
        self.layers = [tuple(kept[rows] for kept in layer) for layer in self.layers]
        self.before = tuple(x[rows] for x in self.before)
        if self.lengths is not None:
            self.lengths = self.lengths[rows]
            self.length = int(self.lengths.max())


def norm(x: torch.Tensor) -> torch.Tensor:
    """Divide by the root mean square over the last dimension (Zhang and Sennrich, 2019)."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def behind(x: torch.Tensor, before: torch.Tensor | None, *, nothing: int) -> torch.Tensor:
    """What stands before each entry of x (B, T, ...): before the first one `before` (B, 1, ...), or nothing."""
    first = torch.full_like(x[:, :1], nothing) if before is None else before
    return torch.cat((first, x[:, :-1]), dim=1)


def rotations(positions: torch.Tensor, head_size: int) -> torch.Tensor:
    """Cosines and sines of the angles of positions (T,) or (B, T) (Su et al., 2021): (2, [B, 1,] T, head_size / 2)."""
    exponents = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32) / head_size
    angles = positions[..., None] * ROTARY_BASE**-exponents
    angles = angles if positions.dim() == 1 else angles[:, None]
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Turn each pair of entries of x (B, heads, T, head_size), one from each half, by its position's angle."""
    cos, sin = turn
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).type_as(x)


def visible(positions: torch.Tensor, keys: int, window: int) -> torch.Tensor | None:
    """Which of `keys` keys the tokens at positions (T,) or (B, 1) see, at most `window` back unless that is 0.

    Returns:
        (T, keys) or (B, 1, 1, keys) of bool; None without a window where each sees all that are not after it.
    """
    if positions.dim() == 1 and not window:
        return None
    age = positions[..., None] - torch.arange(keys, device=positions.device)
    mask = (age >= 0) & (age < (window or keys))
    return mask if positions.dim() == 1 else mask[:, None]


class CausalSelfAttention(nn.Module):
    """Self-attention whose queries and keys are rotated and normed; heads may share keys and values."""

    def __init__(self, config: GPTConfig) -> None:
        """Build the projections."""
        super().__init__()
        self.head_size = config.n_embd // config.n_head
        kv_size = self.head_size * config.n_kv_head
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = nn.Linear(config.n_embd, kv_size, bias=False)
        self.c_v = nn.Linear(config.n_embd, kv_size, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_proj.is_output = True  # type: ignore[assignment]
        self.dropout = config.dropout

    def forward(
        self,
        x: torch.Tensor,
        turn: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Cache | None,
        layer: int,
        last: bool,
    ) -> torch.Tensor:
        """Map (B, T, C) as Block does."""
        B, T, C = x.shape
        q, k, v = (c(x).view(B, T, -1, self.head_size).transpose(1, 2) for c in (self.c_q, self.c_k, self.c_v))
        q, k = norm(rotate(q, turn)), norm(rotate(k, turn))
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if last:
            T, q, mask = 1, q[:, :, -1:], None if mask is None else mask[..., -1:, :]
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and T > 1,
            enable_gqa=k.size(1) < q.size(1),
        )
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Position-wise feed-forward network, four times wider inside, with squared ReLU (So et al., 2021)."""

    def __init__(self, config: GPTConfig) -> None:
        """Build the two projections."""
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)
        self.c_proj.is_output = True  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, T, C) to (B, T, C), each position on its own."""
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """Pre-norm transformer block: attention then MLP, each added to its input."""

    def __init__(self, config: GPTConfig) -> None:
        """Build one block."""
        super().__init__()
        self.attn = CausalSelfAttention(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: torch.Tensor,
        turn: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        layer: int = 0,
        last: bool = False,
    ) -> torch.Tensor:
        """Read the tokens of a batch.

        Args:
            x: (B, T, C).
            turn: Rotation of each position, see `rotations`.
            mask: Which keys each position sees, broadcast to (B, n_head, T, keys); None: itself and all earlier ones.
            cache: What the rows have read before.
            layer: Which layer of the cache this block is.
            last: Compute the last position alone, which reads all others.

        Returns:
            (B, T, C), or (B, 1, C) of the last position.
        """
        y = self.dropout(self.attn(norm(x), turn, mask, cache, layer, last))
        x = (x[:, -1:] if last else x) + y
        return x + self.dropout(self.mlp(norm(x)))


class Transformer(nn.ModuleDict):
    """Everything below the output head, with the types of its entries."""

    wte: nn.Embedding
    drop: nn.Dropout
    h: nn.ModuleList


class GPT(nn.Module):
    """Decoder-only transformer with an output head of its own."""

    # `apply(_init_weights)` sets every parameter, so the model can be built without memory and initialised later.
    initialises_by_apply = True
    # `forward` with one reads what is new to it alone, and gives the logits of each row's last token.
    new_cache = Cache
    # No weight belongs to a position.
    extends_context = True

    def __init__(self, config: GPTConfig) -> None:
        """Build and initialise the model; it keeps a copy of `config`.

        Args:
            config: Sizes and options of the model.

        Raises:
            ValueError: If a size is invalid.
        """
        super().__init__()
        config = self.config = replace(config, n_kv_head=config.n_kv_head or config.n_head)
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_kv_head"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
        for name in ("window", "bigram"):
            if getattr(config, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(config, name)}")
        if config.n_embd % (2 * config.n_head) != 0:
            raise ValueError(
                f"n_embd={config.n_embd} is not divisible by twice n_head={config.n_head}; rotary positions turn pairs"
                " of a head's entries, so choose a width that is an even multiple of the number of heads"
            )
        if config.n_head % config.n_kv_head != 0:
            raise ValueError(f"n_head={config.n_head} is not divisible by n_kv_head={config.n_kv_head}")
        if config.softcap <= 0:
            raise ValueError(f"softcap must be above 0, got {config.softcap}")
        if not 0 <= config.vocab_padding < config.vocab_size:
            raise ValueError(f"vocab_padding must be from 0 to below vocab_size, got {config.vocab_padding}")
        self.transformer = Transformer(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            }
        )
        if config.bigram:
            self.transformer["bigram"] = nn.Embedding(config.bigram, config.n_embd)
        if config.smear:
            self.transformer["smear"] = nn.Linear(min(GATE, config.n_embd), 1, bias=False)
            self.transformer["smear"].is_output = True  # type: ignore[assignment]
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.is_output = True  # type: ignore[assignment]
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        # Each call touches only the module's own parameters, so it also works where those are gathered one by one.
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Linear) and hasattr(module, "is_output"):
            nn.init.zeros_(module.weight)  # at first each block passes on its input, and every token is as likely
        elif isinstance(module, nn.Linear):
            bound = math.sqrt(3 / module.in_features)  # unit variance in, unit variance out
            nn.init.uniform_(module.weight, -bound, bound)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, *, cache: Cache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Predict next tokens.

        Args:
            idx: Token indices (B, T), T at most block_size.
            targets: Next tokens (B, T); positions holding -1 are ignored.
            cache: What the rows have read before idx, which is added to it; not while training.

        Returns:
            With targets, logits (B, T, vocab_size) and the mean cross entropy as a scalar; without, the logits of each
            row's last token (B, 1, vocab_size) and None.

        Raises:
            ValueError: If T exceeds block_size, or what a cache takes.
        """
        T, config = idx.size(1), self.config
        if T > config.block_size:
            raise ValueError(f"sequence of length {T} is longer than block_size={config.block_size}")
        positions = torch.arange(T, device=idx.device) if cache is None else cache.extend(T, idx.device)
        x = self.transformer.drop(self._embed(idx, cache))  # (B, T, C)
        turn = rotations(positions, config.n_embd // config.n_head)
        keys = T if cache is None else cache.length
        whole = visible(positions, keys, 0)
        local = visible(positions, keys, config.window) if config.window else whole
        # The head reads each row's last position alone, and so does the last block, where rows end at the same one.
        ends_alike = targets is None and (cache is None or cache.lengths is None)
        for layer, block in enumerate(self.transformer.h):
            is_top = layer + 1 == config.n_layer
            mask = whole if (layer + 1) % WHOLE_EVERY == 0 or is_top else local
            last = is_top and ends_alike
            x = block(x, turn, mask, last=last) if cache is None else block(x, turn, mask, cache, layer, last)
        if targets is None:
            x = x[:, -1:] if cache is None else cache.last(x)
        logits = config.softcap * torch.tanh(self.lm_head(norm(x)).float() / config.softcap)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.reshape(-1), ignore_index=-1)

    def _embed(self, idx: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """Embed tokens (B, T), and what they make with those before them, as (B, T, C)."""
        config = self.config
        token, embedding = (None, None) if cache is None or cache.before is None else cache.before
        x = self.transformer.wte(idx)
        if config.bigram:
            # No two share one of (tokens + 1) * tokens rows; the first ones are for what begins a text.
            tokens = config.vocab_size - config.vocab_padding
            pairs = (behind(idx, token, nothing=-1) + 1) * tokens + idx
            x = x + self.transformer.bigram(pairs % config.bigram)
        x = norm(x)
        if cache is not None:
            # Laid out alike after any number of tokens, lest a compiled model be compiled again for each layout.
            cache.before = tuple(cache.last(read).clone(memory_format=torch.contiguous_format) for read in (idx, x))
        if config.smear:
            x = x + torch.tanh(self.transformer.smear(x[..., :GATE])) * behind(x, embedding, nothing=0)
        return x
