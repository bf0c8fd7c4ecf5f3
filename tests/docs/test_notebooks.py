"""Notebooks: they run from top to bottom, and their saved output is current and clean.

To save new output: ``HF_HUB_OFFLINE=1 jupyter execute --inplace examples/*.ipynb``.
"""

import re
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from lightning_gpt import UserError, load, parse_train, train
from lightning_gpt.models import GPTModule

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
# Pattern that the output of each notebook must match.
FOUND = {
    "demo": r"^201012 -> 001122\n[\s\S]*^1[78]\d of 182 sorted$",
    "generate": r"^Training a small model instead\.\n[\s\S]*^def main\(",
    "plug_in_a_model": r"^strategy  fsdp[\s\S]*below 0\.001: True$[\s\S]*^bits_per_byte [ \d.]+$",
}


def _read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def _outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def _text(notebook: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in _outputs(notebook)).replace("\r\n", "\n")


def test_notebooks_are_the_known_ones():
    assert {path.stem for path in NOTEBOOKS} == set(FOUND)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_saved_output_is_complete_and_clean(path):
    notebook = _read(path)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run it from top to bottom, then save it"
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(output.output_type == "stream" and output.name == "stdout" for output in _outputs(notebook))
    assert re.search(FOUND[path.stem], _text(notebook), re.MULTILINE)
    raw = path.read_bytes()
    assert raw.isascii() and len(raw) < 20_000
    assert not re.search(rb"(?<![\w.*])/\w|it/s|Warning", raw), "an absolute path, a progress bar, or a warning"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    places = {name: tmp_path / name for name in ("TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "HF_HUB_CACHE")}
    for name, place in places.items():
        place.mkdir()
        monkeypatch.setenv(name, str(place))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # do not download GPT-2
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    before = sorted(EXAMPLES.rglob("*"))
    notebook = _read(path)
    saved = _text(notebook)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": EXAMPLES}})
    client.execute()
    assert re.search(FOUND[path.stem], _text(notebook), re.MULTILINE)
    assert all(output.name == "stdout" for output in _outputs(notebook))
    for line in re.findall(r"^(?:model|steps) .*", _text(notebook), re.MULTILINE):
        assert line in saved, "the saved output is outdated"
    assert sorted(EXAMPLES.rglob("*")) == before
    assert not list(places["TMPDIR"].iterdir())


def test_load_returns_the_trained_weights(tiny_run):
    module, tokenizer = load(tiny_run)
    trained = torch.load(tiny_run / "checkpoints" / "best.ckpt", weights_only=True)
    assert isinstance(module, GPTModule) and not module.training
    assert tokenizer.to_dict() == trained["TokenData"]["tokenizer"]
    assert all(torch.equal(tensor, trained["state_dict"][name]) for name, tensor in module.state_dict().items())
    with pytest.raises(UserError, match="does not exist"):
        load(tiny_run / "no-such-run")


def test_validations_are_printed_without_a_progress_bar(tiny_flags, text_file, tmp_path, capsys):
    flags = [*tiny_flags, f"--data={text_file}", f"--out_dir={tmp_path / 'run'}", "--sample_tokens=0"]
    train(parse_train([*flags, "--trainer.enable_progress_bar=false"]))
    printed = capsys.readouterr()
    assert re.findall(r"^step (\d+): .*val_loss \d\.\d{4}$", printed.out, re.MULTILINE) == ["2", "4"]
    assert "it/s" not in printed.out + printed.err
