"""How far a score can be trusted: bootstrap intervals, variance components, permutations, seeds needed.

Decisions come as ``(S, N, C)``: S seeds, N held-out clips (each decided by the members that hold its fold
out), C classes. A score of decisions is a function of confusion counts, and counts are linear in the weights
of clips. So a bootstrap over clips needs no resampled arrays: B replicates are one matrix product of ``(B,
N)`` integer weights with ``(N, S * C)`` decisions, and memory stays at a chunk of B.

Two questions, two intervals:

* *seed interval*: the same clips, new seeds. Training noise only; it shrinks to nothing with more seeds.
* *clip interval*: new clips (or subjects) and new seeds, both resampled in every replicate (the pigeonhole
  bootstrap for crossed effects: Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 2007; slightly
  conservative). Trained models and thresholds are kept, so what another *training* set would have changed is
  in neither interval.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special  # scipy.stats has the same functions, and takes a second to import

from mer_jax.evaluation.metrics import Counts, confusion_counts, macro_f1

# Largest number of float64 values in one temporary array of a chunk: 64 MB.
_CHUNK_VALUES = 8_000_000

# Resampling within a fold of few units understates the variance by (n - 1) / n; with fewer, folds are left
# open.
MIN_UNITS_PER_FOLD = 5

Metric = Callable[[Counts], np.ndarray]


def percentile_interval(replicates: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """The central interval of bootstrap replicates, by linear quantiles; NaN replicates are left out.

    Args:
        replicates: ``(B,)``.
        confidence: In (0, 1).

    Returns:
        low, high.
    """
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(replicates, [tail, 1 - tail])
    return float(low), float(high)


def centred_interval(
    replicates: np.ndarray,
    estimate: float | np.ndarray,
    confidence: float = 0.95,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> tuple[float, float]:
    """The percentile interval, moved so that the replicates' mean lies on the estimate.

    F1 of resampled clips is biased downwards: some replicates draw no positive clip of a rare class, whose F1
    is then 0, the more so in the small folds of a fold mean. The bias of the replicates around the estimate
    estimates that of the estimate around the truth, so it is taken out. In simulations with 100 clips, 10
    seeds and classes of 12 to 50 % it covers 95 to 98 % at both averages with even tails, where plain
    percentiles, BCa and the basic bootstrap miss to one side.

    Args:
        replicates: ``(B,)``; NaN replicates are left out.
        estimate: The value on the data.
        confidence: In (0, 1).
        bounds: What the figure cannot leave, e.g. 0 and 1 for a score.

    Returns:
        low, high.
    """
    low, high = percentile_interval(replicates, confidence)
    shift = float(estimate) - float(np.nanmean(replicates))
    return float(np.clip(low + shift, *bounds)), float(np.clip(high + shift, *bounds))


def bca_interval(
    replicates: np.ndarray, estimate: float, jackknife: np.ndarray, confidence: float = 0.95
) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval (Efron 1987; Efron and Tibshirani 1993, chapter 14).

    Args:
        replicates: ``(B,)`` bootstrap values of the statistic; ties with the estimate count one half.
        estimate: Its value on the data.
        jackknife: ``(n,)`` its values with one unit left out each.
        confidence: In (0, 1).

    Returns:
        low, high. Replicates all equal to the estimate give the estimate twice.
    """
    below = np.mean(replicates < estimate) + 0.5 * np.mean(replicates == estimate)
    # One half replicate away from the ends keeps the correction finite.
    below = np.clip(below, 0.5 / len(replicates), 1 - 0.5 / len(replicates))
    bias = special.ndtri(below)
    deviation = np.mean(jackknife) - jackknife
    spread = np.sum(deviation**2) ** 1.5
    acceleration = np.sum(deviation**3) / (6 * spread) if spread > 0 else 0.0
    tail = (1 - confidence) / 2
    z = bias + special.ndtri([tail, 1 - tail])
    levels = special.ndtr(bias + z / (1 - acceleration * z))
    low, high = np.quantile(replicates, levels)
    return float(low), float(high)


