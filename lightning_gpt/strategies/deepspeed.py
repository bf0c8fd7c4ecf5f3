"""DeepSpeed's ZeRO, on GPUs and, to try and to test it, on CPU ranks."""

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
from lightning_gpt.strategies.memory import Zero
from lightning_gpt.strategies.saving import WholeFolders

# What the Trainer's own options decide; DeepSpeed's config may say "auto" or the same.
_DECIDED = ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping")


class DeepSpeed(WholeFolders, DeepSpeedStrategy):
    """Lightning's strategy, let onto CPU ranks: DeepSpeed itself has a CPU accelerator, over gloo."""

    @property
    def _on_cpu(self) -> bool:
        return self.parallel_devices is not None and self.parallel_devices[0].type == "cpu"

    @property
    def root_device(self) -> torch.device:
        """This rank's device; a CPU's has an index, which DeepSpeed takes for the local rank."""
        return torch.device("cpu", self.local_rank) if self._on_cpu else super().root_device

    def init_deepspeed(self) -> None:
        """Makes the engine, with buckets no larger than the model: the default ones take gigabytes of any."""
        zero = self.config.get("zero_optimization", {})
        total = sum(getattr(p, "ds_numel", p.numel()) for p in self.lightning_module.parameters())
        for name in ("reduce_bucket_size", "allgather_bucket_size"):
            if isinstance(zero.get(name), int | float):
                zero[name] = min(int(zero[name]), total + total % 2)  # DeepSpeed wants an even number
        super().init_deepspeed()

    def setup_environment(self) -> None:
        """Starts the processes; Lightning's own version of it insists on CUDA."""
        if self._on_cpu:
            super(DeepSpeedStrategy, self).setup_environment()
        else:
            super().setup_environment()

    def setup_distributed(self) -> None:
        """Joins the process group; Lightning's own version of it insists on distinct GPUs."""
        if not self._on_cpu:
            super().setup_distributed()
            return
        import deepspeed

        # Its shared-memory transport is compiled at first use, for most of a minute; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def build_deepspeed(
    *, accelerator: str, stage: int = 2, offload: bool = False, config: dict[str, Any] | None = None
) -> DDPStrategy:
    """A ZeRO strategy.

    Args:
        accelerator: What it runs on.
        stage: What is sharded: 1 the optimizer state, 2 the gradients too, 3 the parameters too.
        offload: Whether the optimizer state, and in stage 3 the parameters, live in the host's memory.
        config: A whole DeepSpeed configuration, which says the stage itself.

    Raises:
        UserError: DeepSpeed is not installed, or offloading lacks what compiles its optimizer.
    """
    require_deepspeed()
    if accelerator == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # also where there is a GPU; must be set before deepspeed is imported
    if offload:
        require_cpu_adam()
    if config is not None:
        _check_zero(config["zero_optimization"])
        return DeepSpeed(config=config, logging_level=logging.ERROR)
    parameters_too = offload and stage == 3
    return DeepSpeed(
        stage=stage,
        logging_batch_size_per_gpu=1,  # for DeepSpeed's own timers, which are off
        offload_optimizer=offload,
        offload_parameters=parameters_too,
        # Where zero.Init puts the shards: not on a GPU that they are to be kept away from.
        remote_device="cpu" if parameters_too else None,
        logging_level=logging.ERROR,
    )


def _check_zero(section: dict[str, Any]) -> None:
    """Lets DeepSpeed itself check the section, which it would do in the middle of building the model."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(["zero_optimization", *map(str, first["loc"])])
        raise UserError(f"--deepspeed_config: {name}: {first['msg']}") from error


def require_deepspeed() -> None:
    """Refuses before anything is done.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    if find_spec("deepspeed") is None:
        raise UserError("this --strategy needs DeepSpeed: pip install -r requirements/deepspeed.txt")


def require_cpu_adam() -> None:
    """Checks for what DeepSpeedCPUAdam is compiled with when it is first used.

    Raises:
        UserError: There is no ninja or no C++ compiler.
    """
    from torch.utils.cpp_extension import is_ninja_available

    if not is_ninja_available():
        raise UserError("offloading compiles DeepSpeedCPUAdam, which needs ninja: pip install ninja")
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        raise UserError(
            f"offloading compiles DeepSpeedCPUAdam, which needs a C++ compiler, and there is no {compiler} here;"
            " install g++, or choose a --strategy without offload"
        )


def read_config(path: str, *, precision: str, decided: dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed JSON file, checked against what the command line decides.

    Args:
        path: The file.
        precision: The Trainer's precision.
        decided: The Trainer's values of what DeepSpeed's config could say, too.

    Raises:
        UserError: It cannot be read, or says otherwise than the command line.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--deepspeed_config {path}: {getattr(error, 'strerror', None) or error}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"--deepspeed_config {path}, line {error.lineno}: {error.msg}") from error
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed_config {path}: expected a JSON object")
    for name, flag in (("optimizer", "--learning_rate"), ("scheduler", "--warmup_steps")):
        if name in config:
            raise UserError(f"--deepspeed_config {path}: remove {name}; train.py's own flags decide it, see {flag}")
    if "activation_checkpointing" in config:
        raise UserError(f"--deepspeed_config {path}: remove activation_checkpointing; --recompute does it")
    for name in _DECIDED:
        value = config.pop(name, "auto")
        if value != "auto" and value != decided.get(name, value):
            raise UserError(
                f"--deepspeed_config {path}: {name} is {value}, and train.py's flags make it {decided[name]}"
            )
    for name, kind in (("bf16", "bf16"), ("fp16", "16")):
        section = _section(config, name, path=path)
        config.pop(name, None)
        enabled = section.get("enabled", False)
        if enabled not in (False, "auto") and not precision.startswith(kind):
            raise UserError(f"--deepspeed_config {path}: {name} is enabled, so give --precision {kind} as well")
        if precision.startswith(kind):
            if enabled is False and "enabled" in section:
                raise UserError(f"--deepspeed_config {path}: {name} is not enabled, and --precision {kind} asks for it")
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
        raise UserError(f"--deepspeed_config {path}: {name} is {json.dumps(section)}; give an object in its place")
    return section


def zero_rules(config: dict[str, Any]) -> Zero:
    """How a DeepSpeed configuration divides memory; what it leaves open is DeepSpeed's own default."""
    zero = config["zero_optimization"]
    stage, overlaps = zero["stage"], zero.get("overlap_comm", zero["stage"] == 3)
    named = {
        "bucket": "reduce_bucket_size",
        "prefetch": "stage3_prefetch_bucket_size",
        "live": "stage3_max_live_parameters",
        "persistent": "stage3_param_persistence_threshold",
    }
    given = {}
    for field, key in named.items():
        if zero.get(key, "auto") != "auto":
            if not isinstance(zero[key], int | float):
                raise UserError(
                    f"--deepspeed_config: zero_optimization.{key} is {json.dumps(zero[key])}; give a number"
                )
            given[field] = int(zero[key])
    offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    return Zero(stage=stage, offload=offload, buckets=2 if overlaps else 1, **given)
