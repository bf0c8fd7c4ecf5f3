"""A modern GPT: rotary positions, RMSNorm, normed queries and keys, squared ReLU, no biases, a soft-capped head.

With the default options it is Karpathy's nanochat; the other options come from the nanoGPT speed runs (Jordan et al.,
modded-nanogpt). Norms have no parameters.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from moderngpt.window import local_mask

ROTARY_BASE = 10000.0
FULL_EVERY = 4  # every fourth layer and the last one attend to all tokens despite `window`
GATE_SIZE = 12  # number of embedding entries that the smear gate reads


@dataclass
class GPTConfig:
    """Sizes and options of the model."""

    block_size: int = 1024
    """Maximum sequence length."""
    vocab_size: int = 50304
    """Number of distinct tokens."""
    n_layer: int = 12
    """Number of transformer blocks."""
    n_head: int = 12
    """Number of attention heads per block."""
    n_embd: int = 768
    """Width of the residual stream; an even multiple of n_head."""
    n_kv_head: int | None = None
    """Number of key and value heads, each shared by as many query heads; a divisor of n_head (default: n_head)."""
    window: int = 0
    """Tokens that a layer attends to, itself included; 0: all. Every fourth layer and the last attend to all."""
    bigram: int = 0
    """Rows of an embedding table for pairs of adjacent tokens, added to the token embedding; 0: none."""
    smear: bool = False
    """Whether a learned gate adds the previous token's embedding to each token's."""
    softcap: float = 15.0
    """Logits are bounded to this magnitude by tanh."""
    dropout: float = 0.0
    """Dropout probability on embeddings, attention weights and residual branches."""
    vocab_padding: int = 0
    """Number of tokens at the end of the vocabulary that are padding and never sampled."""


def norm(x: torch.Tensor) -> torch.Tensor:
    """Divide by the root mean square over the last dimension (Zhang and Sennrich, 2019), in the dtype of x.

    Autocast would keep a float32 copy of x for the backward pass; the sums are in float32 anyway.
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which layers compute with x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def lowered(x: torch.Tensor) -> torch.Tensor:
    """Return x in autocast's dtype, so that the layers that read it share one copy."""
    return x.to(autocast_dtype(x))


def shift_right(x: torch.Tensor, *, fill: int, cache: Any = None) -> torch.Tensor:
    """Shift x (B, T, ...) right by one along T; the first entry comes from the cache, or is `fill` without one."""
    first = torch.full_like(x[:, :1], fill) if cache is None else cache.previous(x, fill=fill)
    return torch.cat((first, x[:, :-1]), dim=1)


def rotary(positions: torch.Tensor, head_size: int) -> torch.Tensor:
    """Return cosines and sines of the rotary angles of positions (T,) or (B, T) (Su et al., 2021).

    Returns:
        Float32 (2, T, hs / 2) or (2, B, 1, T, hs / 2).
    """
    exponents = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32) / head_size
    angles = positions[..., None] * ROTARY_BASE**-exponents
    angles = angles if positions.dim() == 1 else angles[:, None]
    return torch.stack((angles.cos(), angles.sin()))


def apply_rotary(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotate x (B, nh, T, hs) by each position's angles; entry i forms a pair with entry i + hs / 2."""
    cos, sin = cos_sin
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).type_as(x)


class CausalSelfAttention(nn.Module):
    """Causal self-attention with rotary positions and normed queries and keys; heads may share keys and values."""

    def __init__(self, config: GPTConfig) -> None:
        """Build the projections."""
        super().__init__()
        self.head_size = config.n_embd // config.n_head
        kv_size = self.head_size * (config.n_kv_head or config.n_head)
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = nn.Linear(config.n_embd, kv_size, bias=False)
        self.c_v = nn.Linear(config.n_embd, kv_size, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_proj.is_output = True  # type: ignore[assignment]
        self.dropout = config.dropout

    def forward(self, x: torch.Tensor, cos_sin: torch.Tensor, mask: Any = None, cache: Any = None) -> torch.Tensor:
        """Map (B, T, C) to (B, T, C).

        Args:
            x: Input (B, T, C).
            cos_sin: See `rotary`.
            mask: Keys to attend to, bool, broadcast to (B, nh, T, S); or a function that computes the attention; None
                for causal attention.
            cache: Keys and values of earlier tokens.
        """
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, -1, self.head_size).transpose(1, 2)  # (B, nh, T, hs)
        k = self.c_k(x).view(B, T, -1, self.head_size).transpose(1, 2)  # (B, n_kv_head, T, hs)
        v = self.c_v(x).view(B, T, -1, self.head_size).transpose(1, 2)
        q, k = norm(apply_rotary(q, cos_sin)), norm(apply_rotary(k, cos_sin))
        if cache is not None:
            k, v = cache.append(k, v)  # (B, n_kv_head, S, hs) of all S tokens so far
        shares = k.size(1) < q.size(1)
        if callable(mask):
            y = mask(q, k, v, enable_gqa=shares)
        else:
            p = self.dropout if self.training else 0.0
            causal = mask is None and T > 1
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p, is_causal=causal, enable_gqa=shares)
        # y is (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # concatenate the heads


