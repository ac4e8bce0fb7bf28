import numpy as np
import pytest

from mer_jax.evaluation.thresholds import apply_thresholds
from mer_jax.evaluation.views import combine_views


def test_by_hand_with_a_single_view_clip():
    sample_clip = np.array([1, 0, 1, 2])
    probabilities = np.array([[0.2], [0.9], [0.6], [0.3]])
    np.testing.assert_allclose(combine_views(probabilities, sample_clip, 3, "mean"), [[0.9], [0.4], [0.3]])
    np.testing.assert_array_equal(combine_views(probabilities, sample_clip, 3, "max"), [[0.9], [0.6], [0.3]])


def test_or_is_the_or_of_decisions_per_view(rng):
    sample_clip = rng.permutation(np.repeat(np.arange(10), [1, 2] * 5))
    probabilities = rng.random((4, 15, 5)).astype(np.float32).round(2)
    cut = np.array([0.6, 0.08, 0.08, 0.53, 0.33])
    combined = apply_thresholds(combine_views(probabilities, sample_clip, 10, "or"), cut)
    votes = apply_thresholds(probabilities, cut)
    for clip in range(10):
        np.testing.assert_array_equal(combined[:, clip], votes[:, sample_clip == clip].any(axis=1))


def test_dtype_is_kept_and_nan_stays_in_its_clip():
    probabilities = np.array([[0.5], [np.nan], [0.25]], np.float32)
    for how in ("mean", "max", "or"):
        combined = combine_views(probabilities, np.array([0, 0, 1]), 2, how)
        assert combined.dtype == np.float32
        assert np.isnan(combined[0, 0]) and combined[1, 0] == 0.25


def test_bad_input():
    probabilities = np.zeros((2, 5))
    with pytest.raises(ValueError, match="mean, max, or"):
        combine_views(probabilities, np.array([0, 1]), 2, "median")
    with pytest.raises(ValueError, match="at least one sample"):
        combine_views(probabilities, np.array([0, 0]), 2)
