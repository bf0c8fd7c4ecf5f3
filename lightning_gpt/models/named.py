"""The built-in models as LightningModules of their own, for use from Python.

Each class lists its model's arguments and passes training arguments on to ``GPTModule``. It trains on any DataLoader of
``(idx, targets)`` pairs under a plain ``lightning.Trainer``, and has a form for FSDP and one for DeepSpeed.
"""

from typing import Any

from torch import nn

from lightning_gpt.config import SIZES
from lightning_gpt.implementations.registry import IMPLEMENTATIONS, get_implementation
from lightning_gpt.models.forms import DeepSpeedGPTModule, FSDPGPTModule
from lightning_gpt.models.module import GPTModule

_PRESETS = IMPLEMENTATIONS["mingpt"].presets
assert _PRESETS is not None
MINGPT_PRESETS: dict[str, dict[str, int]] = IMPLEMENTATIONS["mingpt"].load(_PRESETS)
"""The sizes of each preset, named as in ``transformers.GPT2Config``; all models have these presets."""


def _arguments(implementation: str, *, training: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Return the arguments of GPTModule.

    Args:
        implementation: A name in the registry.
        training: Training arguments. ``implementation`` and ``model_config``, which a checkpoint adds, are ignored.
        fields: Fields of the model's config; None leaves a size to the preset. Without any size and without a preset,
            it is GPT-2's.

    Raises:
        ValueError: Some sizes are given, but neither all nor a preset.
    """
    given = [name for name in SIZES if fields[name] is not None]
    if fields["model_type"] is None and not given:
        fields["model_type"] = "gpt2"
    if fields["model_type"] is None and len(given) < len(SIZES):
        values = ", ".join(f"{name}={fields[name]}" for name in SIZES)
        raise ValueError(f"got {values}; give all three sizes, or model_type for those that are None")
    training = {name: v for name, v in training.items() if name not in ("implementation", "model_config")}
    model_config = get_implementation(implementation).resolve(**fields)
    return {"implementation": implementation, "model_config": model_config, **training}


class MinGPT(GPTModule):
    """minGPT: untied head, biases everywhere, tanh GELU.

    Args:
        vocab_size: Number of tokens in the vocabulary.
        block_size: Context length in tokens.
        model_type: A preset of sizes (default: gpt2 if no size is given).
        n_layer: Number of layers; overrides the preset.
        n_head: Number of attention heads; overrides the preset.
        n_embd: Width of the residual stream; overrides the preset.
        embd_pdrop: Dropout after the embeddings.
        resid_pdrop: Dropout on each residual branch.
        attn_pdrop: Dropout on the attention weights.
        attention: "sdpa" or "manual".
        vocab_padding: Number of tokens at the end of the vocabulary that are never sampled.
        training: Training arguments of GPTModule, such as ``learning_rate``, ``optimizer`` and ``compile``.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        model_type: str | None = None,
        n_layer: int | None = None,
        n_head: int | None = None,
        n_embd: int | None = None,
        embd_pdrop: float = 0.1,
        resid_pdrop: float = 0.1,
        attn_pdrop: float = 0.1,
        attention: str = "sdpa",
        vocab_padding: int = 0,
        **training: Any,
    ) -> None:
        super().__init__(
            **_arguments(
                "mingpt",
                training=training,
                model_type=model_type,
                n_layer=n_layer,
                n_head=n_head,
                n_embd=n_embd,
                vocab_size=vocab_size,
                block_size=block_size,
                embd_pdrop=embd_pdrop,
                resid_pdrop=resid_pdrop,
                attn_pdrop=attn_pdrop,
                attention=attention,
                vocab_padding=vocab_padding,
            )
        )

    @property
    def mingpt(self) -> nn.Module:
        """The model, ``mingpt.model.GPT``."""
        return self.model


