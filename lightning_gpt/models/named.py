"""The LightningModules by name.

``GPTModule`` serves every implementation; ``MinGPT`` and ``NanoGPT`` have the models' own arguments spelled out, for
use from Python with any DataLoader of ``(idx, targets)`` pairs and a plain ``lightning.Trainer``. Each has a form for
strategies that shard, and ``FORMS`` says which strategy row gets which form of ``GPTModule``.
"""

from lightning_gpt.implementations.registry import get_implementation
from lightning_gpt.models.forms import DeepSpeedForm, FSDPForm
from lightning_gpt.models.module import GPTModule
from lightning_gpt.optim import MUON_LEARNING_RATE


class MinGPT(GPTModule):
    """minGPT: untied head, biases everywhere, tanh GELU.

    Args:
        vocab_size: Number of tokens in the vocabulary.
        block_size: Context length in tokens.
        model_type: A preset of sizes.
        n_layer: Layers, in the preset's place.
        n_head: Attention heads, in the preset's place.
        n_embd: Width, in the preset's place.
        embd_pdrop: Dropout after the embeddings.
        resid_pdrop: Dropout on each residual branch.
        attn_pdrop: Dropout on the attention weights.
        weight_decay: See GPTModule for this and the further arguments.
        learning_rate: Peak learning rate.
        betas: AdamW's betas.
        attention: "sdpa" or "manual".
        vocab_padding: How many tokens at the end of the vocabulary are never sampled.
        warmup_steps: Optimizer steps of linear warm-up.
        decay_steps: Optimizer step at which the cosine ends.
        final_lr_ratio: The learning rate at the end over the peak.
        compile: Whether, or with which backend or mode, blocks are compiled in place.
        recompute: Whether blocks compute their activations again in the backward pass.
        freeze_embeddings: Whether the token embeddings are not trained.
        optimizer: "adamw" or "muon".
        muon_learning_rate: Muon's peak learning rate.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        model_type: str | None = "gpt2",
        n_layer: int | None = None,
        n_head: int | None = None,
        n_embd: int | None = None,
        embd_pdrop: float = 0.1,
        resid_pdrop: float = 0.1,
        attn_pdrop: float = 0.1,
        weight_decay: float = 0.1,
        learning_rate: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        attention: str = "sdpa",
        vocab_padding: int = 0,
        warmup_steps: int = 0,
        decay_steps: int | None = None,
        final_lr_ratio: float = 0.1,
        compile: bool | str = False,
        recompute: bool = False,
        freeze_embeddings: bool = False,
        optimizer: str = "adamw",
        muon_learning_rate: float = MUON_LEARNING_RATE,
    ) -> None:
        config = get_implementation("mingpt").resolve(
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
        super().__init__(
            "mingpt",
            model_config=config,
            weight_decay=weight_decay,
            learning_rate=learning_rate,
            betas=betas,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
            final_lr_ratio=final_lr_ratio,
            compile=compile,
            recompute=recompute,
            freeze_embeddings=freeze_embeddings,
            optimizer=optimizer,
            muon_learning_rate=muon_learning_rate,
        )


class NanoGPT(GPTModule):
    """nanoGPT: tied head, optional biases, exact GELU.

    Args:
        vocab_size: Number of tokens in the vocabulary.
        block_size: Context length in tokens.
        model_type: A preset of sizes.
        n_layer: Layers, in the preset's place.
        n_head: Attention heads, in the preset's place.
        n_embd: Width, in the preset's place.
        dropout: Dropout everywhere.
        bias: Whether Linear and LayerNorm have biases.
        weight_decay: See GPTModule for this and the further arguments.
        learning_rate: Peak learning rate.
        betas: AdamW's betas.
        attention: "sdpa", "flash" or "manual".
        gelu: "exact", or "tanh" as in GPT-2's weights.
        vocab_padding: How many tokens at the end of the vocabulary are never sampled.
        warmup_steps: Optimizer steps of linear warm-up.
        decay_steps: Optimizer step at which the cosine ends.
        final_lr_ratio: The learning rate at the end over the peak.
        compile: Whether, or with which backend or mode, blocks are compiled in place.
        recompute: Whether blocks compute their activations again in the backward pass.
        freeze_embeddings: Whether the token embeddings are not trained.
        position: "learned" or "alibi".
        optimizer: "adamw" or "muon".
        muon_learning_rate: Muon's peak learning rate.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        model_type: str | None = "gpt2",
        n_layer: int | None = None,
        n_head: int | None = None,
        n_embd: int | None = None,
        dropout: float = 0.1,
        bias: bool = True,
        weight_decay: float = 0.1,
        learning_rate: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        attention: str = "sdpa",
        gelu: str = "exact",
        vocab_padding: int = 0,
        warmup_steps: int = 0,
        decay_steps: int | None = None,
        final_lr_ratio: float = 0.1,
        compile: bool | str = False,
        recompute: bool = False,
        freeze_embeddings: bool = False,
        position: str = "learned",
        optimizer: str = "adamw",
        muon_learning_rate: float = MUON_LEARNING_RATE,
    ) -> None:
        config = get_implementation("nanogpt").resolve(
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
        super().__init__(
            "nanogpt",
            model_config=config,
            weight_decay=weight_decay,
            learning_rate=learning_rate,
            betas=betas,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
            final_lr_ratio=final_lr_ratio,
            compile=compile,
            recompute=recompute,
            freeze_embeddings=freeze_embeddings,
            optimizer=optimizer,
            muon_learning_rate=muon_learning_rate,
        )


class FSDPGPTModule(FSDPForm, GPTModule):
    """Any implementation under FSDP."""


class FSDPMinGPT(FSDPForm, MinGPT):
    """minGPT under FSDP."""


class FSDPNanoGPT(FSDPForm, NanoGPT):
    """nanoGPT under FSDP."""


class DeepSpeedGPTModule(DeepSpeedForm, GPTModule):
    """Any implementation under DeepSpeed."""


class DeepSpeedMinGPT(DeepSpeedForm, MinGPT):
    """minGPT under DeepSpeed."""


class DeepSpeedNanoGPT(DeepSpeedForm, NanoGPT):
    """nanoGPT under DeepSpeed."""


FORMS: dict[str, type[GPTModule]] = {"plain": GPTModule, "fsdp": FSDPGPTModule, "deepspeed": DeepSpeedGPTModule}
