"""Settings of --compile."""

import pytest
import torch

from lightning_gpt.implementations.compilation import compile_arguments


@pytest.mark.parametrize("setting", ["true", "dynamo", *torch._inductor.list_mode_options()])
def test_no_setting_uses_cuda_graphs(setting):
    """CUDA graphs of blocks that are compiled one by one overwrite each other's outputs."""
    arguments = compile_arguments(setting)
    assert arguments["backend"] == "inductor"
    options = torch._inductor.list_mode_options().get(arguments["mode"], {})
    assert not options.get("triton.cudagraphs", False)


def test_max_autotune_still_tunes():
    assert torch._inductor.list_mode_options()[compile_arguments("max-autotune")["mode"]]["max_autotune"]


def test_other_backends_have_no_mode():
    assert compile_arguments("aot_eager") == {"backend": "aot_eager", "mode": None}
    assert compile_arguments(False) is None
