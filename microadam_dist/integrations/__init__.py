"""Trainer and Accelerate."""
