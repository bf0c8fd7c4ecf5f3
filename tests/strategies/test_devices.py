"""Peak FLOP/s of devices, by CUDA's device name."""

import pytest
import torch

from lightning_gpt.strategies import peak_flops

PEAKS = [
    # name, half precision, float32 without TF32 (TFLOP/s, dense, from the data sheets; None: unknown)
    ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
    ("NVIDIA H100 PCIe", 756, 51.2),
    ("NVIDIA H100 NVL", 835, 60),
    ("NVIDIA H200", 989, 67),
    ("NVIDIA GH200 480GB", 990, 67),
    ("NVIDIA B200", 2250, 75),
    ("NVIDIA GB200", 2500, 80),
    ("NVIDIA A100-SXM4-40GB", 312, 19.5),
    ("NVIDIA L4", 121, 30.3),
    ("NVIDIA L40S", 362, 91.6),
    ("NVIDIA L40", 181, 90.5),
    ("NVIDIA A10G", 70, 35),
    ("NVIDIA GeForce RTX 4090", None, 82.6),  # Lightning has only the rate without tensor cores
    ("GeForce RTX 2080 Ti", None, None),  # Lightning cannot parse this name
    ("NVIDIA H3000", None, None),
]


@pytest.fixture
def set_card(monkeypatch):
    """Return a function that sets the name of the GPU."""
    monkeypatch.setattr("lightning.fabric.accelerators.cuda._is_ampere_or_later", lambda: True)
    return lambda name: monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "half", "single"), PEAKS)
def test_peak_flops_of_known_and_unknown_cards(name, half, single, set_card):
    set_card(name)
    device = torch.device("cuda")
    for precision, peak in (("bf16-mixed", half), ("16-true", half), ("32-true", single)):
        assert peak_flops(device, precision=precision) == (peak and pytest.approx(peak * 1e12, rel=1e-3)), precision


@pytest.mark.parametrize(("name", "tf32"), [("NVIDIA A100-SXM4-40GB", 156), ("NVIDIA B200", 1100)])
def test_peak_flops_with_tf32(name, tf32, set_card, monkeypatch):
    set_card(name)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops(torch.device("cuda"), precision="32-true") == pytest.approx(tf32 * 1e12)


def test_peak_flops_without_tensor_cores_is_none(set_card):
    set_card("Tesla V100-SXM2-16GB")
    assert peak_flops(torch.device("cuda"), precision="16-mixed") == 125e12
    assert peak_flops(torch.device("cuda"), precision="bf16-mixed") is None  # emulated
    assert peak_flops(torch.device("cuda"), precision="64-true") is None
    assert peak_flops(torch.device("cpu"), precision="bf16-mixed") is None
