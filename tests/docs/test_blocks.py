"""Run every shell and Python block of the README and the manual.

A block runs in a fresh folder that looks like a clone in use: with texts, a few runs, and the files that the manual
tells the reader to write. RULES append flags that make its commands short. Commands that need a GPU, another machine or
a download are only parsed. A command without a rule fails.
"""

import ast
import contextlib
import gzip
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
DOCUMENTS = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]

SHORT = (
    " --batch_size=2 --max_steps=2 --eval_interval=2 --eval_batches=1 --sample_tokens=8 --logger=none --accelerator=cpu"
)
TINY = f" --n_layer=1 --n_head=1 --n_embd=16 --block_size=16{SHORT}"
CONTINUED = f"{SHORT} --max_steps=5 --eval_interval=1"
EVALUATED = " --eval_batches=1 --batch_size=2 --accelerator=cpu"
SAMPLED = " --max_new_tokens=4 --accelerator=cpu"


@dataclass(frozen=True)
class Rule:
    """What to do with a command.

    Attributes:
        pattern: Regular expression that is searched in the command; the first rule that matches counts.
        flags: Flags to append.
        how: "run" in this process, "process" for commands that start several processes, "parse" to check flags only,
            or "skip" for programs of others.
        slow: Whether running the block is a slow test.
    """

    pattern: str
    flags: str = ""
    how: str = "run"
    slow: bool = False


RULES = (
    Rule(r"^(python3 -m venv|\. \.venv/bin/activate$|ruff check|mypy|mkdocs build|python -m pytest)", how="skip"),
    Rule(r"^pip install", how="skip"),  # test_files_to_install_exist
    Rule(r"--help|--print_config"),
    Rule(r"bench.py plan", how="parse"),  # takes a minute; tests/bench/test_plan.py plans some of the rows
    # downloads
    Rule(r"openwebtext|train_gpt2|eval_gpt2|--lm_eval", how="parse"),
    Rule(r"^python prepare\.py shakespeare", how="parse"),
    # GPUs and other machines
    Rule(r"^srun|--nproc_per_node=8|--gpus 1 ", how="parse"),
    # several processes
    Rule(r"^torchrun", TINY, how="process", slow=True),
    Rule(r"^python evaluate\.py .*--devices 2", EVALUATED, how="process", slow=True),
    Rule(r"--resume .*--devices 2", CONTINUED, how="process", slow=True),
    Rule(r"--(n_embd 3072|config configs/mingpt_).*--dry_run", slow=True),
    Rule(r"--dry_run"),
    Rule(r"--devices 2", TINY, how="process", slow=True),
    # models that bring their sizes, or have none
    Rule(r"--decay_from", " --eval_batches=1 --sample_tokens=8 --logger=none --accelerator=cpu"),
    Rule(r"--resume auto", TINY),
    Rule(r"--resume", CONTINUED),
    Rule(r"^python train\.py --init_from", f"{SHORT} --block_size=16"),
    Rule(r"--pretrained_embeddings", f"{TINY} --tokenizer=byte"),
    Rule(r"--implementation my_model", f"{SHORT} --block_size=16 --width=8"),
    Rule(r"--implementation my_llama", f"{SHORT} --block_size=16 --n_layer=1 --n_embd=16"),
    Rule(r"--data my_task|configs/(adder|sort)", f" --n_layer=1 --n_head=1 --n_embd=16{SHORT}"),
    Rule(r"^python train\.py", TINY),
    Rule(r"^python evaluate\.py .*--(convert_only|export)"),
    Rule(r"^python evaluate\.py", EVALUATED),
    Rule(r"^python sample\.py .*--compile", SAMPLED, slow=True),
    Rule(r"^python sample\.py", SAMPLED),
    Rule(r"^python prepare\.py"),
    # measurements; tests/bench runs the others
    Rule(r"bench\.py tax", " --rounds=1 --steps=1 --threads=1", slow=True),
    Rule(r"bench\.py time_to_loss", " --seeds=1 --steps=8 --rows=nanogpt-published --threads=1", slow=True),
    Rule(r"bench\.py prepare", " --rounds=1 --megabytes=1", slow=True),
    Rule(r"^python app\.py", how="parse"),
    Rule(r"bench\.py (parity|generate|reliability|report|strategies)", how="parse"),
)
PROMPTS = "0123456789 O God, O God! def The answer is once upon"  # char tokenizers must know these characters
TABLES = r"--tokenizer gpt2|bench\.py prepare"  # commands that need tiktoken's tables
# How Python blocks are shortened.
SHORTER = {"max_steps=100": "max_steps=2", '"300"': '"2", "--eval_batches", "1"'}


