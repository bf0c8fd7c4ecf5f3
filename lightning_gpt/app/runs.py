"""The Runs page: loss curves of runs side by side, also while they train."""

from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from lightning_gpt.config.commands import AppOptions
from lightning_gpt.training.summary import SUMMARY, read_summary

_SHOWN = 5  # newest runs that are shown at first
_LIVE_SECONDS = 2
_COLUMNS = (
    "status",
    "step",
    "max_steps",
    "train_loss",
    "val_loss",
    "best_val_loss",
    "tokens_per_second",
    "peak_memory_mib",
    "parameters",
    "implementation",
    "strategy",
    "devices",
    "precision",
    "optimizer",
    "learning_rate",
    "command",
)


def show(options: AppOptions) -> None:
    """Draw the page."""
    live = st.toggle("Live", value=True, key="live", help=f"Read the runs again every {_LIVE_SECONDS} seconds.")
    st.fragment(_runs, run_every=_LIVE_SECONDS if live else None)(Path(options.runs))


def _runs(folder: Path) -> None:
    """Draw what changes while runs train."""
    found = read_runs(folder)
    if not found:
        st.info(f"No run with a {SUMMARY} in {folder}/ yet: python train.py starts one.")
        return
    names = list(found)
    left, right = st.columns(2)
    chosen = left.multiselect("Runs", names, names[:_SHOWN], key="runs")
    by = right.segmented_control("Over", ["step", "seconds"], default="step", key="over") or "step"
    log = st.toggle("Logarithmic loss", key="log")
    rows = pd.DataFrame([row for name in chosen for row in points(name, found[name])])
    if rows.empty:
        st.info("The selected runs have no losses yet.")
    else:
        _chart(rows, by=by, log=log)
    st.dataframe([{"run": name} | {c: found[name].get(c) for c in _COLUMNS} for name in chosen], hide_index=True)


def read_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the run.json of each run in a folder by name, the latest first."""
    files = sorted(folder.glob(f"*/{SUMMARY}"), key=lambda file: file.stat().st_mtime, reverse=True)
    return {file.parent.name: content for file in files if (content := read_summary(file))}


def points(name: str, run: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each finite point of a run's loss curves."""
    rows = []
    for curve, columns in run.get("curves", {}).items():
        for step, loss, seconds in zip(columns["step"], columns["loss"], columns["seconds"], strict=True):
            if loss is not None:
                rows.append({"run": name, "curve": curve, "step": step, "seconds": seconds, "loss": loss})
    return rows


def _chart(rows: pd.DataFrame, *, by: str, log: bool) -> None:
    below: dict[str, Any] = {"orient": "bottom", "title": None}
    lines = (
        alt.Chart(rows, height=420)
        .mark_line()
        .encode(
            x=alt.X(f"{by}:Q", title="optimizer step" if by == "step" else "seconds of training"),
            y=alt.Y(
                "loss:Q", title="loss, nats per token", scale=alt.Scale(type="log" if log else "linear", zero=False)
            ),
            color=alt.Color("run:N", legend=alt.Legend(columns=1, labelLimit=300, **below)),
            strokeDash=alt.StrokeDash(
                "curve:N",
                scale=alt.Scale(domain=["train", "validation"], range=[[2, 3], [1, 0]]),
                legend=alt.Legend(symbolType="stroke", **below),
            ),
            tooltip=[
                "run",
                "curve",
                "step",
                alt.Tooltip("seconds:Q", format=",.1f"),
                alt.Tooltip("loss:Q", format=".4f"),
            ],
        )
    )
    st.altair_chart(lines)
