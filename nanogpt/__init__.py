"""nanoGPT: a compact GPT-2 for a single device."""
