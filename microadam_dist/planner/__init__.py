"""Predicts memory with the layout arithmetic that also allocates it."""