class MLP(nn.Module):
    """Position-wise feed-forward network, four times wider inside, with squared ReLU (So et al., 2021)."""

    def __init__(self, config: GPTConfig) -> None:
        """Build the two projections."""
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)
        self.c_proj.is_output = True  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, T, C) to (B, T, C)."""
        x = F.relu(self.c_fc(x))  # (B, T, 4C)
        return self.c_proj(x * x)  # autocast would compute square() in float32


class Block(nn.Module):
    """Pre-norm transformer block: attention then MLP, each added to its input."""

    def __init__(self, config: GPTConfig) -> None:
        """Build the attention and the MLP."""
        super().__init__()
        self.attn = CausalSelfAttention(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, cos_sin: torch.Tensor, mask: Any = None, cache: Any = None) -> torch.Tensor:
        """Map (B, T, C) to (B, T, C); see CausalSelfAttention."""
        x = x + self.dropout(self.attn(lowered(norm(x)), cos_sin, mask, cache))
        return x + self.dropout(self.mlp(norm(x)))


class Transformer(nn.ModuleDict):
    """All layers below the output head; a ModuleDict with typed entries."""

    wte: nn.Embedding
    bigram: nn.Embedding  # only with `bigram`
    smear: nn.Linear  # only with `smear`
    drop: nn.Dropout
    h: nn.ModuleList


class GPT(nn.Module):
    """Decoder-only transformer with an untied output head."""

    # `apply(_init_weights)` sets every parameter, so the model can be built on the meta device and initialised later.
    initialises_by_apply = True
    # Rotary positions extend beyond block_size.
    extends_context = True

    def __init__(self, config: GPTConfig) -> None:
        """Build and initialise the model, which keeps a copy of `config`.

        Args:
            config: Sizes and options of the model.

        Raises:
            ValueError: A size or option is invalid.
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
                f"n_embd={config.n_embd} is not divisible by twice n_head={config.n_head}; rotary positions need an"
                " even head size, so choose a width that is an even multiple of the number of heads"
            )
        assert config.n_kv_head is not None
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
            self.transformer["smear"] = nn.Linear(min(GATE_SIZE, config.n_embd), 1, bias=False)
            self.transformer["smear"].is_output = True  # type: ignore[assignment]
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.is_output = True  # type: ignore[assignment]
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        # Each call sets only the module's own parameters, so it also works under ZeRO-3, which gathers them one by one.
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Linear) and hasattr(module, "is_output"):
            nn.init.zeros_(module.weight)  # blocks start as the identity, and all tokens are equally likely
        elif isinstance(module, nn.Linear):
            bound = math.sqrt(3 / module.in_features)  # keeps unit variance
            nn.init.uniform_(module.weight, -bound, bound)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, *, cache: Any = None, head_loss: Any = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Predict the next token at every position.

        Args:
            idx: Token indices (B, T) int64, T at most block_size.
            targets: Next tokens (B, T) int64; positions holding -1 are ignored.
            cache: Cache of earlier tokens (lightning_gpt.implementations.cache); `idx` then holds only the new ones.
            head_loss: Head and cross entropy in one (lightning_gpt.implementations.loss); no logits are then returned.

        Returns:
            With targets, logits (B, T, vocab_size) and the mean cross entropy in nats; without targets, logits
            (B, 1, vocab_size) of each row's last token and None. Logits are float32.

        Raises:
            ValueError: T exceeds block_size.
        """
        T, config = idx.size(1), self.config
        if T > config.block_size:
            raise ValueError(f"sequence of length {T} is longer than block_size={config.block_size}")
        # positions of the tokens, (T,), or (B, 1) if the cache's rows differ in length
        positions = torch.arange(T, device=idx.device) if cache is None else cache.extend(T, idx.device)
        x = self.transformer.drop(self._embed(idx, cache))  # (B, T, C)
        cos_sin = rotary(positions, config.n_embd // config.n_head)
        full_mask = None if cache is None else cache.mask  # None: causal
        windowed = full_mask
        if config.window:
            fused = cache is None and not (self.training and config.dropout)
            S = T if cache is None else cache.length
            windowed = local_mask(config, positions, S, autocast_dtype(x), fused=fused)
        for layer, block in enumerate(self.transformer.h, start=1):
            is_full = layer % FULL_EVERY == 0 or layer == config.n_layer
            x = block(x, cos_sin, full_mask if is_full else windowed, cache)
        if targets is None:  # the head reads only each row's last position
            x = x[:, -1:] if cache is None else cache.last(x)  # (B, 1, C)
        x = norm(x)
        if targets is not None and head_loss is not None:
            return None, head_loss(self.lm_head, x, targets, softcap=config.softcap)
        logits = self.lm_head(x).float()  # (B, T, vocab_size)
        logits = config.softcap * torch.tanh(logits / config.softcap)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.reshape(-1), ignore_index=-1)

    def _embed(self, idx: torch.Tensor, cache: Any) -> torch.Tensor:
        config = self.config
        x = self.transformer.wte(idx)  # (B, T, C)
        if config.bigram:
            # Hash the pair (previous, token) to a row of the table; previous is -1 before a text's first token.
            V = config.vocab_size - config.vocab_padding
            pairs = (shift_right(idx, fill=-1, cache=cache) + 1) * V + idx  # (B, T)
            x = x + self.transformer.bigram(pairs % config.bigram)
        x = norm(x)
        if config.smear:
            gate = torch.tanh(self.transformer.smear(x[..., :GATE_SIZE]))  # (B, T, 1)
            x = x + gate * shift_right(x, fill=0, cache=cache)
        return x
