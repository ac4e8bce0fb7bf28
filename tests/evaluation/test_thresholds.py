import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer_jax.evaluation import metrics, thresholds


def score(truth, probabilities, cut, mask=None):
    return metrics.macro_f1(metrics.confusion_counts(truth, thresholds.apply_thresholds(probabilities, cut), mask))


def best_by_search(truth, probabilities, mode, mask=None):
    """The highest macro-F1 over all distinct thresholds, by trying each one."""
    cuts = [0.0, *np.unique(probabilities), np.inf]
    if mode == "global":
        return max(score(truth, probabilities, cut, mask) for cut in cuts)
    columns = []
    for c in range(truth.shape[1]):
        column = slice(c, c + 1)
        known = None if mask is None else mask[:, column]
        columns.append(max(score(truth[:, column], probabilities[:, column], cut, known) for cut in cuts))
    return np.mean(columns)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 30),
    st.sampled_from(["global", "per_class"]),
    st.sampled_from([1, 7]),
    st.sampled_from([np.float32, np.float64]),
)
def test_tuned_and_oracle_thresholds_reach_the_best_score(seed, rows, mode, digits, dtype):
    rng = np.random.default_rng(seed)
    truth = rng.random((rows, 5)) < 0.3
    probabilities = rng.random((rows, 5)).round(digits).astype(dtype)
    mask = rng.random((rows, 5)) < 0.9
    best = best_by_search(truth, probabilities, mode, mask)
    tuned = thresholds.tune_thresholds(truth, probabilities, mode, mask)
    assert tuned.shape == (5,) and tuned.dtype == dtype
    assert score(truth, probabilities, tuned, mask) == pytest.approx(best, abs=1e-12)
    oracle = thresholds.oracle_thresholds(truth, probabilities, mode, mask)
    assert score(truth, probabilities, oracle, mask) == pytest.approx(best, abs=1e-12)


def test_the_centre_of_the_best_plateau():
    # F1 is 1 on (0.2, 0.8], and no other interval is as good.
    tuned = thresholds.tune_thresholds(np.array([[1], [0]]), np.array([[0.8], [0.2]]))
    assert tuned == pytest.approx([0.5])
    # The best plateau is [0, 0.3], although (0.4, 0.9] is wider.
    truth, probabilities = np.array([[1], [0], [1]]), np.array([[0.3], [0.4], [0.9]])
    f1 = [float(score(truth, probabilities, cut)) for cut in (0.1, 0.35, 0.6, 0.95)]
    assert f1 == pytest.approx([0.8, 0.5, 2 / 3, 0])
    assert thresholds.tune_thresholds(truth, probabilities) == pytest.approx([0.15])
    # Best on (0.25, 0.5] alone.
    truth, probabilities = np.array([[0], [1], [0], [0]]), np.array([[0.25], [0.5], [0.6], [0.75]])
    assert [float(score(truth, probabilities, cut)) for cut in (0.2, 0.4, 0.55)] == pytest.approx([0.4, 0.5, 0])
    assert thresholds.tune_thresholds(truth, probabilities) == pytest.approx([0.375])


def test_ties_take_the_widest_plateau():
    # F1 is 2/3 on [0, 0.2] and on (0.5, 0.875].
    truth = np.array([[1], [0], [0], [1]])
    probabilities = np.array([[0.875], [0.5], [0.5], [0.2]])
    f1 = [float(score(truth, probabilities, cut)) for cut in (0.1, 0.3, 0.7, 0.9)]
    assert f1 == pytest.approx([2 / 3, 0.4, 2 / 3, 0])
    assert thresholds.tune_thresholds(truth, probabilities) == pytest.approx([0.6875])


def test_equally_wide_plateaus_take_the_lowest():
    truth = np.array([[1], [0], [0], [1]])
    probabilities = np.array([[0.875], [0.625], [0.625], [0.25]])
    f1 = [float(score(truth, probabilities, cut)) for cut in (0.2, 0.5, 0.7, 0.9)]
    assert f1 == pytest.approx([2 / 3, 0.4, 2 / 3, 0])
    assert thresholds.tune_thresholds(truth, probabilities) == pytest.approx([0.125])


