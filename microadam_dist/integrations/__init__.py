"""Adapters to training libraries."""
