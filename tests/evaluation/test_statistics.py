import numpy as np
import pytest
from scipy import stats

from mer_jax.evaluation import metrics
from mer_jax.evaluation import statistics as st

PREVALENCE = np.array([0.5, 0.2, 0.25, 0.15, 0.3])


def make_decisions(rng, num_clips=60, num_seeds=6, signal=0.8, clip_sd=1.0):
    """Truth ``(N, 5)`` and decisions ``(S, N, 5)`` whose errors have a part per clip and a part per (seed, clip)."""
    truth = rng.random((num_clips, 5)) < PREVALENCE
    logit = signal * (2 * truth - 1) + clip_sd * rng.standard_normal((num_clips, 5))
    return truth, logit + 0.7 * rng.standard_normal((num_seeds, num_clips, 5)) > 0


def macro(truth, decisions):
    return metrics.macro_f1(metrics.confusion_counts(truth, decisions))


def test_resampling_counts_keep_strata_and_whole_units(rng):
    units = np.array([0, 0, 1, 2, 2, 3])
    strata = np.array([0, 0, 0, 1, 1, 1])
    counts = st.resample_counts(units, strata, 4000, rng)
    np.testing.assert_array_equal(counts[:, 0], counts[:, 1])
    np.testing.assert_array_equal(counts[:, 0] + counts[:, 2], 2)
    np.testing.assert_array_equal(counts[:, 3] + counts[:, 5], 2)
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=0.05)


