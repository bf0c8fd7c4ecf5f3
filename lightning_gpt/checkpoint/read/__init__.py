"""Readers: one file for each stored form of a checkpoint."""
