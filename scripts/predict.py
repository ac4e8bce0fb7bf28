"""Predicts clips with a trained study.

python scripts/predict.py --workdir runs/fusion --split test --submission out.csv
"""

import argparse
import sys
from pathlib import Path

# Works from a clone, without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mer_jax.cli import open_door


def main() -> None:
    """Flags to one function."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="run folder, as scripts/train.py wrote it")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="train: out of fold")
    parser.add_argument("--member", help="one member, such as fold0-seed3; the ensemble of all by default")
    parser.add_argument("--submission", help="CSV to write: Id,Negative,Positive,Repression,Surprise,Others")
    flags = parser.parse_args()
    open_door(_predict, flags)


def _predict(flags: argparse.Namespace) -> None:
    from mer_jax.study.predict import predict_run

    predict_run(flags.workdir, split=flags.split, member=flags.member, submission=flags.submission)


if __name__ == "__main__":
    main()
