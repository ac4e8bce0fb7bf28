"""Extracts features with a network from its official weights.

python scripts/extract_features.py --extractor radio_v2.5-g --weights FILE --dataset four_dme/challenge
"""

import sys
from pathlib import Path

# Works from a clone, without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_builders.extraction_command_line import main
from mer_jax.cli import open_door

if __name__ == "__main__":
    open_door(main)
