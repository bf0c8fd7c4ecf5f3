"""What the model learns from: corpora (what text), token files (how stored), streams (in what order)."""
