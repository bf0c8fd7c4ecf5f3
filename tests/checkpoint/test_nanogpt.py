"""nanoGPT's own ckpt.pt: its characters are found, and its run is resumed as nanoGPT would go on."""

import math
import pickle

import numpy as np
import pytest
import torch

import evaluate
import sample
import train
from lightning_gpt.checkpoint import open_checkpoint
from lightning_gpt.data.streams import TokenStream
from lightning_gpt.data.tokens.token_files import open_token_files
from nanogpt.model import GPT, GPTConfig

CHARS = "\n abcdefghijkl"
SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 6, "bias": False, "vocab_size": len(CHARS)}
STEP, STEPS = 4, 8
CONFIG = {
    "out_dir": "out-letters",
    "dataset": "letters",
    "batch_size": 3,
    "gradient_accumulation_steps": 2,
    "block_size": 6,
    "learning_rate": 1e-2,
    "max_iters": STEPS,
    "lr_decay_iters": 10,
    "warmup_iters": 2,
    "min_lr": 1e-3,
    "decay_lr": True,
    "weight_decay": 0.3,
    "beta1": 0.8,
    "beta2": 0.9,
    "grad_clip": 0.5,
    "dropout": 0.0,
    "eval_interval": 4,
    "eval_iters": 2,
    "log_interval": 1,
    "device": "cuda",
    "compile": True,
}
ON_CPU = ["--accelerator=cpu", "--devices=1", "--logger=none", "--sample_tokens=4"]


def rate(it):
    """nanoGPT's schedule, from its description: linear warm-up, then half a cosine."""
    if it < CONFIG["warmup_iters"]:
        return CONFIG["learning_rate"] * (it + 1) / (CONFIG["warmup_iters"] + 1)
    ratio = (it - CONFIG["warmup_iters"]) / (CONFIG["lr_decay_iters"] - CONFIG["warmup_iters"])
    share = 0.5 * (1 + math.cos(math.pi * ratio))
    return CONFIG["min_lr"] + share * (CONFIG["learning_rate"] - CONFIG["min_lr"])


