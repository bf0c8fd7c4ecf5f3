"""Finding checkpoints, loading them safely, checking that they fit, and going on exactly where one stopped."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from lightning_gpt.config import UserError
from lightning_gpt.models import GPTModule
from lightning_gpt.tokenizers import Tokenizer, tokenizer_from_dict

RUNS = Path("runs")


def find_checkpoint(path: str, *, which: str, out_dir: str | None = None) -> Path:
    """The checkpoint file that a user means.

    Args:
        path: A file, a run folder, or "latest".
        which: "best" or "last", for a run folder; where it has no best yet, the last is taken.
        out_dir: The run folder that "latest" looks into; without it, the newest of ``runs/``.

    Raises:
        UserError: There is none.
    """
    if which not in ("best", "last"):
        raise UserError(f"--which {which} is unknown; choose best or last")
    if path == "latest" and out_dir is None:
        found = sorted(RUNS.glob("*/checkpoints/*.ckpt"), key=lambda p: p.stat().st_mtime)
        if not found:
            raise UserError(f"no run with a checkpoint in {RUNS}/ yet; train one first, or give a path")
        path = str(found[-1].parent.parent)
    folder = Path(out_dir if path == "latest" and out_dir else path)
    if folder.is_file():
        return folder.resolve()
    if not folder.exists():
        raise UserError(f"checkpoint {folder} does not exist; give a run folder or a checkpoint file")
    for name in (which, "last", "best"):
        file = folder / "checkpoints" / f"{name}.ckpt"
        if file.exists():
            return file.resolve()
    raise UserError(f"{folder} holds no checkpoints/last.ckpt or checkpoints/best.ckpt; is it a run folder?")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's content, on the CPU.

    Attributes:
        path: Where it was read from.
        content: What Lightning wrote.
    """

    path: Path
    content: dict[str, Any]

    @property
    def implementation(self) -> str:
        """The implementation it was trained with."""
        return self.content["hyper_parameters"]["implementation"]

    @property
    def model_config(self) -> dict[str, Any]:
        """The fields of its model's config."""
        return self.content["hyper_parameters"]["model_config"]

    @property
    def step(self) -> int:
        """Optimizer steps it was trained for."""
        return self.content["global_step"]

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer it was trained with, where it knows."""
        stored = self.content.get("TokenData", {}).get("tokenizer")
        return tokenizer_from_dict(stored) if stored else None

    @property
    def data(self) -> str | None:
        """What ``--data`` was, where it knows."""
        return self.content.get("TokenData", {}).get("data")

    def module(self) -> GPTModule:
        """The trained model.

        Raises:
            UserError: The weights do not fit the config, or the implementation cannot be imported.
        """
        module = GPTModule(self.implementation, model_config=self.model_config)
        self.require_fit(module)
        module.load_state_dict(self.content["state_dict"])
        return module

    def require_fit(self, module: GPTModule) -> None:
        """Checks that the weights belong into a module.

        Raises:
            UserError: Another implementation, other parameters or other shapes.
        """
        ours = module.hparams["implementation"]
        if ours != self.implementation:
            raise UserError(
                f"{self.path} is a checkpoint of --implementation {self.implementation}, not of {ours}; say the same"
            )
        want = {k: tuple(v.shape) for k, v in module.state_dict().items()}
        have = {k: tuple(v.shape) for k, v in self.content["state_dict"].items()}
        for key in sorted(want.keys() | have.keys()):
            if want.get(key) != have.get(key):
                raise UserError(
                    f"{self.path} does not fit the model: {key.removeprefix('model.')} has shape"
                    f" {have.get(key, 'none')} in the checkpoint and {want.get(key, 'none')} in the model;"
                    " use the sizes it was trained with"
                )


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint file; only tensors and primitives are let in.

    Raises:
        UserError: The file is not a checkpoint of ours, is damaged, or holds other Python objects.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable checkpoint: {str(error).splitlines()[0]}") from error
    hparams = content.get("hyper_parameters", {}) if isinstance(content, dict) else {}
    if not {"implementation", "model_config"} <= hparams.keys():
        raise UserError(f"{path} is not a checkpoint that train.py wrote")
    return Checkpoint(path, content)


class ExactResume(Callback):
    """Makes Lightning's counters agree with a resumed stream.

    The stream starts at the first sample not yet consumed, so the loop must not believe that it is in the middle of
    something: accumulation starts afresh, even with another number of micro-batches per step than before, and the
    total of micro-batches, which times the validations, is what the number of optimizer steps makes it.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Runs after the checkpoint's loop state is loaded and before the first batch is fetched."""
        loop = trainer.fit_loop.epoch_loop
        trainer.fit_loop.reset_restart_stage()
        loop.restarting = False
        done = trainer.global_step * trainer.accumulate_grad_batches
        total = loop.batch_progress.total
        total.ready = total.started = total.processed = total.completed = done
        loop._batches_that_stepped = trainer.global_step
