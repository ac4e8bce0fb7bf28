from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer_jax.clips.resample import resample_indices
from mer_jax.errors import UserError


@pytest.mark.parametrize(
    ("num_frames", "k", "expected"),
    [
        (1, 1, [0]),
        (1, 4, [0, 0, 0, 0]),
        (3, 5, [0, 1, 2, 2, 2]),
        (5, 5, [0, 1, 2, 3, 4]),
        # 0, 10/3, 20/3, 10
        (11, 4, [0, 3, 7, 10]),
        # The released code's exception for a single frame: the middle one, of an even number the later.
        (7, 1, [3]),
        (8, 1, [4]),
        # 36 frames to 16: i * 35 / 15
        (36, 16, [0, 2, 5, 7, 9, 12, 14, 16, 19, 21, 23, 26, 28, 30, 33, 35]),
        # Ties, at 2.5 and 7.5, go to the even index.
        (11, 5, [0, 2, 5, 8, 10]),
    ],
)
def test_by_hand(num_frames, k, expected):
    assert resample_indices(num_frames, k).tolist() == expected


@settings(deadline=None)
@given(num_frames=st.integers(1, 2000), k=st.integers(1, 200))
def test_indices_are_the_nearest_frames_in_order(num_frames, k):
    indices = resample_indices(num_frames, k)
    assert indices.shape == (k,)
    assert np.issubdtype(indices.dtype, np.integer)
    assert (np.diff(indices) >= 0).all()
    assert indices.min() >= 0
    assert indices.max() < num_frames
    if num_frames <= k:
        assert set(indices.tolist()) == set(range(num_frames))
        assert (indices[num_frames - 1 :] == num_frames - 1).all()
    elif k > 1:
        assert (indices[0], indices[-1]) == (0, num_frames - 1)
        assert len(set(indices.tolist())) == k
        for i, index in enumerate(indices.tolist()):
            assert abs(index - Fraction(i * (num_frames - 1), k - 1)) <= Fraction(1, 2)


@pytest.mark.parametrize("k", [16, 18])
def test_no_ties_in_the_published_lengths(k):
    """Whatever rounds, the published numbers of frames give the same indices."""
    for num_frames in range(k + 1, 400):
        half_up = [(2 * i * (num_frames - 1) + k - 1) // (2 * (k - 1)) for i in range(k)]
        assert resample_indices(num_frames, k).tolist() == half_up


@pytest.mark.parametrize(("num_frames", "k", "said"), [(0, 18, "0 frames"), (5, 0, "to 0 frames")])
def test_nothing_to_choose(num_frames, k, said):
    with pytest.raises(UserError, match=said):
        resample_indices(num_frames, k)
