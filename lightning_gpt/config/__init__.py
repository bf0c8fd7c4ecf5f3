"""Every option of the command line, declared once: those of train.py here, those of the other commands in commands.py.

``options.py`` turns fields into flags. Options of a single optimizer, benchmark or task are declared beside its code.
Both files import only the standard library, so that ``--help`` does not wait for torch.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_gpt.options import (
    Beta,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Share,
)


class UserError(ValueError):
    """An error that the user can correct: printed as one line without a traceback; the exit code is 2."""


def cache_root() -> Path:
    """Return the cache folder: LIGHTNING_GPT_CACHE, or lightning_gpt in the user's cache folder."""
    if own := os.environ.get("LIGHTNING_GPT_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "lightning_gpt"
    return Path("~/.cache/lightning_gpt").expanduser()


@dataclass(frozen=True)
class ModelOptions:
    """The model. Fields of the implementation's own config become further flags."""

    implementation: str = "mingpt"
    """mingpt, nanogpt, moderngpt, or package.module:Class for your own model"""
    model_type: str | None = None
    """preset of sizes, gpt-nano to gpt2-4xl, whose sizes single flags override (default: gpt-micro, unless n_layer,
    n_head and n_embd are all given)"""
    block_size: PositiveInt = 64
    """context length in tokens"""
    pad_vocab: bool = False
    """round the vocabulary up to a multiple of 64, which is faster on GPUs; the padding is never sampled"""


@dataclass(frozen=True)
class DataOptions:
    """The training text, and how it is split into batches."""

    data: str = "stdlib"
    """stdlib (Python's standard library), a text, .jsonl or .parquet file or a folder of them, a folder that prepare.py
    wrote, chargpt:FILE for characters, or a task: adder, sort, or package.module:Class"""
    tokenizer: str | None = None
    """char, byte, gpt2, another tiktoken encoding such as cl100k_base, or a Hugging Face tokenizer.json (default: the
    one of --init_from or of the token files, else char)"""
    tokenizer_file: str | None = None
    """tables of a tiktoken encoding for use without a network: for gpt2 a folder with vocab.bpe and encoder.json, else
    the .tiktoken file; they are checked and cached"""
    batch_size: PositiveInt = 12
    """sequences per device and micro-batch"""
    num_workers: NonNegativeInt = 0
    """worker processes that read batches; 0 reads in the training process, which is fastest for token files"""


@dataclass(frozen=True)
class OptimOptions:
    """The optimizer, and its schedule: linear warm-up, then a decay down to min_learning_rate."""

    optimizer: str = "adamw"
    """adamw, or muon: orthogonalised momentum for the matrices inside blocks, and AdamW for all else"""
    learning_rate: PositiveFloat = 1e-3
    """peak learning rate"""
    schedule: str = "cosine"
    """after the warm-up: cosine, linear, constant, or wsd, which stays at the peak and then falls linearly in a
    cool-down"""
    decay_fraction: Share | None = None
    """wsd: last fraction of the schedule that is the cool-down (default: 0.2)"""
    min_learning_rate: NonNegativeFloat | None = None
    """learning rate at the end of the schedule (default: a tenth of learning_rate)"""
    warmup_steps: NonNegativeInt | None = None
    """optimizer steps of linear warm-up (default: a tenth of the schedule, at most 100)"""
    lr_decay_steps: PositiveInt | None = None
    """optimizer step at which the decay ends (default: the last step of the budget)"""
    weight_decay: NonNegativeFloat = 0.1
    """decoupled weight decay: a step multiplies a decayed parameter by 1 - learning rate x this"""
    beta1: Beta = 0.9
    """AdamW's decay rate of the gradient mean"""
    beta2: Beta = 0.95
    """AdamW's decay rate of the squared gradient"""
    gradient_clip_val: NonNegativeFloat = 1.0
    """clip the norm of the gradient to this; 0 turns clipping off"""
    ema: Beta = 0.0
    """keep an exponential moving average of the weights that each step multiplies by this, such as 0.999; it is what is
    validated, saved and sampled (strategies auto and ddp; default: 0, none)"""
    spike_sigma: PositiveFloat | None = None
    """skip steps whose gradient norm is more than this many standard deviations above its running mean (default: none
    is skipped)"""
    max_bad_steps: NonNegativeInt = 10
    """number of steps in a row whose loss or gradient is not finite that stops the run; each is skipped; 0 stops at the
    first"""
    accumulate_grad_batches: PositiveInt | None = None
    """micro-batches per optimizer step (also --grad_accum; default: 1, or derived from --global_batch_tokens)"""
    global_batch_tokens: PositiveInt | None = None
    """tokens per optimizer step over all devices; sets accumulate_grad_batches, so that the schedule is the same on any
    number of devices"""


@dataclass(frozen=True)
class TrainerOptions:
    """Where and how long to train. Other options of lightning.Trainer: --trainer.NAME VALUE."""

    strategy: str = "auto"
    """auto, ddp, fsdp, or deepspeed_stage_1, _2 or _3, _2_offload or _3_offload (deepspeed is stage 2)"""
    deepspeed_config: str | None = None
    """DeepSpeed JSON file, instead of a stage"""
    accelerator: str = "auto"
    """auto, cpu, gpu, or another accelerator of Lightning"""
    devices: int | str = "auto"
    """number of devices per node, or a list such as 0,2"""
    gpus: int | None = None
    """short for --accelerator gpu --devices N"""
    num_nodes: PositiveInt = 1
    """number of machines; set by torchrun"""
    precision: int | str = "auto"
    """16, bf16, 32, or a precision of Lightning such as bf16-true (default: auto, bf16 on GPUs that have it, 16 on
    older ones, 32 on other devices)"""
    tf32: bool = True
    """let GPUs multiply float32 matrices in TF32, which has 10 bits of mantissa but is several times faster"""
    compile: bool | str = False
    """torch.compile each block in place; alone, or with a backend (dynamo is the default one) or a mode such as
    max-autotune"""
    recompute: bool = False
    """keep only the input of each block, and recompute its activations in the backward pass: less memory, more time"""
    deterministic: bool = False
    """allow only operations whose result does not depend on timing, so that the same command on the same machine gives
    the same weights; slower on GPUs"""
    loss: str = "auto"
    """chunked: compute the head and the loss of some tokens at a time, without holding all logits; full; or auto:
    chunked where the vocabulary is large and the model accepts it"""
    max_steps: PositiveInt | None = None
    """budget in optimizer steps (default: 1000, if no other budget is given)"""
    max_tokens: PositiveInt | None = None
    """budget in tokens, rounded up to whole steps"""
    max_epochs: PositiveFloat | None = None
    """budget in passes over the training text, rounded up to whole steps"""
    max_time: str | None = None
    """stop after this time, counted from the start of the command, and save: 90s, 30m, 12h or 1-12:00:00"""
    patience: PositiveInt | None = None
    """stop when this many validations in a row have not lowered val_loss"""
    eval_interval: PositiveInt = 250
    """optimizer steps between validations; each one saves checkpoints/last, and the best one checkpoints/best"""
    eval_batches: NonNegativeInt = 200
    """number of batches to validate on, from the start of the validation split; 0 takes all"""
    log_every_n_steps: PositiveInt = 10
    """optimizer steps between entries in the log"""
    trainer: dict[str, Any] = field(default_factory=dict)
    """any other option of lightning.Trainer, as --trainer.NAME VALUE"""


@dataclass(frozen=True)
class RunOptions:
    """Where a run starts from, where it is saved, and what it reports."""

    out_dir: str | None = None
    """run folder (default: a new one in runs/)"""
    overwrite: bool = False
    """replace the run in --out_dir: remove its checkpoints and logs, and no other files"""
    save_interval: PositiveInt | None = None
    """optimizer steps between saves of checkpoints/last that do not wait for a validation (default: save only then)"""
    keep: NonNegativeInt = 0
    """number of the newest saves to keep as checkpoints/step-NNNNNN.ckpt, besides best and last"""
    on_save_error: str = "stop"
    """stop or continue when a checkpoint cannot be written; continue warns and tries again at the next save"""
    resume: str | None = None
    """continue a run, given by its folder or a checkpoint, under any strategy and number of devices, with its saved
    settings as defaults. Alone: the newest run. auto: the newest checkpoint in --out_dir, or else a new run; torchrun's
    restarts and requeued SLURM jobs do this by themselves"""
    decay_from: str | None = None
    """branch a run of --schedule wsd into its cool-down: a new run that continues the folder's newest checkpoint, or a
    given one, and decays over the last --decay_fraction (default: beginning at the checkpoint's step)"""
    init_from: str | None = None
    """start from trained weights: a run or checkpoint, a nanoGPT ckpt.pt, a minGPT state dict, a Hugging Face
    folder (GPT-2 or NanoChat), or a hub name such as gpt2-xl. Its sizes and tokenizer are the defaults"""
    pretrained_embeddings: str | None = None
    """start from these token embeddings: a .npy or .safetensors matrix, or a model as for --init_from"""
    freeze_embeddings: bool = False
    """freeze the token embeddings, and the head if it is tied to them"""
    trust_checkpoint: bool = False
    """unpickle Python objects in a checkpoint, which can run any code; only for files whose author you trust"""
    verify: bool = False
    """compare the checkpoint with its checksums first; --resume always does"""
    seed: Seed = 1337
    """seed of the initial weights, the order of samples, and dropout"""
    logger: str = "tensorboard"
    """tensorboard, csv, wandb, mlflow, several of them separated by commas, or none"""
    run_name: str | None = None
    """name of the run for wandb and mlflow (default: the name of the run folder)"""
    project: str | None = None
    """project of the run for wandb (default: WANDB_PROJECT, else lightning_logs), or experiment for mlflow (default:
    lightning-gpt)"""
    tags: str | None = None
    """tags of the run for wandb and mlflow, separated by commas"""
    prompt: str = "\n"
    """prompt of the final sample (default: a newline; for a task, a question of its validation split)"""
    sample_tokens: NonNegativeInt | None = None
    """length of the final sample in tokens; 0 for none (default: 200; for a task, its answer)"""
    log_samples: PositiveInt | None = None
    """write a sample to samples/ in the run folder and to the loggers every N steps, and log the gradient norm of each
    block (not under DeepSpeed)"""
    dry_run: bool | str = False
    """print the memory and compute that the run needs, and stop; the devices need not be present. all: every strategy
    side by side, with and without --recompute"""
    on: str | None = None
    """machine that --dry_run plans for: CARD:GPUS or CARD:GPUSxNODES, such as h100:8 or a100-40:8x4"""
    price_per_gpu_hour: float | None = None
    """what a GPU costs in an hour, in any currency; --dry_run then prints what the run costs"""


@dataclass(frozen=True)
class Resumed:
    """How a run came to be resumed.

    Attributes:
        automatic: Whether ``--resume auto`` or a restart chose the checkpoint, so that a finished run is no error.
        saved: Content of the run's ``config.yaml``; empty if there is none.
    """

    automatic: bool
    saved: dict[str, Any]


@dataclass(frozen=True)
class TrainConfig:
    """One resolved training run: the groups of options above, and fields that are declared elsewhere.

    Attributes:
        model_fields: Fields of the model's own config.
        optimizer_fields: Options of single optimizers; None for those not given.
        task_fields: Fields of the task.
        resumed: How the run came to be resumed; None for a new run.
        command: The command line, for the record; empty if there was none.
    """

    model: ModelOptions
    data: DataOptions
    optim: OptimOptions
    trainer: TrainerOptions
    run: RunOptions
    model_fields: dict[str, Any]
    optimizer_fields: dict[str, Any] = field(default_factory=dict)
    task_fields: dict[str, Any] = field(default_factory=dict)
    resumed: Resumed | None = field(default=None, compare=False)
    command: str = field(default="", compare=False)

    def flat(self) -> dict[str, Any]:
        """Return the values of all options in one flat mapping."""
        groups = (self.model, self.data, self.optim, self.trainer, self.run)
        flat = {name: value for group in groups for name, value in dataclasses.asdict(group).items()}
        return flat | self.optimizer_fields | self.model_fields | self.task_fields


# The key of ``config.yaml`` that holds no option but how the run was made.
PROVENANCE = "_provenance"
# Groups of mutually exclusive options. The one that is given replaces another from a saved run or a YAML file.
EXCLUSIVE = (("max_steps", "max_tokens", "max_epochs"), ("accumulate_grad_batches", "global_batch_tokens"))
# The sizes that a preset (--model_type) sets.
SIZES = ("n_layer", "n_head", "n_embd")
