"""A text, the flags of a run of seconds, and one such run that several tests look at."""

import random
from pathlib import Path

import pytest

_TINY = (
    "--n_layer=1 --n_head=1 --n_embd=16 --block_size=16 --batch_size=4 --max_steps=4 --eval_interval=2 --logger=none"
    " --accelerator=cpu --sample_tokens=8"
)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Tokens, and what DeepSpeed compiles, are kept in folders of this session, never in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_GPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        yield


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """A few kB of ASCII words in lines, the same every time."""
    draw = random.Random(0)
    words = "the cat sat on a mat and saw one dog run by under its blue moon".split()
    lines = (" ".join(draw.choices(words, k=8)) for _ in range(150))
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(lines) + "\n", encoding="ascii")
    return file


@pytest.fixture(scope="session")
def byte_level_file(tmp_path_factory, text_file) -> Path:
    """A Hugging Face tokenizer.json of 300 tokens, learnt on ``text_file`` and on white space, with <|endoftext|>."""
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
    """Flags of a run of four steps of a tiny model on the CPU; what is given after them counts."""
    return _TINY.split()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, text_file, tiny_flags) -> Path:
    """The folder of one finished run of ``tiny_flags`` on ``text_file``; look, do not write."""
    import train

    out_dir = tmp_path_factory.mktemp("runs") / "tiny"
    train.main([*tiny_flags, f"--data={text_file}", f"--out_dir={out_dir}"])
    return out_dir
