"""Many studies compared at once: by hand, and how often the comparison is wrong where the truth is known."""

import numpy as np
import pytest

from mer_jax.evaluation.metrics import macro_f1
from mer_jax.evaluation.statistics import (
    all_pairs,
    hierarchical_replicates,
    make_resampling,
    percentile_interval,
    weighted_scores,
)


def test_by_hand():
    # Deviations of the rows: A (-3, -1, 1, 3), B (3, 1, -1, -3), C none; means 10, 8, 9.5.
    replicates = np.array([[7.0, 9, 11, 13], [11, 9, 7, 5], [9.5, 9.5, 9.5, 9.5]])
    found = all_pairs(np.array([10.0, 8.0, 9.5]), replicates, confidence=0.5)
    # A - B deviates by (-6, -2, 2, 6), sd sqrt(20); A - C and B - C by half of it: studentised, all the same.
    largest = np.array([6, 2, 2, 6]) / np.sqrt(20)
    median = np.median(largest)
    np.testing.assert_allclose(found.difference, [[0, 2, 0.5], [-2, 0, -1.5], [-0.5, 1.5, 0]])
    sd = np.sqrt([[0, 20, 5], [20, 0, 5], [5, 5, 0]])
    np.testing.assert_allclose(found.half_width, median * sd)
    # 2 / sqrt(20) is reached by all four replicates, so is 0.5 / sqrt(5); 1.5 / sqrt(5) = 3 / sqrt(20) by two.
    np.testing.assert_allclose(found.p_value, [[1, 1, 1], [1, 1, 0.6], [1, 0.6, 1]])
    # Replicates as drawn: A - B is 2 + deviation; C is 9.5; A is 7, 9, 11, 13 and B 11, 9, 7, 5.
    np.testing.assert_allclose(found.probability_best, [0.5, 0.25, 0.25])


def test_rows_that_never_differ_share_the_lead(rng):
    row = rng.normal(size=200)
    found = all_pairs(np.zeros(3), np.stack([row, row, row - 1 + 0.01 * rng.normal(size=200)]))
    assert found.difference[0, 1] == found.half_width[0, 1] == 0 and found.p_value[0, 1] == 1
    assert found.probability_best[0] == found.probability_best[1]
    assert found.probability_best.sum() == pytest.approx(1)


def test_two_rows_are_one_pair(rng):
    """With nothing to choose from, the interval is that of the pair alone."""
    replicates = rng.normal(size=(2, 4000))
    found = all_pairs(np.array([0.3, 0.0]), replicates)
    low, high = percentile_interval(replicates[0] - replicates[1])
    assert found.half_width[0, 1] == pytest.approx((high - low) / 2, rel=0.05)


def _equal_rows(rng, num_rows=8, num_clips=60, num_seeds=3):
    """Decisions of studies that are all equally good: each knows half of every clip, by its own luck."""
    truth = rng.random((num_clips, 3)) < 0.4
    knows = rng.random((num_rows, 1, num_clips, 1)) < 0.5
    guess = rng.random((num_rows, num_seeds, num_clips, 3)) < 0.4
    return truth, np.where(knows, truth, guess)


def test_equal_studies_are_told_apart_no_more_often_than_promised(rng):
    """Among equals the best is best by luck: what one pair's interval says of it is mostly wrong, this is not."""
    repeats, wrong, naive = 120, 0, 0
    for _ in range(repeats):
        truth, decisions = _equal_rows(rng)
        mask, num_seeds = np.ones_like(truth), decisions.shape[1]
        draws = make_resampling(np.arange(len(truth)) % 3, None, num_seeds, 200, seed=int(rng.integers(2**31)))
        everything = np.ones((1, len(truth)))
        scores = np.array([weighted_scores(truth, made, mask, everything, macro_f1).mean() for made in decisions])
        replicates = np.stack([hierarchical_replicates(truth, made, mask, draws, macro_f1) for made in decisions])
        found = all_pairs(scores, replicates)
        best, worst = np.argmax(scores), np.argmin(scores)
        wrong += found.p_value[worst, best] <= 0.05
        difference = replicates[best] - replicates[worst]
        naive += percentile_interval(difference - difference.mean() + scores[best] - scores[worst])[0] > 0
    assert wrong / repeats <= 0.09  # 0.05 and two standard errors
    assert naive / repeats > 0.3


def test_all_intervals_hold_the_truth_together(rng):
    """Of correlated normal scores, 95 % of the time; the truth has ties at the top."""
    truth = np.array([1.0, 1.0, 0.9, 0.5, 0.0])
    mixing = 0.2 * rng.normal(size=(5, 5)) + 0.2
    repeats, covered, told = 300, 0, 0
    for _ in range(repeats):
        scores = truth + mixing @ rng.normal(size=5)
        found = all_pairs(scores, scores[:, None] + mixing @ rng.normal(size=(5, 600)))
        covered += (np.abs(found.difference - (truth[:, None] - truth)) <= found.half_width + 1e-12).all()
        told += ((np.abs(found.difference) > found.half_width) == (found.p_value <= 0.05)).all()
    assert 0.91 <= covered / repeats <= 0.985
    assert told / repeats > 0.95  # interval and p-value tell the same, but for a replicate at the edge
