"""strategies/saving.py: checkpoints survive kills, power cuts and copies by hard links."""

import os

import pytest

from lightning_gpt.strategies import saving
from lightning_gpt.strategies.saving import copy_checkpoint


def _tree(path):
    if path.is_file():
        return path.read_text()
    return {str(p.relative_to(path)): p.read_text() for p in path.rglob("*") if p.is_file()}


def _make(path, kind, text):
    if kind == "folder":
        (path / "checkpoint").mkdir(parents=True)
        (path / ".metadata").write_text(text)
        path = path / "checkpoint" / "shard"
    path.write_text(text)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("before", [None, "file", "folder", "same"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_copy_replaces_a_checkpoint_and_outlives_its_source(tmp_path, monkeypatch, kind, before, links):
    def refuses(*args, **kwargs):
        raise PermissionError("no hard links here")

    source, target = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    _make(source, kind, "new")
    if before == "same":
        copy_checkpoint(source, target)
    elif before:
        _make(target, before, "old")
    if not links:
        monkeypatch.setattr(os, "link", refuses)
    copy_checkpoint(source, target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert _tree(target) == _tree(source) and not target.is_symlink()
    files = [source, target] if kind == "file" else [source / ".metadata", target / ".metadata"]
    assert (files[0].stat().st_ino == files[1].stat().st_ino) == links
    kept = _tree(source)
    saving.remove(source)
    assert _tree(target) == kept
