"""Accelerators, device counts and precisions: what was asked for, checked against what is here."""

import os
from dataclasses import dataclass

import torch

from lightning_gpt.config import TrainerOptions, UserError

PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
DTYPES = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}
LIGHTNING_PRECISIONS = ("16-mixed", "bf16-mixed", "32-true", "64-true", "16-true", "bf16-true")


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Where a run computes.

    Attributes:
        accelerator: "cpu" or "gpu", or another that Lightning knows.
        devices: How many a node has, or which.
        num_nodes: Machines.
        precision: Lightning's name of it.
    """

    accelerator: str
    devices: int | str
    num_nodes: int
    precision: str

    @property
    def device_type(self) -> str:
        """What torch calls such a device."""
        gpu = "cuda" if torch.cuda.is_available() or not torch.backends.mps.is_available() else "mps"
        return gpu if self.accelerator == "gpu" else self.accelerator

    @property
    def dtype(self) -> torch.dtype:
        """What activations are computed in."""
        return DTYPES[self.precision.partition("-")[0]]

    @property
    def per_node(self) -> int:
        """Devices of one node."""
        if isinstance(self.devices, int):
            if self.devices >= 0:
                return self.devices
        elif self.devices not in ("auto", "-1"):
            listed = [int(part) for part in self.devices.split(",") if part.strip()]
            return len(listed) if "," in self.devices else listed[0]
        return torch.cuda.device_count() or 1

    @property
    def world_size(self) -> int:
        """Processes, one for each device."""
        return self.per_node * self.num_nodes


def find_devices(options: TrainerOptions, *, elsewhere: bool = False) -> Devices:
    """Resolves what was asked for. Under torchrun, whose environment counts the processes, devices and nodes follow it.

    Args:
        options: The Trainer's options.
        elsewhere: Whether the run is for another machine, so that what is here does not matter.

    Raises:
        UserError: An unknown accelerator or precision, GPUs where there are none, or half precision on a CPU.
    """
    from lightning.pytorch.accelerators import AcceleratorRegistry

    accelerator, devices = options.accelerator, options.devices
    accelerators = ["auto", "gpu", *sorted(AcceleratorRegistry.available_accelerators())]
    if accelerator not in accelerators:
        raise UserError(f"--accelerator {accelerator} is unknown; choose one of {', '.join(accelerators)}")
    if options.gpus is not None:
        if accelerator not in ("auto", "gpu", "cuda") or devices not in ("auto", options.gpus):
            raise UserError("--gpus N is short for --accelerator gpu --devices N; do not give them differently as well")
        accelerator, devices = "gpu", options.gpus
    if accelerator in ("gpu", "cuda", "auto"):
        found = torch.cuda.device_count() or int(torch.backends.mps.is_available())
        if elsewhere and accelerator != "auto":
            found = options.gpus or (devices if isinstance(devices, int) else 1)
        if accelerator != "auto" and found == 0:
            raise UserError("a GPU was asked for and none is found here; use --accelerator cpu")
        if found and isinstance(devices, int) and devices > found:
            raise UserError(f"{devices} GPUs were asked for and {found} found here; lower --devices or --gpus")
        accelerator = "gpu" if found else "cpu"
    precision = PRECISIONS.get(str(options.precision), str(options.precision))
    if precision not in LIGHTNING_PRECISIONS:
        choices = ", ".join([*PRECISIONS, *LIGHTNING_PRECISIONS])
        raise UserError(f"--precision {options.precision} is unknown; choose one of {choices}")
    if accelerator == "cpu" and precision.startswith("16"):
        raise UserError(f"--precision {options.precision} needs a GPU; on a CPU use bf16 or 32")
    num_nodes = options.num_nodes
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        devices, num_nodes = local, int(os.environ["WORLD_SIZE"]) // local
    if devices == "auto" and accelerator == "cpu":
        devices = 1
    where = Devices(accelerator=accelerator, devices=devices, num_nodes=num_nodes, precision=precision)
    try:
        sensible = where.per_node > 0 and not (elsewhere and devices in ("auto", "-1", -1) and accelerator != "cpu")
    except (ValueError, IndexError):
        sensible = False
    if not sensible:
        raise UserError(f"--devices {devices} makes no sense; give a number above 0, or a list such as 0,2")
    return where


def peak_flops(device: torch.device, *, precision: str) -> float | None:
    """Dense peak of a device in FLOP/s for matrix products, from the makers' data sheets; None where unknown."""
    if device.type != "cuda" or precision == "64-true":
        return None
    name = torch.cuda.get_device_name(device)
    half = {
        "H200": 989e12,
        "H100 PCIe": 756e12,
        "H100": 989e12,
        "A100": 312e12,
        "L40S": 362e12,
        "L40": 181e12,
        "A10G": 70e12,
        "L4": 121e12,
        "V100": 125e12,
    }
    full = {
        "H200": 67e12,
        "H100 PCIe": 51e12,
        "H100": 67e12,
        "A100": 19.5e12,
        "L40S": 91.6e12,
        "L40": 90.5e12,
        "A10G": 35e12,
        "L4": 30.3e12,
        "V100": 15.7e12,
    }
    table = full if precision == "32-true" else half
    return next((peak for key, peak in table.items() if key in name), None)
