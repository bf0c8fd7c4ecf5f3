"""Run EleutherAI's lm-eval on one of our models, without exporting it.

``TokenScorer`` works on tokens. An adapter implements lm-eval's ``LM`` interface, whose requests are text
(https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/model_guide.md).
"""

import contextlib
import difflib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_gpt.config import UserError
from lightning_gpt.implementations.generation import GenerationSettings, generate_tokens
from lightning_gpt.invocation import install_line
from lightning_gpt.sampling import GrowingText
from lightning_gpt.tokenizers import Tokenizer

if TYPE_CHECKING:
    from lm_eval.api.model import LM


class TokenScorer:
    """Compute log-probabilities of tokens, and generate greedily.

    Args:
        model: A model of any implementation, in eval mode.
        block_size: Context length in tokens.
        batch_size: Number of sequences in a batch.
        device: Device of the model.
        vocab_size: Size of the vocabulary without its padding, which is never chosen.
    """

    def __init__(
        self, model: nn.Module, *, block_size: int, batch_size: int, device: torch.device, vocab_size: int
    ) -> None:
        self.model = model
        self.block_size = block_size
        self.batch_size = batch_size
        self.device = device
        self.vocab_size = vocab_size

    def _logits(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Return the float32 logits (n, V) of the n positions where targets (B, T) are not -1."""
        with torch.no_grad():
            logits, _ = self.model(idx.to(self.device), targets.to(self.device))
        return logits[targets.to(logits.device) != -1].float()

    def continuations(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Score the continuation of each context.

        Args:
            pairs: (context, continuation) as token ids; a context has at least one. If both together are too long, the
                context is cut from the left.

        Returns:
            For each pair the sum of the continuation's log-probabilities in nats, and whether greedy decoding would
            produce it.

        Raises:
            UserError: A continuation alone is too long.
        """
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        by_length = sorted((i for i, pair in enumerate(pairs) if pair[1]), key=lambda i: -sum(map(len, pairs[i])))
        for first in range(0, len(by_length), self.batch_size):
            numbers = by_length[first : first + self.batch_size]
            rows = [(pairs[i][0] + pairs[i][1])[-self.block_size - 1 :] for i in numbers]
            idx = torch.zeros(len(rows), len(rows[0]) - 1, dtype=torch.long)
            targets = torch.full_like(idx, -1)
            for row, i in enumerate(numbers):
                end, n = len(rows[row]) - 1, len(pairs[i][1])
                if n > end:
                    raise UserError(
                        f"--lm_eval: an answer of {n} tokens is longer than the context of {self.block_size}; choose"
                        " other tasks or another model"
                    )
                idx[row, :end] = torch.tensor(rows[row][:-1])
                targets[row, end - n : end] = torch.tensor(pairs[i][1])
            logits = self._logits(idx, targets)
            expected = targets[targets != -1].to(logits.device)
            log_probs = logits.log_softmax(-1).gather(-1, expected[:, None])[:, 0].double()
            is_greedy = logits[:, : self.vocab_size].argmax(-1) == expected
            counts = [len(pairs[i][1]) for i in numbers]
            for i, nats, same in zip(numbers, log_probs.split(counts), is_greedy.split(counts), strict=True):
                scores[i] = (nats.sum().item(), bool(same.all()))
        return scores

    def write(
        self, tokenizer: Tokenizer, prompts: Sequence[list[int]], *, max_new_tokens: int, stop: Sequence[str]
    ) -> list[str]:
        """Generate greedily after each prompt, up to a stop string or the tokenizer's end of text.

        Args:
            tokenizer: The model's tokenizer.
            prompts: Token ids of each prompt, at least one.
            max_new_tokens: Maximum number of new tokens for each prompt.
            stop: Strings that end a text; they are not part of the result.
        """
        texts = [GrowingText(tokenizer, stop=stop) for _ in prompts]
        ends = () if tokenizer.end_of_text is None else (tokenizer.end_of_text,)
        steps = generate_tokens(
            self.model,
            prompts,
            GenerationSettings(max_new_tokens=max_new_tokens, greedy=True, stop_tokens=ends),
            block_size=self.block_size,
            vocab_size=self.vocab_size,
            device=self.device,
            is_over=lambda row, token: texts[row].add(token),
        )
        for _ in steps:
            pass
        return [text.end() for text in texts]


def first_token(tokenizer: Tokenizer) -> int:
    """Return the token that precedes a text without context: end of text if there is one, else a newline.

    Raises:
        UserError: The tokenizer has neither.
    """
    if tokenizer.end_of_text is not None:
        return tokenizer.end_of_text
    with contextlib.suppress(UserError):
        ids = tokenizer.encode("\n").tolist()
        if len(ids) == 1:
            return ids[0]
    raise UserError(f"--lm_eval: the {tokenizer.name} tokenizer has neither an end of text nor a newline to begin with")


def adapter(scorer: TokenScorer, tokenizer: Tokenizer) -> "LM":
    """Wrap a model in lm-eval's interface."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Adapter(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return first_token(tokenizer)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return tokenizer.encode(string).tolist()

        def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
            return scorer.continuations(
                [(context or [self.prefix_token_id], answer) for _, context, answer in requests]
            )

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            pairs: list[tuple[list[int], list[int]]] = []
            ends = []
            for request in requests:
                windows = get_rolling_token_windows(
                    self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=scorer.block_size,
                    context_len=1,
                )
                pairs += map(make_disjoint_window, windows)
                ends.append(len(pairs))
            nats = [value for value, _ in scorer.continuations(pairs)]
            return [sum(nats[start:end]) for start, end in zip([0, *ends], ends, strict=False)]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            written: list[str] = []
            for _, group in itertools.groupby((request.args for request in requests), key=lambda args: str(args[1])):
                alike = list(group)
                for first in range(0, len(alike), scorer.batch_size):
                    contexts = [context for context, _ in alike[first : first + scorer.batch_size]]
                    written += self._write(contexts, alike[0][1])
            return written

        def _write(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
            kwargs = normalize_gen_kwargs(settings)
            if kwargs["do_sample"]:
                raise UserError("--lm_eval: a task asks for sampled answers; only greedy decoding is supported")
            stop = [kwargs["until"]] if isinstance(kwargs["until"], str) else kwargs["until"]
            prompts = [self.tok_encode(context) or [self.prefix_token_id] for context in contexts]
            stop = [text for text in stop if text]
            return scorer.write(tokenizer, prompts, max_new_tokens=kwargs["max_gen_toks"], stop=stop)

    return Adapter()


def harness(lm: Callable[[], "LM"], *, tasks: str, include: str | None) -> tuple[str, dict[str, dict[str, float]]]:
    """Run tasks of lm-eval.

    Args:
        lm: Builds the model; called after the tasks are loaded.
        tasks: Task names, separated by commas.
        include: Folder with further tasks.

    Returns:
        The version of lm-eval, and the values by task and by ``METRIC,FILTER``.

    Raises:
        UserError: lm-eval is not installed, a task is unknown, or its data is not available.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"--lm_eval needs lm-eval, which is not installed ({error}); {install_line('lm_eval')}"
        ) from error
    if include is not None and not Path(include).is_dir():
        raise UserError(f"--lm_eval_include {include} is not a folder")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    manager = TaskManager(include_path=include, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include)  # reads thousands of files
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {near[0]}?" if near else "its documentation lists them"
            raise UserError(f"--lm_eval {name}: lm-eval has no such task; {hint}")
    with _metrics_package(Path(lm_eval.__file__).parent.parent):
        try:
            manager.load(names)
        except Exception as error:  # downloads and the tasks' own code can raise anything
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"--lm_eval {tasks} cannot be loaded: {reason}") from error
        results = lm_eval.simple_evaluate(lm(), tasks=list(names), task_manager=manager, log_samples=False)["results"]
    numbers = {
        task: {k: v for k, v in found.items() if isinstance(v, int | float) and "," in k}
        for task, found in results.items()
    }
    return lm_eval.__version__, numbers


@contextlib.contextmanager
def _metrics_package(site: Path) -> Iterator[None]:
    """Let tasks import Hugging Face's ``evaluate`` package instead of our entry point of the same name."""
    ours = sys.modules.pop("evaluate", None)
    sys.path.insert(0, str(site))
    try:
        yield
    finally:
        sys.path.remove(str(site))
        sys.modules.pop("evaluate", None)
        if ours is not None:
            sys.modules["evaluate"] = ours
