"""DeepSpeed's ZeRO, on GPUs, and on CPU ranks for testing."""

import json
import logging
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

from lightning_gpt.config import UserError
from lightning_gpt.invocation import install_line
from lightning_gpt.parsing import read_json
from lightning_gpt.strategies.memory import Zero
from lightning_gpt.strategies.saving import WholeFolders

_TAG = "checkpoint"  # name of the inner folder, which Lightning expects
# Settings that the Trainer's options determine. DeepSpeed's config may omit them, or have "auto" or the same value.
_DECIDED = ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping")


class DeepSpeed(WholeFolders, DeepSpeedStrategy):
    """Lightning's strategy, extended to CPU ranks: DeepSpeed itself has a CPU accelerator, over gloo."""

    @property
    def _on_cpu(self) -> bool:
        return self.parallel_devices is not None and self.parallel_devices[0].type == "cpu"

    @property
    def root_device(self) -> torch.device:
        """This rank's device. A CPU gets an index, which DeepSpeed reads as the local rank."""
        return torch.device("cpu", self.local_rank) if self._on_cpu else super().root_device

    def init_deepspeed(self) -> None:
        """Create the engine, with buckets no larger than the model; the default ones always take gigabytes.

        DeepSpeed's timer of the throughput is off: it waits for the device twice per step.
        """
        assert isinstance(self.config, dict) and self.lightning_module is not None
        zero = self.config.get("zero_optimization", {})
        # Under ZeRO-3, numel() counts only this rank's share; ds_numel counts the whole parameter.
        sizes: list[int] = [getattr(p, "ds_numel", None) or p.numel() for p in self.lightning_module.parameters()]
        total = sum(sizes)
        for name in ("reduce_bucket_size", "allgather_bucket_size"):
            if isinstance(zero.get(name), int | float):
                zero[name] = min(int(zero[name]), total + total % 2)  # DeepSpeed wants an even number
        self.config.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
        super().init_deepspeed()

    def setup_environment(self) -> None:
        """Start the processes. Lightning's own version requires CUDA."""
        if self._on_cpu:
            super(DeepSpeedStrategy, self).setup_environment()
        else:
            super().setup_environment()

    def setup_distributed(self) -> None:
        """Join the process group. Lightning's own version requires distinct GPUs."""
        if not self._on_cpu:
            super().setup_distributed()
            return
        import deepspeed

        # DeepSpeed's shared-memory transport takes most of a minute to compile on first use, and gloo works without it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def write_shards(self, checkpoint: dict[str, Any], folder: Path) -> None:
        """Write this rank's shards after DeepSpeed's last collective operation.

        DeepSpeed itself writes between collectives, where a rank that fails leaves the others waiting.
        """
        engine = self.deepspeed_engine
        pending: list[tuple[Any, str]] = []
        engine.checkpoint_engine.save = lambda state_dict, path: pending.append((state_dict, path))
        engine._copy_recovery_script = lambda folder: None  # evaluate.py --convert_only does what it is for
        header = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
        engine.save_checkpoint(str(folder), tag=_TAG, client_state=header, save_latest=False)
        for state_dict, path in pending:
            torch.save(state_dict, path)
        if self.is_global_zero:
            (folder / "latest").write_text(_TAG, encoding="utf-8")


def build_deepspeed(
    *, accelerator: str, stage: int, offload: bool, offload_weights: bool, config: dict[str, Any] | None = None
) -> DDPStrategy:
    """Return a ZeRO strategy.

    Args:
        accelerator: "cpu", or an accelerator of Lightning with GPUs.
        stage: 1 shards the optimizer state, 2 also the gradients, 3 also the parameters.
        offload: Whether to keep the optimizer state in the host's memory.
        offload_weights: Whether to keep the parameters there, too; stage 3 only.
        config: A complete DeepSpeed configuration, which includes the stage.

    Raises:
        UserError: DeepSpeed is not installed, or offloading cannot compile its optimizer.
    """
    require_deepspeed()
    if accelerator == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # also if there is a GPU; must be set before deepspeed is imported
    if offload:
        require_cpu_adam()
    if config is not None:
        _check_zero(config["zero_optimization"])
        return DeepSpeed(config=config, logging_level=logging.ERROR)
    return DeepSpeed(
        stage=stage,
        logging_batch_size_per_gpu=1,  # for DeepSpeed's own timers, which are off
        offload_optimizer=offload,
        offload_parameters=offload_weights,
        # Where zero.Init puts the shards.
        remote_device="cpu" if offload_weights else None,
        logging_level=logging.ERROR,
    )


