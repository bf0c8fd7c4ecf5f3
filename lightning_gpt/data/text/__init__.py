"""Text to train on: corpora, documents, named sets."""
