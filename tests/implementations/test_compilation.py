"""Settings of --compile."""

import pytest
import torch
from torch._dynamo.utils import counters

import train
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("graphs", "options"),
    [
        (2, "--implementation=mingpt"),
        (4, "--implementation=nanogpt --position=alibi --loss=chunked --recompute"),
        (4, "--implementation=moderngpt --n_layer=2 --window=4 --bigram=97 --smear=true --n_kv_head=1"),
    ],
)
def test_blocks_compile_once(graphs, options, text_file, tiny_flags, tmp_path, capsys):
    """Count the graphs of a run that trains, validates with a smaller last batch, and samples.

    Each kind of block, and the chunked loss, is one graph for training and one for validation: layers with a window and
    without are two kinds.
    """
    torch.compiler.reset()
    counters.clear()
    flags = ["--n_head=2", "--batch_size=7", "--eval_batches=0", f"--data={text_file}", f"--out_dir={tmp_path}/run"]
    train.main([*tiny_flags, *flags, "--compile=aot_eager", *options.split()])
    assert "--- sample ---" in capsys.readouterr().out
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == graphs
    windows = (len(text_file.read_text()) // 10 - 1) // 16
    assert windows % 7, "the last batch is smaller"
