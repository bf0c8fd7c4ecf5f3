"""minGPT: a small, readable GPT for a single device."""
