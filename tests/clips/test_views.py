import numpy as np
import pytest

from mer_jax.clips.views import split_views
from mer_jax.errors import UserError


@pytest.mark.parametrize("width", [2, 7, 8])
def test_views_together_are_the_frame(rng, width):
    frame = rng.integers(0, 256, (5, width, 3), dtype=np.uint8)
    views = split_views(frame)
    assert list(views) == ["l", "r"]
    assert views["l"].shape == (5, width // 2, 3)
    np.testing.assert_array_equal(np.concatenate([views["l"], views["r"]], axis=1), frame)


def test_too_narrow():
    with pytest.raises(UserError, match="1 pixel wide"):
        split_views(np.zeros((5, 1, 3), np.uint8))