@dataclass(frozen=True)
class Block:
    """A fenced block of a document, and the line where it starts."""

    document: Path
    line: int
    language: str
    text: str

    def commands(self) -> list[str]:
        """Return the shell commands, with comments removed and continued lines joined; a pipe is one command."""
        lines = self.text.replace("\\\n", " ").splitlines()
        words = [shlex.join(shlex.split(line, comments=True)) for line in lines]
        return [part for line in words if line for part in line.replace("'|'", "|").split(" '&&' ")]

    @property
    def file_name(self) -> str | None:
        """Return the file name in the first line, if the reader is to write the block to a file."""
        found = re.match(r"# (\w+\.py)\n", self.text)
        return found and found[1]


def _read(document: Path) -> list[Block]:
    content = document.read_text(encoding="ascii")
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", content, re.MULTILINE | re.DOTALL)
    return [Block(document, content[: f.start()].count("\n") + 1, *f.groups()) for f in fences]


# Each distinct block once, at its first place.
BLOCKS: list[Block] = []
for _block in itertools.chain.from_iterable(map(_read, DOCUMENTS)):
    if _block.text not in {known.text for known in BLOCKS}:
        BLOCKS.append(_block)
SHELL = [block for block in BLOCKS if block.language == "bash"]
PYTHON = [block for block in BLOCKS if block.language == "python"]
FILES = [block for block in PYTHON if block.file_name]


def _name(block: Block) -> str:
    return f"{block.document.name}-{block.line}"


def _rule(command: str) -> Rule | None:
    command = command.rpartition(" | ")[2]
    return next((rule for rule in RULES if re.search(rule.pattern, command)), None)


def _is_slow(block: Block) -> bool:
    return any(rule.slow for rule in map(_rule, block.commands()) if rule)


def _program(command: str) -> tuple[str, list[str]]:
    """Return the entry point that a command calls, and its flags."""
    words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[place].removesuffix(".py"), words[place + 1 :]


