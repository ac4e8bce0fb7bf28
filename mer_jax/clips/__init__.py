"""Frames: layouts on disk, views, faces, crops, resampling, demo clips (floor 1)."""
