"""The benchmarks of bench.py, one file each; ``registry`` lists them."""
