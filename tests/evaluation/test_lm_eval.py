"""lm-eval: compare the adapter's answers with hand-computed logits and with evaluate.py's own scores."""

import json
import math
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
from lightning_gpt.checkpoint import open_checkpoint
from lightning_gpt.config import UserError
from lightning_gpt.data.tokens.token_files import write_token_files
from lightning_gpt.evaluation.lm_eval import TokenScorer, adapter, first_token
from lightning_gpt.tokenizers import ByteTokenizer, CharTokenizer

HAS_LM_EVAL = find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not HAS_LM_EVAL, reason="lm-eval is not installed")
CHARS = CharTokenizer("abc\n ")  # the tokenizer of `saved_model`; BLOCK is its block size
BLOCK = 12

QUESTIONS = [
    {"question": "abc", "choices": [" a", " bb", " c"], "gold": 1, "text": "abc abc\ncab cab\n" * 3},
    {"question": "cab b", "choices": [" ab", " ac", " b"], "gold": 0, "text": "a" * 24},
    {"question": "bca", "choices": [" bac", " cab", " a"], "gold": 2, "text": "b c b\n"},
]
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
process_docs: !function metrics.unchanged
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
""",
    "tiny_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
""",
    "tiny_words": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
""",
}


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Write three tasks over a local file; one imports Hugging Face's ``evaluate``, named like our script."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    code = "import evaluate\n\nevaluate.load\n\n\ndef unchanged(docs):\n    return docs\n"
    (folder / "metrics.py").write_text(code)
    for name, body in TASKS.items():
        files = (
            f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'rows.jsonl'}\ntest_split: test\n"
        )
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{files}{body.lstrip()}")
    return folder


def scorer_of(checkpoint):
    model = open_checkpoint(checkpoint).module().model.eval()
    return model, TokenScorer(model, block_size=BLOCK, batch_size=4, device=torch.device("cpu"), vocab_size=5)


def by_hand(model, context: list[int], answer: list[int], *, vocab: int = 5) -> tuple[float, bool]:
    """Return the sum of log-probabilities, and whether all tokens are the likeliest; one forward pass per token."""
    total, is_greedy = 0.0, True
    for at, token in enumerate(answer):
        # The whole answer is scored in one window, which ends before its last token.
        window = (context + answer)[:-1][-BLOCK:]
        idx = torch.tensor([window[: len(window) - (len(answer) - 1 - at)]])
        with torch.no_grad():
            logits = model(idx, torch.zeros_like(idx))[0][0, -1].double()
        total += logits.log_softmax(-1)[token].item()
        is_greedy &= int(logits[:vocab].argmax()) == token
    return total, is_greedy


@pytest.mark.parametrize("implementation", ["mingpt", "nanogpt"])
@pytest.mark.parametrize("padding", [0, 3])
def test_continuation_scores_are_sums_of_log_softmax(implementation, padding, saved_model):
    model, scorer = scorer_of(saved_model(implementation, vocab_padding=padding))
    draw = np.random.default_rng(0)
    pairs = [
        (draw.integers(0, 5, n).tolist(), draw.integers(0, 5, m).tolist())
        for n, m in [(1, 1), (3, 2), (9, 4), (20, 3), (1, 12), (2, 0), (14, 12), (5, 1)]
    ]
    idx = torch.tensor([pairs[1][0]])
    pairs.append((pairs[1][0], model.generate(idx, 3, do_sample=False)[0, idx.shape[1] :].tolist()))
    found = scorer.continuations(pairs)
    for pair, (nats, is_greedy) in zip(pairs, found, strict=True):
        expected = by_hand(model, *pair)
        assert nats == pytest.approx(expected[0], rel=1e-5, abs=1e-6) and is_greedy == expected[1]
    assert found[-1][1] and not all(is_greedy for _, is_greedy in found)
    with pytest.raises(UserError, match="13 tokens"):
        scorer.continuations([([1], [1] * 13)])


def test_greedy_flag_ignores_vocabulary_padding():
    logits = torch.tensor([0.0, 0, 0, 1, 0, 2])  # the last one is padding
    scorer = TokenScorer(
        lambda idx, targets: (logits.expand(*idx.shape, -1), None),
        block_size=BLOCK,
        batch_size=4,
        device=torch.device("cpu"),
        vocab_size=5,
    )
    assert [is_greedy for _, is_greedy in scorer.continuations([([0], [3, 3]), ([0], [3, 2])])] == [True, False]


def test_first_token_of_a_text():
    assert first_token(CHARS) == CHARS.encode("\n")[0] and first_token(ByteTokenizer()) == 10
    with pytest.raises(UserError, match="char tokenizer"):
        first_token(CharTokenizer("abc"))


@needs_lm_eval
@pytest.mark.parametrize("text", ["abc abc\ncab cab bcb aabc", "abcab c" * 5])
def test_rolling_loglikelihood_equals_evaluate(text, saved_model, tmp_path):
    """Compare with evaluate.py if the text is a whole number of windows; else the last window has more context."""
    checkpoint = saved_model("mingpt")
    model, scorer = scorer_of(checkpoint)
    nats = adapter(scorer, CHARS).loglikelihood_rolling([SimpleNamespace(args=(text,))])
    tokens = [first_token(CHARS), *CHARS.encode(text).tolist()]
    assert (len(tokens) - 1 == 2 * BLOCK) == text.startswith("abc abc")
    total = 0.0
    for first in range(0, len(tokens) - 1, BLOCK):
        answer = tokens[first + 1 : first + BLOCK + 1]
        total += by_hand(model, tokens[: first + 1] if len(answer) < BLOCK else [tokens[first]], answer)[0]
    assert nats == [pytest.approx(total, rel=1e-5)]
    if len(tokens) - 1 == 2 * BLOCK:
        kept = {"tokenizer": CHARS, "vocab_size": 5, "source": "text"}
        write_token_files(tmp_path / "tokens", train=np.array(tokens), val=np.array(tokens), **kept)
        flags = [f"--checkpoint={checkpoint}", f"--data={tmp_path / 'tokens'}", "--accelerator=cpu"]
        evaluate.main([*flags, f"--json={tmp_path / 'score.json'}"])
        score = json.loads((tmp_path / "score.json").read_text())
        assert -nats[0] == pytest.approx(score["loss"] * 2 * BLOCK, rel=1e-6)


@needs_lm_eval
def test_generate_until_a_stop_string(saved_model):
    model, scorer = scorer_of(saved_model("mingpt"))
    lm = adapter(scorer, CHARS)
    context = "ab cab"
    idx = torch.tensor(CHARS.encode(context))[None]
    text = CHARS.decode(model.generate(idx, 30, do_sample=False)[0, idx.shape[1] :].tolist())
    stop = text[7:9]
    asked = [{"until": [], "max_gen_toks": 30}, {"until": [stop], "max_gen_toks": 30}, {"until": stop}]
    found = lm.generate_until([SimpleNamespace(args=(context, one)) for one in asked])
    assert found == [text, text[: text.index(stop)], text[: text.index(stop)]]
    contexts = ["a", "ab ca", "", "cab" * 5, "b", "c"]  # more than a batch, of several lengths
    together = lm.generate_until([SimpleNamespace(args=(one, asked[0])) for one in contexts])
    assert together == [lm.generate_until([SimpleNamespace(args=(one, asked[0]))])[0] for one in contexts]
    with pytest.raises(UserError, match="sampled"):
        lm.generate_until([SimpleNamespace(args=(context, {"do_sample": True, "temperature": 1.0}))])


@needs_lm_eval
def test_tasks_run_from_the_command_line(saved_model, tasks, tmp_path, capsys):
    checkpoint = saved_model("nanogpt")
    file = tmp_path / "score.json"
    flags = [f"--checkpoint={checkpoint}", f"--lm_eval={','.join(TASKS)}", f"--lm_eval_include={tasks}"]
    evaluate.main([*flags, "--accelerator=cpu", f"--json={file}"])
    found = json.loads(file.read_text())
    model, scorer = scorer_of(checkpoint)
    right = written = 0
    nats = n_bytes = 0
    for row in QUESTIONS:
        context = CHARS.encode(row["question"]).tolist()
        sums = [by_hand(model, context, CHARS.encode(choice).tolist())[0] for choice in row["choices"]]
        right += int(np.argmax(sums) == row["gold"])
        idx = torch.tensor([context])
        text = CHARS.decode(model.generate(idx, 4, do_sample=False)[0, idx.shape[1] :].tolist())
        written += int(text.partition("\n")[0] == row["choices"][row["gold"]])
        nats += adapter(scorer, CHARS).loglikelihood_rolling([SimpleNamespace(args=(row["text"],))])[0]
        n_bytes += len(row["text"])
    assert found["tasks"]["tiny_choice"]["acc,none"] == pytest.approx(right / 3)
    assert found["tasks"]["tiny_words"]["exact_match,none"] == pytest.approx(written / 3)
    assert found["tasks"]["tiny_text"]["bits_per_byte,none"] == pytest.approx(-nats / n_bytes / math.log(2))
    assert found["step"] == 7 and found["block_size"] == BLOCK and found["lm_eval"]
    out = capsys.readouterr().out
    assert f"{found['tasks']['tiny_choice']['acc,none']:.4f}" in out.partition("tiny_choice acc,none")[2].split("\n")[0]

    evaluate.main([f"--checkpoint={checkpoint}", str(checkpoint), *flags[1:], "--lm_eval=tiny_choice"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["checkpoint", "step", "task", "metric", "value"] and len(rows) == 4
    assert sys.modules["evaluate"] is evaluate


@needs_lm_eval
@pytest.mark.parametrize(
    ("flags", "mentions"),
    [
        pytest.param(  # slow: searches all of lm-eval's tasks
            ["--lm_eval=tiny_chioce"], ["tiny_chioce", "did you mean tiny_choice?"], marks=pytest.mark.slow
        ),
        (["--lm_eval=tiny_choice,lost"], ["--lm_eval", "lost.jsonl"]),
        (["--lm_eval=tiny_choice", "--lm_eval_include=nowhere"], ["--lm_eval_include nowhere"]),
        (["--lm_eval=tiny_choice", "--block_size=2"], ["3 tokens", "context of 2"]),
    ],
)
def test_wrong_tasks_are_refused(flags, mentions, saved_model, tasks, evaluation_refused):
    body = (tasks / "tiny_choice.yaml").read_text().replace("tiny_choice", "lost").replace("rows.jsonl", "lost.jsonl")
    (tasks / "lost.yaml").write_text(body)
    evaluation_refused("--checkpoint", saved_model("mingpt"), f"--lm_eval_include={tasks}", *flags, mentions=mentions)


@pytest.mark.parametrize(
    ("flags", "mentions"),
    [
        (["--lm_eval=x", "--stride=2"], ["--lm_eval", "--stride 2"]),
        (["--lm_eval=x", "--data=stdlib"], ["--lm_eval", "--data stdlib"]),
        (["--lm_eval=x", "--devices=2"], ["--lm_eval", "--devices"]),
        (["--lm_eval_include=x"], ["--lm_eval_include x", "--lm_eval"]),
    ],
)
def test_wrong_flags_are_refused(flags, mentions, saved_model, evaluation_refused):
    evaluation_refused("--checkpoint", saved_model("mingpt"), *flags, mentions=mentions)


def test_missing_lm_eval_is_refused(saved_model, evaluation_refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    evaluation_refused("--checkpoint", saved_model("mingpt"), "--lm_eval=x", mentions=["requirements/lm_eval.txt"])
    evaluation_refused(
        "--checkpoint", saved_model("mingpt", None), "--lm_eval=x", mentions=["does not record its tokenizer"]
    )
