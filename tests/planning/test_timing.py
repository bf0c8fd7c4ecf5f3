"""The time of a step: counted work, volumes of the exchanges, and the roofline that turns both into seconds."""

from dataclasses import replace

import pytest

from lightning_gpt.models import GPTModule
from lightning_gpt.planning import Machine, Rates, Traces, step_time
from lightning_gpt.strategies import STRATEGIES
from lightning_gpt.strategies.cards import CARDS, card_named
from lightning_gpt.strategies.memory import Traffic
from lightning_gpt.strategies.step import Operation, StepTrace

SIZES = {"n_layer": 3, "n_head": 4, "n_embd": 64, "block_size": 128, "vocab_size": 512}
STEP = StepTrace(
    parameters=(600, 400),
    units=(400,),
    forward=(),
    backward=(),
    accumulate=1,
    weight_bytes=4,
    compute_bytes=2,
    state=0,
    step=0,
)


def traced(name="ddp", *, precision="bf16-mixed", recompute=False, **fields) -> StepTrace:
    module = GPTModule.without_memory("nanogpt", model_config=SIZES | fields)
    traces = Traces(module, block_size=128, accumulate=1, precision=precision, device_type="cuda")
    return traces.step(STRATEGIES[name].memory, batch_size=4, recompute=recompute)


def test_traced_products_are_those_of_the_model():
    """Compare with 2 FLOPs per weight and token forward and 4 backward, and causal attention's own."""
    tokens, matrices = 4 * 128, 12 * 64 * 64 * 3 + 512 * 64
    attention = 3 * 2 * (4 * 128 * 128 * 64) // 2  # FLOPs of one product of all layers
    trace = traced(bias=False)
    assert sum(o.flops * n for o, n in trace.operations) == 6 * tokens * matrices + (2 + 5) * attention
    again = traced(bias=False, recompute=True)
    blocks = 2 * tokens * 12 * 64 * 64 * 3 + 2 * attention
    extra = sum(o.flops * n for o, n in again.operations) - sum(o.flops * n for o, n in trace.operations)
    assert blocks * 0.6 < extra <= blocks  # the end of a block is not needed again
    assert {o.half for o, _ in trace.operations if o.flops} == {True}
    assert {o.half for o, _ in traced(precision="32-true").operations} == {False}


def test_optimizer_reads_and_writes_weight_gradient_and_both_moments():
    """torch declares that the fused step may also write gradients."""
    trace = traced()
    assert sum(o.bytes * n for o, n in trace.updates) == pytest.approx(2 * 4 * 4 * trace.total, rel=0.01)


@pytest.mark.parametrize(
    ("strategy", "accumulate", "recompute", "sent"),
    [
        # bytes per parameter that are reduced and gathered, before the factor (ranks - 1) / ranks
        ("ddp", 1, False, 2 * 4),
        ("ddp", 3, True, 2 * 4),
        ("fsdp", 1, False, 2 * 2 + 4),
        ("fsdp", 3, True, 3 * (2 * 2 + 4)),
        ("deepspeed_stage_1", 3, False, 2 + 2),
        ("deepspeed_stage_2", 3, False, 3 * 2 + 2),
        ("deepspeed_stage_3", 1, False, 3 * 2),
        ("deepspeed_stage_3", 3, True, 3 * 4 * 2),
        ("deepspeed_stage_3_offload", 1, False, 3 * 2),
    ],
)
def test_volumes_of_the_exchanges(strategy, accumulate, recompute, sent):
    rules = STRATEGIES[strategy].memory
    step = replace(STEP, accumulate=accumulate, recomputed=recompute)
    traffic = rules.traffic(step, ranks=4)
    assert traffic.sent == pytest.approx(sent * 1000 * 3 / 4)
    assert (traffic.offloaded, traffic.updated == 0) == (250 * ("offload" in strategy), "offload" in strategy)
    assert rules.traffic(step, ranks=1).sent == 0


def test_each_kernel_takes_as_long_as_its_slower_part():
    card = CARDS["a100-40"]
    fast = Rates(compute=1, memory=1, link=1, kernel=0, latency=0, fetch=0, step=0)
    second = int(card.half * 1e12)
    trace = replace(
        STEP, operations=((Operation(second, 8, True), 2), (Operation(8, int(card.bandwidth * 1e9), True), 3))
    )
    time = step_time(trace, Traffic(), machine=Machine("a100-40", 1), rates=fast)
    assert (time.arithmetic, time.memory, time.seconds) == pytest.approx((2, 3, 5))
    assert time.bound == "memory"
    wide = replace(STEP, operations=((Operation(second, 8, False), 1),))
    times = [
        step_time(wide, Traffic(), machine=Machine("a100-40", 1), tf32=tf32, rates=fast).arithmetic
        for tf32 in (True, False)
    ]
    assert times == pytest.approx([2, 16])
    slow = step_time(trace, Traffic(), machine=Machine("a100-40", 1), rates=replace(fast, kernel=2.0))
    assert (slow.python, slow.bound) == (pytest.approx(5), "python")  # 5 kernels that start every 2 seconds


def test_exchanges_take_the_slower_of_the_link_and_the_network():
    fast = Rates(compute=1, memory=1, link=1, kernel=0, latency=0, fetch=0, step=0)
    traffic = Traffic(sent=300e9, host=32e9, offloaded=100)

    def part(name, machine, **rates):
        return getattr(step_time(STEP, traffic, machine=machine, rates=replace(fast, **rates)), name)

    assert part("link", Machine("a100-40", 8)) == pytest.approx(1)
    assert part("link", Machine("a100-40", 8, 4)) == pytest.approx(300 / (8 * 25))
    assert part("link", Machine("4090", 1, 4)) == pytest.approx(300 / 12.5)
    assert part("link", Machine("a100-40", 1)) == 0
    assert part("host", Machine("a100-40", 8), host_elements=400) == pytest.approx(1 + 2)


def test_a_device_is_found_by_its_name():
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA L4": "l4", "NVIDIA L40S": "l40s", "Tesla T4": "t4"}
    assert {name: card_named(name) for name in names} == names
    assert all(card.source and card.watts and card.pcie for card in CARDS.values())
    assert card_named("NVIDIA H3000") is None
