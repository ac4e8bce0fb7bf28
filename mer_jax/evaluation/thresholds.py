"""Decision thresholds: applying them, tuning them, and how the score depends on them.

A class is present where its probability is ``>=`` its threshold, compared in the dtype of the probabilities.

Tuning belongs on predictions for clips that served neither the gradients nor the score: for held-out fold k,
the inner-split predictions of the members that hold fold k out. :func:`oracle_thresholds` is the opposite: it
tunes on the very clips that are scored, to show how much that inflates a score, and nothing else may use it.
"""

from collections.abc import Sequence

import numpy as np

from mer_jax.evaluation.metrics import Counts, binary_f1, confusion_counts, macro_f1

TUNED_MODES = ("global", "per_class")
ARGMAX = "argmax"
"""Of several classes the likeliest is present, and no threshold decides."""
THRESHOLD_MODES = ("fixed", *TUNED_MODES, ARGMAX)
UNTUNED = 0.5


def apply_thresholds(probabilities: np.ndarray, thresholds: float | Sequence[float] | np.ndarray) -> np.ndarray:
    """Decisions ``probabilities >= thresholds``.

    Args:
        probabilities: ``(..., C)``.
        thresholds: A scalar, C values, or anything that broadcasts.

    Returns:
        ``(..., C)`` bool; False where the probability is NaN.
    """
    probabilities = np.asarray(probabilities)
    return probabilities >= np.asarray(thresholds, probabilities.dtype)


def likeliest(probabilities: np.ndarray) -> np.ndarray:
    """The one-hot decision for the class of highest probability, the first of equals.

    Args:
        probabilities: ``(..., C)``.

    Returns:
        ``(..., C)`` bool, one True a row; none where a probability is NaN.
    """
    probabilities = np.asarray(probabilities)
    chosen = np.argmax(probabilities, axis=-1)[..., None] == np.arange(probabilities.shape[-1])
    return chosen & ~np.isnan(probabilities).any(axis=-1, keepdims=True)


def tune_thresholds(
    truth: np.ndarray,
    probabilities: np.ndarray,
    mode: str = "per_class",
    mask: np.ndarray | None = None,
    grid: Sequence[float] | None = None,
) -> np.ndarray:
    """The thresholds of the highest binary macro-F1, found exactly.

    Without ``grid`` every distinguishable threshold is tried: between two neighbouring distinct probabilities
    the decisions do not change, so the candidates are the intervals between them, including "all present" and
    "none present". Neighbouring intervals of the same score form a plateau. Ties are resolved as: the widest
    plateau, among equally wide ones the lowest, and its centre. A class without positives (F1 is 0
    everywhere) so gets 0.5.

    Args:
        truth: ``(N, C)`` 0/1.
        probabilities: ``(N, C)`` in [0, 1].
        mode: ``'global'``: one threshold, of the highest mean over classes; ``'per_class'``: each class its
            own.
        mask: ``(N, C)`` bool, False where the truth is unknown.
        grid: Rising candidate thresholds to choose from instead; ties: the longest run of equally good
            neighbours, the lowest of these, and its middle (the lower middle of an even run).

    Returns:
        ``(C,)`` thresholds in the dtype of ``probabilities``; all equal when ``mode`` is ``'global'``. A
        threshold just above 1 stands for "never present".

    Raises:
        ValueError: Unknown mode, or no rows.
    """
    if mode not in TUNED_MODES:
        raise ValueError(f"mode={mode!r}; choose one of {', '.join(TUNED_MODES)}")
    probabilities = np.asarray(probabilities)
    num_rows, num_classes = probabilities.shape
    if num_rows == 0:
        raise ValueError("thresholds cannot be tuned on no predictions")
    known = np.ones(probabilities.shape, bool) if mask is None else np.broadcast_to(mask, probabilities.shape)

    def candidates(columns):
        if grid is not None:
            return np.asarray(grid, probabilities.dtype)
        return np.unique(probabilities[:, columns][known[:, columns]])

    def choose(values, score):
        return _middle_of_run(values, score) if grid is not None else _centre_of_plateau(values, score)

    def f1_at(values, c):
        # "Above the largest probability" is the last candidate: nothing is present.
        cuts = values if grid is not None else np.append(values, np.inf)
        positives = np.sort(probabilities[known[:, c] & (truth[:, c] > 0), c])
        negatives = np.sort(probabilities[known[:, c] & (truth[:, c] <= 0), c])
        tp = len(positives) - np.searchsorted(positives, cuts, side="left").astype(np.float64)
        fp = len(negatives) - np.searchsorted(negatives, cuts, side="left").astype(np.float64)
        return binary_f1(Counts(tp, fp, len(positives) - tp, len(negatives) - fp))

    if mode == "global":
        values = candidates(slice(None))
        score = np.mean([f1_at(values, c) for c in range(num_classes)], axis=0)
        # Means of equal F1 values may differ in the last bit; a plateau must not break there.
        return np.full(num_classes, choose(values, np.round(score, 12)), probabilities.dtype)
    tuned = []
    for c in range(num_classes):
        values = candidates([c])
        tuned.append(choose(values, f1_at(values, c)))
    return np.array(tuned, probabilities.dtype)


