"""The LightningModules and their FSDP and DeepSpeed forms, from Python; options that strategies refuse."""

import json
import sys

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader, TensorDataset

import evaluate
import train
from lightning_gpt.config import TrainerOptions
from lightning_gpt.models import (
    FORMS,
    DeepSpeedMinGPT,
    DeepSpeedModernGPT,
    DeepSpeedNanoGPT,
    FSDPMinGPT,
    FSDPModernGPT,
    FSDPNanoGPT,
    GPTModule,
    MinGPT,
    ModernGPT,
    NanoGPT,
)
from lightning_gpt.optim.adamw import AdamW, deepspeed_adam
from lightning_gpt.strategies import ALIASES, STRATEGIES

SIZES = dict(vocab_size=10, block_size=8, model_type=None, n_layer=2, n_head=2, n_embd=16)


def fit(module: GPTModule, **settings) -> Trainer:
    """Train to count up from 0 under a plain Trainer."""
    idx = torch.arange(9).repeat(64, 1)
    loader = DataLoader(TensorDataset(idx[:, :-1], idx[:, 1:]), batch_size=8)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(**dict(accelerator="cpu", devices=1, gradient_clip_val=1.0, max_epochs=1) | quiet | settings)
    trainer.fit(module, loader, loader)
    return trainer


