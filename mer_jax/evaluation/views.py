"""From samples (one view of a clip) to clips."""

import numpy as np

VIEW_RULES = ("mean", "max", "or")


def combine_views(probabilities: np.ndarray, sample_clip: np.ndarray, num_clips: int, how: str = "mean") -> np.ndarray:
    """One probability per clip and class from those of its views, however many it has.

    ``'or'`` (a class is present when any view reaches its threshold) is the maximum: some view reaches a
    threshold exactly when the largest of them does. So the rule needs no thresholds here, and whatever is
    tuned on its result is tuned for the OR.

    Args:
        probabilities: ``(..., N, C)`` probabilities of samples; NaN spreads to the sample's clip only.
        sample_clip: ``(N,)`` index of each sample's clip.
        num_clips: Number of clips K; every one has at least one sample.
        how: ``'mean'``, ``'max'`` or ``'or'``.

    Returns:
        ``(..., K, C)`` of the same dtype.

    Raises:
        ValueError: Unknown rule, or a clip without samples.
    """
    if how not in VIEW_RULES:
        raise ValueError(f"views={how!r}; choose one of {', '.join(VIEW_RULES)}")
    sample_clip = np.asarray(sample_clip)
    sizes = np.bincount(sample_clip, minlength=num_clips)
    if len(sizes) != num_clips or not sizes.all():
        raise ValueError("every clip needs at least one sample, and every sample a clip")
    by_clip = np.take(probabilities, np.argsort(sample_clip, kind="stable"), axis=-2)
    starts = np.cumsum(sizes) - sizes
    if how == "mean":
        total = np.add.reduceat(by_clip, starts, axis=-2)
        return total / sizes[:, None].astype(total.dtype)
    return np.maximum.reduceat(by_clip, starts, axis=-2)
