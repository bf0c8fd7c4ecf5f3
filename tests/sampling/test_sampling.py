"""sample.py: prompts from all sources, stdout with nothing but text, whole characters, and stop strings."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
from lightning_gpt import GPTModule
from lightning_gpt.checkpoint import find_checkpoint, open_checkpoint
from lightning_gpt.config import UserError
from lightning_gpt.implementations.generation import GenerationSettings
from lightning_gpt.sampling import GrowingText, stream_text
from lightning_gpt.tokenizers import ByteTokenizer, GPT2Tokenizer
from tests.launching import run_python

TEXT = "na\u00efve \u4f60\u597d \U0001f600 end"


def feed_tokens(tokens, *, stop=(), tokenizer=None):
    """Feed tokens to a GrowingText; return the piece after each token, and the rest."""
    text = GrowingText(tokenizer or ByteTokenizer(), stop=stop)
    pieces = []
    for token in tokens:
        over = text.add(token)
        pieces.append(text.take())
        if over:
            break
    return pieces, text.end()


@pytest.mark.parametrize("name", ["byte", pytest.param("gpt2", marks=pytest.mark.tables)])
def test_pieces_are_whole_characters(name):
    tokenizer = {"byte": ByteTokenizer, "gpt2": GPT2Tokenizer}[name]()
    try:
        tokens = tokenizer.encode(TEXT).tolist()
    except UserError as error:
        pytest.skip(str(error))
    pieces, rest = feed_tokens(tokens, tokenizer=tokenizer)
    assert "".join(pieces) == TEXT and rest == ""
    # Incomplete characters are held back; all others are released at once.
    assert len(pieces) > len([piece for piece in pieces if piece]) > 5


def test_pieces_of_invalid_utf8_add_up_to_the_decoded_text():
    draw = np.random.default_rng(0)
    leads = np.frombuffer(b"a\xe4\xbd\xa0\xf0\x9f\x98\x80\xc3\xff\xed\xa0", dtype=np.uint8)
    for _ in range(300):
        tokens = draw.choice(leads, size=12).tolist()
        pieces, rest = feed_tokens(tokens)
        assert "".join(pieces) + rest == ByteTokenizer().decode(tokens)
        held = [len("".join(pieces[: n + 1])) for n in range(12)]
        whole = [len(ByteTokenizer().decode(tokens[: n + 1])) for n in range(12)]
        assert all(w - h <= 1 for h, w in zip(held, whole, strict=True))  # at most one character is held back


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "ne t"], "o"),
        ("aaab", ["aab"], "a"),
        ("abcabd", ["abd"], "abc"),
        ("abcab", ["abd"], "abcab"),
        ("na\u00efve", ["\u00efv"], "na"),
        ("begin", ["begin"], ""),
        ("xyz", ["z", "yz"], "x"),
    ],
)
def test_text_ends_before_a_stop_string(text, stop, expected):
    pieces, rest = feed_tokens(text.encode(), stop=stop)
    assert "".join(pieces) + rest == expected
    # Released text is never withdrawn.
    assert all(expected.startswith("".join(pieces[: n + 1])) for n in range(len(pieces)))


@pytest.fixture(scope="module")
def trained(tiny_run):
    """Return the module and the tokenizer of the tiny run."""
    checkpoint = open_checkpoint(find_checkpoint(str(tiny_run), which="best"))
    return checkpoint.module().eval(), checkpoint.tokenizer


def test_streamed_rows_add_up_to_the_whole_texts(trained):
    module, tokenizer = trained
    prompts = [tokenizer.encode(prompt).tolist() for prompt in ("the cat", "a", "on a mat and under the moon")]
    settings = GenerationSettings(max_new_tokens=40, seed=2)
    tokens = [[], [], []]
    for step in module.stream_tokens(prompts, settings):
        for row, token in step:
            tokens[row].append(token)
    whole = [tokenizer.decode(row) for row in tokens]
    stop = [whole[0][20:23]]
    for stops, expected in (([], whole), (stop, [text.partition(stop[0])[0] for text in whole])):
        texts, ended = ["", "", ""], []
        for row, piece, taken in stream_text(module, tokenizer, prompts, settings, stop=stops):
            assert row not in ended
            texts[row] += piece
            ended += [row] if taken < 0 else []
        assert texts == expected and sorted(ended) == [0, 1, 2]


@pytest.fixture
def run_sample(tiny_run, capsys, monkeypatch):
    """Return a function that runs sample.py on the tiny run, and returns stdout and stderr."""

    def run_sample(*flags, stdin="", terminal=False):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        monkeypatch.setattr("sys.stdin.isatty", lambda: terminal, raising=False)
        sample.main([f"--checkpoint={tiny_run}", "--accelerator=cpu", "--max_new_tokens=20", *flags])
        return capsys.readouterr()

    return run_sample


def test_stdout_has_the_text_and_stderr_the_speed(run_sample):
    out, err = run_sample("--prompt=the cat")
    assert out.startswith("the cat") and len(out) == 7 + 20 + 1
    assert err.startswith("20 tokens in ") and err.endswith(" tokens/s\n") and err.count("\n") == 1


def test_prompt_sources_give_the_same_text(run_sample, tmp_path):
    out, _ = run_sample("--prompt=a mat\n")
    (tmp_path / "prompt.txt").write_text("a mat\n")
    assert run_sample(f"--prompt_file={tmp_path / 'prompt.txt'}").out == out
    assert run_sample(stdin="a mat\n").out == run_sample("--prompt_file=-", stdin="a mat\n").out == out
    nothing = run_sample().out
    assert nothing == run_sample(terminal=True, stdin="not read").out == run_sample("--prompt=\n").out


def test_text_is_unchanged_by_streaming_and_init_from(run_sample, tiny_run):
    flags = ["--prompt=the", "--num_samples=3", "--stop= c", "--stop", "\n"]
    out, err = run_sample(*flags)
    assert out == run_sample(*flags, "--stream").out and out.count("\n") == 3
    assert out == run_sample(*flags, f"--init_from={tiny_run}").out
    assert " c" not in out


def test_batched_samples_equal_single_samples(run_sample):
    together = run_sample("--prompt=the", "--num_samples=3", "--seed=7", "--stop=\n").out.splitlines()
    alone = [run_sample("--prompt=the", f"--seed={7 + n}", "--stop=\n").out.splitlines()[0] for n in range(3)]
    assert together == alone and len(set(alone)) == 3
    greedy = run_sample("--prompt=the", "--num_samples=2", "--greedy", "--stop=\n").out.splitlines()
    assert greedy[0] == greedy[1] == run_sample("--prompt=the", "--top_k=1", "--stop=\n").out.splitlines()[0]


def test_interactive_continues_after_a_mistake(run_sample):
    out, err = run_sample("--interactive", "--stop=\n", stdin="the cat\n\ncat\u00e9\non a")
    first, second = out.splitlines()
    assert first == run_sample("--prompt=the cat", "--stop=\n").out.splitlines()[0]
    assert second.startswith("on a")
    assert err.count("> ") == 5 and err.count("error: ") == 2 and "U+00E9" in err and "tokens/s" in err


@pytest.mark.parametrize(
    ("stdin", "mentions"),
    [
        (None, "which is closed"),
        (io.TextIOWrapper(io.BufferedWriter(io.BytesIO())), "which is closed"),  # write-only, as under nohup
        (io.TextIOWrapper(io.BytesIO(b"a\xff\n"), encoding="utf-8"), "not UTF-8"),
    ],
)
def test_interactive_with_unreadable_stdin_is_refused(tiny_run, monkeypatch, capsys, stdin, mentions):
    monkeypatch.setattr("sys.stdin", stdin)
    with pytest.raises(SystemExit) as stop:
        sample.main([f"--checkpoint={tiny_run}", "--accelerator=cpu", "--interactive"])
    assert stop.value.code == 2 and mentions in capsys.readouterr().err


def test_open_stdin_warns_and_closed_stdout_is_no_error(tiny_run):
    command = [sys.executable, "sample.py", f"--checkpoint={tiny_run}", "--accelerator=cpu", "--stream"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, cwd=Path(sample.__file__).parent, **pipes) as process:
        assert process.stderr.readline().startswith(b"waiting for a prompt on stdin")
        process.stdout.close()
        process.stdin.write(b"the")
        process.stdin.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


def test_sampling_options_reach_the_model(run_sample):
    flags = ["--prompt=the", "--greedy"]
    assert run_sample(*flags, "--repetition_penalty=5").out != run_sample(*flags).out
    assert run_sample("--prompt=the", "--top_p=1e-9").out == run_sample(*flags).out
    assert len(run_sample(*flags, "--precision=bf16").out) == 3 + 20 + 1


@pytest.mark.parametrize(
    ("flags", "mentions"),
    [
        (["--prompt=a", "--prompt_file=b"], "--prompt and --prompt_file"),
        (["--prompt=a", "--interactive"], "--prompt and --interactive"),
        (["--prompt_file=nowhere.txt"], "--prompt_file nowhere.txt: No such file"),
        (["--prompt_file=-"], "--prompt is empty"),
        (["--prompt=a", "--stop="], "--stop is empty"),
        (["--prompt=a", "--top_p=0"], "--top_p 0"),
        (["--prompt=a", "--repetition_penalty=0"], "--repetition_penalty 0"),
        (["--prompt=a", "--precision=16"], "--precision 16 needs a GPU"),
        (["--prompt=a", "--compile=fast"], "--compile fast is unknown; choose dynamo"),
    ],
)
def test_wrong_options_are_refused(run_sample, capsys, flags, mentions):
    with pytest.raises(SystemExit) as stop:
        run_sample(*flags)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and mentions in err


@pytest.mark.slow
def test_final_sample_of_a_sharded_run_equals_its_checkpoint(tmp_path, text_file, tiny_flags, capsys):
    """Compare the final sample of two FSDP ranks, which hold shards, with a sample from the checkpoint."""
    train = Path(sample.__file__).with_name("train.py")
    flags = [f"--data={text_file}", "--strategy=fsdp", "--devices=2", "--sample_tokens=40", "--prompt=the cat"]
    done = run_python(train, *tiny_flags, *flags, f"--out_dir={tmp_path / 'run'}", ranks=2)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.partition("--- sample ---\n")[2].partition("\n------")[0]
    flags = ["--which=last", "--prompt=the cat", "--max_new_tokens=40", "--temperature=0.8", "--top_k=200"]
    sample.main([f"--checkpoint={tmp_path / 'run'}", *flags])
    assert capsys.readouterr().out == printed + "\n" and len(printed) == 7 + 40


def test_generate_is_not_compiled_by_the_training_setting(monkeypatch):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    module = GPTModule(
        "nanogpt", model_config={"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 9, "block_size": 8}
    )
    module.compile_setting = "eager"
    for block in module.model.transformer.h:
        block.compile(backend=backend)
    module.eval().generate(torch.zeros(1, 1, dtype=torch.long), 12, do_sample=False)
    assert not compiled
