"""Score checkpoints, compare the scores, and rewrite checkpoints in other forms."""
