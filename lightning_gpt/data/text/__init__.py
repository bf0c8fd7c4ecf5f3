"""Text to train on: find files (corpora.py), read documents (documents.py), fetch named data sets (sets.py)."""
