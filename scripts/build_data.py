"""Builds a data set: ``python scripts/build_data.py --dataset four_dme/demo``."""

import sys
from pathlib import Path

# Works from a clone, without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_builders.command_line import main
from mer_jax.cli import open_door

if __name__ == "__main__":
    open_door(main)
