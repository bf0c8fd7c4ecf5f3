"""The registry of models, their contract, and the tools for any model: cache, generation, compilation, sharding."""
