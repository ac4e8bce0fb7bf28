"""The command behind ``scripts/extract_features.py``."""

import argparse
import textwrap
from collections.abc import Sequence
from dataclasses import fields

from data_builders import four_dme
from data_builders.command_line import fields_told, frames_told, workers_told
from mer_jax.clips.crops import CropConfig
from mer_jax.errors import UserError
from mer_jax.extractors.networks import NETWORKS


def main(arguments: Sequence[str] | None = None) -> None:
    """Extracts the features that the command line asks for and prints where the data set is that holds them.

    Args:
        arguments: The command line without the program's name; the process's own unless given.

    Raises:
        UserError: An argument is wrong, or the data or the weights are.
    """
    flags = vars(_parser().parse_args(arguments))
    given = {name: value for name, value in flags.items() if value is not None}
    family, _, config = given["dataset"].partition("/")
    if family != "four_dme" or not config:
        names = ", ".join(f"four_dme/{name}" for name in four_dme.CONFIGS)
        raise UserError(f"--dataset {given['dataset']}: features are extracted for {names}")
    options = {**frames_told(given), **fields_told(given, crop=four_dme.default_crop(config))}
    options |= {name: given[name] for name in ("weights", "bundle", "data_dir", "dtype", "store") if name in given}
    batch_size = _batch_size(given["batch_size"])
    options["attention"] = given["attention"]
    with workers_told(flags["workers"], flags["cluster"], given["data_dir"]) as workers:
        built = four_dme.extract_features(given["extractor"], config, batch_size=batch_size, workers=workers, **options)
    print(built)


def _parser() -> argparse.ArgumentParser:
    names = textwrap.fill(" ".join(NETWORKS), 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    parser = argparse.ArgumentParser(
        prog="extract_features.py",
        usage="%(prog)s --extractor NAME --weights FILE --dataset four_dme/NAME [flags]",
        description="Extracts features with a network from its official weights, on all devices that JAX finds, and "
        "adds them to a data set. After an interruption, run it again: it goes on.",
        epilog=f"Extractors:\n{names}",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--extractor", required=True, metavar="NAME", help="the network, listed at the end")
    add("--weights", metavar="FILE", help="its official checkpoint, or the id of one on the Hugging Face hub "
        "(default: its own place there, if it has one)")  # fmt: skip
    add("--dataset", required=True, metavar="NAME", help="four_dme/demo, four_dme/challenge or four_dme/release")
    add("--data_dir", default="data", metavar="DIR", help="where everything is kept (default: %(default)s)")
    add("--bundle", metavar="DIR", help="published features to import, and to continue with --weights: a folder of "
        "feat2d/, feat3d/ and lr_image/, any of them")  # fmt: skip
    add("--attention", action="store_true", help="keep what a transformer attends to in each frame, too, for the "
        "report's pictures (as long again; also for features that are there already)")  # fmt: skip

    add = parser.add_argument_group("how it is computed").add_argument
    add("--batch_size", default="auto", metavar="N", help="images per device at once (default: as memory allows)")
    add("--dtype", choices=four_dme.DTYPES, help="precision of the network (default: float32)")
    add("--store", choices=four_dme.STORES, help="precision in which features are kept (default: float32)")
    add("--workers", type=int, metavar="N", help="processes that read and align frames (default: one per processor)")
    add("--cluster", metavar="ADDRESS", help="Dask scheduler, such as tcp://host:8786, or its scheduler file; "
        "the network then runs on the devices of its workers' machines")  # fmt: skip

    group = parser.add_argument_group("where clips are", "default: as the data set, if there is one, was built")
    add = group.add_argument
    add("--source", help="folder of sequences (challenge) or of frames such as gray_micro (release)")
    add("--test_source", help="folder of test sequences (default: SOURCE/test)")
    add("--labels", help="CSV of training labels (default: SOURCE/train.csv)")
    add("--column", nargs="+", action="extend", metavar="OURS=THEIRS",
        help="what the CSV calls a column, e.g. Negative=neg subject=sub_ID")  # fmt: skip
    add("--workbook", help="the labelling workbook (.xlsx)")
    add("--seed", type=int, help="seed of the demo clips (default: 0)")
    add("--demo_clips", nargs=2, type=int, metavar=("TRAIN", "TEST"),
        help=f"number of demo clips (default: {' '.join(map(str, four_dme.DEMO_CLIPS))})")  # fmt: skip
    crop = ", ".join(field.name for field in fields(CropConfig))
    add("--crop", nargs="+", action="extend", metavar="FIELD=VALUE",
        help=f"how faces are cut out: any of {crop}, see crops.CropConfig")  # fmt: skip
    return parser


class _HelpFormatter(argparse.HelpFormatter):
    """Keeps the lines of the list at the end."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--batch_size {text}: a number of images is expected, or auto") from None
