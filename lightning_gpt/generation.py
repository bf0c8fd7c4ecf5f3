"""Writing text with a trained model."""

from collections.abc import Iterator

import numpy as np
import torch

from lightning_gpt.checkpoint import ensure_canonical, find_checkpoint
from lightning_gpt.config import SampleOptions, TrainerOptions, UserError
from lightning_gpt.models import GPTModule
from lightning_gpt.strategies import find_devices
from lightning_gpt.tokenizers import Tokenizer


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """The tokens of a prompt, int64 of shape (T,).

    Raises:
        UserError: The prompt is empty, or holds a character that the tokenizer does not know.
    """
    try:
        ids = tokenizer.encode(prompt)
    except UserError as error:
        raise UserError(f"--prompt: {error}") from error
    if len(ids) == 0:
        raise UserError("--prompt is empty; give at least one character to continue")
    return ids


def complete(
    module: GPTModule,
    *,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> str:
    """The prompt and its continuation; the global random state is left as it was.

    Raises:
        UserError: The prompt is empty, or holds a character that the tokenizer does not know.
    """
    ids = encode_prompt(tokenizer, prompt)
    device = module.device
    idx = torch.as_tensor(ids, dtype=torch.long, device=device)[None]  # (1, T)
    was_training = module.training
    module.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = module.generate(idx, max_new_tokens, temperature=temperature, do_sample=True, top_k=top_k)
    module.train(was_training)
    return tokenizer.decode(out[0].tolist())


def samples(options: SampleOptions) -> Iterator[str]:
    """The texts that ``sample.py`` writes, one after another.

    Raises:
        UserError: There is no such checkpoint, or it does not know its tokenizer.
    """
    path = find_checkpoint(options.checkpoint or "latest", which=options.which)
    checkpoint = ensure_canonical(path, trust=options.trust_checkpoint)
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        raise UserError(f"{path} does not know its tokenizer")
    module = checkpoint.module()
    if not hasattr(module.model, "generate"):
        raise UserError(f"{path} cannot be sampled: its --implementation {checkpoint.implementation} has no generate")
    where = find_devices(TrainerOptions(accelerator=options.accelerator))
    gpu = "cuda" if torch.cuda.is_available() else "mps"
    module = module.to(gpu if where.accelerator == "gpu" else "cpu")
    for number in range(options.num_samples):
        yield complete(
            module,
            tokenizer=tokenizer,
            prompt=options.prompt,
            max_new_tokens=options.max_new_tokens,
            seed=options.seed + number,
            temperature=options.temperature,
            top_k=options.top_k,
        )
