"""Benchmarks of bench.py: one file each, listed in ``registry``."""
