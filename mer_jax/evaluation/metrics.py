"""Exact classification metrics, vectorised over any leading axes (members, epochs, thresholds).

Letters: N clips (or samples), C classes, ``...`` leading axes that broadcast. Truth and predictions are 0/1.
All averages say which they are. A class on which a figure is undefined (0/0: F1 of a class that is neither in
the truth nor in the prediction, recall of a class that is not in the truth) follows a named rule, ``absent``:

* ``'zero'``: 0, as scikit-learn's ``zero_division=0``; the default, and what the challenge scorers do;
* ``'one'``: 1, as ``zero_division=1``;
* ``'skip'``: NaN, left out of the mean over classes, as ``zero_division=np.nan``.
"""

from typing import NamedTuple

import numpy as np

ABSENT_VALUES = {"zero": 0.0, "one": 1.0, "skip": np.nan}


class Counts(NamedTuple):
    """Confusion counts of C one-against-rest decisions, each ``(..., C)`` float64.

    Exact integers, or sums of weights. They add: counts of two sets of clips are the sum of their counts,
    which is what pooling over folds means.
    """

    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray
    tn: np.ndarray


def confusion_counts(truth: np.ndarray, prediction: np.ndarray, mask: np.ndarray | None = None) -> Counts:
    """Counts of a multi-label decision.

    Args:
        truth: ``(..., N, C)`` 0/1; what stands where ``mask`` is False does not matter.
        prediction: ``(..., N, C)`` 0/1.
        mask: ``(..., N, C)`` or ``(..., N, 1)`` bool, True where the truth is known and the row is no
            padding; None for everywhere.

    Returns:
        Counts of shape ``(..., C)``, where ``...`` is the broadcast of all leading axes.
    """
    truth, prediction = np.asarray(truth) > 0, np.asarray(prediction) > 0
    known = np.True_ if mask is None else np.asarray(mask, bool)
    cells = (truth & prediction, ~truth & prediction, truth & ~prediction, ~truth & ~prediction)
    return Counts(*((cell & known).sum(axis=-2).astype(np.float64) for cell in cells))


def single_label_counts(
    truth: np.ndarray, prediction: np.ndarray, num_classes: int, mask: np.ndarray | None = None
) -> Counts:
    """Counts of a single-label decision, class against rest.

    Args:
        truth: ``(..., N)`` class indices.
        prediction: ``(..., N)`` class indices.
        num_classes: C.
        mask: ``(..., N)`` bool, False for padding.

    Returns:
        Counts of shape ``(..., C)``.
    """
    classes = np.arange(num_classes)
    mask = None if mask is None else np.asarray(mask, bool)[..., None]
    return confusion_counts(np.asarray(truth)[..., None] == classes, np.asarray(prediction)[..., None] == classes, mask)


def _ratio(numerator: np.ndarray, denominator: np.ndarray, absent: str) -> np.ndarray:
    if absent not in ABSENT_VALUES:
        raise ValueError(f"absent={absent!r}; choose one of {', '.join(ABSENT_VALUES)}")
    defined = denominator > 0
    return np.where(defined, numerator / np.where(defined, denominator, 1.0), ABSENT_VALUES[absent])


