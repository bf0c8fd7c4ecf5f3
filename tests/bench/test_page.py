"""bench.py report: one self-contained page with all results."""

import json
import re
import shutil

import pytest

import bench
from tests.launching import REPO

TABLE = """parameters,n_layer,strategy,activation_checkpointing,seconds_per_iteration,peak_mib_per_gpu,status
227M,2,ddp,0,0.06,5936.42,ok
227M,2,ddp,1,,,out of memory
1.5B,9,"<b>zero",0,0.5,2048,ok
"""


def test_page_shows_every_result_and_loads_nothing(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    results = tmp_path / "results"
    shutil.copytree(REPO / "results", results)
    (results / "own.csv").write_text(TABLE)
    (results / "own.md").write_text("Measured <here>.")
    (results / "other.json").write_text(json.dumps([{"name": "x", "value": {"median": 2.0, "min": 1.0, "max": 4.0}}]))
    (results / "broken.json").write_text("{")
    file = tmp_path / "page.html"
    bench.main(["report", f"--results={results}", f"--out={file}"])
    out, page = capsys.readouterr().out, file.read_text(encoding="utf-8")
    assert "broken.json: " in out and f"{file}: " in out
    for path in results.glob("*.[jc]s*"):
        assert f'<h2 id="{path.name}">' in page
    for text in ("out of memory", "&lt;b&gt;zero", "Measured &lt;here&gt;.", "2 (1 to 4)", "peak memory per GPU, GiB"):
        assert text in page
    assert "<b>zero" not in page and page.count("<svg") >= 2
    assert not re.search(r'(?:src|href)="(?!#)', page) and "<script" not in page and "@import" not in page


def test_page_without_results_is_refused(tmp_path, refused):
    pytest.importorskip("matplotlib")
    refused(bench.main, "report", f"--results={tmp_path}", f"--out={tmp_path / 'x.html'}", mentions="--results")
    refused(bench.main, "report", "--out=nowhere/x.html", mentions="--out nowhere/x.html")
