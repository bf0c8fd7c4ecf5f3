"""What a run costs: hours, energy and money, from the time of a step."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_gpt.planning.machines import Machine
from lightning_gpt.planning.timing import Timing, network
from lightning_gpt.strategies.cards import CARDS

BASIS = "a roofline without overlap and --compile, at shares of the card's peaks that fit 8 A100s of 2021"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A run on a machine.

    Attributes:
        timing: Of one optimizer step.
        machine: The machines.
        steps: Optimizer steps.
        tokens_per_step: Tokens per optimizer step over all devices.
        price: Money per GPU and hour; None if it was not given.
    """

    timing: Timing
    machine: Machine
    steps: int
    tokens_per_step: int
    price: float | None

    @property
    def hours(self) -> float:
        """Of training, without validation and checkpoints."""
        return self.timing.seconds * self.steps / 3600

    @property
    def gpu_hours(self) -> float:
        """Hours over all GPUs."""
        return self.hours * self.machine.gpus * self.machine.nodes

    def numbers(self) -> dict[str, str]:
        """Return the cost as text by the title of its column; without a price, without the last one."""
        found = {
            "ms/step": f"{self.timing.seconds * 1e3:,.4g}",
            "tokens/s": f"{self.tokens_per_step / self.timing.seconds:,.0f}",
            "hours": _short(self.hours),
            "kWh": _short(self.gpu_hours * CARDS[self.machine.card].watts / 1000),
        }
        return found if self.price is None else found | {"price": _short(self.gpu_hours * self.price)}

    def lines(self) -> list[tuple[str, str]]:
        """Return the cost as names and values."""
        n = self.numbers()
        parts = ", ".join(f"{name} {seconds:.0%}" for name, seconds in self._shares())
        price = f", {n['price']} at {self.price:g} per GPU and hour" if "price" in n else ""
        return [
            ("time", f"{n['ms/step']} ms per step, {n['tokens/s']} tokens/s ({parts})"),
            ("run", f"{n['hours']} hours, {n['kWh']} kWh at the boards' maximal power{price}"),
            ("time by", BASIS),
            ("card", _rates(self.machine)),
            ("card by", CARDS[self.machine.card].source),
        ]

    def _shares(self) -> list[tuple[str, float]]:
        shares = [(name, seconds / self.timing.seconds) for name, seconds in vars(self.timing).items()]
        return sorted((share for share in shares if share[1] >= 0.005), key=lambda share: -share[1])


def _rates(machine: Machine) -> str:
    """Return the peaks with which the time is planned."""
    card = CARDS[machine.card]
    other = f", {network(machine):.3g} GB/s to other machines" if machine.nodes > 1 else ""
    return (
        f"{card.half:g} TFLOP/s in half precision, {card.bandwidth:g} GB/s, {card.link:g} GB/s to other GPUs{other},"
        f" {card.watts:g} W"
    )


def _short(number: float) -> str:
    """Return three significant digits, without an exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}" if number >= 0.001 else "0"


_WIDTHS = {"ms/step": 11, "tokens/s": 14, "hours": 10, "kWh": 10, "price": 10}


def cost_table(rows: Sequence[tuple[str, bool, Cost]]) -> str:
    """Return strategies, whether they recompute, and their costs as text of at most 120 columns."""
    _, _, first = rows[0]
    titles = [name for name in _WIDTHS if name in first.numbers()]
    lines = [f"{'strategy':26}{'recompute':10}{''.join(f'{name:>{_WIDTHS[name]}}' for name in titles)}  bound by"]
    for name, recompute, cost in rows:
        numbers = cost.numbers()
        columns = "".join(f"{numbers[title]:>{_WIDTHS[title]}}" for title in titles)
        lines.append(f"{name:26}{'yes' if recompute else 'no':10}{columns}  {cost.timing.bound}")
    lines.append(f"time: by {BASIS}")
    lines.append(f"card: {_rates(first.machine)}")
    lines.append(f"card: by {CARDS[first.machine.card].source}")
    lines.append("kWh: at the boards' maximal power; hours: without validation and checkpoints")
    return "\n".join(lines)
