"""Metrics, thresholds and statistics: pure functions of arrays (floor 3)."""
