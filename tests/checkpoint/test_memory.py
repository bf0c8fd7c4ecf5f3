"""Memory of converting a checkpoint of more than 1 GB."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.launching import run_python

# Script with arguments FOLDER STAGE: write a ZeRO folder of two ranks as DeepSpeed does, with random values.
BIG_FOLDER = """
import math, sys
from pathlib import Path
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from lightning_gpt.checkpoint.base import empty_model
from lightning_gpt.implementations.registry import decay_matrices
from lightning_gpt.optim.groups import parameter_groups

folder, stage = Path(sys.argv[1]) / "checkpoint", int(sys.argv[2])
folder.mkdir(parents=True)
config = {"n_layer": 13, "n_head": 4, "n_embd": 1280, "vocab_size": 16000, "block_size": 64}
model = empty_model("nanogpt", model_config=config)
groups = parameter_groups(model, decays=decay_matrices, weight_decay=0.1)
shapes = [{f"model.{n}": p.shape for n, p in zip(g["param_names"], g["params"])} for g in groups]
header = {"hyper_parameters": {"implementation": "nanogpt", "model_config": config}, "global_step": 3}
tie = {"model.lm_head.weight": "model.transformer.wte.weight"}
states = {"module": {}, "buffer_names": [], "param_shapes": shapes, "shared_params": tie, **header}
for rank in range(2):
    sizes, mappings = [], []
    for named in shapes:
        half = sum(math.ceil(math.prod(shape) / 2) for shape in named.values())
        mapping, start = {}, 0
        for name, shape in named.items():
            begin, end = max(start, rank * half), min(start + math.prod(shape), (rank + 1) * half)
            if begin < end:
                mapping[name] = fragment_address(numel=end - begin, start=begin - rank * half)
            start += math.prod(shape)
        sizes.append(half)
        mappings.append(mapping)
    flat, first, second = ([torch.randn(size) for size in sizes] for _ in range(3))
    state = {i: {"step": torch.tensor(3.0), "exp_avg": first[i], "exp_avg_sq": second[i]} for i in range(2)}
    optimizer = {"state": state, "param_groups": [{"params": [i]} for i in range(2)]}
    if stage == 3:
        part = {"fp32_flat_groups": flat, "optimizer_state_dict": optimizer}
    else:
        part = {"single_partition_of_fp32_groups": flat, "base_optimizer_state": optimizer}
    part |= {"partition_count": 2, "zero_stage": ZeroStageEnum(stage), "param_slice_mappings": mappings}
    torch.save({"optimizer_state_dict": part}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
    torch.save(states, folder / f"{prefix}mp_rank_00_model_states.pt")
"""

# Script: print by how much a conversion raises the peak resident memory, and the size of the weights, in bytes.
CONVERT = """
import math, re, sys
from pathlib import Path
from lightning_gpt.checkpoint import convert, open_checkpoint

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = peak()
checkpoint = open_checkpoint(Path(sys.argv[1]))
convert(checkpoint, Path(sys.argv[2]), optimizer="optimizer" in sys.argv, pt="pt" in sys.argv)
print(peak() - before, 4 * sum(math.prod(shape) for shape in checkpoint.shapes().values()))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("stage", [3])  # this stage reads weights from the files of all ranks
def test_conversion_memory_is_below_1_3_times_the_weights(tmp_path, stage):
    def python(script: str, *arguments: object) -> str:
        done = run_python("-c", script, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    python(BIG_FOLDER, tmp_path / "big.ckpt", stage)
    for extras, limit in ((["optimizer"], 0.5), (["pt"], 1.3)):
        rise, size = map(int, python(CONVERT, tmp_path / "big.ckpt", tmp_path / "out", *extras).split()[-2:])
        assert size > 1e9 and rise < limit * size, f"{rise / size:.2f} times the weights with {extras}"
        shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "big.ckpt")
