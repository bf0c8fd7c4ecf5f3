"""The Plan page: what a run needs under each strategy, before it starts."""

import re
import tempfile
import threading
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from lightning_gpt.app.comparison import short_name
from lightning_gpt.bench.gpu_runs import printed_by_training
from lightning_gpt.bench.strategies import write_tokens
from lightning_gpt.config import UserError
from lightning_gpt.config.commands import AppOptions
from lightning_gpt.implementations.registry import IMPLEMENTATIONS
from lightning_gpt.planning import Machine
from lightning_gpt.strategies import STRATEGIES
from lightning_gpt.strategies.cards import CARDS

_SIZES = ("gpt-mini", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
_PARTS = ("weights", "gradients", "optimizer", "activations", "buffers")
# Numbers in the lines about time and cost, with the words that follow them, and their columns.
_COST = re.compile(r"(?<= )([\d.,]+) (ms per step|tokens/s|hours|kWh|at (?=[\d.]+ per GPU))")
_TITLES = {"ms per step": "ms per step", "tokens/s": "tokens/s", "hours": "hours", "kWh": "kWh", "at ": "price"}
_MEMORY = re.compile(r"^(\w+) +([\d.,]+) (MiB|GiB)", re.MULTILINE)
_planning = threading.Lock()  # the planner replaces functions of torch while it counts, and prints to stdout


def show(options: AppOptions) -> None:
    """Draw the page."""
    with st.form("plan"):
        flags, vocab_size, strategies, machine = _fields()
        st.form_submit_button("Plan", type="primary")
    plans = {}
    with st.spinner("Planning"):
        for strategy in strategies:
            try:
                plans[strategy] = dry_run((*flags, f"--strategy={strategy}"), vocab_size=vocab_size)
            except UserError as error:
                st.warning(f"{strategy}: {error}")
    if not plans:
        st.info("Choose at least one strategy.")
        return
    memory = {name: memory_parts(text) for name, text in plans.items()}
    limit = machine.memory / 2**30
    _chart(memory, limit)
    st.dataframe([_row(name, memory[name], text, limit) for name, text in plans.items()], hide_index=True)
    for strategy, text in plans.items():
        with st.expander(f"{strategy}: all numbers"):
            st.code(text, language=None, wrap_lines=True)
    shown = [*flags, f"--strategy={next(iter(plans))}", "--data=FOLDER_OF_TOKENS", "--dry_run"]
    command = " ".join(["python train.py", *shown])
    st.caption("The same in a terminal:")
    st.code(command, language="bash", wrap_lines=True)


def _fields() -> tuple[tuple[str, ...], int, list[str], Machine]:
    """Draw the form; return flags of train.py, the vocabulary, the strategies, and the machines."""
    first, second, third = st.columns(3)
    flags = {
        "implementation": first.selectbox("Model", list(IMPLEMENTATIONS), key="implementation"),
        "model_type": first.selectbox("Size", _SIZES, index=1, key="model_type"),
        "block_size": first.number_input("Tokens per sequence", 1, 1 << 20, 1024, key="block_size"),
        "batch_size": second.number_input("Sequences per GPU and micro-batch", 1, 1 << 16, 8, key="batch_size"),
        "accumulate_grad_batches": second.number_input("Micro-batches per step", 1, 1 << 16, 1, key="accumulate"),
        "max_steps": second.number_input("Steps", 1, 1 << 40, 10_000, key="max_steps"),
        "precision": third.selectbox("Precision", ["auto", "bf16", "16", "32", "bf16-true"], key="precision"),
    }
    cards = list(CARDS)
    card = third.selectbox("GPU", cards, index=cards.index("h100"), key="card")
    gpus = int(third.number_input("GPUs per machine", 1, 64, 8, key="gpus"))
    nodes = int(third.number_input("Machines", 1, 4096, 1, key="num_nodes"))
    flags["on"] = f"{card}:{gpus}x{nodes}"
    vocab_size = int(first.number_input("Vocabulary", 2, 1 << 20, 50304, key="vocab_size"))
    left, right = st.columns(2)
    names = list(STRATEGIES)
    strategies = left.multiselect(
        "Strategies",
        names,
        ["ddp", "fsdp", "deepspeed_stage_2", "deepspeed_stage_3"],
        format_func=short_name,
        key="plans",
    )
    price = right.number_input("Price of a GPU and hour", 0.0, 1000.0, 0.0, key="price")
    if price:
        flags["price_per_gpu_hour"] = price
    recompute = st.toggle("Activation checkpointing", key="recompute")
    given = [f"--{name}={value}" for name, value in flags.items()]
    return (*given, f"--recompute={str(recompute).lower()}"), vocab_size, strategies, Machine(card, gpus, nodes)


@st.cache_data(show_spinner=False, max_entries=200)
def dry_run(flags: tuple[str, ...], *, vocab_size: int) -> str:
    """Return what ``train.py --dry_run`` prints for tokens of a vocabulary.

    Raises:
        UserError: A flag is wrong, or flags exclude each other.
    """
    with tempfile.TemporaryDirectory() as folder, _planning:
        data = write_tokens(Path(folder), vocab_size=vocab_size, block_size=int(dict(map(_pair, flags))["block_size"]))
        return printed_by_training([*flags, f"--data={data}", "--dry_run"])


def _pair(flag: str) -> tuple[str, str]:
    name, _, value = flag.partition("=")
    return name.removeprefix("--"), value


def memory_parts(text: str) -> dict[str, float]:
    """Return GiB by the name of a line of a plan."""
    scale = {"MiB": 1 / 1024, "GiB": 1.0}
    return {name: float(number.replace(",", "")) * scale[unit] for name, number, unit in _MEMORY.findall(text)}


def _chart(plans: dict[str, dict[str, float]], memory: float) -> None:
    """Draw the parts of each strategy's memory, with a line where a GPU is full, and say what fits."""
    rows: list[dict[str, Any]] = [
        {"strategy": short_name(name), "part": part, "GiB": plan[part], "order": order}
        for name, plan in plans.items()
        for order, part in enumerate(_PARTS)
        if part in plan
    ]
    bars = (
        alt.Chart(pd.DataFrame(rows), height=160 + 32 * len(plans))
        .mark_bar()
        .encode(
            x=alt.X("GiB:Q", title="GiB per GPU; parts do not all peak at once"),
            y=alt.Y("strategy:N", title=None, sort=None, axis=alt.Axis(labelOverlap=False)),
            color=alt.Color("part:N", sort=list(_PARTS), legend=alt.Legend(orient="bottom", title=None, columns=3)),
            order="order:Q",
            tooltip=["strategy", "part", alt.Tooltip("GiB:Q", format=",.2f")],
        )
    )
    peaks = pd.DataFrame([{"strategy": short_name(name), "peak": plan.get("peak")} for name, plan in plans.items()])
    ticks = alt.Chart(peaks).mark_tick(color="black", thickness=3).encode(x="peak:Q", y=alt.Y("strategy:N", sort=None))
    limit = alt.Chart(pd.DataFrame([{"memory": memory}])).mark_rule(strokeDash=[4, 4]).encode(x="memory:Q")
    st.altair_chart(bars + ticks + limit)
    st.caption("Black mark: peak. Dashed line: memory of a GPU.")


def _row(strategy: str, memory: dict[str, float], text: str, limit: float) -> dict[str, Any]:
    """Return the row of the table for a plan, its memory and that of a GPU in GiB."""
    cost = {unit: number for number, unit in _COST.findall(text)}
    peak = memory.get("peak", 0)
    row = {
        "strategy": short_name(strategy),
        "peak, GiB": round(peak, 2),
        "host, GiB": round(memory.get("host", 0), 2),
        "fits": peak <= limit,
    }
    return row | {title: _number(cost[unit]) for unit, title in _TITLES.items() if unit in cost}


def _number(text: str) -> float:
    return float(text.replace(",", ""))
