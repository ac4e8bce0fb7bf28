"""The command behind ``scripts/build_data.py``."""

import argparse
import dataclasses
from collections.abc import Sequence

from data_builders import four_dme
from mer_jax.clips.crops import CropConfig
from mer_jax.errors import UserError
from mer_jax.extractors.base import EMBEDDED, EXTRACTORS

_CROP_FIELDS = tuple(field.name for field in dataclasses.fields(CropConfig))


def main(arguments: Sequence[str] | None = None) -> None:
    """Builds the data set that the command line asks for and prints where it is.

    Args:
        arguments: The command line without the program's name; the process's own unless given.

    Raises:
        UserError: An argument is wrong, or the data are.
    """
    given = _parser().parse_args(arguments)
    family, _, config = given.dataset.partition("/")
    if family != "four_dme" or not config:
        names = ", ".join(f"four_dme/{name}" for name in four_dme.CONFIGS)
        raise UserError(f"--dataset {given.dataset}: unknown; there are {names}")
    built = four_dme.build(
        config,
        data_dir=given.data_dir,
        source=given.source,
        test_source=given.test_source,
        labels=given.labels,
        columns=_pairs(given.column, "--column"),
        workbook=given.workbook,
        extractors=given.extractors,
        features=_pairs(given.features, "--features"),
        crop=_crop(_pairs(given.crop, "--crop"), config),
        feature_frames=given.feature_frames,
        workers=given.workers,
        seed=given.seed,
        demo_clips=tuple(given.demo_clips),
    )
    print(built)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="build_data.py",
        description="Builds a data set of per-frame features. After an interruption, run it again: it goes on.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset", required=True, help="four_dme/demo, four_dme/challenge or four_dme/release")
    add("--data_dir", default="data", help="where everything is kept (default: %(default)s)")
    add("--source", help="challenge: folder of sequences; release: folder of frames (gray_micro)")
    add("--test_source", help="challenge: folder of test sequences (default: SOURCE/test)")
    add("--labels", help="challenge: CSV of training labels (default: SOURCE/train.csv)")
    add("--column", nargs="+", action="extend", metavar="OURS=THEIRS",
        help="challenge: what the CSV calls a column, e.g. Negative=neg subject=sub_ID")  # fmt: skip
    add("--workbook", help="release: the labelling workbook (.xlsx)")
    add("--extractors", nargs="*", default=list(EMBEDDED), metavar="NAME",
        help=f"features to compute, of {', '.join(EXTRACTORS)} (default: {' '.join(EMBEDDED)})")  # fmt: skip
    add("--features", nargs="+", action="extend", metavar="NAME=DIR", help="features computed elsewhere")
    add("--feature_frames", default="strict", choices=("strict", "shortest"),
        help="features from elsewhere: one row per frame of the clip, or cut to the shortest")  # fmt: skip
    add("--crop", nargs="+", action="extend", metavar="FIELD=VALUE",
        help=f"how faces are cut out: any of {', '.join(_CROP_FIELDS)} (see crops.CropConfig)")  # fmt: skip
    add("--workers", type=int, help="number of processes (default: one per processor)")
    add("--seed", type=int, default=0, help="demo: seed of the clips (default: %(default)s)")
    add("--demo_clips", nargs=2, type=int, default=four_dme.DEMO_CLIPS, metavar=("TRAIN", "TEST"),
        help="demo: number of clips (default: 100 28)")  # fmt: skip
    return parser


def _pairs(given: Sequence[str] | None, flag: str) -> dict[str, str] | None:
    """``['a=b', ...]`` as a dict."""
    pairs: dict[str, str] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UserError(f"{flag} {text}: write it as NAME=VALUE")
        if name in pairs:
            raise UserError(f"{flag} {text}: {name} is given twice")
        pairs[name] = value
    return pairs or None


def _crop(pairs: dict[str, str] | None, config: str) -> CropConfig | None:
    """The default crop of a configuration with some fields replaced."""
    if pairs is None:
        return None
    default = four_dme.default_crop(config)
    values = {}
    for name, text in pairs.items():
        if name not in _CROP_FIELDS:
            raise UserError(f"--crop {name}={text}: no such field; there are {', '.join(_CROP_FIELDS)}")
        kind = type(getattr(default, name))
        try:
            values[name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise UserError(f"--crop {name}={text}: a value like {getattr(default, name)} is expected") from None
    return dataclasses.replace(default, **values)
