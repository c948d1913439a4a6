"""Checkpoints: the schema of the saved state, and its remapping to another number of ranks."""
