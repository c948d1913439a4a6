"""Backends: the whole fused step over all tensors of a group."""