PLAIN = (MinGPT, NanoGPT, ModernGPT)
PAIRS = [
    *zip((FSDPMinGPT, FSDPNanoGPT, FSDPModernGPT), PLAIN, strict=True),
    *zip((DeepSpeedMinGPT, DeepSpeedNanoGPT, DeepSpeedModernGPT), PLAIN, strict=True),
]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("form", "plain"), PAIRS)
def test_form_trains_as_the_plain_module(form, plain, recompute, tmp_path):
    modules, losses = [], []
    for cls in (plain, form):
        torch.manual_seed(5)
        module = cls(**SIZES, learning_rate=1e-2, recompute=recompute)
        losses.append(fit(module, max_epochs=8).callback_metrics["val_loss"].item())
        modules.append(module.eval())
    ours, theirs = (module.model.state_dict() for module in modules)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert losses[0] == losses[1] < 1.0
    assert modules[1].generate(torch.arange(3)[None], 4, do_sample=False).tolist() == [[0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize(("form", "plain"), PAIRS)
def test_form_is_on_meta_until_configured_and_saves_a_plain_checkpoint(form, plain, tmp_path):
    module = form(**SIZES)
    assert all(p.is_meta for p in module.parameters())
    trainer = fit(module)
    trainer.save_checkpoint(tmp_path / "form.ckpt")
    again = plain.load_from_checkpoint(tmp_path / "form.ckpt", weights_only=True, strict=True)
    torch.testing.assert_close(again.model.state_dict(), module.model.state_dict(), rtol=0, atol=0)
    tied = plain is NanoGPT
    for model in (module.model, again.model):
        assert (model.lm_head.weight is model.transformer.wte.weight) == tied


@pytest.mark.parametrize("cls", [*PLAIN, *(form for form, _ in PAIRS)])
def test_load_from_checkpoint_of_own_and_other_forms(cls, tmp_path):
    """Check that model, training and optimizer arguments are restored, and that given arguments override them."""
    plain = next(base for base in PLAIN if issubclass(cls, base))
    module = fit(plain(**SIZES, learning_rate=0.3, optimizer="muon", muon_learning_rate=0.05), max_steps=1)
    module.save_checkpoint(tmp_path / "plain.ckpt")
    written = cls(**SIZES, recompute=True)
    fit(written, max_steps=1).save_checkpoint(tmp_path / "own.ckpt")
    again = cls.load_from_checkpoint(tmp_path / "own.ckpt", weights_only=True, strict=True, weight_decay=0.7)
    assert again.recompute and again.weight_decay == 0.7 and again.model_config == written.model_config
    torch.testing.assert_close(again.model.state_dict(), written.model.state_dict(), rtol=0, atol=0)
    if not issubclass(cls, FORMS["deepspeed"]):  # DeepSpeed refuses muon
        again = cls.load_from_checkpoint(tmp_path / "plain.ckpt", weights_only=True)
        assert again.learning_rate == 0.3 and again.optimizer_options == {"muon_learning_rate": 0.05}
    if cls is plain:
        again = GPTModule.load_from_checkpoint(tmp_path / "own.ckpt", weights_only=True)
        assert again.model_config == written.model_config


def test_load_from_checkpoint_of_earlier_versions(tmp_path):
    """Load a checkpoint that stores muon's learning rate although its optimizer is AdamW."""
    module = NanoGPT(**SIZES)
    fit(module, max_steps=1).save_checkpoint(tmp_path / "own.ckpt")
    content = torch.load(tmp_path / "own.ckpt", weights_only=True)
    assert "muon_learning_rate" not in content["hyper_parameters"]
    content["hyper_parameters"]["muon_learning_rate"] = 0.02
    torch.save(content, tmp_path / "old.ckpt")
    again = NanoGPT.load_from_checkpoint(tmp_path / "old.ckpt", weights_only=True)
    assert again.optimizer_options == {}
    torch.testing.assert_close(again.model.state_dict(), module.model.state_dict(), rtol=0, atol=0)


def test_unknown_argument_is_refused():
    for build in (lambda **more: NanoGPT(**SIZES, **more), lambda **more: DeepSpeedNanoGPT(**SIZES, **more)):
        with pytest.raises(TypeError, match="unexpected keyword argument 'muon_learning_rat'"):
            build(muon_learning_rat=0.1)


def test_module_without_memory_has_the_same_names_and_shapes():
    fields = {name: value for name, value in SIZES.items() if name != "model_type"}
    module = GPTModule.without_memory("nanogpt", model_config=fields, optimizer="muon")
    assert all(p.is_meta for p in module.parameters()) and module.hidden_matrices
    shapes = {name: tensor.shape for name, tensor in module.model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in NanoGPT(**SIZES).model.state_dict().items()}


@pytest.mark.parametrize("form", [DeepSpeedMinGPT, DeepSpeedNanoGPT])
def test_fused_adam_and_offload_exclude_each_other(form):
    with pytest.raises(RuntimeError) as error:
        form(**SIZES, fused_adam=True, offload=True)
    assert str(error.value) == (
        "Cannot use FusedAdam and CPUAdam at the same time! Please set either `fused_adam` or `offload` to False."
    )
    module = form(**SIZES)
    assert (module.fused_adam, module.offload) == (True, False)
    assert form(**SIZES, fused_adam=False, offload=True).offload


@pytest.mark.slow
def test_offload_trains_under_a_plain_trainer_with_cpu_adam():
    pytest.importorskip("deepspeed")
    modules = []
    for cls, settings in ((NanoGPT, {}), (DeepSpeedNanoGPT, {"fused_adam": False, "offload": True})):
        torch.manual_seed(5)
        module = cls(**SIZES, learning_rate=1e-2, **settings)
        trainer = fit(module)
        modules.append(module)
    assert type(trainer.optimizers[0]).__name__ == "DeepSpeedCPUAdam"
    ours, theirs = (module.model.state_dict() for module in modules)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_fused_adam_is_chosen_if_it_compiles(monkeypatch):
    """Replace FusedAdam, which needs a GPU, to check that it is chosen, and its arguments."""
    adam = pytest.importorskip("deepspeed.ops.adam")
    monkeypatch.setattr(adam, "FusedAdam", lambda groups, **settings: (groups, settings))
    weight = torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [weight], "weight_decay": 0.5}]
    choice = dict(learning_rate=1e-3, betas=(0.9, 0.95), on_host=False)
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "adam_w_mode": True}
    assert deepspeed_adam(groups, **choice, fused=True) == (groups, settings)
    assert type(deepspeed_adam(groups, **choice, fused=False)) is AdamW

    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("no nvcc\nand more")

    monkeypatch.setattr(adam, "FusedAdam", no_compiler)
    with pytest.warns(UserWarning, match="FusedAdam cannot be compiled here .no nvcc."):
        assert type(deepspeed_adam(groups, **choice, fused=True)) is AdamW


