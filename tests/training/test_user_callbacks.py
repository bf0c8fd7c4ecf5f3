"""Lightning's callbacks in lightning_gpt.train do what docs/extending.md says of them."""

import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, Timer

import lightning_gpt
from lightning_gpt.cli import parse_train

SORT = "--data=sort --n_layer=1 --n_head=1 --n_embd=16 --batch_size=4 --eval_batches=1 --logger=none --sample_tokens=0"
RUN = [*SORT.split(), "--accelerator=cpu", "--eval_interval=2"]


def _train(*flags: str, callbacks: list) -> None:
    lightning_gpt.train(parse_train(list(flags)), callbacks=callbacks)


def _saved(run) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def test_early_stopping_at_a_value_and_the_best_k_of_a_metric(tmp_path):
    run, kept = tmp_path / "run", tmp_path / "kept"
    stop = EarlyStopping("val_accuracy", mode="max", patience=9, stopping_threshold=-1.0)  # reached at once
    best = ModelCheckpoint(kept, filename="{step}", monitor="val_loss", mode="max", save_top_k=2)
    _train(*RUN, "--max_steps=8", f"--out_dir={run}", callbacks=[best])
    # The loss falls, so the highest ones are the first ones, and not the newest.
    assert sorted(path.name for path in kept.iterdir()) == ["step=2.ckpt", "step=4.ckpt"]
    _train(f"--resume={run}", "--max_steps=90", callbacks=[stop])
    assert _saved(run)["global_step"] == 10


def test_timer_counts_all_sessions(tmp_path):
    run = tmp_path / "run"
    _train(*RUN, "--max_steps=2", f"--out_dir={run}", callbacks=[Timer(duration={"hours": 1}, interval="step")])
    used = _saved(run)["callbacks"]["Timer"]["time_elapsed"]["train"]
    assert used > 0
    _train(f"--resume={run}", "--max_steps=90", callbacks=[Timer(duration={"seconds": used / 2}, interval="step")])
    assert _saved(run)["global_step"] == 2  # the time is already used


def test_averages_of_lightning_are_saved(tmp_path):
    average = EMAWeightAveraging(decay=0.5, update_every_n_steps=2, use_buffers=False)
    _train(*RUN, "--max_steps=2", f"--out_dir={tmp_path}", callbacks=[average])
    saved = _saved(tmp_path)  # updated after step 1 only
    module, _ = lightning_gpt.load(tmp_path, which="last")
    torch.testing.assert_close(dict(module.state_dict()), saved["state_dict"], rtol=0, atol=0)
    assert not torch.equal(
        saved["state_dict"]["model.lm_head.weight"], saved["current_model_state"]["model.lm_head.weight"]
    )
