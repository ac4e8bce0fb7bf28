"""Folds x seeds: members, the training engine, checkpoints, results (floor 4)."""