@pytest.fixture(scope="module")
def template(tmp_path_factory, text_file, tiny_flags) -> Path:
    """Build a clone in use: small substitutes for all files that the documents name."""
    import evaluate
    import prepare
    import train

    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "results", "requirements"):
        shutil.copytree(REPO / name, folder / name)
    for name in ("my.txt", "tinyshakespeare.txt", "my_texts/a.txt", "texts/a.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text_file.read_text(encoding="ascii") + f"{PROMPTS}\n" * 20, encoding="ascii")
    with gzip.open(folder / "more.jsonl.gz", "wt", encoding="ascii") as file:
        file.write('{"text": "the cat sat on a mat"}\n' * 40)
    for block in FILES:
        (folder / block.file_name).write_text(block.text, encoding="ascii")
    with contextlib.chdir(folder):
        for name in ("NAME", "A", "B"):
            flags = ["--implementation=nanogpt", "--block_size=64", "--data=my.txt", f"--out_dir=runs/{name}"]
            train.main([*tiny_flags, *flags, "--schedule=wsd", "--decay_fraction=0"])  # --decay_from needs a stable run
        prepare.main(["my.txt", "--tokenizer=char", "--out=data/shakespeare_char"])
        # `gpt2` and `PATH` are folders here, so nothing is downloaded.
        flags = "--implementation=nanogpt --block_size=256 --tokenizer=byte --data=my.txt --out_dir=gpt2_run".split()
        train.main([*tiny_flags, *flags])
        evaluate.main(["--checkpoint=gpt2_run", "--export=hf", "--out=gpt2"])
        shutil.copytree("gpt2", "PATH")
        shutil.rmtree("gpt2_run")
    return folder


@pytest.fixture
def clone(template, tmp_path, monkeypatch) -> Path:
    """Copy the template to a fresh working directory."""
    folder = tmp_path / "clone"
    shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield folder
    for block in FILES:
        sys.modules.pop(block.file_name.removesuffix(".py"), None)


def _call(program: str, flags: list[str], monkeypatch, stdin: str = "def \n") -> None:
    """Call an entry point; --help and --print_config exit with 0."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode("ascii"))))
    try:
        import_module(program).main(flags)
    except SystemExit as stop:
        assert stop.code == 0, f"{program}.py {shlex.join(flags)}"


def _parse(command: str, monkeypatch) -> None:
    """Parse the flags of a command, including those of torchrun."""
    if command.startswith("torchrun"):
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args(shlex.split(command)[1:])
    program, flags = _program(command)
    _call(program, [*flags, *([] if "--help" in flags else ["--print_config"])], monkeypatch)


def _run(command: str, rule: Rule, monkeypatch) -> None:
    before, _, command = command.rpartition(" | ")
    stdin = shlex.split(before)[1] if before else "def \n"
    program, flags = _program(command)
    flags += shlex.split(rule.flags)
    if rule.how == "run":
        _call(program, flags, monkeypatch, stdin)
        return
    words = [word if word != f"{program}.py" else str(REPO / word) for word in shlex.split(command)]
    launcher = ["-m", "torch.distributed.run", *words[1:]] if words[0] == "torchrun" else words[1:]
    done = subprocess.run(
        [sys.executable, *launcher, *shlex.split(rule.flags)],
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_block_has_a_rule():
    assert {block.language for block in BLOCKS} == {"bash", "python", "text"}
    for block in SHELL:
        for command in block.commands():
            assert _rule(command), f"{_name(block)}: {command}"


def test_every_rule_is_used():
    commands = [command for block in SHELL for command in block.commands()]
    assert {_rule(command) for command in commands} == set(RULES)


def test_files_to_install_exist():
    text = "".join(document.read_text(encoding="ascii") for document in DOCUMENTS)
    named = set(re.findall(r"pip install\s+-r\s+([\w/.]+\.txt)", text))
    assert named == {path.relative_to(REPO).as_posix() for path in (*REPO.glob("*.txt"), *REPO.glob("requirements/*"))}


@pytest.mark.parametrize("block", SHELL, ids=_name)
def test_flags_of_shell_block_parse(block, clone, monkeypatch, capsys):
    for command in block.commands():
        if _rule(command).how != "skip":
            _parse(command, monkeypatch)


@pytest.mark.parametrize(
    "block",
    [pytest.param(block, marks=[pytest.mark.slow] if _is_slow(block) else [], id=_name(block)) for block in SHELL],
)
def test_shell_block_runs(block, clone, monkeypatch, capsys):
    if re.search(TABLES, block.text) and not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("needs tiktoken's tables in TIKTOKEN_CACHE_DIR")
    for command in block.commands():
        rule = _rule(command)
        if rule.how in ("run", "process"):
            _run(command, rule, monkeypatch)


@pytest.mark.parametrize("block", [block for block in PYTHON if block not in FILES], ids=_name)
def test_python_block_runs(block, clone, capsys):
    if block.text.startswith(" "):  # an excerpt of a longer block
        assert any(block.text in file.text for file in FILES)
        return
    import torch

    text = block.text
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    rows = [(idx, idx) for idx in torch.zeros(2, 64, dtype=torch.int64)]
    exec(compile(text, _name(block), "exec"), {"loader": torch.utils.data.DataLoader(rows, batch_size=2)})


@pytest.mark.parametrize("block", FILES, ids=_name)
def test_file_block_is_used_by_a_command(block):
    ast.parse(block.text)
    assert any(f" {block.file_name.removesuffix('.py')}:" in shell.text for shell in SHELL)


def test_first_run_prints_the_output_in_the_readme(clone, monkeypatch, capsys):
    (shown,) = (block.text for block in BLOCKS if block.language == "text" and block.document.name == "README.md")
    _call("train", [*shlex.split(TINY), "--log_every_n_steps=1", "--trainer.enable_progress_bar=false"], monkeypatch)
    assert _shape(shown) == _shape(capsys.readouterr().out)


def _shape(output: str) -> list[str]:
    """Return the distinct lines of a run's output, with numbers replaced by # and without the sample."""
    output = re.sub(r"(?s)(--- sample ---\n).*?\n(-{14}\n)", r"\1\2", output)
    lines = [re.sub(r"[\d.,/-]*\d[\d.,/-]*", "#", line).strip() for line in output.splitlines() if line.strip()]
    return list(dict.fromkeys(lines))