@pytest.mark.gpu
def test_fused_adam_on_a_gpu():
    builder = pytest.importorskip("deepspeed.ops.op_builder").FusedAdamBuilder()
    try:
        builder.load()
        expected = "FusedAdam"
    except Exception:  # without nvcc, or with one of another version
        expected = "AdamW"
    trainer = fit(DeepSpeedNanoGPT(**SIZES), accelerator="gpu")
    assert type(trainer.optimizers[0]).__name__ == expected


def test_strategy_names_and_aliases():
    stages = [f"deepspeed_stage_{stage}" for stage in ("1", "2", "3", "2_offload", "3_offload")]
    assert list(STRATEGIES) == ["auto", "ddp", "fsdp", *stages]
    assert ALIASES == {"deepspeed": "deepspeed_stage_2", "fsdp_native": "fsdp"}
    assert TrainerOptions().strategy == "auto"
    assert {name: row.form for name, row in STRATEGIES.items()} == {
        "auto": "plain",
        "ddp": "plain",
        "fsdp": "fsdp",
        **dict.fromkeys(stages, "deepspeed"),
    }
    for name in stages:
        offload = name.endswith("offload")
        assert STRATEGIES[name].form_options == {"offload": offload, "fused_adam": not offload}
    assert {name for name, row in STRATEGIES.items() if row.deepspeed_engine} == set(stages)
    assert {name for name, row in STRATEGIES.items() if row.clip_algorithms == ("norm",)} == set(stages)


class Stop(Exception):
    """Raised in place of training."""


@pytest.mark.parametrize("alias", ALIASES)
def test_alias_is_the_same_strategy(alias, tiny_flags, text_file, tmp_path, monkeypatch):
    if alias == "deepspeed":
        pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    made = []

    def fit(trainer, module, data):
        made.append((type(trainer.strategy), getattr(trainer.strategy, "config", None), type(module)))
        raise Stop

    monkeypatch.setattr(Trainer, "fit", fit)
    for name in (alias, ALIASES[alias]):
        with pytest.raises(Stop):
            train.main([*tiny_flags, f"--data={text_file}", f"--out_dir={tmp_path / name}", f"--strategy={name}"])
    assert made[0] == made[1] and made[0][2] is FORMS[STRATEGIES[ALIASES[alias]].form]


