"""GPUs whose data sheets are known: memory, peak rates, bandwidths and power."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Card:
    """A kind of GPU, as its data sheet describes it.

    Attributes:
        names: Regular expression that torch's name of the device matches.
        memory_gib: Memory that ``torch.cuda.get_device_properties`` reports, less than the data sheet's.
        half: Dense peak of matrix products in half precision, in TFLOP/s.
        tf32: The same in TF32; that of float32 where the card has none.
        single: The same in float32.
        bandwidth: Of its memory, in GB/s.
        link: What it can send to the other GPUs of its machine, in GB/s: half of the NVLink or PCIe total.
        pcie: What it can send to the host's memory, in GB/s: half of the PCIe total, or of NVLink-C2C.
        watts: Maximal power of the board.
        source: The data sheet.
        network: What it can send to other machines, in GB/s, in NVIDIA's own machine of 8; None if there is none.
        has_bf16: Whether its tensor cores multiply bfloat16 (compute capability 8.0 or more).
    """

    names: str
    memory_gib: float
    half: float
    tf32: float
    single: float
    bandwidth: float
    link: float
    pcie: float
    watts: float
    source: str
    network: float | None = None
    has_bf16: bool = True


_HOPPER = "NVIDIA H100 Tensor Core GPU data sheet"
_BLACKWELL = "NVIDIA HGX platform data sheet"
_VOLTA = "NVIDIA V100 Tensor Core GPU data sheet"
_AMPERE = "NVIDIA A100 Tensor Core GPU data sheet"

# The first row that matches a device is used. Rates with sparsity are halved.
CARDS = {
    "gb200": Card(
        names="GB200",
        memory_gib=184.0,
        half=2500,
        tf32=1250,
        single=80,
        bandwidth=8000,
        link=900,
        pcie=450,
        watts=1200,
        source="NVIDIA GB200 NVL72 data sheet",
        network=50,
    ),
    "b200": Card(
        names="B200",
        memory_gib=178.3,
        half=2250,
        tf32=1100,
        single=75,
        bandwidth=7700,
        link=900,
        pcie=64,
        watts=1000,
        source=_BLACKWELL,
        network=50,
    ),
    "gh200": Card(
        names="GH200",
        memory_gib=94.5,
        half=990,
        tf32=494,
        single=67,
        bandwidth=4000,
        link=450,
        pcie=450,
        watts=1000,
        source="NVIDIA GH200 Grace Hopper Superchip data sheet",
        network=50,
    ),
    "h200-nvl": Card(
        names="H200 NVL",
        memory_gib=139.8,
        half=835,
        tf32=417,
        single=60,
        bandwidth=4800,
        link=450,
        pcie=64,
        watts=600,
        source="NVIDIA H200 Tensor Core GPU data sheet",
    ),
    "h200": Card(
        names="H200",
        memory_gib=139.8,
        half=989,
        tf32=494,
        single=67,
        bandwidth=4800,
        link=450,
        pcie=64,
        watts=700,
        source="NVIDIA H200 Tensor Core GPU data sheet",
        network=50,
    ),
    "h100-nvl": Card(
        names="H100 NVL",
        memory_gib=93.1,
        half=835,
        tf32=417,
        single=60,
        bandwidth=3900,
        link=300,
        pcie=64,
        watts=400,
        source=_HOPPER,
    ),
    "h100-pcie": Card(
        names="H100 PCIe",
        memory_gib=79.1,
        half=756,
        tf32=378,
        single=51.2,
        bandwidth=2000,
        link=64,
        pcie=64,
        watts=350,
        source="NVIDIA H100 PCIe GPU product brief",
    ),
    "h100": Card(
        names="H100",
        memory_gib=79.1,
        half=989.4,
        tf32=494.7,
        single=66.9,
        bandwidth=3350,
        link=450,
        pcie=64,
        watts=700,
        source=_HOPPER,
        network=50,
    ),
    "a100-80": Card(
        names="A100-SXM4-80GB|A100-SXM-80GB",
        memory_gib=79.1,
        half=312,
        tf32=156,
        single=19.5,
        bandwidth=2039,
        link=300,
        pcie=32,
        watts=400,
        source=_AMPERE,
        network=25,
    ),
    "a100-80-pcie": Card(
        names="A100 80GB PCIe",
        memory_gib=79.1,
        half=312,
        tf32=156,
        single=19.5,
        bandwidth=1935,
        link=32,
        pcie=32,
        watts=300,
        source=_AMPERE,
    ),
    "a100-40-pcie": Card(
        names="A100-PCIE-40GB",
        memory_gib=39.4,
        half=312,
        tf32=156,
        single=19.5,
        bandwidth=1555,
        link=32,
        pcie=32,
        watts=250,
        source=_AMPERE,
    ),
    "a100-40": Card(
        names="A100",
        memory_gib=39.4,
        half=312,
        tf32=156,
        single=19.5,
        bandwidth=1555,
        link=300,
        pcie=32,
        watts=400,
        source=_AMPERE,
        network=25,
    ),
    "l40s": Card(
        names="L40S",
        memory_gib=44.3,
        half=362,
        tf32=183,
        single=91.6,
        bandwidth=864,
        link=32,
        pcie=32,
        watts=350,
        source="NVIDIA L40S data sheet",
    ),
    "l40": Card(
        names="L40",
        memory_gib=44.3,
        half=181,
        tf32=90.5,
        single=90.5,
        bandwidth=864,
        link=32,
        pcie=32,
        watts=300,
        source="NVIDIA L40 data sheet",
    ),
    "a10g": Card(
        names="A10G",
        memory_gib=22.0,
        half=70,
        tf32=35,
        single=35,
        bandwidth=600,
        link=32,
        pcie=32,
        watts=300,
        source="NVIDIA A10G data sheet, published by AWS",
    ),
    "l4": Card(
        names="L4",
        memory_gib=22.0,
        half=121,
        tf32=60,
        single=30.3,
        bandwidth=300,
        link=32,
        pcie=32,
        watts=72,
        source="NVIDIA L4 data sheet",
    ),
    "4090": Card(
        names="RTX 4090$",
        memory_gib=23.6,
        half=165.2,
        tf32=82.6,
        single=82.6,
        bandwidth=1008,
        link=32,
        pcie=32,
        watts=450,
        source="NVIDIA Ada GPU architecture white paper; products accumulated in float32",
    ),
    "3090": Card(
        names="RTX 3090$",
        memory_gib=23.6,
        half=71,
        tf32=35.6,
        single=35.6,
        bandwidth=936,
        link=32,
        pcie=32,
        watts=350,
        source="NVIDIA Ampere GA102 GPU architecture white paper; products accumulated in float32",
    ),
    "v100-32": Card(
        names="V100-SXM[23]-32GB",
        memory_gib=31.7,
        half=125,
        tf32=15.7,
        single=15.7,
        bandwidth=900,
        link=150,
        pcie=16,
        watts=300,
        source=_VOLTA,
        network=6.25,
        has_bf16=False,
    ),
    "v100-16": Card(
        names="V100-SXM2-16GB",
        memory_gib=15.7,
        half=125,
        tf32=15.7,
        single=15.7,
        bandwidth=900,
        link=150,
        pcie=16,
        watts=300,
        source=_VOLTA,
        network=6.25,
        has_bf16=False,
    ),
    "t4": Card(
        names="T4",
        memory_gib=14.5,
        half=65,
        tf32=8.1,
        single=8.1,
        bandwidth=320,
        link=16,
        pcie=16,
        watts=70,
        source="NVIDIA T4 data sheet",
        has_bf16=False,
    ),
}


def card_named(device: str) -> str | None:
    """Return the key of the card that torch calls by a name, such as "NVIDIA H100 80GB HBM3"; None if unknown."""
    return next((key for key, card in CARDS.items() if re.search(rf"\b(?:{card.names})(?!\w)", device)), None)