def _check_zero(section: dict[str, Any]) -> None:
    """Validate the section with DeepSpeed's own schema now; DeepSpeed does so only while the model is built."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(["zero_optimization", *map(str, first["loc"])])
        raise UserError(f"--deepspeed_config: {name}: {first['msg']}") from error


def require_deepspeed() -> None:
    """Raise a UserError if DeepSpeed is not installed."""
    if find_spec("deepspeed") is None:
        raise UserError(f"this --strategy needs DeepSpeed: {install_line('deepspeed')}")


def require_cpu_adam() -> None:
    """Raise a UserError if ninja or a C++ compiler is missing: DeepSpeedCPUAdam is compiled on first use."""
    from torch.utils.cpp_extension import is_ninja_available

    if not is_ninja_available():
        raise UserError("offloading compiles DeepSpeedCPUAdam, which needs ninja: pip install ninja")
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        raise UserError(
            f"offloading compiles DeepSpeedCPUAdam, which needs a C++ compiler, but there is no {compiler} here;"
            " install g++, or choose a --strategy without offload"
        )


def read_config(path: str, *, precision: str, decided: dict[str, Any]) -> dict[str, Any]:
    """Read a DeepSpeed JSON file, and check it against the command line.

    Args:
        path: The file.
        precision: The Trainer's precision.
        decided: DeepSpeed settings that the Trainer's options determine, by DeepSpeed's names.

    Raises:
        UserError: The file cannot be read, or contradicts the command line.
    """
    config = read_json(Path(path), flag="--deepspeed_config ")
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed_config {path}: expected a JSON object")
    for name, flag in (("optimizer", "--learning_rate"), ("scheduler", "--warmup_steps")):
        if name in config:
            raise UserError(f"--deepspeed_config {path}: remove {name}; train.py's flags set it, see {flag}")
    if "activation_checkpointing" in config:
        raise UserError(f"--deepspeed_config {path}: remove activation_checkpointing; --recompute does it")
    for name in _DECIDED:
        value = config.pop(name, "auto")
        if value != "auto" and value != decided.get(name, value):
            raise UserError(
                f"--deepspeed_config {path}: {name} is {value}, but train.py's flags make it {decided[name]}; remove it"
            )
    for name, kind in (("bf16", "bf16"), ("fp16", "16")):
        section = _section(config, name, path=path)
        config.pop(name, None)
        enabled = section.get("enabled", False)
        if enabled not in (False, "auto") and not precision.startswith(kind):
            raise UserError(f"--deepspeed_config {path}: {name} is enabled, so give --precision {kind} as well")
        if precision.startswith(kind):
            if enabled is False and "enabled" in section:
                raise UserError(f"--deepspeed_config {path}: {name} is not enabled, but --precision {kind} needs it")
            config[name] = {k: v for k, v in section.items() if v != "auto"} | {"enabled": True}
    config.setdefault("zero_allow_untested_optimizer", True)
    config["train_micro_batch_size_per_gpu"] = decided.get("train_micro_batch_size_per_gpu", 1)
    zero = _section(config, "zero_optimization", path=path)
    for name in ("offload_optimizer", "offload_param"):
        if _section(zero, name, path=path).get("device") == "nvme":
            raise UserError(f"--deepspeed_config {path}: {name} to nvme is not supported; give cpu or none")
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        raise UserError(f"--deepspeed_config {path}: zero_optimization.stage is {stage}; give 1, 2 or 3")
    return config


def _section(config: dict[str, Any], name: str, *, path: str) -> dict[str, Any]:
    section = config.get(name, {})
    if not isinstance(section, dict):
        raise UserError(f"--deepspeed_config {path}: {name} is {json.dumps(section)}; give an object instead")
    return section


def zero_rules(config: dict[str, Any]) -> Zero:
    """Return the memory rules of a DeepSpeed configuration; UserError if a size in it is not a number."""
    zero = config["zero_optimization"]
    stage, overlaps = zero["stage"], zero.get("overlap_comm", zero["stage"] == 3)
    named = {
        "bucket": "reduce_bucket_size",
        "prefetch": "stage3_prefetch_bucket_size",
        "live": "stage3_max_live_parameters",
        "reuse": "stage3_max_reuse_distance",
        "persistent": "stage3_param_persistence_threshold",
    }
    given: dict[str, Any] = {}
    for field, key in named.items():
        if zero.get(key, "auto") != "auto":
            if not isinstance(zero[key], int | float):
                raise UserError(
                    f"--deepspeed_config: zero_optimization.{key} is {json.dumps(zero[key])}; give a number"
                )
            given[field] = int(zero[key])
    offload, weights_too = (
        zero.get(name, {}).get("device", "none") != "none" for name in ("offload_optimizer", "offload_param")
    )
    return Zero(
        stage=stage, offload=offload, offload_weights=weights_too and stage == 3, buckets=2 if overlaps else 1, **given
    )