@pytest.fixture
def refused(refused, tmp_path, monkeypatch, text_file, tiny_flags):
    """Return a function that calls train.py with more flags, and checks that it refuses and leaves no file behind."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def call(*flags, mentions, main=train.main):
        start = [*tiny_flags, f"--data={text_file}"] if main is train.main else []
        refused(main, *start, *flags, mentions=mentions)
        assert list(folder.iterdir()) == [], "something was left behind"

    return call


@pytest.mark.parametrize("strategy", ["deepspeed", *(name for name in STRATEGIES if name.startswith("deepspeed"))])
def test_missing_deepspeed_is_refused(strategy, refused, monkeypatch, tiny_run):
    monkeypatch.setattr("lightning_gpt.strategies.deepspeed.find_spec", lambda name: None)
    flags = ["--strategy", strategy]
    refused(*flags, mentions=["pip install -r requirements/deepspeed.txt"])
    flags += ["--checkpoint", tiny_run, "--accelerator", "cpu"]
    refused(*flags, mentions=["pip install -r requirements/deepspeed.txt"], main=evaluate.main)


def test_missing_deepspeed_with_a_config_is_refused(refused, monkeypatch, tmp_path):
    monkeypatch.setattr("lightning_gpt.strategies.deepspeed.find_spec", lambda name: None)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    refused("--deepspeed_config", tmp_path / "ds.json", mentions=["pip install -r requirements/deepspeed.txt"])


OFFLOAD_FILE = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize("flag", ["deepspeed_stage_2_offload", "deepspeed_stage_3_offload", "file"])
def test_offload_without_compiler_tools_is_refused(flag, refused, monkeypatch, tmp_path):
    pytest.importorskip("deepspeed")
    (tmp_path / "ds.json").write_text(json.dumps(OFFLOAD_FILE))
    flags = ["--deepspeed_config", tmp_path / "ds.json"] if flag == "file" else ["--strategy", flag]
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(*flags, mentions=["DeepSpeedCPUAdam", "pip install ninja"])
    for name in ("ninja", "no-compiler"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / "ninja").chmod(0o755)
    refused(*flags, mentions=["DeepSpeedCPUAdam", "C++ compiler", "no c++ here", "install g++"])
    monkeypatch.setenv("CXX", "no-such-c++")
    refused(*flags, mentions=["no no-such-c++ here"])


@pytest.mark.parametrize("strategy", ["auto", "fsdp", "deepspeed_stage_2"])
@pytest.mark.parametrize("mode", ["true", "max-autotune"])
def test_compile_without_a_compiler_is_refused(strategy, mode, refused, monkeypatch, tmp_path):
    if "deepspeed" in strategy:
        pytest.importorskip("deepspeed")
    monkeypatch.setenv("PATH", str(tmp_path))
    refused("--compile", mode, "--strategy", strategy, mentions=["--compile", "no c++ here", "install g++"])


ZERO = {"zero_optimization": {"stage": 2}}
# Content of the file, more flags, and texts in the error.
FILES = {
    "missing": (None, [], ["ds.json", "No such file"]),
    "no JSON": ("{'stage': 2}", [], ["ds.json", "line 1"]),
    "no JSON, later": ('{\n"zero_optimization": {\n"stage": 2,}}', [], ["ds.json", "line 3"]),
    "no text": (b"\xff\xfe\x00", [], ["ds.json"]),
    "a list": ([1], [], ["JSON object"]),
    "optimizer": (ZERO | {"optimizer": {"type": "Adam"}}, [], ["remove optimizer"]),
    "muon": (ZERO, ["--optimizer=muon"], ["--optimizer muon", "DeepSpeed", "whole matrix"]),
    "scheduler": (ZERO | {"scheduler": {"type": "WarmupLR"}}, [], ["remove scheduler"]),
    "micro batch": (
        ZERO | {"train_micro_batch_size_per_gpu": 3},
        [],
        ["train_micro_batch_size_per_gpu is 3", "flags make it 4"],
    ),
    "batch": (ZERO | {"train_batch_size": 16}, ["--grad_accum=2"], ["train_batch_size is 16", "make it 8"]),
    "accumulation": (
        ZERO | {"gradient_accumulation_steps": 2},
        ["--grad_accum=3"],
        ["gradient_accumulation_steps is 2", "make it 3"],
    ),
    "clipping": (ZERO | {"gradient_clipping": 0.5}, [], ["gradient_clipping is 0.5", "make it 1.0"]),
    "bf16": (ZERO | {"bf16": {"enabled": True}}, [], ["bf16 is enabled", "--precision bf16"]),
    "fp16": (ZERO | {"fp16": {"enabled": True}}, ["--precision=bf16"], ["fp16 is enabled", "--precision 16"]),
    "no stage": ({}, [], ["stage is 0", "give 1, 2 or 3"]),
    "stage 0": ({"zero_optimization": {"stage": 0}}, [], ["stage is 0", "give 1, 2 or 3"]),
    "stage 4": ({"zero_optimization": {"stage": 4}}, [], ["stage is 4", "give 1, 2 or 3"]),
    "stage as a text": ({"zero_optimization": {"stage": "2"}}, [], ["stage is 2", "give 1, 2 or 3"]),
    "other strategy": (ZERO, ["--strategy=fsdp"], ["--deepspeed_config", "not fsdp"]),
    "other stage": (ZERO, ["--strategy=deepspeed_stage_3"], ["--deepspeed_config", "not deepspeed_stage_3"]),
    "double precision": (ZERO, ["--precision=64"], ["64", "32-true"]),
    "zero as a number": ({"zero_optimization": 2}, [], ["zero_optimization"]),
    "bf16 as a switch": (ZERO | {"bf16": True}, ["--precision=bf16"], ["bf16"]),
    "offload as a text": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
        [],
        ["offload_optimizer"],
    ),
    "unknown option of ZeRO": ({"zero_optimization": {"stage": 2, "stag3_live": 1}}, [], ["stag3_live"]),
    "activation checkpointing": (
        ZERO | {"activation_checkpointing": {}},
        [],
        ["activation_checkpointing", "--recompute"],
    ),
    "no bf16": (ZERO | {"bf16": {"enabled": False}}, ["--precision=bf16"], ["bf16 is not enabled"]),
    "nvme": ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, [], ["offload_param", "nvme"]),
    "bucket as a text": ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}}, [], ["reduce_bucket_size"]),
    "value of ZeRO": ({"zero_optimization": {"stage": 2, "overlap_comm": "perhaps"}}, [], ["overlap_comm"]),
}


@pytest.mark.parametrize("case", FILES)
def test_wrong_deepspeed_config_is_refused(case, refused, tmp_path):
    pytest.importorskip("deepspeed")
    content, flags, mentions = FILES[case]
    if content is not None:
        encoded = content if isinstance(content, str | bytes) else json.dumps(content)
        (tmp_path / "ds.json").write_bytes(encoded.encode() if isinstance(encoded, str) else encoded)
    refused("--deepspeed_config", tmp_path / "ds.json", *flags, mentions=mentions)


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name.startswith("deepspeed")])
def test_deepspeed_refuses_muon(strategy, refused):
    pytest.importorskip("deepspeed")
    for more in ([], ["--dry_run"]):
        refused(
            "--strategy", strategy, "--optimizer=muon", *more, mentions=["--optimizer muon", "whole matrix", "fsdp"]
        )


def test_deepspeed_refuses_clipping_by_value(refused):
    pytest.importorskip("deepspeed")
    flags = ["--strategy=deepspeed", "--trainer.gradient_clip_algorithm=value"]
    refused(*flags, mentions=["gradient_clip_algorithm"])


def test_initial_weights_are_drawn_on_the_cpu():
    """Build with the meta device as the default device, as Lightning does with the GPU."""
    torch.manual_seed(7)
    plain = NanoGPT(**SIZES).model.state_dict()
    torch.manual_seed(7)
    form = FSDPNanoGPT(**SIZES)
    with torch.device("meta"):
        form.configure_model()
    torch.testing.assert_close(form.model.state_dict(), plain, rtol=0, atol=0)


@pytest.mark.parametrize("strategy", ["fsdp", *(name for name in STRATEGIES if name.startswith("deepspeed"))])
def test_unsupported_precision_is_refused(strategy, refused):
    if strategy != "fsdp":
        pytest.importorskip("deepspeed")
    refused("--strategy", strategy, "--precision=64", mentions=["--precision 64", f"--strategy {strategy}", "32-true"])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="seen on Linux")
def test_max_autotune_trains_as_eager(tmp_path, tiny_flags, text_file):
    losses = []
    for name, flags in (("eager", []), ("tuned", ["--compile", "max-autotune"])):
        out = [f"--out_dir={tmp_path / name}", f"--data={text_file}", "--implementation=nanogpt"]
        train.main([*tiny_flags, *out, "--sample_tokens=0", *flags])
        file = tmp_path / name / "checkpoints" / "last.ckpt"
        losses.append(torch.load(file, weights_only=True))
    torch.testing.assert_close(losses[0]["state_dict"], losses[1]["state_dict"], rtol=1e-3, atol=1e-4)
