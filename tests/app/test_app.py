"""app.py: what its pages show and what their controls change, in Streamlit's own test driver."""

import shutil
import sys

import pytest

import app
from lightning_gpt.app.comparison import Choice, largest_models, points, read_all, relative_to_baseline
from tests.launching import REPO

TABLE = """size,parameters,n_layer,strategy,activation_checkpointing,seconds_per_iteration,\
peak_mib_per_gpu,planned_mib_per_gpu,largest_batch_per_gpu,status
1m,1000000,2,ddp,0,0.5,1024,512,8,ok
1m,1000000,2,deepspeed_stage_2,0,1.0,256,512,16,ok
2m,2000000,4,ddp,0,,,4096,,out of memory
2m,2000000,4,deepspeed_stage_2,0,2.0,512,512,8,ok
1m,1000000,2,ddp,1,1.0,128,64,,ok
"""


@pytest.fixture
def results(tmp_path):
    """Return a folder with a table of strategies, and a broken one."""
    (tmp_path / "own.csv").write_text(TABLE)
    (tmp_path / "broken.csv").write_text(TABLE.replace("1024", "much"))
    return tmp_path


def test_tables_are_compared(results):
    measured, problems = read_all(results)
    assert len(problems) == 1 and "broken.csv" in problems[0]
    chosen = Choice({"own"}, {"ddp", "deepspeed_stage_2"}, checkpointing=False).of(measured)
    assert [(row["strategy"], row["value"]) for row in points(chosen, "peak memory")] == [
        *(("ddp", 1.0), ("ZeRO-2", 0.25), ("ZeRO-2", 0.5))
    ]
    relative = {(row["strategy"], row["quantity"]): row["relative"] for row in relative_to_baseline(chosen, "own: 1m")}
    assert relative[("ZeRO-2", "peak memory")] == 0.25 and relative[("ZeRO-2", "largest batch")] == 2
    assert relative[("ZeRO-2", "throughput")] == 0.5 and relative_to_baseline(chosen, "own: 2m") == []
    largest = {row["strategy"]: (row["size"], row["did not run"]) for row in largest_models(chosen)}
    assert largest == {"ddp": ("1m", "2m: out of memory"), "ZeRO-2": ("2m", "")}
    planned = Choice({"own, planned"}, {"ddp"}, checkpointing=True).of(measured)
    assert [m.peak_gib for m in planned] == [1 / 16]


def test_app_without_streamlit_is_refused(monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "streamlit", None)
    refused(app.main, mentions="pip install -r requirements/app.txt")


def test_pages_in_streamlits_driver(results, tiny_run, tmp_path, monkeypatch):
    testing = pytest.importorskip("streamlit.testing.v1", reason="needs requirements/app.txt")
    shutil.copytree(tiny_run, tmp_path / "runs" / "tiny")
    monkeypatch.setattr(sys, "argv", ["app.py", f"--results={results}", f"--runs={tmp_path / 'runs'}"])
    compare, plan, runs, write = (
        testing.AppTest.from_string(
            f"from lightning_gpt.app import {name}\nfrom lightning_gpt.config.commands import AppOptions\n"
            f"{name}.show(AppOptions(results={str(results)!r}, runs={str(tmp_path / 'runs')!r}))",
            default_timeout=60,
        ).run()
        for name in ("compare", "plan", "runs", "write")
    )
    start = testing.AppTest.from_file(str(REPO / "app.py"), default_timeout=60).run()
    for page in (start, compare, plan, runs, write):
        assert not page.exception
    assert start.title[0].value == "Compare" and len(compare.warning) == 1
    before = len(compare.dataframe[0].value)
    compare.toggle(key="checkpointing").set_value(True).run()
    assert not compare.exception and len(compare.dataframe[0].value) == 2 < before
    plan.number_input(key="gpus").set_value(2)
    plan.multiselect(key="plans").set_value(["fsdp"])
    plan.button[0].click().run()
    assert not plan.exception and list(plan.dataframe[0].value["strategy"]) == ["fsdp"]
    assert "--on=h100:2x1" in plan.code[-1].value and "peak" in plan.code[0].value
    at_first = plan.dataframe[0].value.iloc[0]
    plan.selectbox(key="card").set_value("4090")
    plan.number_input(key="price").set_value(0.5)
    plan.number_input(key="max_steps").set_value(1_000_000)
    plan.button[0].click().run()
    later = plan.dataframe[0].value.iloc[0]
    assert not plan.exception and "--on=4090:2x1" in plan.code[-1].value
    assert later["ms per step"] > 3 * at_first["ms per step"]
    assert later["price"] == pytest.approx(later["hours"] * 2 * 0.5, rel=0.01) and "price" not in at_first
    assert later["kWh"] == pytest.approx(later["hours"] * 2 * 0.45, rel=0.01)
    assert list(runs.dataframe[0].value["run"]) == ["tiny"] and runs.dataframe[0].value["step"][0] == 4
    write.text_area(key="prompt").set_value("the cat")
    write.number_input(key="max_new_tokens").set_value(5)
    write.button[0].click().run()
    assert not write.exception and not write.error
    assert write.code[0].value.startswith("the cat") and len(write.code[0].value) == 12
    write.text_input(key="path").set_value("nowhere")
    write.button[0].click().run()
    assert "nowhere" in write.error[0].value
