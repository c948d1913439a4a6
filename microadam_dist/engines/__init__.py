"""Engine adapters: what the local tensors of an engine hold, as spans of the model's parameters."""
