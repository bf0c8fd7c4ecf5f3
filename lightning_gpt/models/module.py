"""The LightningModule that trains any implementation: a thin layer over models in plain PyTorch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_gpt.implementations.compilation import compile_arguments, compile_model, compile_step, recompute_blocks
from lightning_gpt.implementations.generation import GenerationSettings, generate_tokens
from lightning_gpt.implementations.loss import make_head_loss
from lightning_gpt.implementations.registry import get_implementation, token_embedding_name
from lightning_gpt.implementations.sharding import give_memory
from lightning_gpt.models.scoring import ScoreSums
from lightning_gpt.optim.groups import parameter_groups
from lightning_gpt.optim.registry import get_optimizer
from lightning_gpt.optim.schedule import scheduled
from lightning_gpt.trust import reading_from

# Arguments that only subclasses have, besides the fields of the model's config. Checkpoints store them, and Lightning
# passes all stored arguments to whichever class loads the checkpoint.
_OF_SUBCLASSES = {"model_type", "fused_adam", "offload"}


class GPTModule(LightningModule):
    """Trains the model of any implementation.

    Args:
        implementation: A name in the registry, or ``package.module:Class``.
        model_config: The fields of the implementation's config dataclass.
        weight_decay: Decoupled weight decay; the implementation determines which parameters decay.
        learning_rate: Peak learning rate.
        betas: AdamW's betas.
        optimizer: "adamw", or "muon" for the matrices inside blocks and AdamW for all else.
        warmup_steps: Optimizer steps of linear warm-up.
        schedule: "cosine", "linear", "constant" or "wsd": the learning rate after the warm-up.
        decay_steps: Optimizer step at which the decay ends; None keeps the learning rate constant after the warm-up.
        cooldown_steps: Length of wsd's decay in steps; None starts the decay after the warm-up.
        final_lr_ratio: Final learning rate divided by the peak.
        compile: Whether, or with which backend or mode, to compile blocks in place.
        recompute: Whether blocks recompute their activations in the backward pass instead of storing them.
        freeze_embeddings: Whether to exclude the token embeddings, and a head that is tied to them, from training.
        loss: "chunked" to compute head and loss for some tokens at a time, "full" to hold all logits, or "auto".
        optimizer_options: The optimizer's own options, such as ``muon_learning_rate`` (see ``optim/registry.py``).

    Raises:
        UserError: The implementation or the optimizer is unknown, the model rejects a field, or it has no
            matrices for the optimizer.
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
        warmup_steps: int = 0,
        schedule: str = "cosine",
        decay_steps: int | None = None,
        cooldown_steps: int | None = None,
        final_lr_ratio: float = 0.1,
        compile: bool | str = False,
        recompute: bool = False,
        freeze_embeddings: bool = False,
        loss: str = "auto",
        **optimizer_options: Any,
    ) -> None:
        super().__init__()
        self.implementation = get_implementation(implementation)
        self.optimizer_row = get_optimizer(optimizer)
        ignored = _OF_SUBCLASSES | self.implementation.complete(model_config).keys()
        optimizer_options = {name: v for name, v in optimizer_options.items() if name not in ignored}
        optimizer_options = self.optimizer_row.complete(optimizer_options)
        self.save_hyperparameters(logger=False)
        self.model_config = model_config
        self.weight_decay = weight_decay
        self.learning_rate = learning_rate
        self.betas = betas
        self.optimizer_options = optimizer_options
        self.schedule = partial(
            scheduled,
            shape=schedule,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
            cooldown_steps=cooldown_steps,
            final=final_lr_ratio,
        )
        self.compile_setting = compile
        self.recompute = recompute
        self.freeze_embeddings = freeze_embeddings
        self.model: nn.Module = self.build_model()
        self.head_loss = make_head_loss(
            self.model, setting=loss, vocab_size=model_config["vocab_size"], compile_setting=compile
        )
        self.hidden_matrices: dict[str, int] = {}
        if self.optimizer_row.hidden:
            vocab_size = model_config["vocab_size"]
            self.hidden_matrices = self.implementation.hidden_matrices(self.model, vocab_size=vocab_size)
        # Device tensors, read only when they are logged, so that other steps do not wait for the device.
        self.step_loss: Tensor | None = None
        self.step_metrics: dict[str, float] = {}  # what callbacks add to the log entry of a step
        self._gradient_norm: Tensor | None = None
        self._skip_rule: Callable[[Tensor], Tensor] | None = None
        self._val_sums: ScoreSums | None = None
        self._step: Callable[..., Any] | None = None  # the compiled decoding step
        self.val_tokens = 0  # tokens that the last validation scored, over all ranks

    @classmethod
    def without_memory(cls, implementation: str, *, model_config: dict[str, Any], **training: Any) -> "GPTModule":
        """Return a module whose model is on the meta device, with names and shapes but no memory.

        A model without ``initialises_by_apply`` is built whole.

        Args:
            implementation: A name in the registry, or ``package.module:Class``.
            model_config: The fields of the implementation's config dataclass.
            training: Further arguments of GPTModule.
        """
        return DeferredModule(implementation, model_config=model_config, **training)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a file of ``Trainer.save_checkpoint`` as Lightning does; see ``LightningModule.load_from_checkpoint``.

        A user's model is imported only if the file is in a run folder made on this machine, or if it is also given as
        ``implementation="package.module:Class"``.

        Raises:
            UserError: The file names another model.
        """
        typed = [str(kwargs.get("implementation"))]
        with reading_from(Path(str(checkpoint_path)), typed=typed):
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def build_model(self) -> nn.Module:
        """Return the initialised model; all forms get the same weights from the same seed."""
        meta = self.implementation.initialises_by_apply
        model = self.new_model(meta=meta)
        if meta:
            give_memory(model, torch.device("cpu"))
        self.prepare_blocks(model)
        return model

    def new_model(self, *, meta: bool) -> nn.Module:
        """Return the implementation's model, with frozen embeddings if requested; ``meta`` gives it no memory."""
        model = self.implementation.build(self.model_config, meta=meta)
        if self.freeze_embeddings:
            name = token_embedding_name(model, vocab_size=self.model_config["vocab_size"])
            model.get_parameter(name).requires_grad_(False)
        return model

    def prepare_blocks(self, model: nn.Module) -> None:
        """Apply recomputation and compilation to the model's blocks, in place, before the model is sharded."""
        block_class = self.implementation.block_class()
        if self.recompute:
            recompute_blocks(model, block_class=block_class)
        compile_model(model, block_class=block_class, setting=self.compile_setting)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the model's logits and loss for ``idx`` and ``targets`` (B, T) int64; targets of -1 are ignored."""
        return self.model(idx, targets)

    def compute_loss(self, idx: Tensor, targets: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the logits, or None if the loss is chunked, and the mean loss of idx and targets (B, T) int64."""
        chunked = {} if self.head_loss is None else {"head_loss": self.head_loss}
        return self.model(idx, targets, **chunked)

    @torch.no_grad()
    def predict(self, idx: Tensor, targets: bool = True) -> Tensor:
        """Return the logits of all positions if ``targets``, else of the last one.

        Args:
            idx: Token ids (B, T) int64.
            targets: Whether to return all positions.

        Returns:
            Logits (B, T, vocab_size), or (B, 1, vocab_size) of the last position.
        """
        return self.model(idx, idx)[0] if targets else self.model(idx)[0][:, -1:]

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        do_sample: bool | None = None,
        top_k: int | None = None,
        *,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> Tensor:
        """Append tokens to each row, in the module's current mode (train or eval).

        Args:
            idx: Token ids (B, T) int64.
            max_new_tokens: Number of tokens to append.
            temperature: Divisor of the logits; see ``GenerationSettings``.
            do_sample: Whether to sample instead of taking the most likely token (default: as in the model's own
                ``generate``, else sample).
            top_k: Sample from the k most likely tokens only.
            top_p: Sample from the most likely tokens with this total probability only.
            repetition_penalty: Penalty on tokens that are already in the row.
            seed: Row r samples with ``seed + r`` (default: a seed from torch's global random state).

        Returns:
            Token ids (B, T + max_new_tokens).

        Raises:
            ValueError: A setting is out of range.
        """
        if not isinstance(do_sample, bool | None):  # nanoGPT's own `generate` has top_k in this place
            raise ValueError(f"do_sample is True or False, not {do_sample!r}; give top_k by its name")
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
        """Generate with a compiled step from now on; the weights must not change. See ``compile_step``.

        Returns:
            Whether ``setting`` asks for compilation, which happens at the first step.
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
        """Continue prompts of any lengths, one token per step; see ``generate_tokens`` for arguments and results."""
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
            # Compiled blocks would recompile for every new length.
            with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
                new = next(steps, None)
            if new is None:
                return
            yield new

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of a micro-batch, and add it to ``step_loss``, the mean loss of the optimizer step."""
        _, loss = self.compute_loss(*batch)
        micro_batches = self.trainer.accumulate_grad_batches
        part = loss.detach() / micro_batches if micro_batches > 1 else loss.detach()
        if self.step_loss is None or batch_idx % micro_batches == 0:
            self.step_loss = part
        else:
            self.step_loss = self.step_loss + part
        # A loss that is not finite makes the gradients NaN, so that the gradient norm tells all ranks; else a factor 1.
        return loss * (1 + 0 * loss.detach())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the training loss and ``step_metrics`` every ``log_every_n_steps`` optimizer steps.

        Loggers get one entry from here, since each call of ``self.log`` takes as long as the launch of many kernels.
        """
        trainer = self.trainer
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches or step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        loss = trainer.strategy.reduce(self.step_loss, reduce_op="mean")
        self.log("train_loss", loss, logger=False)
        if trainer.loggers:
            metrics = {"train_loss": float(loss), **self.step_metrics}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=step)
                logger.save()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer does, and keep the norm before clipping, which Lightning would discard."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # Lightning leaves this to the fused optimizer's step, which is after clipping
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self._gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self._skip_rule is not None:
            skippable: Any = optimizer
            skippable.skip = self._skip_rule(self._gradient_norm)

    def skip_steps(self, rule: Callable[[Tensor], Tensor]) -> None:
        """Skip the optimizer steps that a rule selects: weights and optimizer state stay as they are.

        Args:
            rule: Function of the gradient norm (a scalar), called once per step, that returns a float32 scalar on the
                same device: 1 skips the step, 0 does not.
        """
        self._skip_rule = rule

    def gradient_norm(self) -> Tensor | float | None:
        """Return the gradient norm of the last step, before clipping; None before the first step."""
        return self._gradient_norm

    def on_validation_epoch_start(self) -> None:
        """Reset the validation sums."""
        has_answers = getattr(getattr(self.trainer, "datamodule", None), "has_answers", False)
        padding = self.model_config.get("vocab_padding", 0)
        self._val_sums = ScoreSums(self.device, has_answers=has_answers, padding=padding)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to the validation sums."""
        assert self._val_sums is not None
        logits, loss = self.model(*batch) if self._val_sums.has_answers else self.compute_loss(*batch)
        self._val_sums.add(logits, loss, batch[1])

    def on_validation_epoch_end(self) -> None:
        """Log ``val_loss``, and ``val_accuracy`` of a task; all ranks log the same values."""
        assert self._val_sums is not None
        reduce = partial(self.trainer.strategy.reduce, reduce_op="sum")
        found, self.val_tokens = self._val_sums.result(reduce)
        for name, value in found.items():
            self.log(name, value, sync_dist=True)

    def build_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return the optimizer over parameter groups."""
        settings = {"learning_rate": self.learning_rate, "betas": self.betas, **self.optimizer_options}
        return self.optimizer_row.build(groups, **settings)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return the parameter groups of the module's model, or of another model with the same modules."""
        return parameter_groups(
            model, decays=self.implementation.decays, weight_decay=self.weight_decay, hidden=self.hidden_matrices
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer with the implementation's decay groups, and the schedule per optimizer step."""
        optimizer = self.build_optimizer(self.parameter_groups(self.model))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class DeferredModule(GPTModule):
    """A module whose model has no memory until a subclass allocates it in ``configure_model``."""

    def build_model(self) -> nn.Module:
        """Return the model on the meta device, or whole if it cannot be initialised in place later."""
        compile_arguments(self.compile_setting)  # report errors now; subclasses compile the blocks when they shard them
        return self.new_model(meta=self.implementation.initialises_by_apply)
