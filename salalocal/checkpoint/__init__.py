"""A model folder on disk: found, checked, read tensor by tensor, written; for the engine and the quantizer."""
