"""The nanoGPT language model: GPT-2 with tied embeddings, exact GELU, optional biases and optional ALiBi."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanogpt.alibi import alibi_mask
from nanogpt.training import configure_optimizers, estimate_mfu

# Our name -> nn.GELU's `approximate`. nanoGPT uses exact; GPT-2's weights were trained with tanh.
GELU_CHOICES = {"exact": "none", "tanh": "tanh"}
CHOICES = {"attention": ("sdpa", "flash", "manual"), "position": ("learned", "alibi"), "gelu": tuple(GELU_CHOICES)}
GPT2_GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}  # Hugging Face's name -> ours
# GPT-2 settings that this model hard-codes.
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
    """Maximum sequence length."""
    vocab_size: int = 50304
    """Number of distinct tokens."""
    n_layer: int = 12
    """Number of transformer blocks."""
    n_head: int = 12
    """Number of attention heads per block."""
    n_embd: int = 768
    """Width of the residual stream; a multiple of n_head."""
    dropout: float = 0.0
    """Dropout probability on embeddings, attention weights and residual branches."""
    bias: bool = True
    """Whether linear layers and layer norms have a bias."""
    attention: str = "sdpa"
    """Attention implementation: sdpa (fused), flash (that kernel or an error) or manual (explicit formula)."""
    position: str = "learned"
    """Position encoding: learned embeddings, or alibi, which extends beyond block_size."""
    gelu: str = "exact"
    """GELU of the MLP: exact, or the tanh approximation that GPT-2 was trained with."""
    vocab_padding: int = 0
    """Number of tokens at the end of the vocabulary that are padding and never sampled."""


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last dimension, with an optional bias."""

    def __init__(self, size: int, bias: bool) -> None:
        """Create the parameters for vectors of length `size`."""
        super().__init__(size, bias=bias)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        """Build the projections; ValueError if n_head does not divide n_embd."""
        super().__init__()
        if config.n_embd % config.n_head != 0:
            raise ValueError(f"n_embd={config.n_embd} is not divisible by n_head={config.n_head}; choose a multiple")
        self.n_head = config.n_head
        self.fused, self.flash = config.attention != "manual", config.attention == "flash"
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_attn.parts = 3  # type: ignore[assignment]  # q, k, v: Muon orthogonalises each one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj.is_residual = True  # type: ignore[assignment]
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Original checkpoints may store the causal mask under this name; this model never stores it.
        state_dict.pop(prefix + "bias", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x: torch.Tensor, mask: Any = None, cache: Any = None) -> torch.Tensor:
        """Map (B, T, C) to (B, T, C).

        `mask` replaces the causal mask: keys to attend to (bool) or a bias of the scores (float), broadcast to
        (B, nh, T, S), or a function that computes the attention. A cache adds the keys and values of earlier tokens.
        """
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3 * self.n_head, C // self.n_head).transpose(1, 2)
        q, k, v = heads.chunk(3, dim=1)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, nh, S, hs) of all S tokens so far
        if callable(mask):
            y = mask(q, k, v)
        elif self.fused:
            p = self.attn_dropout.p if self.training else 0.0
            # The flash kernel takes no mask, so batches with rows of different lengths use another kernel.
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if self.flash and mask is None else nullcontext():
                y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p, is_causal=mask is None and T > 1)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))  # (B, nh, T, S)
            if mask is None:
                mask = torch.ones(T, k.size(2), dtype=torch.bool, device=x.device).tril(k.size(2) - T)
            att = att + mask if mask.is_floating_point() else att.masked_fill(~mask, -math.inf)
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v  # (B, nh, T, hs)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))  # concatenate the heads


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
        """Map (B, T, C) to (B, T, C)."""
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Pre-norm transformer block: attention then MLP, each added to its input."""

    def __init__(self, config: GPTConfig) -> None:
        """Build the norms, the attention and the MLP."""
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
    """All layers below the output head; a ModuleDict with typed entries."""

    wte: nn.Embedding
    wpe: nn.Embedding  # only with learned positions
    drop: nn.Dropout
    h: nn.ModuleList
    ln_f: LayerNorm


class GPT(nn.Module):
    """Decoder-only transformer whose output head shares the weight of the token embedding."""

    # `apply(_init_weights)` sets every parameter, so the model can be built on the meta device and initialised later.
    initialises_by_apply = True
    configure_optimizers = configure_optimizers
    estimate_mfu = estimate_mfu

    def __init__(self, config: GPTConfig) -> None:
        """Build and initialise the model, which keeps a copy of `config`; ValueError on invalid options."""
        super().__init__()
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
        if not 0 <= config.vocab_padding < config.vocab_size:
            raise ValueError(f"vocab_padding must be from 0 to below vocab_size, got {config.vocab_padding}")
        for name, choices in CHOICES.items():
            if getattr(config, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(config, name)!r}; choose one of: {', '.join(choices)}")
        self.extends_context = config.position == "alibi"
        if config.attention == "flash" and self.extends_context:
            raise ValueError("attention=flash is not available with position=alibi: the kernel takes no bias; use sdpa")
        if config.attention == "flash" and config.n_embd > 256 * config.n_head:
            raise ValueError("attention=flash is not available: the kernel takes heads of up to 256; use sdpa")
        config = self.config = replace(config)
        self.transformer = Transformer(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                **({} if self.extends_context else {"wpe": nn.Embedding(config.block_size, config.n_embd)}),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": LayerNorm(config.n_embd, config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        # Each call sets only the module's own parameters, so it also works under ZeRO-3, which gathers them one by one.
        if isinstance(module, nn.Linear | nn.Embedding):
            shrink = math.sqrt(2 * self.config.n_layer) if hasattr(module, "is_residual") else 1.0
            nn.init.normal_(module.weight, std=0.02 / shrink)
        elif isinstance(module, LayerNorm):
            nn.init.ones_(module.weight)
        elif module is self:
            # to_empty() gives each module its own parameter, so a model built on the meta device must be tied again.
            self.transformer.wte.weight = self.lm_head.weight
        if isinstance(module, nn.Linear | LayerNorm) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def refuses(self, device_type: str, dtype: torch.dtype) -> tuple[str, dict[str, Any]] | None:
        """Return None if the model runs on this device type and dtype, else why not, and options that work."""
        if self.config.attention != "flash":
            return None
        fits = device_type == "cuda" and dtype in (torch.float16, torch.bfloat16)
        if fits and not (torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)):
            return None
        need = f"a GPU (compute capability 8.0 or more) and 16 bits, not {str(dtype).removeprefix('torch.')}"
        return f"attention=flash is not available: the kernel needs {need} on {device_type}", {"attention": "sdpa"}

    @classmethod
    def from_pretrained(cls, name_or_path: str, override_args: dict[str, Any] | None = None, **overrides: Any) -> "GPT":
        """Return a model with the weights of a Hugging Face GPT-2, read by the package transformers.

        Args:
            name_or_path: A model name on the hub, such as gpt2-xl, or a folder.
            override_args: Overrides as a dictionary.
            overrides: dropout, attention, or a smaller block_size.

        Raises:
            ImportError: transformers is not installed.
            ValueError: Another option is overridden, or the pretrained model uses an option that this one lacks.
        """
        try:
            from transformers import GPT2LMHeadModel
        except ImportError as error:
            raise ImportError("GPT.from_pretrained needs transformers: pip install transformers") from error
        overrides = (override_args or {}) | overrides
        if wrong := overrides.keys() - {"dropout", "attention", "block_size"}:
            raise ValueError(f"{', '.join(sorted(wrong))} cannot be overridden, since the weights depend on it")
        pretrained = GPT2LMHeadModel.from_pretrained(name_or_path)
        hf_config, state_dict = pretrained.config, pretrained.state_dict()
        for name, value in (GPT2_TRAITS | {"n_inner": 4 * hf_config.n_embd if hf_config.n_inner else None}).items():
            if (found := getattr(hf_config, name)) != value:
                raise ValueError(f"{name} of {name_or_path} is {found!r}; this model needs {value!r}")
        if (found := hf_config.activation_function) not in GPT2_GELU:
            raise ValueError(f"activation_function of {name_or_path} is {found!r}; this model needs a GELU")
        if not torch.equal(state_dict["lm_head.weight"], state_dict["transformer.wte.weight"]):
            raise ValueError(f"{name_or_path} has an untied head; this model's shares the token embedding")
        block_size = overrides.pop("block_size", hf_config.n_positions)
        sizes = {name: getattr(hf_config, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
        model = cls(GPTConfig(block_size=hf_config.n_positions, gelu=GPT2_GELU[found], **sizes, **overrides))
        # Hugging Face's Conv1D stores its weight as (in, out).
        transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        model.load_state_dict({name: w.t() if name.endswith(transposed) else w for name, w in state_dict.items()})
        model.crop_block_size(block_size)
        return model

    def crop_block_size(self, block_size: int) -> None:
        """Reduce the context to `block_size`; ValueError if that is longer than now or below 1."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size={block_size} must be from 1 to the current {self.config.block_size}")
        self.config.block_size = block_size
        if not self.extends_context:
            wpe = self.transformer.wpe
            wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone())
            wpe.num_embeddings = block_size

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Count the parameters, tied ones once; `non_embedding` leaves out the position embedding."""
        left_out = self.transformer.wpe.weight.numel() if non_embedding and not self.extends_context else 0
        return sum(p.numel() for p in self.parameters()) - left_out

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
            (B, 1, vocab_size) of each row's last token and None.

        Raises:
            ValueError: T exceeds block_size, or the model does not run on the device or dtype (see `refuses`).
        """
        T, config = idx.size(1), self.config
        if T > config.block_size:
            raise ValueError(f"sequence of length {T} is longer than block_size={config.block_size}")
        # positions of the tokens, (T,), or (B, 1) if the cache's rows differ in length
        pos = torch.arange(T, device=idx.device) if cache is None else cache.extend(T, idx.device)
        x = self.transformer.wte(idx)  # (B, T, C)
        device_type = x.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
        if refusal := self.refuses(device_type, dtype):
            raise ValueError(refusal[0])
        mask = None if cache is None else cache.mask  # (B, 1, 1, S) if rows differ in length
        if self.extends_context:  # in the attention's dtype, so that layers share one tensor
            fused = config.attention == "sdpa" and cache is None and not (self.training and config.dropout)
            mask = alibi_mask(config, pos, T if cache is None else cache.length, dtype, fused=fused)
        else:
            x = x + self.transformer.wpe(pos)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x, mask, cache)
        if targets is None:  # the head reads only each row's last position
            x = x[:, -1:] if cache is None else cache.last(x)  # (B, 1, C)
        x = self.transformer.ln_f(x)
        if targets is not None and head_loss is not None:
            return None, head_loss(self.lm_head, x, targets)
        logits = self.lm_head(x)  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.reshape(-1), ignore_index=-1)

    @torch.no_grad()
    def predict(self, idx: torch.Tensor, targets: bool = True) -> torch.Tensor:
        """Return the logits of all positions of idx (B, T) if `targets`, else of the last one, (B, 1, vocab_size)."""
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
        """Extend each sequence one token at a time, in the model's current mode (train or eval).

        Args:
            idx: Token indices (B, T) to continue; the model reads the last block_size of them.
            max_new_tokens: Number of tokens to append.
            temperature: Divides the logits before sampling.
            top_k: Sample among this many most likely tokens; more than vocab_size means all.
            do_sample: Whether to sample; otherwise take the most likely token.

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
