"""`microadam bench`: optimizer steps side by side in one process."""
