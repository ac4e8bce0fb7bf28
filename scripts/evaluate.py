"""Evaluates runs from their predictions alone; nothing is trained.

python scripts/evaluate.py report runs/A             scores again: summary.json, report.html; also of a grid
python scripts/evaluate.py compare runs/A runs/B     A against B on the same folds and seeds
"""

import argparse
import sys
from pathlib import Path

# Works from a clone, without installation.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mer_jax.cli import open_door


def main() -> None:
    """Parses the command line and runs the command."""
    # Flags that are not given stay out of the namespace, so that what is left are the overrides.
    settings = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    group = settings.add_argument_group("evaluation settings (default: those of the run's config.json)")
    group.add_argument("--phases", help="how a view's phases are combined: mean, max or onset_apex")
    group.add_argument("--views", help="how a clip's views are combined: mean, max or or")
    group.add_argument(
        "--thresholds",
        help="fixed, or tuned on inner splits: global or per_class; argmax, the only one where a clip has one class",
    )
    group.add_argument("--fixed-threshold", type=numbers, help="a number, or one a label separated by commas")
    group.add_argument(
        "--negative-excludes-positive",
        action=argparse.BooleanOptionalAction,
        help="drop Positive where Negative is predicted",
    )
    group.add_argument(
        "--selection",
        help="what chooses among hyper-parameters on inner splits: average_precision, loss or macro_f1",
    )
    group.add_argument("--bootstrap", type=int, help="bootstrap replicates and permutations")
    group.add_argument("--confidence", type=float, help="level of all intervals, e.g. 0.95")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", parents=[settings], help="score a run again")
    report.add_argument("workdir", help="folder of a run or a grid, as scripts/train.py wrote it")
    compare = commands.add_parser("compare", parents=[settings], help="compare two runs")
    compare.add_argument("workdir_a", help="run A")
    compare.add_argument("workdir_b", help="run B")
    overrides = vars(parser.parse_args())
    if overrides.pop("command") == "report":
        _report(overrides.pop("workdir"), overrides)
    else:
        _compare(overrides.pop("workdir_a"), overrides.pop("workdir_b"), overrides)


def _report(workdir: str, overrides: dict) -> None:
    from mer_jax.study.grid_rows import is_grid

    if is_grid(workdir):
        from mer_jax.report.grid_html import write_grid_report
        from mer_jax.report.grid_tables import terminal_tables
        from mer_jax.study.grid_summary import write_grid_summary

        print(terminal_tables(write_grid_summary(workdir, overrides)))
        print(f"report: {write_grid_report(workdir)}")
        return
    from mer_jax.report.html import write_report
    from mer_jax.report.tables import terminal_table
    from mer_jax.study.summary import write_summary

    print(terminal_table(write_summary(workdir, overrides)))
    print(f"report: {write_report(workdir)}")


def _compare(workdir_a: str, workdir_b: str, overrides: dict) -> None:
    from mer_jax.study.comparison import compare, format_comparison

    print(format_comparison(compare(workdir_a, workdir_b, overrides)))


def numbers(text: str) -> float | list[float]:
    """One number, or a list of several separated by commas."""
    values = [float(part) for part in text.split(",")]
    return values[0] if len(values) == 1 else values


if __name__ == "__main__":
    open_door(main)
