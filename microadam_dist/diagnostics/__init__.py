"""What an installation can do, and what a run does."""
