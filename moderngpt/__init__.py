"""A GPT with what has been found since GPT-2 to learn faster, for a single device."""
