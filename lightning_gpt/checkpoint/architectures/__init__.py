"""Adapters: config and weights of architectures defined elsewhere."""
