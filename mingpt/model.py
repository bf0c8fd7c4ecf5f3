"""The minGPT language model: untied output head, tanh GELU, logits at all positions."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from mingpt.trainer import configure_optimizers
from mingpt.utils import CfgNode

ATTENTION_CHOICES = ("sdpa", "manual")
# GPT-2 settings that this model hard-codes.
GPT2_TRAITS = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}

PRESETS: dict[str, dict[str, int]] = {
    "openai-gpt": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    "gpt2-xxl": {"n_layer": 96, "n_head": 25, "n_embd": 1600},
    "gpt2-xxxl": {"n_layer": 100, "n_head": 30, "n_embd": 1920},
    "gpt2-4xl": {"n_layer": 190, "n_head": 30, "n_embd": 1920},
    "gopher-44m": {"n_layer": 8, "n_head": 16, "n_embd": 512},
    "gpt-mini": {"n_layer": 6, "n_head": 6, "n_embd": 192},
    "gpt-micro": {"n_layer": 4, "n_head": 4, "n_embd": 128},
    "gpt-nano": {"n_layer": 3, "n_head": 3, "n_embd": 48},
}


@dataclass
class GPTConfig:
    """Sizes and options of the model; sizes that are None are taken from the preset `model_type`."""

    model_type: str | None = None
    """Preset for n_layer, n_head and n_embd; those that are also set take precedence."""
    n_layer: int | None = None
    """Number of transformer blocks."""
    n_head: int | None = None
    """Number of attention heads per block."""
    n_embd: int | None = None
    """Width of the residual stream; a multiple of n_head."""
    vocab_size: int | None = None
    """Number of distinct tokens."""
    block_size: int | None = None
    """Maximum sequence length."""
    embd_pdrop: float = 0.1
    """Dropout probability on the summed embeddings."""
    resid_pdrop: float = 0.1
    """Dropout probability on the two residual branches of each block."""
    attn_pdrop: float = 0.1
    """Dropout probability on the attention weights."""
    attention: str = "sdpa"
    """Attention implementation: sdpa (fused) or manual (explicit formula)."""
    vocab_padding: int = 0
    """Number of tokens at the end of the vocabulary that are padding and never sampled."""


def _resolve(config: GPTConfig | CfgNode) -> GPTConfig:
    """Return a copy of `config` with all sizes set, or raise ValueError."""
    if not isinstance(config, GPTConfig):
        known = vars(config)
        config = GPTConfig(**{f.name: known[f.name] for f in fields(GPTConfig) if f.name in known})
    sizes: dict[str, int] = {}
    if config.model_type is not None:
        if config.model_type not in PRESETS:
            raise ValueError(f"unknown model_type {config.model_type!r}; choose one of: {', '.join(PRESETS)}")
        sizes.update(PRESETS[config.model_type])
    names = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")
    sizes.update({name: value for name in names if (value := getattr(config, name)) is not None})
    if missing := [name for name in names if name not in sizes]:
        raise ValueError(
            f"config is missing {', '.join(missing)}; set each one (model_type sets n_layer, n_head, n_embd)"
        )
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= config.vocab_padding < sizes["vocab_size"]:
        raise ValueError(f"vocab_padding must be from 0 to below vocab_size, got {config.vocab_padding}")
    return replace(config, **sizes)  # type: ignore[arg-type]


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        """Build the projections; ValueError if n_head does not divide n_embd, or `attention` is unknown."""
        super().__init__()
        assert config.n_embd is not None and config.n_head is not None
        n_embd, n_head = config.n_embd, config.n_head
        if n_embd % n_head != 0:
            raise ValueError(
                f"n_embd={n_embd} is not divisible by n_head={n_head}; "
                "choose a width that is a multiple of the number of heads"
            )
        if config.attention not in ATTENTION_CHOICES:
            raise ValueError(f"unknown attention {config.attention!r}; choose one of: {', '.join(ATTENTION_CHOICES)}")
        self.n_head = n_head
        self.fused = config.attention == "sdpa"
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_attn.parts = 3  # type: ignore[assignment]  # q, k, v: Muon orthogonalises each one
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.c_proj.is_residual = True  # type: ignore[assignment]
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Original checkpoints store the causal mask under this name; this model never stores it.
        state_dict.pop(prefix + "bias", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x: torch.Tensor, cache: Any = None) -> torch.Tensor:
        """Map (B, T, C) to (B, T, C); a cache adds the keys and values of earlier tokens."""
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3 * self.n_head, C // self.n_head).transpose(1, 2)
        q, k, v = heads.chunk(3, dim=1)  # (B, nh, T, hs)
        mask = None  # causal
        if cache is not None:
            k, v = cache.append(k, v)  # (B, nh, S, hs) of all S tokens so far
            mask = cache.mask  # (B, 1, 1, S) if rows differ in length
        if self.fused:
            p = self.attn_dropout.p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p, is_causal=mask is None and T > 1)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))  # (B, nh, T, S)
            if mask is None:
                mask = torch.ones(T, k.size(2), dtype=torch.bool, device=x.device).tril(k.size(2) - T)
            att = self.attn_dropout(F.softmax(att.masked_fill(~mask, -math.inf), dim=-1))
            y = att @ v  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # concatenate the heads
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Position-wise feed-forward network, four times wider inside."""

    def __init__(self, config: GPTConfig) -> None:
        """Build the two projections."""
        super().__init__()
        assert config.n_embd is not None
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.act = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.c_proj.is_residual = True  # type: ignore[assignment]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    """Pre-norm transformer block: attention then MLP, each added to its input."""

    def __init__(self, config: GPTConfig) -> None:
        """Build the norms, the attention and the MLP."""
        super().__init__()
        assert config.n_embd is not None
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cache: Any = None) -> torch.Tensor:
        """Map (B, T, C) to (B, T, C)."""
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.ModuleDict):
    """All layers below the output head; a ModuleDict with typed entries."""

    wte: nn.Embedding
    wpe: nn.Embedding
    drop: nn.Dropout
    h: nn.ModuleList
    ln_f: nn.LayerNorm


