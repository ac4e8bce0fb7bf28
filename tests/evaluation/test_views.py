import numpy as np
import pytest

from mer_jax.evaluation.thresholds import apply_thresholds
from mer_jax.evaluation.views import combine_samples, combine_views


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


# Clip 0: both views, both phases; clip 1: one view, both phases; clip 2: the second phase only; clip 3: the whole clip.
CLIP = np.array([0, 0, 0, 0, 1, 1, 2, 3])
VIEW = np.array(["l", "l", "r", "r", "l", "l", "r", "l"])
PHASE = np.array(["onset_apex", "apex_offset"] * 3 + ["apex_offset", ""])
VALUES = np.array([0.2, 0.6, 0.9, 0.1, 0.3, 0.7, 0.4, 0.8])[:, None]


@pytest.mark.parametrize(
    ("phases", "views", "expected"),
    [
        ("mean", "mean", [0.45, 0.5, 0.4, 0.8]),  # views 0.4 and 0.5
        ("mean", "max", [0.5, 0.5, 0.4, 0.8]),
        ("max", "mean", [0.75, 0.7, 0.4, 0.8]),  # views 0.6 and 0.9
        ("max", "or", [0.9, 0.7, 0.4, 0.8]),
        ("onset_apex", "mean", [0.55, 0.3, 0.4, 0.8]),  # views 0.2 and 0.9
        ("onset_apex", "max", [0.9, 0.3, 0.4, 0.8]),
    ],
)
def test_phases_then_views_by_hand_in_any_order(rng, phases, views, expected):
    for order in (np.arange(8), rng.permutation(8)):
        found = combine_samples(VALUES[order], CLIP[order], VIEW[order], PHASE[order], 4, views, phases)
        np.testing.assert_allclose(found[:, 0], expected, rtol=1e-15)


def test_a_view_of_more_phases_weighs_no_more_than_another():
    found = combine_samples(np.array([[0.2], [0.6], [0.8]]), [0, 0, 0], ["l", "l", "r"], PHASE[[0, 1, 0]], 1)
    np.testing.assert_allclose(found, [[0.6]])  # not the mean over samples, 0.533


def test_without_phases_only_views_are_combined(rng):
    probabilities = rng.random((2, 3, 6, 4)).astype(np.float32)
    clip, view = np.array([0, 1, 0, 1, 2, 2]), np.array(["l", "l", "r", "r", "l", "r"])
    for how in ("mean", "max", "or"):
        expected = combine_views(probabilities, clip, 3, how)
        for phases in ("mean", "max", "onset_apex"):
            found = combine_samples(probabilities, clip, view, np.full(6, ""), 3, how, phases)
            np.testing.assert_array_equal(found, expected)
            assert found.dtype == np.float32


def test_unknown_phase_rules_are_refused():
    with pytest.raises(ValueError, match="phases='apex'; choose one of mean, max, onset_apex"):
        combine_samples(VALUES, CLIP, VIEW, PHASE, 4, "mean", "apex")
