"""The registry, and what happens to frames in which nothing was found."""

import subprocess
import sys

import numpy as np
import pytest

from mer_jax.errors import UserError
from mer_jax.extractors.base import EXTRACTORS, fill_missing, get_extractor


@pytest.mark.parametrize("name", EXTRACTORS)
def test_every_extractor_describes_itself(name):
    extractor = get_extractor(name)
    assert extractor.name == name
    assert extractor.modality in ("appearance", "geometry")
    assert extractor.dim > 0 and extractor.licence and extractor.preprocessing


def test_unknown_extractor_is_told_what_there_is():
    with pytest.raises(UserError, match="extractor 'hogg' is unknown; there are hog, facemesh"):
        get_extractor("hogg")


def test_describing_extractors_loads_no_network():
    program = (
        "import sys; from mer_jax.extractors.base import EXTRACTORS, get_extractor\n"
        "[get_extractor(name) for name in EXTRACTORS]\n"
        "print(sorted({'mediapipe', 'jax', 'tensorflow', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_missing_frames_are_interpolated_and_held(rng):
    whole = np.linspace([0.0, 10.0], [7.0, 3.0], 8).astype(np.float32)
    gaps = whole.copy()
    gaps[[0, 2, 3, 6, 7]] = np.nan
    filled, count = fill_missing(gaps)
    assert count == 5 and filled.dtype == np.float32
    expected = whole.copy()
    expected[0], expected[6:] = whole[1], whole[5]
    np.testing.assert_allclose(filled, expected, atol=1e-6)


def test_nothing_missing_and_all_missing(rng):
    features = rng.normal(size=(4, 3)).astype(np.float32)
    filled, count = fill_missing(features)
    assert count == 0 and filled is features
    filled, count = fill_missing(np.full((4, 3), np.nan, np.float32))
    assert count == 4 and not filled.any()