def _centre_of_plateau(values: np.ndarray, score: np.ndarray) -> float:
    """Centre of the widest best plateau.

    Args:
        values: ``(G,)`` distinct probabilities, rising.
        score: ``(G + 1,)``: score for thresholds in ``(values[i-1], values[i]]``, the first from 0, the last
            up to 1.
    """
    dtype = values.dtype
    edges = np.concatenate([[0], values, [1]]).astype(dtype)
    start, stop = _best_runs(score)
    low, high = edges[start], edges[stop]
    width = np.where(high > low, high - low, 0)
    best = int(np.argmax(width))
    low, high = low[best], high[best]
    if stop[best] == len(score) and high <= low:
        return np.nextafter(dtype.type(1), dtype.type(2))
    centre = low + (high - low) / 2
    # Only (low, high] belongs to the plateau (from 0, included, on the first), and the centre of two adjacent
    # floats may round down to low.
    return high if centre <= low else centre


def _middle_of_run(grid: np.ndarray, score: np.ndarray) -> float:
    start, stop = _best_runs(score)
    best = int(np.argmax(stop - start))
    return grid[(start[best] + stop[best] - 1) // 2]


def _best_runs(score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and one-past-last index of each run of neighbours that share the highest score."""
    best = np.concatenate([[False], score == score.max(), [False]])
    change = np.diff(best.astype(np.int8))
    return np.flatnonzero(change == 1), np.flatnonzero(change == -1)


def oracle_thresholds(
    truth: np.ndarray, probabilities: np.ndarray, mode: str = "per_class", mask: np.ndarray | None = None
) -> np.ndarray:
    """LEAKY: the thresholds that maximise the macro-F1 of the very rows that they are scored on.

    Vectorised over leading axes (members, epochs), one tuning each; use it only for figures that are labelled
    leaky.

    Args:
        truth: ``(N, C)`` 0/1.
        probabilities: ``(..., N, C)``; NaN (an absent epoch) is never predicted present.
        mode: ``'global'`` or ``'per_class'``.
        mask: ``(N, C)`` bool, False where the truth is unknown.

    Returns:
        ``(..., C)`` thresholds: the highest probability at which the best score is reached; infinite where no
        cut scores above 0.
    """
    if mode not in TUNED_MODES:
        raise ValueError(f"mode={mode!r}; choose one of {', '.join(TUNED_MODES)}")
    probabilities = np.asarray(probabilities)
    truth = np.asarray(truth) > 0
    known = np.ones(truth.shape, bool) if mask is None else np.broadcast_to(mask, truth.shape)
    num_classes = truth.shape[-1]
    totals = Counts(np.zeros(1), np.zeros(1), (truth & known).sum(0), (~truth & known).sum(0))
    if mode == "per_class":
        positive, negative, score = truth & known, ~truth & known, probabilities
    else:
        # One cut through all classes: rank the (row, class) pairs together, count per class.  (N, C) -> (N *
        # C, C)
        own = np.eye(num_classes, dtype=bool)  # (C, C)
        positive = ((truth & known)[:, :, None] & own).reshape(-1, num_classes)
        negative = ((~truth & known)[:, :, None] & own).reshape(-1, num_classes)
        score = probabilities.reshape(*probabilities.shape[:-2], -1, 1)  # (..., N * C, 1)
    order = np.argsort(-score, axis=-2, kind="stable")  # NaN sorts last
    score = np.take_along_axis(score, order, axis=-2)
    lead = score.shape[:-2]
    gather = np.broadcast_to(order, (*lead, order.shape[-2], num_classes))

    def ranked(hits):
        hits = np.broadcast_to(hits, gather.shape)
        return np.cumsum(np.take_along_axis(hits, gather, axis=-2), axis=-2, dtype=np.float64)

    tp, fp = ranked(positive), ranked(negative)
    f1 = binary_f1(Counts(tp, fp, totals.fn - tp, totals.tn - fp))
    if mode == "global":
        f1 = f1.mean(axis=-1, keepdims=True)
    cut_here = np.ones(score.shape, bool)
    cut_here[..., :-1, :] = score[..., :-1, :] != score[..., 1:, :]
    cut_here &= ~np.isnan(score)
    f1 = np.where(cut_here, f1, -1.0)
    best = np.argmax(f1, axis=-2)[..., None, :]
    threshold = np.take_along_axis(score, best, axis=-2)[..., 0, :]
    reached = np.take_along_axis(f1, best, axis=-2)[..., 0, :] > 0
    threshold = np.where(reached, threshold, np.inf)
    return np.broadcast_to(threshold, (*lead, num_classes)).astype(probabilities.dtype)


def threshold_curve(
    truth: np.ndarray, probabilities: np.ndarray, grid: Sequence[float], mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Binary macro-F1, and F1 per class, as functions of one global threshold.

    Args:
        truth: ``(N, C)`` or ``(..., N, C)`` 0/1.
        probabilities: ``(..., N, C)``.
        grid: ``(G,)`` thresholds.
        mask: ``(..., N, C)`` bool, False where the truth is unknown.

    Returns:
        macro-F1 ``(..., G)`` and F1 per class ``(..., G, C)``.
    """
    counts = [confusion_counts(truth, apply_thresholds(probabilities, value), mask) for value in grid]
    stacked = Counts(*(np.stack(cells, axis=-2) for cells in zip(*counts, strict=True)))  # (..., G, C)
    return macro_f1(stacked), binary_f1(stacked)
