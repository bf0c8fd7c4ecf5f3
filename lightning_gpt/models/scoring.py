"""What a validation adds up: exact sums over batches and ranks, divided once."""

from collections.abc import Callable

import torch
from torch import Tensor


def count_right(logits: Tensor, targets: Tensor) -> Tensor:
    """How many answers the likeliest token after each true one makes up, and how many answers there are.

    That is exactly how many answers greedy generation gets right. As long as it agrees with the true answer its inputs
    are those of this forward pass, and where it first disagrees the answer is wrong in both.

    Args:
        logits: (B, T, vocab_size).
        targets: (B, T) int64, -1 where no answer is asked for; a row of nothing else is no question.

    Returns:
        Right answers and answers, shape (2,), int64.
    """
    asked = targets != -1
    questions = asked.any(dim=1)
    right = ((logits.argmax(dim=-1) == targets) | ~asked).all(dim=1) & questions
    return torch.stack([right.sum(), questions.sum()])


class ScoreSums:
    """The sums of one rank. They stay on its device, so that no batch waits for them.

    Args:
        device: Where the model computes.
        has_answers: Whether a sequence is a question whose answer is right or wrong.
        padding: How many tokens at the end of the vocabulary are never sampled.
    """

    def __init__(self, device: torch.device, *, has_answers: bool, padding: int) -> None:
        self.has_answers = has_answers
        self.padding = padding
        # Loss, tokens scored, right answers, answers. Apple's devices have no float64.
        self._sums = torch.zeros(4, dtype=torch.float64, device="cpu" if device.type == "mps" else device)

    def add(self, logits: Tensor, loss: Tensor, targets: Tensor) -> None:
        """Adds a batch: logits (B, T, vocab_size), and the mean loss over the targets (B, T) that are not -1."""
        device = self._sums.device
        loss, scored = loss.to(device), (targets != -1).sum().to(device)
        # A batch of padding alone has no loss.
        total = torch.where(scored > 0, loss.double() * scored, 0.0)
        self._sums[:2] += torch.stack([total, scored.double()])
        if self.has_answers:
            self._sums[2:] += count_right(logits[..., : logits.shape[-1] - self.padding], targets).to(device)

    def result(self, add_ranks: Callable[[Tensor], Tensor]) -> tuple[dict[str, Tensor], int]:
        """What the ranks found together.

        Args:
            add_ranks: Adds a tensor up over all ranks.

        Returns:
            ``val_loss``, nats per token, and of a task ``val_accuracy``, the share of answers that are right as a
            whole; and the number of tokens scored.
        """
        total, scored, right, answers = add_ranks(self._sums)
        found = {"val_loss": (total / scored).float()}
        if self.has_answers:
            found["val_accuracy"] = (right / answers).float()
        return found, int(scored)
