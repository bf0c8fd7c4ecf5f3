"""Validation scores: exact sums over batches and ranks, divided once at the end."""

from collections.abc import Callable

import torch
from torch import Tensor


def count_right(logits: Tensor, targets: Tensor) -> Tensor:
    """Count answers that match exactly under teacher forcing, and all answers.

    Greedy generation gets exactly these answers right: as long as it agrees with the true answer it reads the same
    inputs as this forward pass, and after the first difference the answer is wrong in both.

    Args:
        logits: (B, T, vocab_size).
        targets: (B, T) int64, -1 outside of the answer; a row of only -1 is not counted.

    Returns:
        Correct answers and all answers, shape (2,), int64.
    """
    asked = targets != -1
    questions = asked.any(dim=1)
    right = ((logits.argmax(dim=-1) == targets) | ~asked).all(dim=1) & questions
    return torch.stack([right.sum(), questions.sum()])


class ScoreSums:
    """Validation sums of one rank, kept on its device, so that no batch waits for it.

    Args:
        device: The model's device.
        has_answers: Whether each sequence is a question whose answer is right or wrong as a whole.
        padding: Number of tokens at the end of the vocabulary that are never sampled.
    """

    def __init__(self, device: torch.device, *, has_answers: bool, padding: int) -> None:
        self.has_answers = has_answers
        self.padding = padding
        # Loss, scored tokens, correct answers, answers. Apple's devices have no float64.
        self._sums = torch.zeros(4, dtype=torch.float64, device="cpu" if device.type == "mps" else device)

    def add(self, logits: Tensor | None, loss: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            logits: (B, T, vocab_size); needed for answers only.
            loss: Mean loss over the targets that are not -1.
            targets: (B, T) int64.
        """
        device = self._sums.device
        loss, scored = loss.to(device), (targets != -1).sum().to(device)
        # The loss of a batch of only padding is NaN.
        total = torch.where(scored > 0, loss.double() * scored, 0.0)
        self._sums[:2] += torch.stack([total, scored.double()])
        if self.has_answers:
            assert logits is not None
            self._sums[2:] += count_right(logits[..., : logits.shape[-1] - self.padding], targets).to(device)

    def result(self, add_ranks: Callable[[Tensor], Tensor]) -> tuple[dict[str, Tensor], int]:
        """Return the scores over all ranks.

        Args:
            add_ranks: Sums a tensor over all ranks.

        Returns:
            ``val_loss`` in nats per token, for a task also ``val_accuracy``, the fraction of answers that are entirely
            right; and the number of scored tokens.
        """
        total, scored, right, answers = add_ranks(self._sums)
        found = {"val_loss": (total / scored).float()}
        if self.has_answers:
            found["val_accuracy"] = (right / answers).float()
        return found, int(scored)