def bootstrap_mean(
    values: np.ndarray, draws: np.ndarray, confidence: float = 0.95
) -> dict[str, tuple[float, float] | None]:
    """Intervals for the mean of independent values, e.g. one score per seed.

    With few values they are too narrow: of normal values, 95 % intervals cover 52, 72, 84, 90 and 93 % with 2, 3, 5, 10
    and 20 of them. :func:`t_interval` covers 95 % throughout.

    Args:
        values: ``(S,)``.
        draws: ``(B, S)`` how often each value is drawn in each replicate, from :func:`resample_counts`.
        confidence: In (0, 1).

    Returns:
        ``'percentile'`` and ``'bca'`` intervals, None with fewer than two values.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return {"percentile": None, "bca": None}
    replicates = draws @ values / draws.sum(axis=1)
    jackknife = (values.sum() - values) / (len(values) - 1)
    return {
        "percentile": percentile_interval(replicates, confidence),
        "bca": bca_interval(replicates, float(values.mean()), jackknife, confidence),
    }


def t_interval(
    values: np.ndarray, confidence: float = 0.95, bounds: tuple[float, float] = (-np.inf, np.inf)
) -> tuple[float, float] | None:
    """Student's interval for the mean of independent values, e.g. one score per seed.

    Args:
        values: ``(S,)``.
        confidence: In (0, 1).
        bounds: What the figure cannot leave, e.g. 0 and 1 for a score.

    Returns:
        low, high; None with fewer than two values.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return None
    quantile = special.stdtrit(len(values) - 1, (1 + confidence) / 2)
    half = quantile * values.std(ddof=1) / np.sqrt(len(values))
    low, high = np.clip([values.mean() - half, values.mean() + half], *bounds)
    return float(low), float(high)


def resample_counts(
    units: np.ndarray, strata: np.ndarray | None, num_replicates: int, rng: np.random.Generator
) -> np.ndarray:
    """How often each row is drawn when whole units are resampled with replacement.

    Args:
        units: ``(N,)`` the unit of each row (its own index, or a subject).
        strata: ``(N,)`` the stratum of each row, the same within a unit; units are resampled within strata,
            so that each keeps its number of units. None for one stratum.
        num_replicates: B.
        rng: Source of randomness.

    Returns:
        ``(B, N)`` float64 counts.
    """
    names, row_unit = np.unique(units, return_inverse=True)
    unit_stratum = np.zeros(len(names), np.int64)
    if strata is not None:
        unit_stratum[row_unit] = np.unique(strata, return_inverse=True)[1]
    drawn = np.zeros((num_replicates, len(names)))
    for stratum in np.unique(unit_stratum):
        members = np.flatnonzero(unit_stratum == stratum)
        drawn[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=num_replicates)
    return drawn[:, row_unit]


class Resampling(NamedTuple):
    """Which rows and seeds the replicates draw; shared by all figures of a study, so that they are paired.

    Attributes:
        clips: ``(B, N)`` counts of held-out clips.
        seeds: ``(B, S)`` counts of seeds, each row summing to S.
        units: ``(U, N)`` 0/1, the rows of each unit.
        fold_share: ``(B, F)`` units drawn in each fold over the units it has; 1 throughout when folds are
            strata.
        unit: What is resampled: ``'clips within folds'``, ``'subjects within folds'``, ``'clips'`` or
            ``'subjects'``.
    """

    clips: np.ndarray
    seeds: np.ndarray
    units: np.ndarray
    fold_share: np.ndarray
    unit: str


def make_resampling(
    fold: np.ndarray, subject: Sequence[str] | None, num_seeds: int, num_replicates: int, seed: int = 0
) -> Resampling:
    """Draws the replicates of a study.

    Subjects are resampled where they are known for every clip, since clips of one face are not independent;
    else clips. They are resampled within folds, as the folds were made, where every fold holds at least
    ``MIN_UNITS_PER_FOLD`` units and no unit spans folds; otherwise across all of them (leave-one-subject-out:
    one unit per fold).

    Args:
        fold: ``(N,)`` fold of each held-out clip.
        subject: N subject ids, or None; unknown where any is ``''``.
        num_seeds: S.
        num_replicates: B.
        seed: Of the resampling.
    """
    fold = np.asarray(fold)
    rng = np.random.default_rng(seed)
    known = subject is not None and len(fold) > 0 and all(subject)
    # A single subject leaves nothing to resample.
    if known and len(set(subject)) < 2:
        known = False
    units = np.unique(np.asarray(subject), return_inverse=True)[1] if known else np.arange(len(fold))
    folds, fold_index = np.unique(fold, return_inverse=True)
    pairs = np.unique(np.stack([units, fold_index], axis=1), axis=0)  # (unit, fold) that occur
    units_per_fold = np.bincount(pairs[:, 1], minlength=len(folds))
    within = len(pairs) == units.max() + 1 and units_per_fold.min() >= MIN_UNITS_PER_FOLD
    clips = resample_counts(units, fold if within else None, num_replicates, rng)
    seeds = resample_counts(np.arange(num_seeds), None, num_replicates, rng)
    in_fold = np.eye(len(folds))[fold_index]  # (N, F)
    # A unit's rows in a fold share its draws: count each unit once per fold.
    once = np.zeros(len(fold))
    once[np.unique(np.stack([units, fold_index], axis=1), axis=0, return_index=True)[1]] = 1.0
    per_fold = in_fold * once[:, None]
    name = "subjects" if known else "clips"
    return Resampling(
        clips=clips,
        seeds=seeds,
        units=(units == np.arange(units.max() + 1)[:, None]).astype(np.float64),
        fold_share=clips @ per_fold / units_per_fold,
        unit=f"{name} within folds" if within else name,
    )


