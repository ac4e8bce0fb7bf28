"""What a config says of its data reaches the builders, and what it says in vain is refused."""

import dataclasses

import pytest

from configs.megc2019 import get_config as megc_config
from configs.micro_attnet import get_config as micro_attnet_config
from data_builders import ensure_dataset, four_dme_flow, megc2019, raw_options
from mer_jax.clips.apex import ApexConfig
from mer_jax.clips.crops import CropConfig
from mer_jax.clips.flow import FlowConfig
from mer_jax.errors import UserError


@pytest.fixture
def built(monkeypatch):
    """Records what the builders are asked for, instead of building."""
    calls = {}

    def record(family):
        return lambda name, **options: calls.update({family: (name, options)})

    for module in (four_dme_flow, megc2019):
        monkeypatch.setattr(module, "build", record(module.__name__.rpartition(".")[2]))
    return calls


def test_the_defaults_are_the_builders_own(built):
    ensure_dataset(micro_attnet_config().data, ())
    name, options = built["four_dme_flow"]
    assert name == "demo" and options["crop"] == four_dme_flow.DEFAULT_CROP
    assert options["apex"] == ApexConfig() and options["flow"] == FlowConfig() and options["source"] is None
    for variant in ("micro_attnet", "ststnet"):
        config = megc_config(variant)
        assert raw_options(config.data) == megc2019.RAW_DEFAULTS
        ensure_dataset(config.data, ())
        name, options = built["megc2019"]
        assert name == "demo" and not {"crop", "apex", "flow", "size", "store"} & options.keys()
    flow = set(megc_config().data.raw.flow)
    assert flow == {field.name for field in dataclasses.fields(FlowConfig)}


def test_raw_frames_are_prepared_as_told(built):
    config = megc_config()
    config.update_from_flattened_dict(
        {
            "data.dataset": "megc2019/raw",
            "data.samm": "SAMM",
            "data.samm_sheet": "codes.xlsx",
            "data.workers": 3,
            "data.raw.crop.size": 96,
            "data.raw.crop.rule": "largest",
            "data.raw.apex.rule": "motion",
            "data.raw.apex.blink": 0,
            "data.raw.flow.lambda_": 0.2,
            "data.raw.size": 56,
            "data.raw.store": "flow",
        }
    )
    ensure_dataset(config.data, ())
    name, options = built["megc2019"]
    assert name == "raw" and options["data_dir"] == "data" and options["workers"] == 3
    assert options["samm"] == "SAMM" and options["samm_sheet"] == "codes.xlsx" and options["smic"] is None
    assert options["crop"] == CropConfig(rule="largest", size=96) and options["apex"] == ApexConfig(blink=0)
    assert options["flow"] == FlowConfig(method="tvl1", lambda_=0.2)
    assert options["size"] == 56 and options["store"] == "flow"
    config.data.raw.crop.rule = "whole"
    assert raw_options(config.data)["crop"] == "whole"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "megc2019/raws"}, r"'megc2019/raws': must be one of megc2019/folder, megc2019/raw, megc2019/demo"),
        ({"dataset": "samm/raw"}, r"'samm/raw': a study of flow needs 'four_dme_flow/...', 'megc2019/...'"),
        ({"raw.size": 56}, r"config\.data\.raw\.size: not used by megc2019/demo; leave it as it is"),
        ({"dataset": "megc2019/folder", "raw.flow.warps": 3}, r"config\.data\.raw\.flow: not used by megc2019/folder"),
        ({"raw.apex.rule": "middle"}, r"config\.data\.raw\.apex\.rule='middle': must be 'half_way' or 'motion'"),
        ({"raw.apex.use_annotated": False}, r"use_annotated=False: needs config\.data\.raw\.apex\.rule='motion'"),
        ({"raw.crop.rule": "biggest"}, r"raw\.crop\.rule='biggest': must be one of 'first', 'largest', 'whole'"),
        ({"raw.flow.method": "dis"}, r"flow method 'dis' is unknown"),
    ],
)
def test_what_is_said_in_vain_is_refused(built, fields, message):
    config = megc_config()
    config.update_from_flattened_dict({f"data.{name}": value for name, value in fields.items()})
    with pytest.raises(UserError, match=message) as caught:
        ensure_dataset(config.data, ())
    assert "\n" not in str(caught.value) and not built
