"""Accelerators, device counts and precisions: the requested ones, checked against the machine."""

import os
import time
import warnings
from dataclasses import dataclass

import torch
from lightning.fabric.utilities.throughput import get_available_flops

from lightning_gpt.config import TrainerOptions, UserError
from lightning_gpt.strategies.cards import CARDS, card_named

PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
DTYPES = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}
LIGHTNING_PRECISIONS = ("16-mixed", "bf16-mixed", "32-true", "64-true", "16-true", "bf16-true")


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Where a run computes.

    Attributes:
        accelerator: "cpu", "gpu", or another accelerator of Lightning.
        devices: Number of devices per node, or a list of their indices.
        num_nodes: Number of machines.
        precision: Lightning's name of the precision.
        planned: Whether they are GPUs that are only planned for, which are NVIDIA's.
    """

    accelerator: str
    devices: int | str
    num_nodes: int
    precision: str
    planned: bool = False

    @property
    def device_type(self) -> str:
        """torch's name of this kind of device, such as "cuda" for "gpu"."""
        return _gpu(planned=self.planned) if self.accelerator == "gpu" else self.accelerator

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return DTYPES[self.precision.partition("-")[0]]

    @property
    def per_node(self) -> int:
        """Number of devices per node."""
        if isinstance(self.devices, int):
            if self.devices >= 0:
                return self.devices
        elif self.devices not in ("auto", "-1"):
            listed = [int(part) for part in self.devices.split(",") if part.strip()]
            return len(listed) if "," in self.devices else listed[0]
        return torch.cuda.device_count() or 1

    @property
    def world_size(self) -> int:
        """Number of processes, one per device."""
        return self.per_node * self.num_nodes


def _gpu(*, planned: bool) -> str:
    """Return torch's name of this machine's kind of GPU, or of NVIDIA's for one that is only planned for."""
    return "mps" if torch.backends.mps.is_available() and not (torch.cuda.is_available() or planned) else "cuda"


def find_devices(options: TrainerOptions, *, elsewhere: bool = False, card: str | None = None) -> Devices:
    """Return the devices that the options ask for. Under torchrun, its environment determines their number.

    Args:
        options: The Trainer's options.
        elsewhere: Whether the run is only planned, so that the devices need not be on this machine.
        card: The card that it is planned for, a key of ``CARDS``; None for this machine's.

    Raises:
        UserError: The accelerator or precision is unknown, there are not enough GPUs, or a CPU cannot do fp16.
    """
    from lightning.pytorch.accelerators import AcceleratorRegistry

    accelerator, devices = options.accelerator, options.devices
    accelerators = ["auto", "gpu", *sorted(AcceleratorRegistry.available_accelerators())]
    if accelerator not in accelerators:
        raise UserError(f"--accelerator {accelerator} is unknown; choose one of {', '.join(accelerators)}")
    if options.gpus is not None:
        if accelerator not in ("auto", "gpu", "cuda") or devices not in ("auto", options.gpus):
            raise UserError("--gpus N is short for --accelerator gpu --devices N; leave these two out")
        accelerator, devices = "gpu", options.gpus
    planned = elsewhere and options.gpus is not None
    if accelerator in ("gpu", "cuda", "auto"):
        found = torch.cuda.device_count() or int(torch.backends.mps.is_available())
        if elsewhere and accelerator != "auto":
            found = options.gpus or (devices if isinstance(devices, int) else 1)
        if accelerator != "auto" and found == 0:
            raise UserError("no GPU was found, but the options ask for one; use --accelerator cpu")
        if found and isinstance(devices, int) and devices > found:
            raise UserError(f"{devices} GPUs are needed, but only {found} were found; lower --devices or --gpus")
        accelerator = "gpu" if found else "cpu"
    lacking = _without_bf16(accelerator, card)
    kind = _gpu(planned=planned) if accelerator in ("gpu", "cuda") else accelerator
    precision = _precision(str(options.precision), kind, lacking=lacking)
    num_nodes = options.num_nodes
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        devices, num_nodes = local, int(os.environ["WORLD_SIZE"]) // local
    if devices == "auto" and accelerator == "cpu":
        devices = 1
    where = Devices(accelerator=accelerator, devices=devices, num_nodes=num_nodes, precision=precision, planned=planned)
    try:
        sensible = where.per_node > 0 and not (elsewhere and devices in ("auto", "-1", -1) and accelerator != "cpu")
    except (ValueError, IndexError):
        sensible = False
    if not sensible:
        raise UserError(f"--devices {devices} is not a number of devices; give a number above 0, or a list such as 0,2")
    if where.device_type == "mps":
        _require_for_mps(where)
    return where


