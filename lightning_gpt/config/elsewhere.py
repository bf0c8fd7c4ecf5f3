"""Names that options of this package have in other programs; each is declared once, and error messages suggest ours.

``cli/nanogpt_flags.py`` declares nanoGPT's names, which are also accepted.
"""

# Options of lightning.Trainer that lightning_gpt sets itself, each with the flags that replace it; None if there are
# none.
TRAINER: dict[str, str | None] = {
    "accelerator": "--accelerator",
    "devices": "--devices",
    "num_nodes": "--num_nodes",
    "strategy": "--strategy",
    "precision": "--precision",
    "plugins": None,
    "logger": "--logger",
    "callbacks": None,
    "max_epochs": "--max_epochs",
    "max_steps": "--max_steps",
    "max_time": "--max_time",
    "accumulate_grad_batches": "--accumulate_grad_batches",
    "gradient_clip_val": "--gradient_clip_val",
    "val_check_interval": "--eval_interval",
    "check_val_every_n_epoch": "--eval_interval",
    "num_sanity_val_steps": None,
    "log_every_n_steps": "--log_every_n_steps",
    "use_distributed_sampler": None,
    "enable_model_summary": None,
    "limit_train_batches": "--max_steps",
    "limit_val_batches": "--eval_batches",
    "overfit_batches": None,
    "fast_dev_run": "--max_steps 1 --eval_batches 1 --logger none",
    "default_root_dir": "--out_dir",
    "deterministic": "--deterministic",
}

# Other options of lightning.Trainer, which --trainer.NAME sets.
PASSED_ON = frozenset(
    "barebones benchmark detect_anomaly enable_autolog_hparams enable_checkpointing enable_progress_bar"
    " gradient_clip_algorithm inference_mode limit_predict_batches limit_test_batches min_epochs min_steps"
    " model_registry profiler reload_dataloaders_every_n_epochs sync_batchnorm".split()
)

# Names of Hugging Face's Trainer, and common short ones.
OTHERS = {
    "adam_beta1": "--beta1",
    "adam_beta2": "--beta2",
    "bf16": "--precision bf16",
    "bs": "--batch_size",
    "dataset_name": "--data",
    "epochs": "--max_epochs",
    "eval_steps": "--eval_interval",
    "fp16": "--precision 16",
    "gradient_checkpointing": "--recompute",
    "logging_steps": "--log_every_n_steps",
    "lr": "--learning_rate",
    "max_grad_norm": "--gradient_clip_val",
    "model_name_or_path": "--init_from",
    "num_train_epochs": "--max_epochs",
    "output_dir": "--out_dir",
    "per_device_train_batch_size": "--batch_size",
    "report_to": "--logger",
    "resume_from_checkpoint": "--resume",
    "save_steps": "--save_interval",
    "save_total_limit": "--keep",
    "torch_compile": "--compile",
    "train_file": "--data",
    "wd": "--weight_decay",
}
