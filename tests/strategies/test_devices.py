"""Precisions that cards support, and peak FLOP/s of devices, by CUDA's device name."""

import pytest
import torch

from lightning_gpt import UserError
from lightning_gpt.config import TrainerOptions
from lightning_gpt.strategies import find_devices, get_strategy, peak_flops
from lightning_gpt.strategies.devices import set_tf32

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
    ("NVIDIA A100 80GB PCIe", 312, 19.5),
    ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None, 82.6),  # Lightning has only the rate without tensor cores
    ("GeForce RTX 2080 Ti", None, None),  # Lightning cannot parse this name
    ("NVIDIA H3000", None, None),
]


@pytest.fixture
def set_card(monkeypatch):
    """Return a function that sets the name of the GPU."""
    monkeypatch.setattr("lightning.fabric.accelerators.cuda._is_ampere_or_later", lambda: True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield lambda name: monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    torch.set_float32_matmul_precision(before)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "half", "single"), PEAKS)
def test_peak_flops_of_known_and_unknown_cards(name, half, single, set_card):
    set_card(name)
    device = torch.device("cuda")
    for precision, peak in (("bf16-mixed", half), ("16-true", half), ("32-true", single)):
        assert peak_flops(device, precision=precision) == (peak and pytest.approx(peak * 1e12, rel=1e-3)), precision


@pytest.mark.parametrize(("name", "tf32"), [("NVIDIA A100-SXM4-40GB", 156), ("NVIDIA B200", 1100)])
def test_peak_flops_with_tf32(name, tf32, set_card):
    set_card(name)
    half = peak_flops(torch.device("cuda"), precision="bf16-mixed")
    torch.set_float32_matmul_precision("high")
    assert peak_flops(torch.device("cuda"), precision="32-true") == pytest.approx(tf32 * 1e12)
    assert half == peak_flops(torch.device("cuda"), precision="bf16-mixed") > 0
    assert torch.get_float32_matmul_precision() == "high"


def test_peak_flops_without_tensor_cores_is_none(set_card):
    set_card("Tesla V100-SXM2-16GB")
    assert peak_flops(torch.device("cuda"), precision="16-mixed") == 125e12
    assert peak_flops(torch.device("cuda"), precision="bf16-mixed") is None  # emulated
    assert peak_flops(torch.device("cuda"), precision="64-true") is None
    assert peak_flops(torch.device("cpu"), precision="bf16-mixed") is None


# Precision


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that pretends that one GPU of a compute capability is present; it returns devices for it."""

    def find(capability, *, name="NVIDIA H100", **options):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: name)
        return find_devices(TrainerOptions(accelerator="gpu", devices=1, **options))

    return find


@pytest.mark.parametrize(
    "capability, precision",
    [((7, 0), "16-mixed"), ((7, 5), "16-mixed"), ((8, 0), "bf16-mixed"), ((9, 0), "bf16-mixed")],
)
def test_precision_defaults_to_what_the_card_has(gpu, capability, precision):
    assert gpu(capability).precision == precision
    planned = [find_devices(TrainerOptions(gpus=2), elsewhere=True, card=card).precision for card in ("t4", "h100")]
    assert planned == ["16-mixed", "bf16-mixed"]  # whatever is here


def test_precision_defaults_to_float32_on_a_cpu():
    assert find_devices(TrainerOptions(accelerator="cpu")).precision == "32-true"


def test_planned_run_assumes_a_new_card():
    where = find_devices(TrainerOptions(accelerator="gpu", devices=8), elsewhere=True)
    assert where.precision == "bf16-mixed"


@pytest.mark.parametrize("given, instead", [("bf16", "16"), ("bf16-true", "16-true"), ("bf16-mixed", "16-mixed")])
def test_bf16_is_refused_on_a_card_without_it(gpu, given, instead):
    with pytest.raises(UserError, match=f"--precision {given}: Tesla T4 has no bfloat16; give --precision {instead}$"):
        gpu((7, 5), name="Tesla T4", precision=given)
    assert gpu((7, 5), precision=instead).precision.startswith("16")


def test_automatic_half_precision_names_itself_where_a_strategy_lacks_it(gpu):
    where = gpu((7, 5))
    with pytest.raises(UserError, match="--precision 16-mixed does not work under --strategy fsdp"):
        get_strategy(TrainerOptions(strategy="fsdp"), where=where)


@pytest.mark.parametrize("allowed, precision", [(True, "high"), (False, "highest")])
def test_tf32_is_a_choice_on_gpus_alone(gpu, allowed, precision, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    set_tf32(find_devices(TrainerOptions(accelerator="cpu")), allowed=allowed)
    assert chosen == []
    set_tf32(gpu((8, 0)), allowed=allowed)
    assert chosen == [precision]


def test_an_apple_gpu_is_one_device_in_float32_or_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for accelerator in ("mps", "gpu", "auto"):
        where = find_devices(TrainerOptions(accelerator=accelerator))
        assert (where.device_type, where.world_size, where.precision) == ("mps", 1, "32-true")
        assert get_strategy(TrainerOptions(), where=where).name == "auto"
        assert find_devices(TrainerOptions(accelerator=accelerator, precision="bf16")).precision == "bf16-mixed"
        with pytest.raises(UserError, match="--strategy ddp does not work on an Apple GPU"):
            get_strategy(TrainerOptions(strategy="ddp"), where=where)
        for wrong, message in (({"precision": "16"}, "--precision 16-mixed"), ({"num_nodes": 2}, "2 devices")):
            with pytest.raises(UserError, match=f"{message}.* Apple GPU"):
                find_devices(TrainerOptions(accelerator=accelerator, **wrong))
    planned = find_devices(TrainerOptions(gpus=8), elsewhere=True)
    assert (planned.device_type, planned.world_size, planned.precision) == ("cuda", 8, "bf16-mixed")
    assert get_strategy(TrainerOptions(strategy="ddp"), where=planned).name == "ddp"