class GPT(nn.Module):
    """Decoder-only transformer; its `config` is a copy with all sizes set."""

    # `apply(_init_weights)` sets every parameter, so the model can be built on the meta device and initialised later.
    initialises_by_apply = True
    configure_optimizers = configure_optimizers

    @staticmethod
    def get_default_config() -> CfgNode:
        """Return a config without sizes: set vocab_size, block_size, and either model_type or the sizes."""
        return CfgNode(**vars(GPTConfig()))

    @classmethod
    def from_pretrained(cls, name_or_path: str, **overrides: Any) -> "GPT":
        """Return a model with the weights of a Hugging Face GPT-2, read by the package transformers.

        Args:
            name_or_path: A model name on the hub, such as gpt2-xl, or a folder.
            overrides: Dropout rates, attention, or a smaller block_size.

        Raises:
            ImportError: transformers is not installed.
            ValueError: Another option is overridden, or the pretrained model uses an option that this one lacks.
        """
        try:
            from transformers import GPT2LMHeadModel
        except ImportError as error:
            raise ImportError("GPT.from_pretrained needs transformers: pip install transformers") from error
        if wrong := overrides.keys() - {"embd_pdrop", "resid_pdrop", "attn_pdrop", "attention", "block_size"}:
            raise ValueError(f"{', '.join(sorted(wrong))} cannot be overridden, since the weights depend on it")
        pretrained = GPT2LMHeadModel.from_pretrained(name_or_path)
        hf_config, state_dict = pretrained.config, pretrained.state_dict()
        expected = GPT2_TRAITS | {"n_inner": 4 * hf_config.n_embd if hf_config.n_inner else None}
        for name, value in expected.items():
            if (found := getattr(hf_config, name)) != value:
                raise ValueError(f"{name} of {name_or_path} is {found!r}; this model needs {value!r}")
        if (found := hf_config.activation_function) not in ("gelu_new", "gelu_pytorch_tanh"):
            raise ValueError(f"activation_function of {name_or_path} is {found!r}; this model needs the tanh GELU")
        block_size = overrides.pop("block_size", hf_config.n_positions)
        if not 1 <= block_size <= hf_config.n_positions:
            raise ValueError(f"block_size={block_size} must be from 1 to the {hf_config.n_positions} of {name_or_path}")
        state_dict["transformer.wpe.weight"] = state_dict["transformer.wpe.weight"][:block_size]
        sizes = {name: getattr(hf_config, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
        model = cls(GPTConfig(block_size=block_size, **sizes, **overrides))
        # Hugging Face's Conv1D stores its weight as (in, out).
        transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        model.load_state_dict({name: w.t() if name.endswith(transposed) else w for name, w in state_dict.items()})
        return model

    def __init__(self, config: GPTConfig) -> None:
        """Build and initialise the model, without changing `config`.

        Args:
            config: Sizes, dropout rates and the attention implementation; a GPTConfig, or a CfgNode that has some of
                its fields, and others that are ignored.

        Raises:
            ValueError: The preset or `attention` is unknown, or a size is missing or invalid.
        """
        super().__init__()
        config = self.config = _resolve(config)
        assert config.n_layer is not None and config.n_embd is not None
        assert config.vocab_size is not None and config.block_size is not None
        self.block_size = config.block_size
        self.sampled_tokens = config.vocab_size - config.vocab_padding
        self.residual_std = 0.02 / math.sqrt(2 * config.n_layer)
        self.transformer = Transformer(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.embd_pdrop),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        # Each call sets only the module's own parameters, so it also works under ZeRO-3, which gathers them one by one.
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.residual_std if hasattr(module, "is_residual") else 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

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
            Logits (B, T, vocab_size), or with a cache (B, 1, vocab_size) of each row's last token; and the mean cross
            entropy in nats, or None without targets.

        Raises:
            ValueError: T exceeds block_size.
        """
        T = idx.size(1)
        if T > self.block_size:
            raise ValueError(f"sequence of length {T} is longer than block_size={self.block_size}")
        # positions of the tokens, (T,), or (B, 1) if the cache's rows differ in length
        pos = torch.arange(T, device=idx.device) if cache is None else cache.extend(T, idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)  # (B, T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x, cache)
        if cache is not None:
            x = cache.last(x)  # (B, 1, C)
        x = self.transformer.ln_f(x)  # (B, T, C)
        if targets is not None and head_loss is not None:
            return None, head_loss(self.lm_head, x, targets)
        logits = self.lm_head(x)  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.reshape(-1), ignore_index=-1)

    @torch.no_grad()
    def predict(self, idx: torch.Tensor, targets: bool = True) -> torch.Tensor:
        """Return the logits of all positions of idx (B, T) if `targets`, else of the last one, (B, 1, vocab_size)."""
        return self(idx)[0][:, 0 if targets else -1 :]

    @torch.no_grad()
    def generate(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        do_sample: bool = False,
        top_k: int | None = None,
    ) -> torch.Tensor:
        """Extend each sequence one token at a time, in the model's current mode (train or eval).

        Args:
            idx: Token indices (B, T) to continue; the model reads the last block_size of them.
            max_new_tokens: Number of tokens to append.
            temperature: Divides the logits before sampling.
            do_sample: Whether to sample; otherwise take the most likely token.
            top_k: Sample among this many most likely tokens; more than vocab_size means all.

        Returns:
            Token indices (B, T + max_new_tokens).

        Raises:
            ValueError: The temperature is not positive when sampling, or top_k is below 1.
        """
        if do_sample and temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}; use do_sample=False for greedy")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.block_size :])[0][:, -1]  # (B, vocab_size)
            logits = logits[:, : self.sampled_tokens]
            if do_sample:
                logits = logits / temperature
                if top_k is not None:
                    kept = torch.topk(logits, min(top_k, logits.size(-1))).values
                    logits = logits.masked_fill(logits < kept[:, -1:], -math.inf)
                token = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)
            else:
                token = logits.argmax(dim=-1, keepdim=True)
            idx = torch.cat((idx, token), dim=1)
        return idx
