"""The LightningModule that trains the model of any implementation: a thin layer over models that are plain PyTorch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from inspect import signature
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_gpt.implementations.compilation import compile_arguments, compile_model, compile_step, recompute_blocks
from lightning_gpt.implementations.generation import GenerationSettings, generate_tokens
from lightning_gpt.implementations.registry import get_implementation, token_embedding_name
from lightning_gpt.implementations.sharding import give_memory
from lightning_gpt.models.scoring import ScoreSums
from lightning_gpt.optim import MUON_LEARNING_RATE, get_optimizer, parameter_groups, warmup_cosine


class GPTModule(LightningModule):
    """Trains the model of any implementation.

    Args:
        implementation: A name of the registry, or ``package.module:Class``.
        model_config: The fields of the implementation's config dataclass.
        weight_decay: Decoupled weight decay, on the parameters the implementation decays.
        learning_rate: Peak learning rate.
        betas: AdamW's betas.
        optimizer: "adamw", or "muon" for the matrices inside of blocks and AdamW for all else.
        muon_learning_rate: Muon's peak learning rate.
        warmup_steps: Optimizer steps of linear warm-up.
        decay_steps: Optimizer step at which the cosine ends; None for a constant learning rate after the warm-up.
        final_lr_ratio: The learning rate at the end over the peak.
        compile: Whether, or with which backend or mode, blocks are compiled in place.
        recompute: Whether blocks compute their activations again in the backward pass instead of keeping them.
        freeze_embeddings: Whether the token embeddings, and a head that is tied to them, are not trained.

    Raises:
        UserError: The implementation or the optimizer is unknown, the config refuses the fields, or the model has no
            matrices that the optimizer is made for.
    """

    def __init__(
        self,
        implementation: str,
        *,
        model_config: dict[str, Any],
        weight_decay: float = 0.1,
        learning_rate: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        optimizer: str = "adamw",
        muon_learning_rate: float = MUON_LEARNING_RATE,
        warmup_steps: int = 0,
        decay_steps: int | None = None,
        final_lr_ratio: float = 0.1,
        compile: bool | str = False,
        recompute: bool = False,
        freeze_embeddings: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.implementation = get_implementation(implementation)
        self.model_config = model_config
        self.weight_decay = weight_decay
        self.learning_rate = learning_rate
        self.betas = betas
        self.optimizer_row = get_optimizer(optimizer)
        self.muon_learning_rate = muon_learning_rate
        self.schedule = partial(warmup_cosine, warmup_steps=warmup_steps, decay_steps=decay_steps, final=final_lr_ratio)
        self.compile_setting = compile
        self.recompute = recompute
        self.freeze_embeddings = freeze_embeddings
        self.model: nn.Module = self.build_model()
        self.hidden_matrices: dict[str, int] = {}
        if self.optimizer_row.hidden:
            vocab_size = model_config["vocab_size"]
            self.hidden_matrices = self.implementation.hidden_matrices(self.model, vocab_size=vocab_size)
        # Device tensors, read only when something is logged, so that no step waits for them.
        self.step_loss: Tensor | None = None
        self._gradient_norm: Tensor | None = None
        self._val_sums: ScoreSums | None = None
        self._step: Callable[..., Any] | None = None  # what reads a token after a cache, where that is compiled
        self.val_tokens = 0  # that the last validation scored, over all ranks

    @classmethod
    def without_memory(cls, implementation: str, *, model_config: dict[str, Any]) -> "GPTModule":
        """Build a module on the meta device if the model allows it, to compare names and shapes."""
        from lightning_gpt.models.named import FSDPGPTModule

        return FSDPGPTModule(implementation, model_config=model_config)

    def build_model(self) -> nn.Module:
        """The model, initialised as the sharded forms initialise it, so that a seed means the same weights."""
        meta = self.implementation.initialises_by_apply
        model = self.new_model(meta=meta)
        if meta:
            give_memory(model, torch.device("cpu"))
        self.prepare_blocks(model)
        return model

    def new_model(self, *, meta: bool) -> nn.Module:
        """The implementation's model with what is not trained marked; on the meta device it has no memory."""
        model = self.implementation.build(self.model_config, meta=meta)
        if self.freeze_embeddings:
            name = token_embedding_name(model, vocab_size=self.model_config["vocab_size"])
            model.get_parameter(name).requires_grad_(False)
        return model

    def prepare_blocks(self, model: nn.Module) -> None:
        """Applies recomputation and compilation to the model's blocks, in place; sharding comes after it."""
        block_class = self.implementation.block_class()
        if self.recompute:
            recompute_blocks(model, block_class=block_class)
        compile_model(model, block_class=block_class, setting=self.compile_setting)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The model's own forward: ``idx`` and ``targets`` are (B, T) int64, targets of -1 are ignored."""
        return self.model(idx, targets)

    @torch.no_grad()
    def predict(self, idx: Tensor, targets: bool = True) -> Tensor:
        """Logits of every position of ``idx`` (B, T), or without ``targets`` of the last one alone, (B, 1, V)."""
        return self.model(idx, idx)[0] if targets else self.model(idx)[0][:, -1:]

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        do_sample: bool | None = None,
        top_k: int | None = None,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> Tensor:
        """Extends each row, in whichever mode (train or eval) the module is in.

        Args:
            idx: Token ids (B, T).
            max_new_tokens: How many to append.
            temperature: See GenerationSettings for this and top_k, top_p, repetition_penalty.
            do_sample: Draw, or take the likeliest token (default: as the model's own ``generate`` does, else draw).
            top_k: Draw among this many.
            top_p: Draw among those that have this probability.
            repetition_penalty: On tokens that are in the row already.
            seed: Row r draws with ``seed + r`` (default: from torch's global random state).

        Returns:
            Token ids (B, T + max_new_tokens).

        Raises:
            ValueError: A number makes no sense.
        """
        if do_sample is None:
            own = signature(getattr(self.model, "generate", self.generate)).parameters.get("do_sample")
            do_sample = own is None or own.default is not False
        settings = GenerationSettings(
            max_new_tokens=max_new_tokens,
            greedy=not do_sample,
            temperature=temperature if do_sample else 1.0,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=int(torch.randint(2**31, ())) if seed is None else seed,
        )
        steps = [[token for _, token in step] for step in self.stream_tokens(idx.tolist(), settings)]
        new = torch.tensor(steps, dtype=idx.dtype, device=idx.device).view(max_new_tokens, len(idx))
        return torch.cat((idx, new.T), dim=1)

    def compile_generation(self, setting: bool | str) -> bool:
        """Has new tokens written by a compiled step from now on, with the weights as they are; see ``compile_step``.

        Returns:
            Whether it is compiled, when it is first called.
        """
        self._step = compile_step(self.model, setting=setting)
        return self._step is not None

    def stream_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        *,
        is_over: Callable[[int, int], bool] | None = None,
    ) -> Iterator[list[tuple[int, int]]]:
        """Continues prompts of any lengths step by step; ``generate_tokens`` says what it takes, yields and raises."""
        fields = self.model_config
        steps = generate_tokens(
            self.model,
            prompts,
            settings,
            block_size=fields["block_size"],
            vocab_size=fields["vocab_size"] - fields.get("vocab_padding", 0),
            device=self.device,
            step=self._step,
            is_over=is_over,
        )
        compiled = compile_arguments(self.compile_setting) is not None and self._step is None
        while True:
            # A compiled block would be compiled again for ever new lengths.
            with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
                new = next(steps, None)
            if new is None:
                return
            yield new

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of a micro-batch; ``step_loss`` gathers the mean over the optimizer step's micro-batches."""
        _, loss = self.model(*batch)
        parts = self.trainer.accumulate_grad_batches
        if parts == 1:
            self.step_loss = loss.detach()
        else:
            part = loss.detach() / parts
            first = batch_idx % parts == 0 or self.step_loss is None
            self.step_loss = part if first else self.step_loss + part
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Shows and logs the training loss every ``log_every_n_steps`` optimizer steps."""
        trainer = self.trainer
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            if trainer.global_step % trainer.log_every_n_steps == 0:
                self.log("train_loss", self.step_loss, prog_bar=True, sync_dist=True)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as the Trainer says, and keeps the norm from before clipping, which Lightning would throw away."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # Lightning leaves it to a fused optimizer's step, which is after clipping
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), gradient_clip_val)
            self._gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def gradient_norm(self) -> Tensor | float | None:
        """The norm of the last step's gradient before clipping; None where nothing is clipped."""
        return self._gradient_norm

    def on_validation_epoch_start(self) -> None:
        """Begins the sums of the validation."""
        has_answers = getattr(self.trainer.datamodule, "has_answers", False)
        padding = self.model_config.get("vocab_padding", 0)
        self._val_sums = ScoreSums(self.device, has_answers=has_answers, padding=padding)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Adds a batch to the sums."""
        assert self._val_sums is not None
        logits, loss = self.model(*batch)
        self._val_sums.add(logits, loss, batch[1])

    def on_validation_epoch_end(self) -> None:
        """Logs ``val_loss``, and of a task ``val_accuracy``: the same on all ranks (see ``ScoreSums``)."""
        assert self._val_sums is not None
        reduce = partial(self.trainer.strategy.reduce, reduce_op="sum")
        found, self.val_tokens = self._val_sums.result(reduce)
        for name, value in found.items():
            self.log(name, value, prog_bar=name == "val_loss", sync_dist=True)

    def build_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over parameter groups."""
        own = {name: getattr(self, name) for name in self.optimizer_row.options}
        return self.optimizer_row.build(groups, learning_rate=self.learning_rate, betas=self.betas, **own)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The groups of the module's model, or of one that is built like it."""
        return parameter_groups(
            model, decays=self.implementation.decays, weight_decay=self.weight_decay, hidden=self.hidden_matrices
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer with the implementation's decay groups, and the schedule per optimizer step."""
        optimizer = self.build_optimizer(self.parameter_groups(self.model))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
