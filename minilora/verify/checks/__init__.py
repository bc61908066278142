"""The checks by level: one module each, from a single layer to a whole model's training step."""