def test_a_class_without_positives_gets_one_half():
    tuned = thresholds.tune_thresholds(np.zeros((4, 1)), np.array([[0.1], [0.2], [0.3], [0.9]]))
    assert tuned == pytest.approx([0.5])


def test_ends_of_the_scale():
    everything = thresholds.tune_thresholds(np.array([[1], [1]]), np.array([[0.0], [0.0]]))
    assert thresholds.apply_thresholds(np.zeros((1, 1)), everything).all()
    # Adjacent float32 values have no float between them.
    low = np.float32(0.5)
    high = np.nextafter(low, np.float32(1))
    tuned = thresholds.tune_thresholds(np.array([[0], [1]]), np.array([[low], [high]]))
    assert thresholds.apply_thresholds(np.array([[low], [high]]), tuned).tolist() == [[False], [True]]
    # "Never present" is told from probability 1.
    mixed = np.array([[1, 0], [0, 0], [0, 1]])
    certain = np.array([[0.9, 1.0], [0.1, 1.0], [0.1, 1.0]])
    for mode in ("global", "per_class"):
        tuned = thresholds.tune_thresholds(mixed, certain, mode)
        assert score(mixed, certain, tuned) == pytest.approx(best_by_search(mixed, certain, mode))


def test_grid_of_candidates_takes_the_middle_of_the_longest_run():
    truth, probabilities = np.array([[1], [0]]), np.array([[0.8], [0.2]])
    grid = [0.1, 0.3, 0.4, 0.5, 0.6, 0.9]
    assert thresholds.tune_thresholds(truth, probabilities, grid=grid) == pytest.approx([0.4])
    assert thresholds.tune_thresholds(truth, probabilities, "global", grid=grid) == pytest.approx([0.4])


def test_order_of_rows_does_not_matter(rng):
    truth, probabilities = rng.random((60, 5)) < 0.3, rng.random((60, 5))
    order = rng.permutation(60)
    for mode in thresholds.TUNED_MODES:
        np.testing.assert_array_equal(
            thresholds.tune_thresholds(truth, probabilities, mode),
            thresholds.tune_thresholds(truth[order], probabilities[order], mode),
        )


def test_oracle_over_members_and_epochs_equals_one_by_one(rng):
    truth = rng.random((12, 5)) < 0.3
    probabilities = rng.random((3, 4, 12, 5)).round(1)
    for mode in thresholds.TUNED_MODES:
        together = thresholds.oracle_thresholds(truth, probabilities, mode)
        for index in np.ndindex(3, 4):
            np.testing.assert_array_equal(
                together[index], thresholds.oracle_thresholds(truth, probabilities[index], mode)
            )


def test_curve_equals_the_score_at_each_threshold(rng):
    truth, probabilities = rng.random((20, 5)) < 0.3, rng.random((3, 20, 5))
    grid = [0.1, 0.5, 0.9]
    macro, per_class = thresholds.threshold_curve(truth, probabilities, grid)
    assert macro.shape == (3, 3) and per_class.shape == (3, 3, 5)
    for member in range(3):
        expected = [score(truth, probabilities[member], cut) for cut in grid]
        np.testing.assert_allclose(macro[member], expected)
        np.testing.assert_allclose(per_class[member].mean(axis=-1), expected)


def test_bad_input():
    with pytest.raises(ValueError, match="global, per_class"):
        thresholds.tune_thresholds(np.zeros((1, 1)), np.zeros((1, 1)), "fixed")
    with pytest.raises(ValueError, match="global, per_class"):
        thresholds.oracle_thresholds(np.zeros((1, 1)), np.zeros((1, 1)), "fixed")
    with pytest.raises(ValueError, match="no predictions"):
        thresholds.tune_thresholds(np.zeros((0, 5)), np.zeros((0, 5)))
