"""Shared fixtures: a small text, a tiny run, saved models, exports, and refusals by entry points."""

import os
import random
import re
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # set before torch is imported, so that workers do not compete for cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

_TINY = (
    "--n_layer=1 --n_head=1 --n_embd=16 --block_size=16 --batch_size=4 --max_steps=4 --eval_interval=2 --logger=none"
    " --accelerator=cpu --sample_tokens=8"
)


# Files that one process would take too long for: the tests of each strategy are a group.
_SPLIT = re.compile(r"/(test_strategies|test_parity|test_planning)\.py::.*[\[-](ddp|fsdp|deepspeed_stage_\w+)")
# Groups that start first, in this order, because they take long: the last ones should be short, so that both processes
# end at the same time. The first one compiles DeepSpeed's CPUAdam, on which others would have to wait.
_FIRST = (
    "test_parity deepspeed_stage_2_offload, test_strategies fsdp, test_parity fsdp, test_anywhere, test_strategies, "
    "test_parity, test_planning, test_training, test_formats, test_muon, test_resume, test_compiled_generation, "
    "test_blocks, test_notebooks, test_forms, test_init_from, test_tasks"
).split(", ")


def _group(nodeid: str) -> str:
    """Return the group of a test: its file, or in a split file, its file and strategy."""
    split = _SPLIT.search(nodeid)
    return f"{split[1]} {split[2]}" if split else Path(nodeid.partition("::")[0]).stem


def pytest_configure(config):
    """Hide GPUs, so that the tests are the same on every machine, unless those that need one were chosen."""
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item):
    """Skip what needs a GPU where there is none, or where it is hidden."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU, and -m gpu")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Have one process run all tests of a group, so that it makes the fixtures they share once."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return Groups(config, log)


def pytest_collection_modifyitems(items):
    """Sort the groups, and mark the tests that need GPT-2's tables, so that `-m tables` selects them."""
    for item in items:
        if "gpt2_tables" in item.fixturenames:
            item.add_marker("tables")
    first = len(_FIRST)
    items.sort(key=lambda item: next((i for i in range(first) if _group(item.nodeid).startswith(_FIRST[i])), first))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep tokens and DeepSpeed's compiled extensions in this session's folders, away from the user's.

    TORCH_EXTENSIONS_DIR, if set, is used: compiling the extensions takes over a minute.
    """
    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the parent folder is shared, so that the extensions are compiled once
        session = session.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_GPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        if "TORCH_EXTENSIONS_DIR" not in os.environ:
            patch.setenv("TORCH_EXTENSIONS_DIR", str(session / "extensions"))
        yield


@pytest.fixture(scope="session")
def gpt2_tables(_own_cache):
    """Skip a test where GPT-2's byte-pair tables are neither cached nor downloadable."""
    from lightning_gpt.config import UserError
    from lightning_gpt.tokenizers.tables import load_encoding

    try:
        load_encoding("gpt2")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Write a few kB of ASCII words in lines; the text never changes."""
    draw = random.Random(0)
    words = "the cat sat on a mat and saw one dog run by under its blue moon".split()
    lines = (" ".join(draw.choices(words, k=8)) for _ in range(150))
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(lines) + "\n", encoding="ascii")
    return file


@pytest.fixture(scope="session")
def byte_level_file(tmp_path_factory, text_file) -> Path:
    """Train a Hugging Face tokenizer.json of 300 tokens on `text_file` and white space, with <|endoftext|>."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text_file.read_text(), "\n\n \n\n\n  \n" * 99, " \t\n\n" * 99], trainer)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.fixture(scope="session")
def tiny_flags() -> list[str]:
    """Flags of a four-step run of a tiny model on the CPU; later flags override them."""
    return _TINY.split()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, text_file, tiny_flags) -> Path:
    """Run train.py once with `tiny_flags` on `text_file`, and return its run folder; read-only."""
    import train

    out_dir = tmp_path_factory.mktemp("runs") / "tiny"
    train.main([*tiny_flags, f"--data={text_file}", f"--out_dir={out_dir}"])
    return out_dir


@pytest.fixture
def saved_model(tmp_path):
    """Return a function that saves a checkpoint with random weights; its characters are "abc\\n "."""
    import torch

    from lightning_gpt.models import GPTModule
    from lightning_gpt.tokenizers import CharTokenizer

    char = CharTokenizer("abc\n ")
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 12}

    def save(implementation: str, tokenizer=char, *, dtype=torch.float32, **fields) -> Path:
        vocab_size = (tokenizer.vocab_size if tokenizer else 5) + fields.get("vocab_padding", 0)
        config = ({} if ":" in implementation else sizes) | {"vocab_size": vocab_size, "block_size": 12} | fields
        torch.manual_seed(0)
        module = GPTModule(implementation, model_config=config)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        content = {
            "hyper_parameters": {"implementation": implementation, "model_config": config},
            "global_step": 7,
            "state_dict": {name: tensor.to(dtype) for name, tensor in module.state_dict().items()},
            "TokenData": {"data": "text.txt", "tokenizer": tokenizer and tokenizer.to_dict()},
        }
        torch.save(content, tmp_path / "any.ckpt")
        return tmp_path / "any.ckpt"

    return save


@pytest.fixture
def export(tmp_path, capsys):
    """Return a function that exports a checkpoint and returns the folder and the text on stderr."""
    import evaluate

    def write(checkpoint: Path, form: str, target: Path | None = None) -> tuple[Path, str]:
        folder = target or tmp_path / "out" / form
        capsys.readouterr()
        evaluate.main([f"--checkpoint={checkpoint}", f"--export={form}", f"--out={folder}"])
        out, err = capsys.readouterr()
        assert out == f"{'exported':14}{folder}\n"
        return folder, err

    return write


@pytest.fixture
def refused(capsys):
    """Return a function that calls an entry point, checks for one line of error and exit code 2, and returns it."""

    def call(main, *flags, mentions=()):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(flag) for flag in flags])
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == "" and err.endswith("\n") and "Traceback" not in err, out + err
        *progress, line = err.splitlines()  # other libraries may show progress bars before it
        assert line.startswith("error: ") and all("/s]" in text for text in progress), err
        for text in (mentions,) if isinstance(mentions, str) else mentions:
            assert str(text) in line, line
        return line

    return call


@pytest.fixture
def evaluation_refused(refused):
    """Return a function that calls evaluate.py on the CPU and checks that it refuses."""
    import evaluate

    return lambda *flags, mentions: refused(evaluate.main, *flags, "--accelerator=cpu", mentions=mentions)
