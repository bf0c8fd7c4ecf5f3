"""Every option of the command line, declared once.

A field's annotation is its flag's type, its default is the flag's default, and the string below it is the flag's line
in ``--help``. Nothing here needs more than the standard library, so ``--help`` answers without importing torch.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_gpt.options import (
    Beta,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Seed,
)


class UserError(ValueError):
    """Something a user can put right: shown as one line, exit code 2, without a traceback."""


def cache_root() -> Path:
    """The folder for what can be made again: LIGHTNING_GPT_CACHE, or lightning_gpt in the user's cache folder."""
    if own := os.environ.get("LIGHTNING_GPT_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "lightning_gpt"
    return Path("~/.cache/lightning_gpt").expanduser()


@dataclass(frozen=True)
class ModelOptions:
    """Which model is built. Fields of the implementation's own config become further flags of this group."""

    implementation: str = "mingpt"
    """mingpt, nanogpt, moderngpt, or package.module:Class for a model of your own"""
    model_type: str | None = None
    """a preset of sizes, gpt-nano to gpt2-4xl; single sizes given beside it replace the preset's (default: gpt-micro
    unless all of n_layer, n_head and n_embd are given)"""
    block_size: PositiveInt = 64
    """context length in tokens"""
    pad_vocab: bool = False
    """round the vocabulary up to a multiple of 64, which GPUs multiply faster; the padding is never sampled"""


@dataclass(frozen=True)
class DataOptions:
    """Which text is learnt, and how it is cut into batches."""

    data: str = "stdlib"
    """stdlib (this Python's own standard library), a text file, a folder of text files, or a folder with train.bin and
    val.bin, such as prepare.py makes (texts may be JSON lines or Parquet with a field text, and .gz or .zst);
    chargpt:FILE, a text by characters; or a task: adder, sort, or package.module:Class for one of your own, whose
    fields become further flags"""
    tokenizer: str | None = None
    """char, byte, gpt2, another tiktoken encoding such as cl100k_base, or the path of a Hugging Face tokenizer.json
    (default: that of --init_from, else char for text; a folder of token files knows its own)"""
    tokenizer_file: str | None = None
    """tables of gpt2 (a folder with vocab.bpe and encoder.json) or of another tiktoken encoding (its .tiktoken file),
    for use without a network; checked, and kept in the cache for later runs"""
    batch_size: PositiveInt = 12
    """sequences per device and micro-batch"""
    num_workers: NonNegativeInt = 0
    """worker processes that read batches; 0 reads in the training process, which is fastest for memory-mapped tokens"""


@dataclass(frozen=True)
class OptimOptions:
    """The optimizer, linear warm-up, then a cosine down to min_learning_rate."""

    optimizer: str = "adamw"
    """adamw, or muon, which trains the matrices inside of blocks by orthogonalised momentum, and all else by AdamW"""
    learning_rate: PositiveFloat = 1e-3
    """peak learning rate"""
    min_learning_rate: NonNegativeFloat | None = None
    """learning rate at the end of the schedule (default: a tenth of learning_rate)"""
    warmup_steps: NonNegativeInt | None = None
    """optimizer steps of linear warm-up (default: a tenth of the schedule, at most 100)"""
    lr_decay_steps: PositiveInt | None = None
    """optimizer step at which the cosine ends (default: the last step of the budget)"""
    weight_decay: NonNegativeFloat = 0.1
    """decoupled weight decay, on the parameters that the implementation decays: a step takes this times the learning
    rate of a parameter away"""
    beta1: Beta = 0.9
    """AdamW's decay of the gradient mean"""
    beta2: Beta = 0.95
    """AdamW's decay of the squared gradient"""
    gradient_clip_val: NonNegativeFloat = 1.0
    """clip the norm of the whole gradient to this; 0 turns clipping off"""
    accumulate_grad_batches: PositiveInt | None = None
    """micro-batches per optimizer step (also --grad_accum; default: 1, or what --global_batch_tokens makes)"""
    global_batch_tokens: PositiveInt | None = None
    """tokens per optimizer step over all devices, from which accumulate_grad_batches then follows: the same schedule on
    any number of devices"""


@dataclass(frozen=True)
class TrainerOptions:
    """Where and for how long to train. Other options of lightning.Trainer are reachable as --trainer.NAME VALUE."""

    strategy: str = "auto"
    """auto, ddp, fsdp, or deepspeed_stage_1, _2 or _3, _2_offload or _3_offload (deepspeed is stage 2)"""
    deepspeed_config: str | None = None
    """a DeepSpeed JSON file, in place of a stage"""
    accelerator: str = "auto"
    """auto, cpu, gpu, or another that Lightning knows"""
    devices: int | str = "auto"
    """how many devices a node, or a list such as 0,2"""
    gpus: int | None = None
    """short for --accelerator gpu --devices N"""
    num_nodes: PositiveInt = 1
    """how many machines; torchrun sets it by itself"""
    precision: int | str = 32
    """16, bf16, 32, or one of Lightning's own names such as bf16-true"""
    compile: bool | str = False
    """torch.compile each block, in place; alone, or with a backend (dynamo means the default one) or a mode such as
    max-autotune"""
    recompute: bool = False
    """keep only each block's input, and compute its activations again in the backward pass: less memory, more time"""
    max_steps: PositiveInt | None = None
    """budget in optimizer steps (default: 1000, where no other budget is given)"""
    max_tokens: PositiveInt | None = None
    """budget in tokens, rounded up to whole steps"""
    max_epochs: PositiveFloat | None = None
    """budget in passes over the training text, rounded up to whole steps"""
    eval_interval: PositiveInt = 250
    """optimizer steps between validations; every validation saves checkpoints/last, the best one checkpoints/best"""
    eval_batches: NonNegativeInt = 200
    """validate on the first this many batches of the validation split; 0 takes the whole split"""
    log_every_n_steps: PositiveInt = 10
    """optimizer steps between two lines in the log"""
    trainer: dict[str, Any] = field(default_factory=dict)
    """any other option of lightning.Trainer, as --trainer.NAME VALUE"""


@dataclass(frozen=True)
class RunOptions:
    """What a run is called, where it goes, and what it says."""

    out_dir: str | None = None
    """the run folder (default: a fresh one under runs/)"""
    resume: str | None = None
    """go on with a run: its folder or any checkpoint, under any strategy and number of devices; alone, the latest run.
    Its saved settings are the defaults"""
    init_from: str | None = None
    """start from trained weights, at step 0: a folder of Hugging Face's GPT-2, an original nanoGPT ckpt.pt or minGPT
    state dict, a run or checkpoint of ours, or a name on the Hugging Face hub such as gpt2-xl. Its sizes and tokenizer
    are the defaults"""
    pretrained_embeddings: str | None = None
    """start from these token embeddings: a .npy or .safetensors matrix, or what --init_from takes"""
    freeze_embeddings: bool = False
    """do not train the token embeddings; where the head is tied to them, that is not trained either"""
    trust_checkpoint: bool = False
    """let a checkpoint that another made run the code that it may hold"""
    seed: Seed = 1337
    """seed of the weights, the order of the samples, and dropout"""
    logger: str = "tensorboard"
    """tensorboard, csv, wandb or none"""
    prompt: str = "\n"
    """what the sample at the end continues (default: a newline; for a task, a question of its validation split)"""
    sample_tokens: NonNegativeInt | None = None
    """length of that sample in tokens; 0 for none (default: 200; for a task, its answer)"""
    dry_run: bool = False
    """check everything, say what the run would need in memory and compute, and stop; the devices need not be here"""


@dataclass(frozen=True)
class EvaluateOptions:
    """Which checkpoint is scored, on what, and where."""

    checkpoint: list[str] | str | None = None
    """a run folder or any checkpoint, of any strategy and number of devices; several are compared side by side
    (default: the latest run)"""
    which: str = "best"
    """best or last, where checkpoint is a run folder"""
    data: str | None = None
    """text or token files, as for train.py (default: what the run was trained on)"""
    batch_size: PositiveInt = 32
    """sequences per device and batch"""
    eval_batches: NonNegativeInt = 0
    """score the first this many batches of the validation split; 0 takes the whole split"""
    block_size: PositiveInt | None = None
    """context length in tokens; beyond the one of the training only for a model whose positions go on (default: that
    of the training)"""
    stride: PositiveInt | None = None
    """windows of block_size tokens start this many tokens apart, and each token is scored where it has the most
    context (default: block_size, windows side by side)"""
    lm_eval: str | None = None
    """score tasks of EleutherAI's lm-eval in place of the validation split: names, separated by commas"""
    lm_eval_include: str | None = None
    """a folder with further tasks for lm_eval, as YAML files"""
    strategy: str = TrainerOptions.strategy
    """what it is scored under, as for train.py"""
    deepspeed_config: str | None = None
    """a DeepSpeed JSON file, in place of a stage"""
    accelerator: str = "auto"
    """auto, cpu or gpu"""
    devices: int | str = 1
    """how many devices a node"""
    gpus: int | None = None
    """short for --accelerator gpu --devices N"""
    num_nodes: PositiveInt = 1
    """how many machines; torchrun sets it by itself"""
    precision: int | str = 32
    """16, bf16, 32, or one of Lightning's own names"""
    json: str | None = None
    """also write the result to this file, of several checkpoints as a list"""
    convert_only: bool | str = False
    """convert the checkpoint, optimizer state included, and score nothing; "pt" writes model.pt as well"""
    export: str | None = None
    """write the model for other programs, into --out, and score nothing: hf (transformers), safetensors, pt (a state
    dict) or nanogpt (the original's ckpt.pt)"""
    out: str | None = None
    """the folder that --export writes; it may hold nothing but an earlier export"""
    trust_checkpoint: bool = False
    """let a checkpoint that another made run the code that it may hold"""


@dataclass(frozen=True)
class SampleOptions:
    """Which checkpoint writes, and how."""

    checkpoint: str | None = None
    """a run folder or any checkpoint, of any strategy (default: the latest run; also --init_from)"""
    which: str = "best"
    """best or last, where checkpoint is a run folder"""
    prompt: str = "\n"
    """the text to continue (default: what stdin holds where it is no terminal, else a line break)"""
    prompt_file: str | None = None
    """a file whose text, to its last character, is the prompt; - for stdin"""
    interactive: bool = False
    """continue each line that is typed; Ctrl-D ends"""
    num_samples: PositiveInt = 1
    """how many texts to write, together"""
    max_new_tokens: NonNegativeInt = 500
    """length of each in tokens"""
    stop: list[str] = field(default_factory=list)
    """end a text before this string; may be given several times"""
    greedy: bool = False
    """take the likeliest token each time, draw none"""
    temperature: PositiveFloat = 1.0
    """below 1 is more careful, above 1 more daring"""
    top_k: PositiveInt | None = None
    """draw from the k likeliest tokens only"""
    top_p: Probability = 1.0
    """draw from the likeliest tokens that together have this probability only"""
    repetition_penalty: PositiveFloat = 1.0
    """above 1 makes tokens less likely that the text has already"""
    stream: bool = False
    """write each token when it is there"""
    seed: Seed = 1337
    """seed of the draw; the second text has the next one, and so on"""
    accelerator: str = "auto"
    """auto, cpu or gpu"""
    precision: int | str = 32
    """the type of the weights: 32, bf16, or on a GPU 16"""
    compile: bool | str = False
    """torch.compile the reading of each token after the prompt, up to the model's block; takes from seconds to minutes,
    which many or long texts repay; alone, or with a backend or mode as for train.py"""
    trust_checkpoint: bool = False
    """let a checkpoint that another made run the code that it may hold"""


@dataclass(frozen=True)
class EmbeddingsOptions:
    """Which model's token embeddings are taken out, and where they go."""

    checkpoint: list[str] = field(default_factory=list, metadata={"positional": True})
    """what train.py's --init_from takes, such as a folder of Hugging Face's GPT-2"""
    out: str | None = None
    """the file to write, .npy or .safetensors"""
    trust_checkpoint: bool = False
    """let a checkpoint that another made run the code that it may hold"""


@dataclass(frozen=True)
class PrepareOptions:
    """Which text becomes token files, and how."""

    inputs: list[str] = field(default_factory=list, metadata={"positional": True})
    """shakespeare_char, shakespeare, openwebtext, or files and folders: plain text, .jsonl, .ndjson or .parquet, the
    first three also .gz or .zst"""
    out: str | None = None
    """the folder of token files; one that is there is replaced when the new one is whole"""
    tokenizer: str | None = None
    """as for train.py (default: gpt2; char for shakespeare_char)"""
    tokenizer_file: str | None = None
    """as for train.py"""
    val_fraction: Fraction | None = None
    """share of the text, or chance of a document, to be for validation (default: 0.1; 0.0005 for openwebtext)"""
    seed: Seed = 2357
    """seed of the draw of documents"""
    workers: PositiveInt | None = None
    """threads that tokenize, which does not change the tokens (default: one per processor core)"""
    field: str = "text"
    """the field of a JSON row, or the column of a Parquet file, that holds the text"""
    from_file: str | None = None
    """take a named text from this file or folder, in place of a download (also --from)"""


@dataclass(frozen=True)
class TaxOptions:
    """How long the comparison with a hand-written loop takes, and where its numbers go."""

    rounds: int = 7
    """how often each path is measured, in turns"""
    steps: int = 100
    """optimizer steps that are timed in each round, after 10 of warm-up"""
    threads: int | None = None
    """threads that torch computes with (default: torch's own choice); 1 where other programs are busy"""
    json: str | None = None
    """also write the result to this file"""


@dataclass(frozen=True)
class ParityOptions:
    """What is trained under every strategy."""

    steps: int = 10
    """optimizer steps of each run"""
    devices: int | None = None
    """ranks of each strategy (default: all GPUs, or 2 on a CPU)"""
    accelerator: str = "auto"
    """auto, cpu or gpu"""
    strategies: str | None = None
    """names, separated by commas (default: all)"""
    data: str = "stdlib"
    """text or token files, as for train.py"""
    json: str | None = None
    """also write the result to this file"""


@dataclass(frozen=True)
class PrepareSpeedOptions:
    """Which text is tokenized, how often, and by how many threads."""

    rounds: int = 5
    """how often each path is measured, in turns"""
    megabytes: int = 32
    """length of the text, in millions of bytes"""
    workers: int | None = None
    """threads that tokenize (default: one per processor core)"""
    data: str | None = None
    """a text file, repeated up to that length (default: made-up words in lines)"""
    json: str | None = None
    """also write the result to this file"""


@dataclass(frozen=True)
class GenerateOptions:
    """How fast text is written on this CPU, and beside what."""

    shapes: str = "small,124m"
    """small (6/6/384, block 256: 200 new tokens from one), 124m (12/12/768, block 1024: 64 from 512), or both"""
    batch_sizes: str = "1,8"
    """how many texts are written together; several numbers, separated by commas, for one table each"""
    implementation: str = "nanogpt"
    """mingpt, nanogpt or moderngpt"""
    rounds: int = 5
    """how often each way is measured, in turns"""
    recompute_steps: int = 8
    """how many steps of the plain loop are timed, spread over the lengths, to stand for all; 0 for each of them"""
    compile: bool | str = False
    """measure what sample.py --compile does, too; alone, or with a backend or mode as there"""
    threads: int | None = None
    """threads that torch computes with (default: torch's own choice)"""
    json: str | None = None
    """also write the result to this file"""


@dataclass(frozen=True)
class TimeToLossOptions:
    """What is trained to see how soon it has learnt, and where the numbers go."""

    data: str = "data/shakespeare_char"
    """tiny Shakespeare, as a text file or as token files (default: what `prepare.py shakespeare_char --out
    data/shakespeare_char` writes)"""
    recipe: str = "cpu"
    """nanoGPT's settings that all rows share: cpu (4/4/128, block 64, batch 12, 2000 steps) or gpu (6/6/384, block 256,
    batch 64, 5000 steps)"""
    rows: str | None = None
    """names of rows, separated by commas, the first being what the others are compared with (default: all)"""
    seeds: int = 3
    """how many runs of each row"""
    steps: int | None = None
    """optimizer steps of the longest rows, the others shortened alike, for a trial (default: the recipe's)"""
    threads: int | None = None
    """threads that torch computes with (default: torch's own choice)"""
    json: str | None = None
    """also write the result, curves included, to this file"""
    plot: str | None = None
    """also draw the curves into this PNG file"""
    from_file: str | None = None
    """show an earlier result, of --json, in place of training (also --from)"""


@dataclass(frozen=True)
class TrainConfig:
    """One resolved training run.

    Attributes:
        model: Options of the group.
        data: Options of the group.
        optim: Options of the group.
        trainer: Options of the group.
        run: Options of the group.
        model_fields: Fields of the model's own config.
        optimizer_fields: Own options of all optimizers; None for those not given.
        task_fields: Fields of the task.
    """

    model: ModelOptions
    data: DataOptions
    optim: OptimOptions
    trainer: TrainerOptions
    run: RunOptions
    model_fields: dict[str, Any]
    optimizer_fields: dict[str, Any] = field(default_factory=dict)
    task_fields: dict[str, Any] = field(default_factory=dict)

    def flat(self) -> dict[str, Any]:
        """Return all values in one flat mapping, the content of ``config.yaml``."""
        groups = (self.model, self.data, self.optim, self.trainer, self.run)
        flat = {name: value for group in groups for name, value in dataclasses.asdict(group).items()}
        return flat | self.optimizer_fields | self.model_fields | self.task_fields


# Options that fix the same thing, of which one may be given; it replaces the one of an earlier layer.
EXCLUSIVE = (("max_steps", "max_tokens", "max_epochs"), ("accumulate_grad_batches", "global_batch_tokens"))
# Sizes that determine the shapes of the weights. When a run is resumed the checkpoint decides them.
SIZES = ("n_layer", "n_head", "n_embd")
