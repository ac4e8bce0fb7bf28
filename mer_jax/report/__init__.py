"""Tables, plots and one self-contained HTML page per study (floor 5)."""