def adamw(model):
    """nanoGPT's optimizer: matrices decay, in the order of the model, and other weights do not."""
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.dim() >= 2], "weight_decay": CONFIG["weight_decay"]},
        {"params": [w for w in weights if w.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=CONFIG["learning_rate"], betas=(CONFIG["beta1"], CONFIG["beta2"]))


def take_steps(model, optimizer, batches, start):
    """Train as nanoGPT's loop does, with one step for every two batches."""
    for it, pair in enumerate(zip(batches[::2], batches[1::2], strict=True), start):
        for group in optimizer.param_groups:
            group["lr"] = rate(it)
        for idx, targets in pair:
            (model(idx, targets)[1] / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG["grad_clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Return nanoGPT's folder after four steps: data/letters, out-letters/ckpt.pt, and the model."""
    letters, draw = tmp_path / "data" / "letters", np.random.default_rng(0)
    letters.mkdir(parents=True)
    for split, size in (("train", 900), ("val", 101)):
        draw.integers(len(CHARS), size=size).astype("<u2").tofile(letters / f"{split}.bin")
    meta = {"vocab_size": len(CHARS), "itos": dict(enumerate(CHARS)), "stoi": {c: i for i, c in enumerate(CHARS)}}
    (letters / "meta.pkl").write_bytes(pickle.dumps(meta))
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES, dropout=0.0))
    optimizer = adamw(model)
    random = [torch.randint(len(CHARS), (2, 3, 6)) for _ in range(2 * STEP)]
    take_steps(model, optimizer, [tuple(pair) for pair in random], 0)
    out = tmp_path / "out-letters"
    out.mkdir()
    content = {
        "model": {f"_orig_mod.{name}": weight for name, weight in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": SIZES | {"dropout": 0.0},
        "iter_num": STEP,
        "best_val_loss": torch.tensor(1.5),
        "config": CONFIG,
    }
    torch.save(content, out / "ckpt.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path, model, optimizer


def test_resumed_run_goes_on_as_nanogpt_would(project, capsys):
    folder, model, optimizer = project
    train.main([f"--resume={folder / 'out-letters' / 'ckpt.pt'}", f"--out_dir={folder / 'run'}", *ON_CPU])
    ours = open_checkpoint(folder / "run" / "checkpoints" / "last.ckpt")
    tokens = open_token_files(folder / "data" / "letters").opener("train")
    samples = np.arange(STEP * 2 * 3, STEPS * 2 * 3).reshape(-1, 3)
    batches = TokenStream(tokens, n_tokens=900, block_size=6, seed=1337).batches(samples)
    take_steps(model, optimizer, list(batches), STEP)
    assert ours.step == STEPS
    for name, weight in model.state_dict().items():
        assert torch.allclose(ours.weight(name), weight, rtol=1e-6, atol=1e-7), name
    # Random letters never reach the loss of 1.5 that the checkpoint records, so there is no better one.
    assert not (folder / "run" / "checkpoints" / "best.ckpt").exists()
    out, err = capsys.readouterr()
    assert "step 8:" in out and err == ""


def test_typed_flags_win_and_out_dir_can_be_nanogpts(project, capsys):
    train.main(["--init_from=resume", "--out_dir=out-letters", "--max_iters=6", "--batch_size=6", *ON_CPU])
    out = capsys.readouterr().out
    assert "of 36 tokens (6 x 6 x 1 micro-batches x 1 devices," in out and "step 6:" in out


def test_what_cannot_be_resumed_is_refused(project, refused):
    folder, *_ = project
    file = folder / "out-letters" / "ckpt.pt"
    content = torch.load(file)
    torch.save(content | {"iter_num": 8}, file)
    refused(train.main, f"--resume={file}", *ON_CPU, mentions="already at step 8 of 8; raise --max_steps")
    for config in ({"dataset": "elsewhere"}, {"dataset": "../data/letters"}, {"dataset": str(folder / "data/letters")}):
        torch.save(content | {"config": CONFIG | config}, file)
        refused(train.main, f"--resume={file}", *ON_CPU, mentions=[config["dataset"], "not found; give --data"])
    torch.save(content | {"optimizer": {"state": {}, "param_groups": []}}, file)
    refused(train.main, f"--resume={file}", *ON_CPU, mentions="holds only weights; start from it with --init_from")


def test_characters_are_found_or_named(project, capsys, refused):
    folder, model, _ = project
    file = folder / "out-letters" / "ckpt.pt"
    flags = [f"--checkpoint={file}", "--accelerator=cpu"]
    sample.main([*flags, "--prompt=abc", "--max_new_tokens=5", "--greedy"])
    text = capsys.readouterr().out
    assert text.startswith("abc") and len(text) == 9 and set(text) <= set(CHARS)
    evaluate.main([*flags, "--data=data/letters"])
    found = dict(line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
    # Every character is one byte.
    assert float(found["bits_per_byte"]) == pytest.approx(float(found["loss"]) / math.log(2) * 100 / 101, rel=1e-3)
    (folder / "data").rename(folder / "moved")
    refused(sample.main, *flags, mentions=["does not record its tokenizer", "--data"])
    refused(sample.main, *flags, "--tokenizer=char", mentions=["--tokenizer char", "--data"])
    refused(sample.main, *flags, "--tokenizer=byte", mentions=["256 tokens", "knows 14"])
    sample.main([*flags, "--data=moved/letters", "--prompt=abc", "--max_new_tokens=5", "--greedy"])
    assert capsys.readouterr().out == text
    (folder / "out-letters" / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    refused(sample.main, *flags, mentions=["meta.pkl is refused"])
    assert not (folder / "owned").exists()


def test_mingpts_adder_is_sampled_with_its_task(tmp_path, capsys):
    from mingpt.model import GPT as MinGPT

    config = MinGPT.get_default_config()
    config.model_type, config.vocab_size, config.block_size = "gpt-nano", 10, 6
    torch.save(MinGPT(config).state_dict(), tmp_path / "model.pt")
    sample.main([f"--checkpoint={tmp_path / 'model.pt'}", "--data=adder", "--prompt=8550", "--max_new_tokens=3"])
    text = capsys.readouterr().out
    assert text.startswith("8550") and text.strip().isdecimal() and len(text) == 8