def weighted_scores(
    truth: np.ndarray,
    decisions: np.ndarray,
    mask: np.ndarray,
    weights: np.ndarray,
    metric: Metric = macro_f1,
    groups: np.ndarray | None = None,
    group_share: np.ndarray | None = None,
) -> np.ndarray:
    """Scores under many weightings of the clips.

    Args:
        truth: ``(N, C)`` 0/1.
        decisions: ``(S, N, C)`` bool.
        mask: ``(N, C)`` bool, False where the truth is unknown.
        weights: ``(B, N)`` weight of each clip in each weighting.
        metric: Confusion counts ``(..., C)`` to ``(...)`` or ``(..., K)``.
        groups: ``(N,)`` fold of each clip, to average the folds' scores; None pools all clips.
        group_share: ``(B, F)`` weight of each fold in that average, folds rising; None for equal weights.

    Returns:
        ``(B, S)`` or ``(B, S, K)``; NaN where no clip has weight.
    """
    if groups is not None:
        names = np.unique(groups)
        share = np.ones((len(weights), len(names))) if group_share is None else group_share
        total, weight = 0.0, 0.0
        for index, name in enumerate(names):
            rows = groups == name
            values = weighted_scores(truth[rows], decisions[:, rows], mask[rows], weights[:, rows], metric)
            part = share[:, index].reshape(-1, *[1] * (values.ndim - 1))
            # A fold of which nothing was drawn has no part in the average; one without a defined score
            # neither.
            defined = ~np.isnan(values) & (part > 0)
            total = total + np.where(defined, np.where(defined, values, 0.0) * part, 0.0)
            weight = weight + np.where(defined, part, 0.0)
        return np.where(weight > 0, total / np.where(weight > 0, weight, 1.0), np.nan)
    num_seeds, num_rows, num_classes = decisions.shape
    truth, known = np.asarray(truth) > 0, np.asarray(mask, np.float64)
    positive = known * truth  # (N, C)
    # (S, N, C) -> (N, S * C): one product of the weights with all seeds and classes.
    flat = np.moveaxis(decisions, 0, 1).reshape(num_rows, -1)
    hits = flat * np.tile(positive, num_seeds)
    alarms = flat * np.tile(known - positive, num_seeds)
    chunk = max(1, _CHUNK_VALUES // max(1, flat.shape[1]))
    scores = []
    for start in range(0, len(weights), chunk):
        part = weights[start : start + chunk]
        shape = (len(part), num_seeds, num_classes)
        tp = (part @ hits).reshape(shape)
        fp = (part @ alarms).reshape(shape)
        fn = (part @ positive)[:, None, :] - tp
        tn = (part @ (known - positive))[:, None, :] - fp
        values = metric(Counts(tp, fp, fn, tn))
        drawn = (part.sum(axis=1) > 0).reshape(-1, *[1] * (values.ndim - 1))
        scores.append(np.where(drawn, values, np.nan))
    return np.concatenate(scores)


def mean_over_seeds(scores: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Mean over the seeds drawn in each replicate.

    Args:
        scores: ``(B, S)`` or ``(B, S, K)``.
        seeds: ``(B, S)`` counts.

    Returns:
        ``(B,)`` or ``(B, K)``.
    """
    return np.einsum("bs...,bs->b...", scores, seeds) / seeds.sum(axis=1).reshape(-1, *[1] * (scores.ndim - 2))


def hierarchical_replicates(
    truth: np.ndarray,
    decisions: np.ndarray,
    mask: np.ndarray,
    resampling: Resampling,
    metric: Metric = macro_f1,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """Mean score of a member on resampled clips (or subjects) and seeds, for :func:`centred_interval`.

    Args:
        truth: ``(N, C)`` 0/1.
        decisions: ``(S, N, C)`` bool.
        mask: ``(N, C)`` bool.
        resampling: The draws, for these N clips and S seeds.
        metric: Counts ``(..., C)`` to ``(...)`` or ``(..., K)``.
        groups: As for :func:`weighted_scores`.

    Returns:
        ``(B,)`` or ``(B, K)``.
    """
    share = None if groups is None else resampling.fold_share
    scores = weighted_scores(truth, decisions, mask, resampling.clips, metric, groups, share)
    return mean_over_seeds(scores, resampling.seeds)


class VarianceComponents(NamedTuple):
    """Variance of the score of one member around the grand mean, split by cause.

    Attributes:
        fold: Between folds: which clips are held out (and which are left to train on).
        seed: Between seeds, in common to all folds.
        rest: Within (fold, seed): training noise of the single member, and any interaction.
        truncated: Names of the components whose estimate was negative and is given as 0.
    """

    fold: float
    seed: float
    rest: float
    truncated: tuple[str, ...]


def variance_components(scores: np.ndarray) -> VarianceComponents | None:
    """Two-way random-effects analysis of variance, one observation per cell, method of moments.

    ``score[k, s] = mean + fold_k + seed_s + rest_ks``. With the mean squares of folds, seeds and residuals

        E[MS_fold] = rest + S fold,   E[MS_seed] = rest + F seed,   E[MS_rest] = rest,

    which is solved for the components; negative estimates (the effect is smaller than its noise) become 0,
    which makes them slightly too large on average. No distribution is assumed.

    Args:
        scores: ``(F, S)``.

    Returns:
        The components; None with fewer than two folds or two seeds.
    """
    scores = np.asarray(scores, np.float64)
    num_folds, num_seeds = scores.shape
    if num_folds < 2 or num_seeds < 2:
        return None
    grand, by_fold, by_seed = scores.mean(), scores.mean(axis=1), scores.mean(axis=0)
    ms_fold = num_seeds * np.sum((by_fold - grand) ** 2) / (num_folds - 1)
    ms_seed = num_folds * np.sum((by_seed - grand) ** 2) / (num_seeds - 1)
    residual = scores - by_fold[:, None] - by_seed[None, :] + grand
    ms_rest = np.sum(residual**2) / ((num_folds - 1) * (num_seeds - 1))
    fold, seed = (ms_fold - ms_rest) / num_seeds, (ms_seed - ms_rest) / num_folds
    truncated = tuple(name for name, value in (("fold", fold), ("seed", seed)) if value < 0)
    return VarianceComponents(max(0.0, float(fold)), max(0.0, float(seed)), float(ms_rest), truncated)


def seeds_needed(sd: float, half_width: float, confidence: float = 0.95, limit: int = 1_000_000) -> int | None:
    """The least number of seeds whose t interval of the mean is at most ``half_width`` to either side.

    Args:
        sd: Standard deviation of the score over seeds.
        half_width: In the unit of the score, above 0.
        confidence: In (0, 1).
        limit: Largest number to consider.

    Returns:
        At least 2; None when ``limit`` is not enough or ``sd`` is not finite.
    """
    if not np.isfinite(sd):
        return None

    def reaches(n):
        return special.stdtrit(n - 1, (1 + confidence) / 2) * sd / np.sqrt(n) <= half_width

    low, high = 2, limit
    if not reaches(high):
        return None
    while low < high:  # the half width falls with n
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle + 1, high)
    return low


class Chance(NamedTuple):
    """What the decisions would score if they had nothing to do with the labels.

    Attributes:
        mean: Mean over permutations of the mean score over seeds.
        interval: Central interval of the same.
        p_value: Share of permutations (the data among them) that score at least as high as the data.
    """

    mean: float
    interval: tuple[float, float]
    p_value: float


def chance_level(
    truth: np.ndarray,
    decisions: np.ndarray,
    mask: np.ndarray,
    fold: np.ndarray,
    num_permutations: int = 2000,
    metric: Metric = macro_f1,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[Chance, Chance]:
    """Permutation null: whole label vectors change places among the held-out clips of a fold, decisions stay.

    It keeps the label frequencies and co-occurrence of every fold, and the rate at which each member says
    "present".

    Args:
        truth: ``(N, C)`` 0/1.
        decisions: ``(S, N, C)`` bool.
        mask: ``(N, C)`` bool, False where the truth is unknown (travels with the labels).
        fold: ``(N,)``.
        num_permutations: R.
        metric: Counts ``(..., C)`` to ``(...)``.
        confidence: In (0, 1).
        seed: Of the permutations.

    Returns:
        Chance of the pooled score and of the fold mean.
    """
    rng = np.random.default_rng(seed)
    truth, mask, fold = np.asarray(truth) > 0, np.asarray(mask, bool), np.asarray(fold)
    num_seeds, _, num_classes = decisions.shape
    chunk = max(1, _CHUNK_VALUES // (num_seeds * num_classes * len(np.unique(fold))))
    pooled, fold_mean = [], []
    for start in range(0, num_permutations, chunk):
        size = min(chunk, num_permutations - start)
        parts = []
        for name in np.unique(fold):
            rows = np.flatnonzero(fold == name)
            order = rng.permuted(np.broadcast_to(rows, (size, len(rows))), axis=1)  # (R, N)
            parts.append(_permuted_counts(truth[order], mask[order], decisions[:, rows]))
        pooled.append(metric(Counts(*(sum(cells) for cells in zip(*parts, strict=True)))).mean(axis=1))
        fold_mean.append(np.mean([metric(part) for part in parts], axis=0).mean(axis=1))
    everything = np.ones((1, len(truth)))
    observed = (
        weighted_scores(truth, decisions, mask, everything, metric).mean(),
        weighted_scores(truth, decisions, mask, everything, metric, fold).mean(),
    )

    def result(null, value):
        null = np.concatenate(null)
        at_least = np.sum(null >= value - 1e-12)
        return Chance(
            float(null.mean()),
            percentile_interval(null, confidence),
            float((at_least + 1) / (len(null) + 1)),
        )

    return result(pooled, observed[0]), result(fold_mean, observed[1])


def _permuted_counts(truth: np.ndarray, mask: np.ndarray, decisions: np.ndarray) -> Counts:
    """Counts ``(R, S, C)`` of decisions ``(S, n, C)`` against R labellings ``(R, n, C)``."""
    positive = np.moveaxis((truth & mask).astype(np.float64), -1, 0)  # (C, R, n)
    negative = np.moveaxis((~truth & mask).astype(np.float64), -1, 0)
    said = np.moveaxis(decisions.astype(np.float64), -1, 0).swapaxes(1, 2)  # (C, n, S)
    tp, fp = np.moveaxis(positive @ said, 0, -1), np.moveaxis(negative @ said, 0, -1)  # (R, S, C)
    fn = np.moveaxis(positive.sum(axis=2), 0, -1)[:, None, :] - tp
    tn = np.moveaxis(negative.sum(axis=2), 0, -1)[:, None, :] - fp
    return Counts(tp, fp, fn, tn)


def sign_flip_p_value(differences: np.ndarray, num_permutations: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of "the differences are symmetric around 0", by flipping their signs.

    All flips are enumerated when there are no more than ``num_permutations`` of them, else drawn at random
    (the data counted among them, so that the p-value is valid and never 0).

    Args:
        differences: Any shape, one independent unit per entry.
        num_permutations: Largest number of flips.
        seed: Of the random flips.
    """
    flat = np.asarray(differences, np.float64).ravel()
    observed = abs(flat.sum())
    tolerance = 1e-12 * max(1.0, np.abs(flat).sum())
    if len(flat) < 60 and 2 ** len(flat) <= num_permutations:
        bits = np.arange(2 ** len(flat))[:, None] >> np.arange(len(flat)) & 1
        return float(np.mean(np.abs((1 - 2 * bits) @ flat) >= observed - tolerance))
    rng = np.random.default_rng(seed)
    at_least, done = 0, 0
    chunk = max(1, _CHUNK_VALUES // len(flat))
    while done < num_permutations:
        size = min(chunk, num_permutations - done)
        signs = rng.integers(0, 2, (size, len(flat))) * 2 - 1
        at_least += int(np.sum(np.abs(signs @ flat) >= observed - tolerance))
        done += size
    return (at_least + 1) / (num_permutations + 1)


class PairedScores(NamedTuple):
    """Two studies compared on the scores of the same (fold, seed) pairs: A minus B.

    Attributes:
        difference: ``(F, S)``.
        mean: Mean difference.
        sd: Its standard deviation over pairs, ddof 1.
        interval: Student's interval of the mean over seeds (folds kept).
        p_value: :func:`sign_flip_p_value` over pairs: would these clips tell A from B after other seeds?
        win_rate: Share of pairs in which A is ahead, ties one half.
    """

    difference: np.ndarray
    mean: float
    sd: float
    interval: tuple[float, float] | None
    p_value: float
    win_rate: float


def paired_comparison(a: np.ndarray, b: np.ndarray, confidence: float = 0.95, seed: int = 0) -> PairedScores:
    """Compares scores ``(F, S)`` of two studies pair by pair.

    It knows training noise only; for new clips see :func:`paired_clip_comparison`.

    Args:
        a: ``(F, S)`` scores of study A.
        b: ``(F, S)`` scores of study B, same folds and seeds.
        confidence: In (0, 1).
        seed: Of the flips.
    """
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    if difference.ndim != 2:
        raise ValueError(f"scores must be (folds, seeds), got {difference.shape}")
    return PairedScores(
        difference=difference,
        mean=float(difference.mean()),
        sd=float(difference.std(ddof=1)) if difference.size > 1 else float("nan"),
        interval=t_interval(difference.mean(axis=0), confidence),
        p_value=sign_flip_p_value(difference, seed=seed),
        win_rate=float(np.mean(difference > 0) + 0.5 * np.mean(difference == 0)),
    )


class PairedClips(NamedTuple):
    """Two studies compared on new clips: A minus B, the same clips and seeds drawn for both.

    Attributes:
        mean: Difference of the mean scores over seeds.
        interval: Paired hierarchical bootstrap over clips (or subjects) and seeds.
        p_value: Swap test: the decisions of A and B change places for whole clips (or subjects), all seeds
            together. It takes the trained members as they are: what other seeds would change is in the interval alone,
            and with few seeds and strong training noise equally good studies differ by it more often than its level.
        probability_a_better: Share of the (centred) replicates in which A is ahead, ties one half.
    """

    mean: float
    interval: tuple[float, float]
    p_value: float
    probability_a_better: float


def paired_clip_comparison(
    truth: np.ndarray,
    decisions_a: np.ndarray,
    decisions_b: np.ndarray,
    mask: np.ndarray,
    resampling: Resampling,
    metric: Metric = macro_f1,
    groups: np.ndarray | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedClips:
    """Compares the decisions of two studies for the same clips and seeds.

    Args:
        truth: ``(N, C)`` 0/1.
        decisions_a: ``(S, N, C)`` bool.
        decisions_b: ``(S, N, C)`` bool.
        mask: ``(N, C)`` bool.
        resampling: The draws, for these N clips and S seeds.
        metric: Counts ``(..., C)`` to ``(...)``.
        groups: ``(N,)`` folds to average over; None pools.
        confidence: In (0, 1).
        seed: Of the swaps.
    """
    everything = np.ones((1, len(truth)))
    mean, replicates = 0.0, 0.0
    for sign, decisions in ((1, decisions_a), (-1, decisions_b)):
        args = (truth, decisions, mask)
        mean += sign * float(weighted_scores(*args, everything, metric, groups).mean())
        replicates += sign * hierarchical_replicates(*args, resampling, metric, groups)
    # Swapping is weighting: the stack of A's and B's rows, with weight 1 on one of each pair of rows.
    rng = np.random.default_rng(seed)
    coins = rng.integers(0, 2, (len(resampling.clips), len(resampling.units)))  # (R, U)
    from_b = coins.astype(np.float64) @ resampling.units  # (R, N)
    both = np.concatenate([decisions_a, decisions_b], axis=1)  # (S, 2 N, C)
    stacked = (np.tile(truth, (2, 1)), both, np.tile(mask, (2, 1)))
    twice = None if groups is None else np.tile(groups, 2)
    one = weighted_scores(*stacked, np.concatenate([1 - from_b, from_b], axis=1), metric, twice).mean(axis=1)
    other = weighted_scores(*stacked, np.concatenate([from_b, 1 - from_b], axis=1), metric, twice).mean(axis=1)
    at_least = np.sum(np.abs(one - other) >= abs(mean) - 1e-12)
    centred = replicates - np.nanmean(replicates) + mean
    return PairedClips(
        mean=mean,
        interval=centred_interval(replicates, mean, confidence),
        p_value=float((at_least + 1) / (len(from_b) + 1)),
        probability_a_better=float(np.mean(centred > 0) + 0.5 * np.mean(centred == 0)),
    )


class AllPairs(NamedTuple):
    """R studies compared with each other on new clips, all pairs at once: row a minus column b.

    Attributes:
        difference: ``(R, R)``.
        half_width: ``(R, R)`` of the simultaneous intervals: with the wanted confidence *all* of
            ``difference +- half_width`` hold the truth together.
        p_value: ``(R, R)`` adjusted for all pairs.
        probability_best: ``(R,)`` share of the (centred) replicates in which a study is ahead of all others, ties
            shared. It describes the replicates and is no test.
    """

    difference: np.ndarray
    half_width: np.ndarray
    p_value: np.ndarray
    probability_best: np.ndarray


def all_pairs(scores: np.ndarray, replicates: np.ndarray, confidence: float = 0.95) -> AllPairs:
    """Compares many studies pair by pair so that any pair may be picked afterwards, the best study's among them.

    To compare every study with the best *of the same data* is to pick the most extreme pairs; a single pair's
    interval and p-value are then too optimistic, the more so the more studies there are. Here the largest
    studentised deviation over all pairs sets one critical value for all of them: Tukey's method, with the
    distribution of the maximum from the replicates instead of the studentised range (Westfall and Young,
    "Resampling-Based Multiple Testing", 1993, single-step max T; Romano and Wolf, "Exact and approximate stepdown
    methods for multiple hypothesis testing", JASA 2005). It controls the chance of any false claim over all pairs,
    whichever are looked at. Replicates must be paired (the same clips and seeds drawn for all studies); they are
    centred as in :func:`centred_interval`.

    Args:
        scores: ``(R,)`` each study's mean score.
        replicates: ``(R, B)`` replicates of them, of :func:`hierarchical_replicates` on the same draws.
        confidence: In (0, 1).

    Returns:
        The comparisons; studies that never differ have difference 0, half width 0 and p-value 1.
    """
    scores = np.asarray(scores, np.float64)
    deviation = replicates - replicates.mean(axis=1, keepdims=True)  # (R, B)
    num_studies, num_replicates = deviation.shape
    sd = np.zeros((num_studies, num_studies))
    largest = np.zeros(num_replicates)
    for row in range(num_studies):  # a row at a time: (R, R, B) would not fit where there are many studies
        difference = deviation[row] - deviation  # (R, B)
        sd[row] = difference.std(axis=1)
        sd[row, sd[row] < 1e-12] = 0.0
        differing = sd[row] > 0
        if differing.any():
            largest = np.maximum(largest, np.abs(difference[differing] / sd[row, differing, None]).max(axis=0))
    difference = scores[:, None] - scores
    statistic = np.where(difference == 0, 0.0, np.inf)
    np.divide(np.abs(difference), sd, out=statistic, where=sd > 0)
    at_least = num_replicates - np.searchsorted(np.sort(largest), statistic - 1e-12)  # (R, R)
    centred = scores[:, None] + deviation
    first = centred >= centred.max(axis=0) - 1e-12  # (R, B)
    return AllPairs(
        difference=difference,
        half_width=np.quantile(largest, confidence) * sd,
        p_value=np.where(statistic == 0, 1.0, (at_least + 1) / (num_replicates + 1)),
        probability_best=(first / first.sum(axis=0)).mean(axis=1),
    )


def seed_matrix(truth: np.ndarray, decisions: np.ndarray, mask: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Binary macro-F1 of every member: ``(F, S)``, folds rising, from decisions ``(S, N, C)``."""
    return np.stack(
        [
            macro_f1(confusion_counts(truth[fold == name], decisions[:, fold == name], mask[fold == name]))
            for name in np.unique(fold)
        ]
    )