class NanoGPT(GPTModule):
    """nanoGPT: tied head, optional biases, exact GELU.

    Args:
        vocab_size: Number of tokens in the vocabulary.
        block_size: Context length in tokens.
        model_type: A preset of sizes (default: gpt2 if no size is given).
        n_layer: Number of layers; overrides the preset.
        n_head: Number of attention heads; overrides the preset.
        n_embd: Width of the residual stream; overrides the preset.
        dropout: Dropout after the embeddings, on attention weights and on residual branches.
        bias: Whether Linear and LayerNorm have biases.
        attention: "sdpa", "flash" or "manual".
        gelu: "exact", or "tanh" as in GPT-2's weights.
        vocab_padding: Number of tokens at the end of the vocabulary that are never sampled.
        position: "learned" or "alibi".
        training: Training arguments of GPTModule, such as ``learning_rate``, ``optimizer`` and ``compile``.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        model_type: str | None = None,
        n_layer: int | None = None,
        n_head: int | None = None,
        n_embd: int | None = None,
        dropout: float = 0.1,
        bias: bool = True,
        attention: str = "sdpa",
        gelu: str = "exact",
        vocab_padding: int = 0,
        position: str = "learned",
        **training: Any,
    ) -> None:
        super().__init__(
            **_arguments(
                "nanogpt",
                training=training,
                model_type=model_type,
                n_layer=n_layer,
                n_head=n_head,
                n_embd=n_embd,
                vocab_size=vocab_size,
                block_size=block_size,
                dropout=dropout,
                bias=bias,
                attention=attention,
                position=position,
                gelu=gelu,
                vocab_padding=vocab_padding,
            )
        )

    @property
    def nanogpt(self) -> nn.Module:
        """The model, ``nanogpt.model.GPT``."""
        return self.model


class ModernGPT(GPTModule):
    """moderngpt: rotary positions, RMSNorm, normed queries and keys, squared ReLU, no biases, a soft-capped head.

    Args:
        vocab_size: Number of tokens in the vocabulary.
        block_size: Context length in tokens.
        model_type: A preset of sizes (default: gpt2 if no size is given).
        n_layer: Number of layers; overrides the preset.
        n_head: Number of attention heads; overrides the preset.
        n_embd: Width of the residual stream, an even multiple of ``n_head``; overrides the preset.
        n_kv_head: Number of key and value heads, a divisor of ``n_head`` (default: ``n_head``).
        window: Tokens that a layer attends to, except every fourth layer and the last one; 0 attends to all.
        bigram: Rows of a table of embeddings for pairs of tokens; 0 leaves it out.
        smear: Whether each token's embedding mixes with the one before it.
        softcap: Bound on the absolute value of the logits.
        dropout: Dropout after the embeddings, on attention weights and on residual branches.
        vocab_padding: Number of tokens at the end of the vocabulary that are never sampled.
        training: Training arguments of GPTModule, such as ``learning_rate``, ``optimizer`` and ``compile``.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        model_type: str | None = None,
        n_layer: int | None = None,
        n_head: int | None = None,
        n_embd: int | None = None,
        n_kv_head: int | None = None,
        window: int = 0,
        bigram: int = 0,
        smear: bool = False,
        softcap: float = 15.0,
        dropout: float = 0.0,
        vocab_padding: int = 0,
        **training: Any,
    ) -> None:
        super().__init__(
            **_arguments(
                "moderngpt",
                training=training,
                model_type=model_type,
                n_layer=n_layer,
                n_head=n_head,
                n_embd=n_embd,
                vocab_size=vocab_size,
                block_size=block_size,
                n_kv_head=n_kv_head,
                window=window,
                bigram=bigram,
                smear=smear,
                softcap=softcap,
                dropout=dropout,
                vocab_padding=vocab_padding,
            )
        )


class FSDPMinGPT(FSDPGPTModule, MinGPT):
    """minGPT under FSDP."""


class FSDPNanoGPT(FSDPGPTModule, NanoGPT):
    """nanoGPT under FSDP."""


class FSDPModernGPT(FSDPGPTModule, ModernGPT):
    """moderngpt under FSDP."""


class DeepSpeedMinGPT(DeepSpeedGPTModule, MinGPT):
    """minGPT under DeepSpeed."""


class DeepSpeedNanoGPT(DeepSpeedGPTModule, NanoGPT):
    """nanoGPT under DeepSpeed."""


class DeepSpeedModernGPT(DeepSpeedGPTModule, ModernGPT):
    """moderngpt under DeepSpeed."""
