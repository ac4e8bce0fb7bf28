"""From samples (one view and phase of a clip) to clips: first its phases are combined in each view, then its views."""

import numpy as np

VIEW_RULES = ("mean", "max", "or")
PHASE_RULES = ("mean", "max", "onset_apex")


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


def combine_samples(
    probabilities: np.ndarray,
    sample_clip: np.ndarray,
    sample_view: np.ndarray,
    sample_phase: np.ndarray,
    num_clips: int,
    views: str = "mean",
    phases: str = "mean",
) -> np.ndarray:
    """One probability per clip and class: the phases of each view are combined, then the views of each clip.

    Args:
        probabilities: ``(..., N, C)`` probabilities of samples; NaN spreads to the sample's clip only.
        sample_clip: ``(N,)`` index of each sample's clip.
        sample_view: ``(N,)`` view names.
        sample_phase: ``(N,)`` phase names, ``''`` for a sample of the whole clip.
        num_clips: Number of clips K; every one has at least one sample.
        views: As ``how`` of :func:`combine_views`.
        phases: ``'mean'``, ``'max'``, or ``'onset_apex'``: that phase alone. A view that lacks it (data of whole
            clips, or of the other phase only) keeps the mean of what it has, so that no clip goes unpredicted.

    Returns:
        ``(..., K, C)`` of the same dtype.

    Raises:
        ValueError: Unknown rule, or a clip without samples.
    """
    if phases not in PHASE_RULES:
        raise ValueError(f"phases={phases!r}; choose one of {', '.join(PHASE_RULES)}")
    view = np.unique(np.asarray(sample_view), return_inverse=True)[1]
    pairs, pair = np.unique(np.stack([np.asarray(sample_clip), view], axis=1), axis=0, return_inverse=True)
    pair = pair.reshape(-1)
    if phases == "onset_apex":
        first = np.asarray(sample_phase) == "onset_apex"
        kept = first | ~np.isin(pair, pair[first])
        probabilities, pair = np.compress(kept, probabilities, axis=-2), pair[kept]
    by_view = combine_views(probabilities, pair, len(pairs), "max" if phases == "max" else "mean")
    return combine_views(by_view, pairs[:, 0], num_clips, views)
