"""What a model must offer, the registry of models, and what the library does to any of them from outside."""
