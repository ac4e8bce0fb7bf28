"""Whatever a user's own config holds, it is valid or refused in one line that names the field."""

import copy
import runpy
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from mer_jax.errors import UserError
from mer_jax.study.validation import validate_study

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
VARIANTS = {
    "fusion": ("fusion", "appearance", "geometry", "concat", "mean", "released"),
    "fusion_grid": ("fusion_grid",),
    "fusion_search": ("fusion_search", "geometry"),
    "megc2019": ("micro_attnet", "ststnet", "micro_attnet_search"),
    "micro_attnet": ("micro_attnet", "no_attention", "no_se", "neither", "full"),
}
ODD = (None, "x", "", -1, 0, 1.5, float("nan"), float("inf"), 10**12, (), [1], ("x", "x"), {}, True, "3", (None,))
REQUIRED = {"model", "data", "train", "folds", "study", "report", "name", "train.epochs", "data.dataset"}


def made(name, variant=None):
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](*([variant] if variant else []))


def fields(section, path=()):
    for name, value in section.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from fields(value, (*path, name))


def told(config):
    """The line that refuses a config, '' for a valid one."""
    try:
        validate_study(config)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name, variant", [(name, variant) for name in VARIANTS for variant in VARIANTS[name]])
def test_the_configs_of_the_library_are_valid(name, variant):
    validate_study(made(name, variant))


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_that_a_field_can_hold_ends_in_a_traceback(name):
    whole = made(name).to_dict()
    for path in fields(whole):
        field = ".".join(path)
        for value in ("absent", *ODD):
            changed = copy.deepcopy(whole)
            section = changed
            for part in path[:-1]:
                section = section[part]
            if value == "absent":
                del section[path[-1]]
            else:
                section[path[-1]] = value
            line = told(ConfigDict(changed))
            assert "\n" not in line
            if value == "absent" and field in REQUIRED:
                assert f"config.{field} is missing; begin a config with" in line
            if value is None:  # no field takes it
                assert path[-1] in line, field


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "fusion",
            {"train.lerning_rate": 1e-4},
            "config.train.lerning_rate: there is no such field, so that it would ",
        ),
        (
            "fusion",
            {"trian.epochs": 3},
            "config.trian: there is no such field, so that it would change nothing; did yo",
        ),
        (
            "fusion",
            {"data.num_frame": 3},
            "config.data.num_frame: there is no such field, so that it would change noth",
        ),
        ("fusion", {"model.key_dim": "64"}, "config.model.key_dim='64': must be a whole number from 1 to 1000000"),
        ("fusion", {"model.num_queries.geometry": 0}, "config.model.num_queries.geometry=0: must be a whole number"),
        ("fusion", {"model.name": "ststnet"}, "config.model.name='ststnet': a study of features needs one of 'fusion'"),
        (
            "micro_attnet",
            {"model.name": "fusion"},
            "config.model.name='fusion': a study of flow needs one of 'micro_at",
        ),
        ("micro_attnet", {"data.crop.scale": "1.5"}, "config.data.crop.scale='1.5': must be a number"),
        ("micro_attnet", {"data.crop.rul": "first"}, "config.data.crop.rul: there is no such field, so that it would"),
        ("micro_attnet", {"data.dataset": "megc2019/folder"}, "config.data.casme2 is missing; begin a config with"),
        ("fusion", {"grid.dropout": 0.1}, "config.grid.dropout=0.1: must be numbers in [0, 1), in a tuple"),
        ("fusion", {"study.num_seeds": 10**12}, "config.study.num_seeds=1000000000000: must be a whole number from 1"),
        ("fusion", {"name": "a/b"}, "config.name='a/b': must be the name of a folder"),
        ("fusion_grid", {"cross.geometry": "facemesh"}, "config.cross.geometry='facemesh': must be texts, in a tuple"),
    ],
)
def test_what_is_wrong_is_named(name, change, message):
    config = ConfigDict(made(name).to_dict(), convert_dict=True)
    for field, value in change.items():
        *sections, last = field.split(".")
        section = config
        for part in sections:
            if part not in section:
                section[part] = ConfigDict()
            section = section[part]
        with section.ignore_type():
            section[last] = value
    assert told(config).startswith(message)


def test_data_of_neither_kind_are_refused():
    config = made("fusion")
    del config.data.modalities
    assert told(config).startswith("config.data has neither modalities, as a study of features has, nor channels, as")
