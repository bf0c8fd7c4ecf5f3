"""What the model learns from: corpora (what text), how it becomes token files, streams (in what order)."""
