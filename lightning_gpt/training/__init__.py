"""Put a training run together and run it."""
