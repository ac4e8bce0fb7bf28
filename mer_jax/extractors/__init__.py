"""Per-frame features: frames in, (T, D) out (floor 2)."""
