"""The decision rules of the released 4DMR inference code, and its submission file."""

import os
import re
from collections.abc import Sequence

import numpy as np

from mer_jax.clips.layouts import LABELS
from mer_jax.errors import UserError
from mer_jax.evaluation.thresholds import apply_thresholds
from mer_jax.files import atomic_write_text

RELEASED_THRESHOLDS = (0.60, 0.08, 0.08, 0.53, 0.33)
NEGATIVE, POSITIVE = "Negative", "Positive"


def exclude_positive(prediction: np.ndarray, labels: Sequence[str] = LABELS) -> np.ndarray:
    """Sets Positive to 0 wherever Negative is 1.

    Args:
        prediction: ``(..., L)`` 0/1.
        labels: L names, Negative and Positive among them.

    Returns:
        A new array like ``prediction``.
    """
    prediction = np.array(prediction)
    negative, positive = (list(labels).index(name) for name in (NEGATIVE, POSITIVE))
    prediction[..., positive] = np.where(prediction[..., negative] > 0, 0, prediction[..., positive])
    return prediction


def released_postprocess(
    probabilities: np.ndarray,
    sample_names: Sequence[str],
    thresholds: Sequence[float] = RELEASED_THRESHOLDS,
    negative_excludes_positive: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Decisions per sequence as the released code takes them.

    Each view is thresholded by itself (``>=``), the views of a sequence are OR-ed, then Negative excludes
    Positive. The comparison is made in the dtype of the probabilities, so a float32 probability of 0.08
    reaches a threshold of 0.08.

    Args:
        probabilities: ``(N, 5)`` sigmoid outputs of samples.
        sample_names: N names ``<sequence>_l``, ``<sequence>_r`` (or ``<sequence>`` where there is one view).
        thresholds: Five values, in the order of ``LABELS``.
        negative_excludes_positive: The rule of item 8.

    Returns:
        ids ``(K,)`` int64, the first integer in each sequence's name, rising; predictions ``(K, 5)`` int64
        0/1.

    Raises:
        UserError: A name holds no integer, or two sequences share one.
    """
    votes = apply_thresholds(np.asarray(probabilities), thresholds)
    by_sequence: dict[str, np.ndarray] = {}
    for name, vote in zip(sample_names, votes, strict=True):
        sequence = name[:-2] if name.endswith(("_l", "_r")) else name
        by_sequence[sequence] = by_sequence.get(sequence, False) | vote
    ids = np.array([sequence_id(name) for name in by_sequence], np.int64)
    predictions = np.array(list(by_sequence.values()), np.int64).reshape(-1, len(LABELS))
    if negative_excludes_positive:
        predictions = exclude_positive(predictions)
    _check_unique(ids, list(by_sequence))
    order = np.argsort(ids)
    return ids[order], predictions[order]


def sequence_id(name: str) -> int:
    """The first integer in a sequence's name.

    Raises:
        UserError: There is none.
    """
    found = re.search(r"\d+", name)
    if found is None:
        raise UserError(f"sequence {name!r}: no integer in its name to be the Id; rename it, e.g. to 'seq_12'")
    return int(found.group())


def write_submission(path: str | os.PathLike, ids: Sequence[int], predictions: np.ndarray) -> None:
    """Writes the challenge's CSV ``Id,Negative,Positive,Repression,Surprise,Others`` atomically.

    Rows are sorted by Id.

    Args:
        path: The file.
        ids: K integer Ids, unique.
        predictions: ``(K, 5)`` 0/1.

    Raises:
        UserError: Two rows share an Id, or the file cannot be written.
        ValueError: Predictions of another shape, or that are not 0/1.
    """
    ids, predictions = np.asarray(ids, np.int64), np.asarray(predictions)
    if predictions.shape != (len(ids), len(LABELS)) or not np.isin(predictions, (0, 1)).all():
        raise ValueError(f"predictions must be ({len(ids)}, {len(LABELS)}) of 0 and 1, got {predictions.shape}")
    _check_unique(ids, [f"row {row}" for row in range(len(ids))])
    rows = [",".join(("Id", *LABELS))]
    for row in np.argsort(ids):
        rows.append(",".join(str(int(value)) for value in (ids[row], *predictions[row])))
    atomic_write_text(path, "\n".join(rows) + "\n")


def _check_unique(ids: np.ndarray, names: list[str]) -> None:
    first: dict[int, str] = {}
    for number, name in zip(ids.tolist(), names, strict=True):
        if number in first:
            raise UserError(f"Id {number}: given to both {first[number]!r} and {name!r}; one row per Id, rename one")
        first[number] = name
