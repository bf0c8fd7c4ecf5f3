"""A data set of characters for scripts; train.py reads token files instead, and orders samples by itself."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_gpt.tokenizers import CharTokenizer


class CharDataset(Dataset):
    """All windows of a text, with a token for each character.

    Args:
        data: The text; its sorted characters are the vocabulary.
        block_size: Tokens per sample, T.

    Attributes:
        stoi: Token id of each character.
        itos: Character of each token id.
        vocab_size: Number of characters.
    """

    def __init__(self, data: str, block_size: int) -> None:
        self.tokenizer = CharTokenizer("".join(sorted(set(data))))
        self.data = data
        self.block_size = block_size
        self.vocab_size = self.tokenizer.vocab_size
        self.stoi = {char: index for index, char in enumerate(self.tokenizer.chars)}
        self.itos = dict(enumerate(self.tokenizer.chars))
        self._tokens = torch.from_numpy(self.tokenizer.encode(data))

    def __len__(self) -> int:
        return max(0, len(self._tokens) - self.block_size)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the tokens from an index on and the tokens that follow each, both (T,) int64."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        window = self._tokens[index : index + self.block_size + 1]
        return window[:-1], window[1:]

    def to_tokens(self, message: str, device: torch.device | str) -> Tensor:
        """Return the token ids of a text, (1, T) int64; UserError if a character is unknown."""
        return torch.from_numpy(self.tokenizer.encode(message))[None].to(device)

    def from_tokens(self, tokens: Tensor) -> str:
        """Return the text of token ids, (T,) or (1, T)."""
        return self.tokenizer.decode(tokens.flatten().tolist())
