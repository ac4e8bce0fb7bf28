"""What an extractor is, and which ones there are.

An extractor turns the frames of one sample (one view of one clip, cropped to the face) into one feature
vector per frame. Everything a data set says about its features (name, width, licence, preprocessing) comes
from here.
"""

import dataclasses
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal

import numpy as np

from mer_jax.errors import UserError

Session = Callable[[np.ndarray], np.ndarray]

# Modules are named, not imported: listing the extractors must not load their networks.
_MODULES = {"hog": "mer_jax.extractors.hog", "facemesh": "mer_jax.extractors.facemesh"}
EXTRACTORS = tuple(_MODULES)
EMBEDDED = ("hog", "facemesh")  # need no weights beyond what is installed; what data sets hold unless told otherwise


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A deterministic map from the frames of one sample to features.

    Attributes:
        name: What configs, command lines and data sets call it.
        modality: ``'appearance'`` (2D) or ``'geometry'`` (3D).
        dim: D, the number of features per frame.
        licence: Licence of the code and weights behind the features.
        preprocessing: What is done to the crops, in words, with every constant. Two extractors that give
            different numbers differ here: finished work is reused only where this text is the same.
        open: Makes a context manager whose value maps one sample's crops, (T, H, W, 3) uint8 RGB, to (T, D)
            float32. Weights and graphs live in the context. A row of NaN says that nothing was found in that
            frame (see :func:`fill_missing`); the result does not depend on samples mapped before.
    """

    name: str
    modality: Literal["appearance", "geometry"]
    dim: int
    licence: str
    preprocessing: str
    open: Callable[[], AbstractContextManager[Session]]


def get_extractor(name: str) -> Extractor:
    """Returns the extractor called ``name``.

    Raises:
        UserError: There is none of this name.
    """
    if name not in _MODULES:
        raise UserError(f"extractor '{name}' is unknown; there are {', '.join(EXTRACTORS)}")
    return importlib.import_module(_MODULES[name]).EXTRACTOR


def fill_missing(features: np.ndarray) -> tuple[np.ndarray, int]:
    """Fills the frames in which an extractor found nothing.

    A missing frame lies on the straight line between its nearest neighbours in time that were found; before
    the first and after the last of these it repeats them. Where no frame was found all features are 0.

    Args:
        features: (T, D) float32, missing frames as rows of NaN.

    Returns:
        The features without NaN, (T, D) float32, and the number of missing frames, for the caller to report.
    """
    missing = np.isnan(features).any(axis=1)  # (T,)
    if not missing.any():
        return features, 0
    if missing.all():
        return np.zeros_like(features), len(features)
    (found,) = np.nonzero(~missing)
    after = np.searchsorted(found, np.arange(len(features))).clip(0, len(found) - 1)
    before = np.maximum(after - (found[after] > np.arange(len(features))), 0)
    before, after = found[before], found[after]
    gap = np.maximum(after - before, 1)
    weight = ((np.arange(len(features)) - before) / gap).clip(0, 1).astype(features.dtype)[:, None]
    return (1 - weight) * features[before] + weight * features[after], int(missing.sum())
