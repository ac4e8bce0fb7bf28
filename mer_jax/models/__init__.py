"""Flax modules, one file per model (floor 3)."""
