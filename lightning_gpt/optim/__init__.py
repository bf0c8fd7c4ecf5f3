"""Optimizers: the registry, parameter groups, the learning-rate schedule, AdamW and Muon."""
