"""minGPT's names for GPT-2's tokenizer, which is lightning_gpt's: tiktoken, with tables that are checked and cached."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class Encoder:
    """GPT-2's byte-pair encoding of text to lists of token ids."""

    def __init__(self) -> None:
        from lightning_gpt.tokenizers import GPT2Tokenizer

        self._tokenizer = GPT2Tokenizer()

    @cached_property
    def encoder(self) -> dict[str, int]:
        """Ids by token, in GPT-2's spelling: a printable character for each byte, such as \u0120 for a space."""
        from lightning_gpt.checkpoint.write.hf_tokenizer import vocabulary
        from lightning_gpt.tokenizers.tables import load_encoding

        encoding = load_encoding(self._tokenizer.name)
        return vocabulary(encoding._mergeable_ranks, specials=encoding._special_tokens)

    @cached_property
    def decoder(self) -> dict[int, str]:
        """Tokens by id; the inverse of `encoder`."""
        return {index: token for token, index in self.encoder.items()}

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text; ``<|endoftext|>`` in it is encoded as plain text."""
        return self._tokenizer.encode(text).tolist()

    def decode(self, bpe_idx: Sequence[int]) -> str:
        """Return the text of token ids; incomplete UTF-8 becomes U+FFFD."""
        return self._tokenizer.decode(bpe_idx)


def get_encoder() -> Encoder:
    """Return GPT-2's encoder."""
    return Encoder()


class BPETokenizer:
    """GPT-2's tokenizer, to and from tensors."""

    def __init__(self) -> None:
        self.encoder = get_encoder()

    def __call__(self, text: str, return_tensors: str = "pt") -> Tensor:
        """Return the token ids of one text, (1, T) int64.

        Raises:
            ValueError: ``return_tensors`` is not "pt", or GPT-2's tables are missing.
        """
        if return_tensors != "pt" or not isinstance(text, str):
            raise ValueError('BPETokenizer takes one text, and returns torch tensors: return_tensors="pt"')
        return torch.tensor([self.encoder.encode(text)], dtype=torch.long)

    def decode(self, idx: Tensor) -> str:
        """Return the text of token ids (T,).

        Raises:
            ValueError: ``idx`` has not one dimension, or an id is not GPT-2's.
        """
        if idx.ndim != 1:
            raise ValueError(f"decode takes the ids of one text, (T,), not {tuple(idx.shape)}; give it one row")
        return self.encoder.decode(idx.tolist())