def _require_for_mps(where: Devices) -> None:
    """Raise a UserError for what Lightning does not do on Apple's GPUs, of which a machine has one."""
    if where.world_size > 1:
        raise UserError(f"{where.world_size} devices were asked for, but an Apple GPU is one device; give --devices 1")
    if where.precision.startswith(("16", "64")):
        raise UserError(f"--precision {where.precision} does not work on an Apple GPU; use 32 or bf16")


def _without_bf16(accelerator: str, card: str | None) -> str | None:
    """Return the name of the GPU if it has no bfloat16, which older ones emulate slowly; else None."""
    if card is not None:
        return None if CARDS[card].has_bf16 else card
    # A planned run need not have its card here, so a new one is assumed.
    if accelerator not in ("gpu", "cuda") or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name() if torch.cuda.get_device_capability() < (8, 0) else None


def _precision(given: str, kind: str, *, lacking: str | None) -> str:
    """Return Lightning's name of a precision, chosen for the kind of device if it is "auto".

    Args:
        given: Value of ``--precision``.
        kind: torch's name of the kind of device.
        lacking: Name of the GPU if it has no bfloat16.
    """
    if given == "auto":
        if kind != "cuda":
            return PRECISIONS["32"]
        return PRECISIONS["16" if lacking else "bf16"]
    precision = PRECISIONS.get(given, given)
    if precision not in LIGHTNING_PRECISIONS:
        choices = ", ".join(["auto", *PRECISIONS, *LIGHTNING_PRECISIONS])
        raise UserError(f"--precision {given} is unknown; choose one of {choices}")
    if kind == "cpu" and precision.startswith("16"):
        raise UserError(f"--precision {given} needs a GPU; on a CPU use bf16 or 32")
    if lacking and precision.startswith("bf16"):
        instead = given.replace("bf16", "16")
        raise UserError(f"--precision {given}: {lacking} has no bfloat16; give --precision {instead}")
    return precision


def memory_of_this(where: Devices) -> int | None:
    """Return the bytes of a GPU of this machine; None if it has none, or the run does not use it."""
    if where.accelerator != "gpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory


def device_time(device: torch.device) -> float:
    """Wait until the device is idle, and return the time of a monotonic clock in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def set_tf32(where: Devices, *, allowed: bool) -> None:
    """Allow or forbid TF32 in matrix products of float32 on GPUs; torch uses it only on those that have it."""
    if where.device_type == "cuda":
        torch.set_float32_matmul_precision("high" if allowed else "highest")


def peak_flops(device: torch.device, *, precision: str) -> float | None:
    """Return the dense peak of a device for matrix products, in FLOP/s; None if it is unknown.

    Args:
        device: The device.
        precision: Lightning's name of the precision.
    """
    dtype = DTYPES[precision.partition("-")[0]]
    if device.type != "cuda" or dtype == torch.float64:
        return None
    key = card_named(torch.cuda.get_device_name(device))
    if key:
        card = CARDS[key]
        full = card.single if torch.get_float32_matmul_precision() == "highest" else card.tf32
        if dtype == torch.bfloat16 and not card.has_bf16:
            return None
        return (full if dtype == torch.float32 else card.half) * 1e12
    peak = _lightnings_peak(device, dtype)
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        plain = _lightnings_peak(device, torch.float32)
    finally:
        torch.set_float32_matmul_precision(chosen)
    # For GeForce and workstation cards Lightning has the rate without tensor cores, at most twice the float32 rate,
    # which would give a wrong utilisation.
    if peak is None or (dtype != torch.float32 and plain is not None and peak < 3 * plain):
        return None
    return float(peak)


def _lightnings_peak(device: torch.device, dtype: torch.dtype) -> int | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning warns about unknown cards and precisions
        try:
            return get_available_flops(device, dtype)
        except IndexError:  # Lightning expects "NVIDIA" before "GeForce"
            return None
