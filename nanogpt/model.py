"""The nanoGPT language model: GPT-2 with tied embeddings, exact GELU and optional biases, or with ALiBi's positions."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanogpt.alibi import alibi_bias, alibi_slopes, flex_alibi

# What nn.GELU calls each: nanoGPT has the exact one, GPT-2's weights were trained with the tanh approximation.
GELU_CHOICES = {"exact": "none", "tanh": "tanh"}
CHOICES = {"attention": ("sdpa", "flash", "manual"), "position": ("learned", "alibi"), "gelu": tuple(GELU_CHOICES)}
# What Hugging Face calls them, and what else of a GPT-2 this model has no option for.
GPT2_GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
GPT2_TRAITS = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


@dataclass
class GPTConfig:
    """Sizes and options of the model; the defaults are GPT-2 with the vocabulary padded to a multiple of 64."""

    block_size: int = 1024
    """Longest sequence the model can read."""
    vocab_size: int = 50304
    """Number of distinct tokens."""
    n_layer: int = 12
    """Number of transformer blocks."""
    n_head: int = 12
    """Number of attention heads in each block."""
    n_embd: int = 768
    """Width of the residual stream; a multiple of n_head."""
    dropout: float = 0.0
    """Dropout probability on embeddings, attention weights and residual branches."""
    bias: bool = True
    """Whether linear layers and layer norms have a bias."""
    attention: str = "sdpa"
    """Attention implementation: sdpa (the best kernel), flash (that one or an error) or manual (the formula)."""
    position: str = "learned"
    """Where a token stands: learned embeddings, or alibi, which goes on beyond block_size."""
    gelu: str = "exact"
    """The MLP's activation: exact, or tanh as in GPT-2's weights."""
    vocab_padding: int = 0
    """How many tokens at the end of the vocabulary are padding, which is never sampled."""


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension with an optional bias."""

    def __init__(self, size: int, bias: bool) -> None:
        """Build a norm over vectors of length `size`."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., size) to (..., size)."""
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which a position sees only itself and earlier ones."""

    def __init__(self, config: GPTConfig) -> None:
        """Build the projections; ValueError on an indivisible n_embd."""
        super().__init__()
        if config.n_embd % config.n_head != 0:
            wrong = f"n_embd={config.n_embd} is not divisible by n_head={config.n_head}"
            raise ValueError(f"{wrong}; choose a width that is a multiple of the number of heads")
        self.n_head = config.n_head
        self.head_size = config.n_embd // config.n_head
        self.fused, self.flash = config.attention != "manual", config.attention == "flash"
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_attn.parts = 3  # type: ignore[assignment]
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj.is_residual = True  # type: ignore[assignment]
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Original checkpoints may store the causal mask under this name; here it is recomputed, never stored.
        state_dict.pop(prefix + "bias", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x: torch.Tensor, mask: Any = None, cache: Any = None) -> torch.Tensor:
        """Map (B, T, C) to (B, T, C).

        Args:
            x: Input (B, T, C).
            mask: What to use in place of the causal mask: keys to attend to (bool) or a bias of the scores (float),
                broadcast to (B, nh, T, S), or a function of q, k and v that computes the attention.
            cache: Keys and values of earlier tokens.
        """
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3 * self.n_head, C // self.n_head).transpose(1, 2).chunk(3, dim=1)
        if cache is not None:
            k, v = cache.append(k, v)  # of all S tokens so far
        # q is (B, nh, T, hs), k and v are (B, nh, S, hs)
        if callable(mask):
            y = mask(q, k, v)
        elif self.fused:
            p = self.attn_dropout.p if self.training else 0.0
            # The flash kernel takes no mask, so rows of different lengths are left to another one.
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if self.flash and mask is None else nullcontext():
                y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p, is_causal=mask is None and T > 1)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))  # (B, nh, T, S)
            if mask is None:
                mask = torch.ones(T, k.size(2), dtype=torch.bool, device=x.device).tril(k.size(2) - T)
            att = att + mask if mask.is_floating_point() else att.masked_fill(~mask, -math.inf)
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Position-wise feed-forward network, four times wider inside."""

    def __init__(self, config: GPTConfig) -> None:
        """Build the two projections."""
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate=GELU_CHOICES[config.gelu])
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj.is_residual = True  # type: ignore[assignment]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, T, C) to (B, T, C), each position on its own."""
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Pre-norm transformer block: attention then MLP, each added to its input."""

    def __init__(self, config: GPTConfig) -> None:
        """Build one block."""
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, mask: Any = None, cache: Any = None) -> torch.Tensor:
        """Map (B, T, C) to (B, T, C); see CausalSelfAttention."""
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.ModuleDict):
    """Everything below the output head, with the types of its entries."""

    wte: nn.Embedding
    wpe: nn.Embedding  # of learned positions alone
    drop: nn.Dropout
    h: nn.ModuleList
    ln_f: LayerNorm


class GPT(nn.Module):
    """Decoder-only transformer whose output head shares the token embedding's weight."""

    # `apply(_init_weights)` sets every parameter, so the model can be built without memory and initialised later.
    initialises_by_apply = True

    def __init__(self, config: GPTConfig) -> None:
        """Build and initialise the model; it keeps a copy of `config`. ValueError on what makes no sense together."""
        super().__init__()
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
        if not 0 <= config.vocab_padding < config.vocab_size:
            raise ValueError(f"vocab_padding must be from 0 to below vocab_size, got {config.vocab_padding}")
        for name, choices in CHOICES.items():
            if getattr(config, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(config, name)!r}; choose one of: {', '.join(choices)}")
        self.extends_context = config.position == "alibi"  # positions go on beyond block_size
        if config.attention == "flash" and self.extends_context:
            raise ValueError("attention=flash cannot be had with position=alibi: that kernel takes no bias; use sdpa")
        if config.attention == "flash" and config.n_embd > 256 * config.n_head:
            raise ValueError("attention=flash cannot be had: that kernel takes heads of up to 256; use sdpa")
        config = self.config = replace(config)
        wpe = {} if self.extends_context else {"wpe": nn.Embedding(config.block_size, config.n_embd)}
        self.transformer = Transformer(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                **wpe,
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": LayerNorm(config.n_embd, config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        # Each call touches only the module's own parameters, so it also works where those are gathered one by one.
        if isinstance(module, nn.Linear):
            residual = hasattr(module, "is_residual")
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, LayerNorm):
            nn.init.ones_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif module is self:
            # to_empty() gives each module a parameter of its own, so a model built on meta has to be tied again.
            self.transformer.wte.weight = self.lm_head.weight

    def refuses(self, device_type: str, dtype: torch.dtype) -> tuple[str, dict[str, Any]] | None:
        """Say why it cannot compute on "cpu", "cuda", ... in a type, and the options that can; None where it can."""
        if self.config.attention != "flash":  # each forward asks
            return None
        fits = device_type == "cuda" and dtype in (torch.float16, torch.bfloat16)
        if fits and not (torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)):
            return None
        need = "a GPU (compute capability 8.0 or more) and 16 bits"
        have = f"{str(dtype).removeprefix('torch.')} on {device_type}"
        return f"attention=flash cannot be had: that kernel needs {need}, not {have}", {"attention": "sdpa"}

    @classmethod
    def from_pretrained(cls, name_or_path: str, **overrides: Any) -> "GPT":
        """The model with the weights of a GPT-2 of Hugging Face's, through their package transformers.

        Args:
            name_or_path: A name on the hub such as gpt2-xl, or a folder.
            overrides: dropout, attention, or a smaller block_size.

        Raises:
            ImportError: transformers is not installed.
            ValueError: Another option is overridden, or this model cannot express the other.
        """
        try:
            from transformers import GPT2LMHeadModel
        except ImportError as error:
            raise ImportError("GPT.from_pretrained needs transformers: pip install transformers") from error
        if wrong := overrides.keys() - {"dropout", "attention", "block_size"}:
            raise ValueError(f"{', '.join(sorted(wrong))} cannot be overridden: the weights decide it")
        theirs = GPT2LMHeadModel.from_pretrained(name_or_path)
        said, weights = theirs.config, theirs.state_dict()
        for name, value in (GPT2_TRAITS | {"n_inner": 4 * said.n_embd if said.n_inner else None}).items():
            if getattr(said, name) != value:
                raise ValueError(f"{name} of {name_or_path} is {getattr(said, name)!r}, and this model has {value!r}")
        if said.activation_function not in GPT2_GELU:
            raise ValueError(f"activation_function of {name_or_path} is {said.activation_function!r}, and not a GELU")
        if not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
            raise ValueError(f"{name_or_path} has a head of its own, and this model's is its token embedding")
        block_size = overrides.pop("block_size", said.n_positions)
        sizes = {name: getattr(said, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
        gelu = GPT2_GELU[said.activation_function]
        model = cls(GPTConfig(block_size=said.n_positions, gelu=gelu, **sizes, **overrides))
        # Their Conv1D keeps its weight as (in, out).
        turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        model.load_state_dict({name: w.t() if name.endswith(turned) else w for name, w in weights.items()})
        model.crop_block_size(block_size)
        return model

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context to `block_size`, at most the present one; ValueError otherwise."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size={block_size} must be from 1 to the present {self.config.block_size}")
        self.config.block_size = block_size
        if not self.extends_context:
            wpe = self.transformer.wpe
            wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone())
            wpe.num_embeddings = block_size

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Count parameters, the shared embedding once, and unless `non_embedding` is False no position embedding."""
        total = sum(p.numel() for p in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding and not self.extends_context else total

    def _alibi(self, pos: torch.Tensor, S: int, dtype: torch.dtype) -> Any:
        # Built once per forward and in the dtype of the attention, so that layers share one tensor.
        config, slopes = self.config, alibi_slopes(self.config.n_head, pos.device)
        # FlexAttention has neither dropout nor float64, and is slow unless S fills its blocks of 128 keys.
        fits = pos.is_cuda and dtype.itemsize < 8 and config.n_embd // config.n_head >= 16 and S % 128 == 0
        if fits and config.attention == "sdpa" and pos.shape == (S,) and not (self.training and config.dropout):
            return flex_alibi(slopes, S)
        return alibi_bias(slopes, pos, S).to(dtype)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, *, cache: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Predict next tokens.

        Args:
            idx: Token indices (B, T) int64, T at most block_size.
            targets: Next tokens (B, T) int64; positions holding -1 are ignored.
            cache: Keys and values of earlier tokens (lightning_gpt.implementations.cache), for generation only; `idx`
                then holds only the new tokens.

        Returns:
            With targets, logits (B, T, vocab_size) and the mean cross entropy; without, logits (B, 1, vocab_size) of
            each row's last token and None.

        Raises:
            ValueError: T exceeds block_size, or the model `refuses` the device or dtype.
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"sequence of length {T} is longer than block_size={self.config.block_size}")
        # positions of the tokens, (T,), or (B, 1) if the cache's rows differ in length
        pos = torch.arange(T, device=idx.device) if cache is None else cache.extend(T, idx.device)
        x = self.transformer.wte(idx)  # (B, T, C)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if refusal := self.refuses(device, dtype):
            raise ValueError(refusal[0])
        mask = None if cache is None else cache.mask  # (B, 1, 1, S) if rows differ in length
        if self.extends_context:
            mask = self._alibi(pos, T if cache is None else cache.length, dtype)  # (1 or B, nh, T, S), or a function
        else:
            x = x + self.transformer.wpe(pos)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x, mask, cache)
        if targets is None:  # the head reads only each row's last position
            x = x[:, -1:] if cache is None else cache.last(x)  # (B, 1, C)
        logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.reshape(-1), ignore_index=-1)

    @torch.no_grad()
    def predict(self, idx: torch.Tensor, targets: bool = True) -> torch.Tensor:
        """Return the logits of every position of idx (B, T), or (B, 1, vocab_size) of the last without `targets`."""
        return self(idx, idx if targets else None)[0]

    @torch.no_grad()
    def generate(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        *,
        do_sample: bool = True,
    ) -> torch.Tensor:
        """Extend each sequence one token at a time, in whichever mode (train or eval) the model is in.

        Args:
            idx: Token indices (B, T) to continue; only the last block_size are read.
            max_new_tokens: Number of tokens to append.
            temperature: Divides the logits before sampling.
            top_k: Sample among this many most likely tokens; more than vocab_size means all.
            do_sample: Sample if True, otherwise take the most likely token.

        Returns:
            Token indices (B, T + max_new_tokens).

        Raises:
            ValueError: If temperature is not positive when sampling, or top_k is below 1.
        """
        if do_sample and temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}; use do_sample=False for greedy")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size :])[0][:, -1]  # (B, vocab_size)
            logits = logits[:, : self.config.vocab_size - self.config.vocab_padding]
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
