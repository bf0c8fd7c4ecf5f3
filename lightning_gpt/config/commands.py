"""Options of the commands other than train.py."""

from dataclasses import dataclass, field

from lightning_gpt.config import TrainerOptions
from lightning_gpt.options import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Probability, Seed


@dataclass(frozen=True)
class EvaluateOptions:
    """Which checkpoints are scored, on which data, and on which devices."""

    checkpoint: list[str] | str | None = None
    """run folder, or checkpoint of any strategy and number of devices; several are compared side by side (default: the
    latest run)"""
    which: str = "best"
    """best or last checkpoint of a run folder"""
    data: str | None = None
    """text or token files, as for train.py (default: the training data of the run)"""
    batch_size: PositiveInt = 32
    """sequences per device and batch"""
    eval_batches: NonNegativeInt = 0
    """number of batches to score, from the start of the validation split; 0 takes all"""
    block_size: PositiveInt | None = None
    """context length in tokens; a longer one than in training needs a model with relative positions (default: as in
    training)"""
    stride: PositiveInt | None = None
    """distance in tokens between windows of block_size tokens; each token is scored where it has the most context
    (default: block_size)"""
    lm_eval: str | None = None
    """names of EleutherAI lm-eval tasks, separated by commas, to score instead of the validation split"""
    lm_eval_include: str | None = None
    """folder of further lm-eval tasks, as YAML files"""
    strategy: str = TrainerOptions.strategy
    """strategy to score under, as for train.py"""
    deepspeed_config: str | None = None
    """DeepSpeed JSON file, instead of a stage"""
    accelerator: str = "auto"
    """auto, cpu or gpu"""
    devices: int | str = 1
    """number of devices per node"""
    gpus: int | None = None
    """short for --accelerator gpu --devices N"""
    num_nodes: PositiveInt = 1
    """number of machines; set by torchrun"""
    precision: int | str = 32
    """16, bf16, 32, or a precision of Lightning"""
    json: str | None = None
    """also write the result to this file, as a list for several checkpoints"""
    plot: str | None = None
    """also draw the scores into this file, .png or .svg"""
    convert_only: bool | str = False
    """only convert the checkpoint to the canonical form, with its optimizer state; pt also writes model.pt"""
    export: str | None = None
    """only write the model for other programs, to --out: hf (transformers), safetensors, pt (a state dict) or nanogpt
    (the original's ckpt.pt)"""
    out: str | None = None
    """folder that --export writes; it must be empty or hold an earlier export"""
    trust_checkpoint: bool = False
    """unpickle Python objects in a checkpoint, which can run any code; only for files whose author you trust"""
    verify: bool = False
    """compare the checkpoint with its checksums first"""


@dataclass(frozen=True)
class SampleOptions:
    """Which model writes text, and how."""

    checkpoint: str | None = None
    """run folder, or checkpoint of any strategy (default: the latest run; also --init_from)"""
    which: str = "best"
    """best or last checkpoint of a run folder"""
    data: str | None = None
    """training data, as for train.py, of a model whose checkpoint does not record its tokenizer"""
    tokenizer: str | None = None
    """tokenizer, as for train.py, of a model whose checkpoint does not record it"""
    prompt: str = "\n"
    """text to continue (default: stdin if it is not a terminal, else a newline)"""
    prompt_file: str | None = None
    """file with the prompt, including trailing newlines; - reads stdin"""
    interactive: bool = False
    """continue each line that is typed; end with Ctrl-D"""
    num_samples: PositiveInt = 1
    """number of texts, written in one batch"""
    max_new_tokens: NonNegativeInt = 500
    """length of each text in tokens"""
    stop: list[str] = field(default_factory=list)
    """end a text before this string; may be given several times"""
    greedy: bool = False
    """take the most likely token each time instead of sampling"""
    temperature: PositiveFloat = 1.0
    """divisor of the logits: below 1 more predictable, above 1 more varied"""
    top_k: PositiveInt | None = None
    """sample from the k most likely tokens only"""
    top_p: Probability = 1.0
    """sample from the most likely tokens with this total probability only"""
    repetition_penalty: PositiveFloat = 1.0
    """above 1, makes tokens that are already in the text less likely"""
    stream: bool = False
    """write each token as soon as it is sampled"""
    seed: Seed = 1337
    """seed of the first text; each further text uses the next one"""
    accelerator: str = "auto"
    """auto, cpu or gpu"""
    precision: int | str = 32
    """dtype of the weights: 32, bf16, or on a GPU 16"""
    compile: bool | str = False
    """torch.compile the decoding step, up to the model's block size, which takes seconds to minutes and pays off for
    many or long texts; alone, or with a backend or mode as for train.py"""
    trust_checkpoint: bool = False
    """unpickle Python objects in a checkpoint, which can run any code; only for files whose author you trust"""
    verify: bool = False
    """compare the checkpoint with its checksums first"""


@dataclass(frozen=True)
class EmbeddingsOptions:
    """Which model's token embeddings are extracted, and where to."""

    checkpoint: list[str] = field(default_factory=list, metadata={"positional": True})
    """model as for train.py --init_from, such as a Hugging Face GPT-2 folder"""
    out: str | None = None
    """file to write, .npy or .safetensors"""
    trust_checkpoint: bool = False
    """unpickle Python objects in a checkpoint, which can run any code; only for files whose author you trust"""


@dataclass(frozen=True)
class AppOptions:
    """Which results and runs are shown, and where."""

    results: str = "results"
    """folder of results: .csv files that bench.py strategies writes"""
    runs: str = "runs"
    """folder of run folders"""
    port: PositiveInt = 8501
    """port to serve on"""
    address: str = "localhost"
    """address to serve on; 0.0.0.0 lets other machines see the pages and load the checkpoints of this one"""


@dataclass(frozen=True)
class PrepareOptions:
    """Which text is turned into token files, and how."""

    inputs: list[str] = field(default_factory=list, metadata={"positional": True})
    """shakespeare_char, shakespeare, openwebtext, or files and folders: text, .jsonl or .ndjson, also .gz or .zst, or
    .parquet"""
    out: str | None = None
    """folder of token files; an existing one is replaced when the new one is complete"""
    tokenizer: str | None = None
    """as for train.py (default: gpt2; char for shakespeare_char)"""
    tokenizer_file: str | None = None
    """as for train.py"""
    val_fraction: Fraction | None = None
    """fraction of the text, or of documents, for validation (default: 0.1; 0.0005 for openwebtext)"""
    seed: Seed = 2357
    """seed that selects the documents for validation"""
    workers: PositiveInt | None = None
    """number of tokenizing threads; the tokens do not depend on it (default: one per processor core)"""
    field: str = "text"
    """field of a JSON row, or column of a Parquet file, that holds the text"""
    from_file: str | None = None
    """file or folder to read a named text from, instead of downloading it (also --from)"""