def test_resampling_chooses_its_units():
    fold = np.repeat([0, 1], 12)
    clips = st.make_resampling(fold, None, 3, 50)
    assert clips.unit == "clips within folds" and (clips.fold_share == 1).all()
    within = st.make_resampling(fold, [f"s{f}{i % 6}" for i, f in enumerate(fold)], 3, 50)
    assert within.unit == "subjects within folds" and (within.fold_share == 1).all()
    across = st.make_resampling(fold, [f"s{i % 6}" for i in range(24)], 3, 50)
    assert across.unit == "subjects"  # each has clips in both folds
    one_left_out = st.make_resampling(np.arange(24) // 3, [f"s{i // 3}" for i in range(24)], 3, 50)
    assert one_left_out.unit == "subjects"
    np.testing.assert_array_equal(one_left_out.fold_share, one_left_out.clips[:, ::3])
    assert st.make_resampling(fold, [""] * 24, 3, 50).unit == "clips within folds"
    assert st.make_resampling(fold, ["only"] * 24, 3, 50).unit == "clips within folds"
    assert st.make_resampling(np.arange(4), None, 3, 50).unit == "clips"
    np.testing.assert_array_equal(across.seeds.sum(axis=1), 3)
    np.testing.assert_array_equal(across.units.sum(axis=0), 1)


def test_weights_equal_resampled_arrays(rng):
    truth, decisions = make_decisions(rng, 20, 3)
    mask = rng.random(truth.shape) < 0.9
    fold = np.arange(20) % 2
    draws = st.make_resampling(fold, None, 3, 8, seed=1)
    pooled = st.weighted_scores(truth, decisions, mask, draws.clips)
    by_fold = st.weighted_scores(truth, decisions, mask, draws.clips, groups=fold, group_share=draws.fold_share)
    for b in range(8):
        rows = np.repeat(np.arange(20), draws.clips[b].astype(int))

        def score(chosen):
            return metrics.macro_f1(metrics.confusion_counts(truth[chosen], decisions[:, chosen], mask[chosen]))

        np.testing.assert_allclose(pooled[b], score(rows))
        expected = (score(rows[fold[rows] == 0]) + score(rows[fold[rows] == 1])) / 2
        np.testing.assert_allclose(by_fold[b], expected)


def test_chunks_do_not_show(rng, monkeypatch):
    truth, decisions = make_decisions(rng, 20, 3)
    mask = np.ones_like(truth)
    fold = np.arange(20) % 2
    draws = st.make_resampling(fold, None, 3, 50)
    whole = st.weighted_scores(truth, decisions, mask, draws.clips)
    monkeypatch.setattr(st, "_CHUNK_VALUES", 100)
    np.testing.assert_array_equal(whole, st.weighted_scores(truth, decisions, mask, draws.clips))
    assert st.sign_flip_p_value(rng.standard_normal(40), 300) <= 1
    assert st.chance_level(truth, decisions, mask, fold, 55)[0].mean > 0


def test_a_fold_that_is_not_drawn_has_no_part_in_the_mean(rng):
    truth, decisions = make_decisions(rng, 9, 2)
    fold = np.arange(9) // 3
    weights = np.repeat([2.0, 1.0, 0.0], 3)[None]
    share = np.array([[2.0, 1.0, 0.0]])
    scores = st.weighted_scores(truth, decisions, np.ones_like(truth), weights, groups=fold, group_share=share)
    each = [macro(truth[fold == k], decisions[:, fold == k]) for k in range(2)]
    np.testing.assert_allclose(scores[0], (2 * each[0] + each[1]) / 3)


def test_bootstrap_over_seeds_agrees_with_scipy(rng):
    values = rng.gamma(2.0, size=40)
    draws = st.resample_counts(np.arange(40), None, 20_000, rng)
    ours = st.bootstrap_mean(values, draws)
    for method in ("percentile", "bca"):
        reference = stats.bootstrap((values,), np.mean, n_resamples=20_000, method=method, rng=rng)
        width = np.ptp(reference.confidence_interval)
        np.testing.assert_allclose(ours[method], reference.confidence_interval, atol=0.05 * width)
    assert st.bootstrap_mean(values[:1], draws[:, :1]) == {"percentile": None, "bca": None}
    np.testing.assert_allclose(st.bootstrap_mean(np.full(5, 0.25), np.ones((9, 5)))["bca"], 0.25)


def test_t_interval_equals_scipy(rng):
    values = rng.standard_normal(7)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    np.testing.assert_allclose(st.t_interval(values, 0.9), expected)
    assert st.t_interval(values[:1]) is None
    np.testing.assert_allclose(st.t_interval([0.1, 0.3], bounds=(0, 1)), (0, 1))


def test_centred_interval_takes_the_bias_out():
    replicates = np.linspace(0.1, 0.5, 1001)
    low, high = st.centred_interval(replicates, 0.4)
    assert (low, high) == (pytest.approx(0.21), pytest.approx(0.59))
    assert st.centred_interval(replicates, 0.9, bounds=(0, 1)) == (pytest.approx(0.71), 1.0)


@pytest.mark.parametrize("average", ["pooled", "fold_mean"])
def test_clip_interval_covers_what_new_clips_and_seeds_would_score(rng, average):
    fold = np.arange(60) % 3
    groups = fold if average == "fold_mean" else None
    estimates, intervals = [], []
    for trial in range(150):
        truth, decisions = make_decisions(rng)
        mask = np.ones_like(truth)
        draws = st.make_resampling(fold, None, len(decisions), 300, seed=trial)
        estimates.append(st.weighted_scores(truth, decisions, mask, np.ones((1, 60)), groups=groups).mean())
        replicates = st.hierarchical_replicates(truth, decisions, mask, draws, groups=groups)
        intervals.append(st.centred_interval(replicates, estimates[-1]))
    low, high = np.transpose(intervals)
    covered = np.mean((low <= np.mean(estimates)) & (np.mean(estimates) <= high))
    assert 0.90 <= covered <= 1.0
    # Not by being far too wide.
    assert np.mean(high - low) < 1.4 * 2 * 1.96 * np.std(estimates)


def test_seed_interval_knows_training_noise_only(rng):
    truth, decisions = make_decisions(rng, num_seeds=40)
    mask = np.ones_like(truth)
    values = macro(truth, decisions)
    draws = st.make_resampling(np.arange(60) % 3, None, 40, 500)
    seed_interval = st.bootstrap_mean(values, draws.seeds)["percentile"]
    clip_interval = st.centred_interval(st.hierarchical_replicates(truth, decisions, mask, draws), values.mean())
    assert np.ptp(clip_interval) > 2 * np.ptp(seed_interval)


def test_variance_components_by_hand():
    # Fold effects +-1, seed effects +-2, residual +-0.5 as in a 2 x 2 table.
    scores = np.array([[1 + 2 + 0.5, 1 - 2 - 0.5], [-1 + 2 - 0.5, -1 - 2 + 0.5]])
    parts = st.variance_components(scores)
    # MS_fold = 2 * (1 + 1), MS_seed = 2 * (4 + 4), MS_rest = 4 * 0.25
    assert parts == (pytest.approx((4 - 1) / 2), pytest.approx((16 - 1) / 2), pytest.approx(1), ())
    assert st.variance_components(np.zeros((1, 5))) is None
    assert st.variance_components(np.zeros((5, 1))) is None


def test_variance_components_truncate_and_say_so():
    parts = st.variance_components(np.array([[1.0, -1.0], [-1.0, 1.0]]))
    assert (parts.fold, parts.seed, parts.truncated) == (0, 0, ("fold", "seed"))
    assert parts.rest == 4


def test_variance_components_recover_simulated_effects(rng):
    estimates = []
    for _ in range(600):
        fold, seed, rest = rng.normal(0, 3, (6, 1)), rng.normal(0, 2, (1, 20)), rng.normal(0, 1, (6, 20))
        estimates.append(st.variance_components(0.5 + fold + seed + rest)[:3])
    np.testing.assert_allclose(np.mean(estimates, axis=0), [9, 4, 1], rtol=0.1)


def test_seeds_needed():
    for sd, half_width in ((0.02, 0.01), (0.05, 0.005), (0.01, 0.05)):
        n = st.seeds_needed(sd, half_width)

        def half(k, sd=sd):
            return stats.t.ppf(0.975, k - 1) * sd / np.sqrt(k)

        assert half(n) <= half_width
        assert n == 2 or half(n - 1) > half_width
    assert st.seeds_needed(0.0, 0.01) == 2
    assert st.seeds_needed(1.0, 1e-6, limit=1000) is None
    assert st.seeds_needed(float("nan"), 0.01) is None


def test_chance_of_unrelated_decisions(rng):
    truth, decisions = make_decisions(rng, 90, 5, signal=0.0)
    fold = np.arange(90) % 3
    pooled, fold_mean = st.chance_level(truth, decisions, np.ones_like(truth), fold, 500)
    assert 0.01 < pooled.p_value <= 1 and 0.01 < fold_mean.p_value <= 1
    assert pooled.interval[0] < macro(truth, decisions).mean() < pooled.interval[1]
    # Expected counts: the rates of truth and decision multiply.
    p, q = truth.mean(axis=0), decisions.mean(axis=(0, 1))
    assert pooled.mean == pytest.approx(np.mean(2 * p * q / (p + q)), abs=0.01)


def test_chance_of_related_decisions_and_unknown_labels(rng):
    truth, decisions = make_decisions(rng, 60, 4, signal=2.0)
    mask = rng.random(truth.shape) < 0.8
    fold = np.arange(60) % 3
    pooled, fold_mean = st.chance_level(truth, decisions, mask, fold, 400)
    assert pooled.p_value == fold_mean.p_value == 1 / 401
    # One permutation by hand: what counts is which labels meet which decisions.
    order = rng.permutation(60)
    counts = st._permuted_counts(truth[order][None], mask[order][None], decisions)
    expected = metrics.confusion_counts(truth[order], decisions, mask[order])
    for ours, theirs in zip(counts, expected, strict=True):
        np.testing.assert_array_equal(ours[0], theirs)


def test_sign_flips_by_hand_and_by_chance(rng):
    assert st.sign_flip_p_value(np.array([1.0, 2.0, 3.0])) == pytest.approx(2 / 8)
    assert st.sign_flip_p_value(np.array([1.0, -1.0])) == 1
    assert st.sign_flip_p_value(np.zeros((2, 3))) == 1
    values = rng.normal(0.3, 1, 12)
    exact = st.sign_flip_p_value(values)
    assert st.sign_flip_p_value(values, 4000, seed=1) == pytest.approx(exact, abs=0.03)
    assert st.sign_flip_p_value(np.ones(100)) == pytest.approx(1 / 10_001)


def test_paired_comparison_of_scores(rng):
    b = rng.random((3, 8))
    pairs = st.paired_comparison(b + 0.1 + 0.01 * rng.standard_normal((3, 8)), b)
    assert pairs.mean == pytest.approx(0.1, abs=0.01)
    assert pairs.interval[0] < pairs.mean < pairs.interval[1]
    assert pairs.win_rate == 1 and pairs.p_value < 0.001
    expected = stats.ttest_1samp(pairs.difference.mean(axis=0), 0).confidence_interval(0.95)
    np.testing.assert_allclose(pairs.interval, expected)
    same = st.paired_comparison(b, b)
    assert (same.mean, same.p_value, same.win_rate, same.interval) == (0, 1, 0.5, (0, 0))
    assert st.paired_comparison(b[:1, :1], b[:1, :1]).interval is None
    with pytest.raises(ValueError, match="folds, seeds"):
        st.paired_comparison(b[0], b[0])


def test_paired_comparison_on_clips(rng):
    truth, a = make_decisions(rng, 60, 5, signal=1.5)
    b = a ^ (rng.random(a.shape) < 0.15)
    mask = np.ones_like(truth)
    fold = np.arange(60) % 3
    draws = st.make_resampling(fold, None, 5, 400)
    for groups in (None, fold):
        found = st.paired_clip_comparison(truth, a, b, mask, draws, groups=groups)
        assert found.interval[0] < found.mean < found.interval[1]
        assert found.mean > 0 and found.p_value < 0.05 and found.probability_a_better > 0.95
        reverse = st.paired_clip_comparison(truth, b, a, mask, draws, groups=groups)
        assert reverse.mean == pytest.approx(-found.mean)
        np.testing.assert_allclose(reverse.interval, [-found.interval[1], -found.interval[0]], atol=1e-12)
    assert found.mean == pytest.approx(
        np.mean(st.seed_matrix(truth, a, mask, fold) - st.seed_matrix(truth, b, mask, fold))
    )
    nothing = st.paired_clip_comparison(truth, a, a, mask, draws)
    assert (nothing.mean, nothing.p_value, nothing.probability_a_better) == (0, 1, 0.5)


def test_pairing_narrows_the_interval(rng):
    truth, a = make_decisions(rng, 60, 5, clip_sd=2.0)
    b = a ^ (rng.random(a.shape) < 0.03)
    mask = np.ones_like(truth)
    draws = st.make_resampling(np.arange(60) % 3, None, 5, 400)
    paired = np.ptp(st.paired_clip_comparison(truth, a, b, mask, draws).interval)
    alone = [np.std(st.hierarchical_replicates(truth, made, mask, draws)) for made in (a, b)]
    assert paired < 0.6 * 2 * 1.96 * np.hypot(*alone)


def test_swapping_clips_has_the_right_level(rng):
    p_values = []
    for trial in range(120):
        truth, both = make_decisions(rng, 40, 6, clip_sd=0.0)
        draws = st.make_resampling(np.arange(40) % 2, None, 3, 199, seed=trial)
        p_values.append(
            st.paired_clip_comparison(truth, both[:3], both[3:], np.ones_like(truth), draws, seed=trial).p_value
        )
    assert 0.0 <= np.mean(np.array(p_values) <= 0.1) <= 0.2
    assert 0.35 < np.mean(p_values) < 0.65
