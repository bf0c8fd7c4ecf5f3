"""The Compare page: strategies by memory, largest batch and speed."""

from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from lightning_gpt.app.comparison import (
    BASELINE,
    PLANNED,
    Choice,
    largest_models,
    points,
    read_all,
    relative_to_baseline,
    short_name,
    sizes,
)
from lightning_gpt.bench.measurements import QUANTITIES, Measurement
from lightning_gpt.config.commands import AppOptions
from lightning_gpt.strategies import STRATEGIES


def show(options: AppOptions) -> None:
    """Draw the page."""
    measured, problems = read_all(Path(options.results))
    for problem in problems:
        st.warning(problem)
    if not measured:
        st.info(f"No table of strategies in {options.results}/ yet: python bench.py strategies --csv FILE writes one.")
        return
    choice = _choose(measured)
    chosen = choice.of(measured)
    quantity = (
        st.segmented_control("Quantity", list(QUANTITIES), default="peak memory", key="quantity") or "peak memory"
    )
    _over_parameters(chosen, quantity)
    st.subheader("Relative to DDP")
    _relative(chosen)
    st.subheader("Largest model")
    _largest(chosen)


def _choose(measured: list[Measurement]) -> Choice:
    """Draw the controls that select measurements."""
    sources = list(dict.fromkeys(m.source for m in measured))
    strategies = list(dict.fromkeys(m.strategy for m in measured))
    left, right = st.columns(2)
    return Choice(
        left.multiselect("Measurements and predictions", sources, default=sources, key="sources"),
        right.multiselect("Strategies", strategies, default=strategies, key="strategies", format_func=short_name),
        st.toggle("Activation checkpointing", key="checkpointing"),
    )


def _over_parameters(chosen: list[Measurement], quantity: str) -> None:
    rows = pd.DataFrame(points(chosen, quantity))
    if rows.empty:
        st.info("The selection has no such measurement.")
        return
    title = QUANTITIES[quantity].title
    of_strategy = alt.Legend(orient="bottom", columns=2, title=None, values=sorted(set(rows["strategy"])))
    of_source = alt.Legend(
        orient="top", columns=1, title=None, labelLimit=300, symbolStrokeColor="gray", symbolStrokeWidth=2
    )
    chart = alt.Chart(rows, height=640).encode(
        x=alt.X("parameters:Q", title="parameters", scale=alt.Scale(type="log"), axis=alt.Axis(format="~s")),
        y=alt.Y("value:Q", title=title, scale=alt.Scale(type="log")),
        color=_color(legend=of_strategy),
        tooltip=["source", "size", "strategy", alt.Tooltip("value:Q", title=title, format=",.4~g")],
    )
    lines = chart.mark_line().encode(strokeDash=alt.StrokeDash("source:N", legend=of_source))
    st.altair_chart(lines + chart.mark_point(size=60).encode(shape=alt.Shape("source:N", legend=of_source)))
    with st.expander("Table"):
        st.dataframe(rows.rename(columns={"value": title}), hide_index=True)


def _relative(chosen: list[Measurement]) -> None:
    with_ddp = [label for label in sizes(chosen) if relative_to_baseline(chosen, label)]
    if not with_ddp:
        st.info(f"The selection has no size that was measured under {BASELINE}.")
        return
    label = st.selectbox("Size", with_ddp, key="size")
    rows = pd.DataFrame(relative_to_baseline(chosen, label))
    bars = (
        alt.Chart(rows)
        .mark_bar()
        .encode(
            x=alt.X("relative:Q", title=f"times {BASELINE}", axis=alt.Axis(format="~g")),
            y=alt.Y("strategy:N", title=None, sort=None, axis=alt.Axis(labelOverlap=False)),
            color=_color(legend=None),
            tooltip=[
                "strategy",
                "quantity",
                alt.Tooltip("value:Q", format=",.4~g"),
                alt.Tooltip("relative:Q", format=".2f"),
            ],
        )
    )
    for quantity, column in zip(QUANTITIES, st.columns(len(QUANTITIES)), strict=True):
        mine = rows[rows["quantity"] == quantity]
        if mine.empty:
            column.caption(f"{quantity}: not measured")
        else:
            column.altair_chart(
                bars.properties(data=mine, title=QUANTITIES[quantity].title, height=70 + 28 * len(mine))
            )


def _largest(chosen: list[Measurement]) -> None:
    rows = pd.DataFrame(largest_models([m for m in chosen if not m.source.endswith(PLANNED)]))
    if rows.empty:
        st.info("The selection has no measurement.")
        return
    for source, mine in rows.groupby("source", sort=False):
        bars = (
            alt.Chart(mine, title=str(source), height=70 + 28 * len(mine))
            .mark_bar()
            .encode(
                x=alt.X("parameters:Q", title="parameters of the largest model that ran", axis=alt.Axis(format="~s")),
                y=alt.Y("strategy:N", title=None, sort="-x", axis=alt.Axis(labelOverlap=False)),
                color=_color(legend=None),
                tooltip=["strategy", "size", "did not run"],
            )
        )
        st.altair_chart(bars)


def _color(**options: Any) -> alt.Color:
    """Return the colours of strategies, the same in all charts."""
    return alt.Color("strategy:N", scale=alt.Scale(domain=[short_name(name) for name in STRATEGIES]), **options)
