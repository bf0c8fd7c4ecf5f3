"""A GPT with the architectural improvements found since GPT-2, for a single device."""
