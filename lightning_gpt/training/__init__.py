"""Training runs: setting them up, their callbacks, and the header that they print."""
