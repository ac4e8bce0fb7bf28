"""The command behind ``scripts/build_data.py``."""

import argparse
import contextlib
import dataclasses
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_builders import four_dme, four_dme_flow, megc2019
from mer_jax.clips.apex import ApexConfig
from mer_jax.clips.crops import CropConfig
from mer_jax.clips.flow import FlowConfig
from mer_jax.cluster import connect
from mer_jax.errors import UserError
from mer_jax.extractors.base import EMBEDDED, EXTRACTORS
from mer_jax.parallel import Workers

_FRAMES = {
    "demo": ("seed", "demo_clips"),
    "challenge": ("source", "test_source", "labels", "column"),
    "release": ("source", "workbook"),
}
_FEATURES = ("extractors", "features", "feature_frames", "crop")
_FLOW = ("crop", "apex", "flow")
# Data set to the flags that it uses; --data_dir, --workers and --cluster go with all.
_USED = {
    **{f"four_dme/{config}": (*flags, *_FEATURES) for config, flags in _FRAMES.items()},
    **{f"four_dme_flow/{config}": (*flags, *_FLOW) for config, flags in _FRAMES.items()},
    "megc2019/folder": ("source", "labels"),
    "megc2019/raw": ("source", *megc2019.SOURCES, *_FLOW, "size", "store"),
    "megc2019/demo": ("seed", "demo_clips"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Builds the data set that the command line asks for and prints where it is.

    Args:
        arguments: The command line without the program's name; the process's own unless given.

    Raises:
        UserError: An argument is wrong, or the data are.
    """
    flags = vars(_parser().parse_args(arguments))
    dataset, data_dir, workers, cluster = (flags.pop(name) for name in ("dataset", "data_dir", "workers", "cluster"))
    given = {name: value for name, value in flags.items() if value is not None}
    if dataset not in _USED:
        raise UserError(f"--dataset {dataset}: unknown; there are {', '.join(_USED)}")
    for name in given:
        if name not in _USED[dataset]:
            taken = " ".join(f"--{flag}" for flag in _USED[dataset])
            raise UserError(f"--{name}: not used by {dataset}, which takes {taken}; leave it out")
    family, _, config = dataset.partition("/")
    options = _BUILDERS[family][1](config, given)
    with workers_told(workers, cluster, data_dir) as who:
        built = _BUILDERS[family][0](config, data_dir=data_dir, workers=who, **options)
    print(built)


def _four_dme(config: str, given: dict[str, Any]) -> dict[str, Any]:
    return {
        **frames_told(given),
        **_kept(given, "extractors", "feature_frames"),
        "features": _pairs(given.get("features"), "--features"),
        **fields_told(given, crop=four_dme.default_crop(config)),
    }


def _four_dme_flow(config: str, given: dict[str, Any]) -> dict[str, Any]:
    del config
    defaults = {"crop": four_dme_flow.DEFAULT_CROP, "apex": ApexConfig(), "flow": FlowConfig()}
    return {**frames_told(given), **fields_told(given, **defaults)}


def _megc2019(config: str, given: dict[str, Any]) -> dict[str, Any]:
    del config
    plain = _kept(given, "source", "labels", *megc2019.SOURCES, "size", "store", "seed", "demo_clips")
    for flag, word in (("crop", "whole"), ("apex", "half_way")):
        if given.get(flag) == [word]:
            given.pop(flag)
            plain[flag] = word
    defaults = {"crop": megc2019.DEFAULT_CROP, "apex": ApexConfig(), "flow": megc2019.DEFAULT_FLOW}
    return {**plain, **fields_told(given, **defaults)}


# Family to what builds it, and to what makes that builder's arguments of the flags that were given.
_BUILDERS: dict[str, tuple[Callable[..., Path], Callable[[str, dict[str, Any]], dict[str, Any]]]] = {
    "four_dme": (four_dme.build, _four_dme),
    "four_dme_flow": (four_dme_flow.build, _four_dme_flow),
    "megc2019": (megc2019.build, _megc2019),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="build_data.py",
        usage="%(prog)s --dataset NAME [--data_dir DIR] [--workers N | --cluster ADDRESS] [flags of the data set, "
        "listed at the end]",
        description="Builds a data set of per-frame features or of optical flow. After an interruption, run it again: "
        "it goes on.",
        epilog="Flags by data set, beside --data_dir, --workers and --cluster:\n"
        + "\n".join(_flags_told(dataset, flags) for dataset, flags in _USED.items()),
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset", required=True, metavar="NAME", help=f"one of {', '.join(_USED)}")
    add("--data_dir", default="data", metavar="DIR", help="where everything is kept (default: %(default)s)")
    add("--workers", type=int, metavar="N", help="number of processes (default: one per processor)")
    add("--cluster", metavar="ADDRESS", help="Dask scheduler whose workers do it, such as tcp://host:8786, or its "
        "scheduler file")  # fmt: skip

    add = parser.add_argument_group("where clips are").add_argument
    add("--source", help="folder of sequences (challenge), of frames such as gray_micro (release), of flow images "
        "(folder), or of the databases (raw)")  # fmt: skip
    add("--test_source", help="folder of test sequences (default: SOURCE/test)")
    add("--labels", help="CSV of training labels (default: SOURCE/train.csv), or the table of the flow images")
    add("--column", nargs="+", action="extend", metavar="OURS=THEIRS",
        help="what the CSV calls a column, e.g. Negative=neg subject=sub_ID")  # fmt: skip
    add("--workbook", help="the labelling workbook (.xlsx)")
    for database in megc2019.DATABASES:
        add(f"--{database}", metavar="DIR", help=f"folder of {database}, where it is not in SOURCE under its name")
    for sheet in megc2019.SHEETS:
        add(f"--{sheet}", metavar="FILE", help=f"coding sheet of {sheet.removesuffix('_sheet')} (default: found in and "
            "above its folder)")  # fmt: skip
    add("--seed", type=int, help="seed of the demo clips (default: 0)")
    add("--demo_clips", nargs=2, type=int, metavar=("TRAIN", "TEST"),
        help=f"number of demo clips (default: {' '.join(map(str, four_dme.DEMO_CLIPS))})")  # fmt: skip

    add = parser.add_argument_group("how faces are cut out").add_argument
    crop = f"any of {', '.join(_names(CropConfig))}, see crops.CropConfig; megc2019/raw: or just 'whole', for frames "
    add("--crop", nargs="+", action="extend", metavar="FIELD=VALUE", help=f"{crop}that are cropped already")

    add = parser.add_argument_group("features").add_argument
    add("--extractors", nargs="*", metavar="NAME",
        help=f"features to compute, of {', '.join(EXTRACTORS)} (default: {' '.join(EMBEDDED)})")  # fmt: skip
    add("--features", nargs="+", action="extend", metavar="NAME=DIR", help="features computed elsewhere")
    add("--feature_frames", choices=("strict", "shortest"),
        help="features from elsewhere: one row per frame of the clip (default), or cut to the shortest")  # fmt: skip

    add = parser.add_argument_group("flow").add_argument
    apex = f"how the apex is found, see apex.ApexConfig (default: {_values(ApexConfig())}); megc2019/raw: or just "
    apex += "'half_way' (default), the frame half-way where the sheet tells none"
    add("--apex", nargs="+", action="extend", metavar="FIELD=VALUE", help=apex)
    flow = f"see flow.FlowConfig (default: {_values(FlowConfig())}; megc2019/raw: "
    flow += f"{_values(megc2019.DEFAULT_FLOW, FlowConfig())})"
    add("--flow", nargs="+", action="extend", metavar="FIELD=VALUE", help=flow)
    add("--size", type=int, help=f"side of the stored maps in px (default: {megc2019.SIZE})")
    add("--store", choices=megc2019.STORES,
        help="what is stored: 8-bit images like the published ones (default), or flow in px")  # fmt: skip
    return parser


class _HelpFormatter(argparse.HelpFormatter):
    """Keeps the lines of the list at the end."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def _flags_told(dataset: str, flags: Sequence[str]) -> str:
    text = f"  {dataset:<24}{' '.join(f'--{flag}' for flag in flags)}"
    return textwrap.fill(text, 100, subsequent_indent=" " * 26, break_on_hyphens=False)


def _names(config: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(config)]


def _values(config: Any, but: Any = None) -> str:
    """Fields and their values, or those that are not as in another config."""
    values = {name: getattr(config, name) for name in _names(config)}
    return " ".join(f"{name}={value}" for name, value in values.items() if but is None or value != getattr(but, name))


@contextlib.contextmanager
def workers_told(workers: int | None, cluster: str | None, data_dir: str) -> Iterator[Workers]:
    """Who does the work, by the flags ``--workers`` and ``--cluster``."""
    if cluster is None:
        yield workers
        return
    if workers is not None:
        raise UserError(
            "--workers: how many processes work on a cluster is said where they are started; leave it out, or --cluster"
        )
    with connect(cluster, data_dir) as connected:
        yield connected


def frames_told(given: Mapping[str, Any]) -> dict[str, Any]:
    """What says where the frames of 4DME are."""
    plain = _kept(given, "source", "test_source", "labels", "workbook", "seed")
    if "demo_clips" in given:
        plain["demo_clips"] = tuple(given["demo_clips"])
    return {**plain, "columns": _pairs(given.get("column"), "--column")}


def _kept(given: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: given[name] for name in names if name in given}


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


def fields_told(given: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """Of each flag that was given the default dataclass with the fields replaced that it names."""
    return {
        flag: _replaced(f"--{flag}", _pairs(given[flag], f"--{flag}") or {}, default)
        for flag, default in defaults.items()
        if flag in given
    }


def _replaced(flag: str, pairs: Mapping[str, str], default: Any) -> Any:
    names = _names(default)
    values = {}
    for name, text in pairs.items():
        if name not in names:
            raise UserError(f"{flag} {name}={text}: no such field; there are {', '.join(names)}")
        kind = type(getattr(default, name))
        try:
            values[name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise UserError(f"{flag} {name}={text}: a value like {getattr(default, name)} is expected") from None
    return dataclasses.replace(default, **values)
