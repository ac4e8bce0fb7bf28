"""The registry of networks: every name leads to what it says, and the README's table is true."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mer_jax.errors import UserError
from mer_jax.extractors.base import EXTRACTORS, get_extractor
from mer_jax.extractors.networks import NETWORKS, get_network

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_describes_itself(name):
    network = get_network(name)
    assert network.name == name
    assert network.modality in ("appearance", "geometry")
    assert network.dim > 0 and min(network.input_shape) > 0
    assert network.licence and network.preprocessing
    assert not network.hub or re.fullmatch(r"[\w.-]+/[\w.-]+", network.hub)


def test_names_are_free_of_each_other_and_fit_for_folders():
    assert not set(NETWORKS) & set(EXTRACTORS)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", name) for name in NETWORKS)


def test_unknown_names_are_told_what_there_is():
    with pytest.raises(
        UserError, match=r"^extractor 'radio' is unknown; networks are siglip2_b16_224, .*faceverse_v4$"
    ):
        get_network("radio")


def test_listing_the_networks_loads_none():
    program = (
        "import sys; from mer_jax.extractors.networks import NETWORKS\n"
        "print(sorted({'mediapipe', 'jax', 'flax', 'cv2', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def expanded(pattern):
    """``a{b,c}`` as ``ab``, ``ac``."""
    parts = [part.strip("{}").split(",") for part in re.split(r"(\{[^}]*\})", pattern)]
    return ["".join(choice) for choice in itertools.product(*parts)]


def test_the_readme_tells_all_extractors_with_their_width_and_licence():
    rows = re.findall(
        r"^\| (`.+`) \| (\w+) \| (\d+) \| (.+) \| (.+) \|$", README.split("## Features of networks")[1], re.M
    )
    told = {}
    for names, modality, dim, licence, _ in rows:
        for pattern in re.findall(r"`([^`]+)`", names):
            for name in expanded(pattern):
                assert name not in told
                told[name] = modality, int(dim), licence
    found = {name: get_extractor(name) for name in EXTRACTORS} | {name: get_network(name) for name in NETWORKS}
    assert told == {name: (each.modality, each.dim, each.licence) for name, each in found.items()}