def mean_over_classes(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN; NaN where all of it is.

    Args:
        values: ``(..., C)``.

    Returns:
        ``(...)``.
    """
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0.0).sum(axis=-1), defined.sum(axis=-1).astype(np.float64), "skip")


def binary_f1(counts: Counts, absent: str = "zero") -> np.ndarray:
    """F1 of "present" per class, ``2 TP / (2 TP + FP + FN)``: ``(..., C)``."""
    return _ratio(2 * counts.tp, 2 * counts.tp + counts.fp + counts.fn, absent)


def macro_f1(counts: Counts, absent: str = "zero") -> np.ndarray:
    """Binary macro-F1, the score of the 4DMR challenge: mean over classes of :func:`binary_f1`, ``(...)``."""
    return mean_over_classes(binary_f1(counts, absent))


def present_absent_macro_f1(counts: Counts, absent: str = "zero") -> np.ndarray:
    """Mean over labels of the mean of F1(present) and F1(absent), ``(...)``.

    Far higher than :func:`macro_f1` on the same decisions when labels are rare: never
    compare the two.
    """
    swapped = Counts(tp=counts.tn, fp=counts.fn, fn=counts.fp, tn=counts.tp)
    both = np.stack([binary_f1(counts, absent), binary_f1(swapped, absent)], axis=-1)  # (..., C, 2)
    return mean_over_classes(mean_over_classes(both))


def recall(counts: Counts, absent: str = "zero") -> np.ndarray:
    """``TP / (TP + FN)`` per class, ``(..., C)``; undefined for a class absent from the truth."""
    return _ratio(counts.tp, counts.tp + counts.fn, absent)


def multilabel_uar(counts: Counts, absent: str = "zero") -> np.ndarray:
    """Unweighted average recall of "present" over labels, ``(...)``.

    It does not punish false alarms: predicting every label scores 1. Read it beside :func:`macro_f1` or use
    :func:`balanced_accuracy`.
    """
    return mean_over_classes(recall(counts, absent))


def accuracy(counts: Counts) -> np.ndarray:
    """Share of clips whose class is predicted, ``(...)``, from one-hot truth and decisions; NaN without clips."""
    return _ratio(counts.tp.sum(axis=-1), (counts.tp + counts.fn).sum(axis=-1), "skip")


def balanced_accuracy(counts: Counts, absent: str = "zero") -> np.ndarray:
    """Mean over labels of the mean recall of "present" and "absent", ``(...)``; 0.5 for a constant answer."""
    swapped = Counts(tp=counts.tn, fp=counts.fn, fn=counts.fp, tn=counts.tp)
    both = np.stack([recall(counts, absent), recall(swapped, absent)], axis=-1)  # (..., C, 2)
    return mean_over_classes(mean_over_classes(both))


def uf1(
    truth: np.ndarray,
    prediction: np.ndarray,
    num_classes: int,
    mask: np.ndarray | None = None,
    absent: str = "zero",
) -> np.ndarray:
    """Unweighted F1 of single-label decisions (MEGC2019): mean over classes of ``2 TP / (2 TP + FP + FN)``.

    Pool the folds' predictions first and call this once; the mean of per-fold values is another figure.

    Args:
        truth: ``(..., N)`` class indices.
        prediction: ``(..., N)`` class indices.
        num_classes: C.
        mask: ``(..., N)`` bool, False for padding.
        absent: Rule for a class absent from truth and prediction.

    Returns:
        ``(...)``.
    """
    return macro_f1(single_label_counts(truth, prediction, num_classes, mask), absent)


def uar(
    truth: np.ndarray,
    prediction: np.ndarray,
    num_classes: int,
    mask: np.ndarray | None = None,
    absent: str = "zero",
) -> np.ndarray:
    """Unweighted average recall of single-label decisions (MEGC2019): mean over classes of ``TP / N_class``.

    Arguments and result as :func:`uf1`; the rule ``absent`` concerns classes absent from the truth
    (``'skip'`` gives scikit-learn's ``balanced_accuracy_score``).
    """
    return multilabel_uar(single_label_counts(truth, prediction, num_classes, mask), absent)


def auroc(truth: np.ndarray, score: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve per class, ties counted one half.

    Args:
        truth: ``(..., N, C)`` 0/1.
        score: ``(..., N, C)`` finite scores, higher means present.
        mask: ``(..., N, C)`` or ``(..., N, 1)`` bool, False where unknown or padding.

    Returns:
        ``(..., C)`` in [0, 1]; NaN for a class without positives or without negatives.
    """
    tp, fp, previous_tp, previous_fp = _ranked_counts(truth, score, mask)
    area = ((fp - previous_fp) * (tp + previous_tp) / 2).sum(axis=-2)
    return _ratio(area, tp[..., -1, :] * fp[..., -1, :], "skip")


def average_precision(truth: np.ndarray, score: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Average precision per class: sum over distinct scores of recall step x precision, not interpolated.

    Arguments as :func:`auroc`.

    Returns:
        ``(..., C)`` in [0, 1]; NaN for a class without positives (scikit-learn says 0 and warns).
    """
    tp, fp, previous_tp, _ = _ranked_counts(truth, score, mask)
    steps = (tp - previous_tp) * _ratio(tp, tp + fp, "zero")
    return _ratio(steps.sum(axis=-2), tp[..., -1, :], "skip")


def _ranked_counts(truth, score, mask) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """True and false positives when cutting after each rank, and at the previous distinct score.

    Returns:
        tp, fp, previous tp, previous fp, each ``(..., N, C)``, ranks in order of falling score. Within a
        group of tied scores all four are equal to the group's own, so that a sum over ranks is a sum over
        distinct scores.
    """
    mask = np.True_ if mask is None else np.asarray(mask, bool)
    truth, score, mask = np.broadcast_arrays(np.asarray(truth) > 0, score, mask)
    order = np.argsort(-score, axis=-2, kind="stable")
    score = np.take_along_axis(score, order, axis=-2)
    truth = np.take_along_axis(truth, order, axis=-2)
    mask = np.take_along_axis(mask, order, axis=-2)
    tp = np.cumsum(truth & mask, axis=-2, dtype=np.float64)
    fp = np.cumsum(~truth & mask, axis=-2, dtype=np.float64)
    last = np.ones(score.shape, bool)
    last[..., :-1, :] = score[..., :-1, :] != score[..., 1:, :]

    def at_distinct(values):
        # Counts never fall along the ranks, so the running maximum of the group ends is the latest group end.
        ends = np.maximum.accumulate(np.where(last, values, 0.0), axis=-2)
        previous = np.zeros_like(ends)
        previous[..., 1:, :] = ends[..., :-1, :]
        return ends, previous

    (tp, previous_tp), (fp, previous_fp) = at_distinct(tp), at_distinct(fp)
    return tp, fp, previous_tp, previous_fp
