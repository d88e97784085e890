"""Measurements of what a model is worth: texts and models in, plain figures out; for `eval` and the quality card."""
