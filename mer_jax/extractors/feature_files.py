"""Features that were computed elsewhere: one file per sample, or one file per frame.

A *sample* is one view of one clip, named ``<sequence>_l`` or ``<sequence>_r`` (just ``<sequence>`` for clips
of a single view). Under a folder of features of one extractor its features are either

- ``<sample>.npy`` (or ``.pt``): one array (T, D), or
- ``<sample>/``: one ``.npy`` or ``.pt`` file per frame, each (D,) or (1, D). This is the layout of the bundle
  published with "Leveraging Foundation Models and 3D Facial Reconstruction for Micro-Expression
  Classification": ``feat2d/<sample>/*.pt`` with one tensor per frame, ``feat3d/<sample>/*.npy`` with one
  pickled dict per frame whose ``coeffs`` (1, 621) are FaceVerse v4's; of these only the 171 expression values
  are features (section 3.1.2).

Nothing is executed from these files and PyTorch is not needed (see :mod:`mer_jax.extractors.pt_files`).
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from mer_jax.clips.frames import frame_order
from mer_jax.errors import UserError
from mer_jax.extractors.pt_files import read_npy, read_pt

# FaceVerse v4: 156 shape values, then 171 of expression (then tongue, texture, light and pose).
COEFFS_WIDTH = 621
EXPRESSION = slice(156, 327)

_READERS = {".npy": read_npy, ".pt": read_pt}


def read_feature_file(path: str | os.PathLike, *, dim: int | None = None, num_frames: int | None = None) -> np.ndarray:
    """Reads the features of one sample from one file.

    Args:
        path: A ``.npy`` or ``.pt`` file of one array (T, D) of real numbers.
        dim: The D that the file must have; None accepts any.
        num_frames: The T that the file must have; None accepts any but 0.

    Returns:
        The features, (T, D) float32, all finite.

    Raises:
        UserError: The file is missing or damaged, of another D, T or kind of number, or holds NaN or Inf.
    """
    path = Path(path)
    return _checked(_numbers(path, _load(path)), path, dim, num_frames)


def read_feature_folder(
    folder: str | os.PathLike, *, dim: int | None = None, num_frames: int | None = None
) -> np.ndarray:
    """Reads the features of one sample from a folder of one file per frame.

    The frames are in the order of :func:`mer_jax.clips.frames.frame_order`, as frames of clips are.

    Args:
        folder: The folder; hidden files and others than ``.npy`` and ``.pt`` are ignored.
        dim: The D that all files must have; None accepts that of the first.
        num_frames: How many files there must be; None accepts any number but 0.

    Returns:
        The features, (T, D) float32, all finite.

    Raises:
        UserError: No such folder, nothing in it, both kinds of file in it, or a file that does not fit, by
            name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    paths = sorted(filter(is_feature_file, folder.iterdir()), key=frame_order)
    if not paths:
        raise UserError(f"{folder}: no .npy or .pt file inside; one per frame is expected")
    if len({path.suffix for path in paths}) > 1:
        raise UserError(f"{folder}: both .npy and .pt files inside; keep one kind")
    if num_frames is not None and len(paths) != num_frames:
        raise UserError(f"{folder}: {len(paths)} feature files, but the clip has {_frames(num_frames)}")
    rows = []
    for path in paths:
        row = _numbers(path, _load(path))
        # One frame: (D,) or (1, D).
        row = row[None] if row.ndim == 1 else row
        rows.append(_checked(row, path, dim if dim is not None or not rows else rows[0].shape[1], 1))
    return np.concatenate(rows)  # (T, D)


def read_sample_features(
    root: str | os.PathLike, sample: str, *, dim: int | None = None, num_frames: int | None = None
) -> np.ndarray:
    """Reads the features of one sample from whichever of the layouts is there.

    Args:
        root: The folder of one extractor's features.
        sample: The sample's name, e.g. ``7_l``.
        dim: The D that the sample must have; None accepts any.
        num_frames: The T that the sample must have; None accepts any but 0.

    Returns:
        The features, (T, D) float32, all finite.

    Raises:
        UserError: There are none, there are several, or what is there does not fit.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of features")
    found = [p for p in (root / f"{sample}.npy", root / f"{sample}.pt", root / sample) if p.exists()]
    if not found:
        raise UserError(f"{root}: no features of '{sample}': neither {sample}.npy nor a folder {sample}")
    if len(found) > 1:
        raise UserError(f"{root}: features of '{sample}' twice, {found[0].name} and {found[1].name}; keep one")
    read = read_feature_folder if found[0].is_dir() else read_feature_file
    return read(found[0], dim=dim, num_frames=num_frames)


def is_feature_file(path: Path) -> bool:
    """Whether a file's name is one of features; those of file systems and viewers are hidden or called otherwise."""
    return path.suffix in _READERS and not path.name.startswith(".")


def _load(path: Path) -> Any:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise UserError(f"{path}: features are .npy or .pt files")
    return reader(path)


def _numbers(path: Path, value: Any) -> np.ndarray:
    """The array in what a file holds, taking a FaceVerse dict apart, before any check of shape."""
    if isinstance(value, dict):
        if "coeffs" not in value:
            keys = ", ".join(sorted(map(str, value))) or "nothing"
            raise UserError(f"{path}: holds a dict of {keys}; an array or a dict with 'coeffs' is expected")
        coeffs = np.asarray(value["coeffs"])
        if coeffs.shape not in ((COEFFS_WIDTH,), (1, COEFFS_WIDTH)):
            raise UserError(f"{path}: 'coeffs' has shape {coeffs.shape}, expected (1, {COEFFS_WIDTH})")
        value = coeffs[..., EXPRESSION]
    if not isinstance(value, np.ndarray):
        raise UserError(f"{path}: holds a {type(value).__name__}; an array of numbers is expected")
    # bfloat16 is a kind of its own to NumPy.
    if value.dtype.kind not in "iuf" and value.dtype.name != "bfloat16":
        raise UserError(f"{path}: values of type {value.dtype}; real numbers are expected")
    return value


def _checked(array: np.ndarray, path: Path, dim: int | None, num_frames: int | None) -> np.ndarray:
    """``array`` as (T, D) float32 after all checks."""
    if array.ndim != 2 or 0 in array.shape:
        raise UserError(f"{path}: shape {array.shape}; (frames, features) is expected")
    if dim is not None and array.shape[1] != dim:
        raise UserError(f"{path}: {array.shape[1]} features per frame, the others have {dim}")
    if num_frames is not None and array.shape[0] != num_frames:
        raise UserError(f"{path}: {_frames(array.shape[0])}, but {_frames(num_frames)} expected")
    # Overflow to Inf is found just below and named there.
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        row, column = np.argwhere(~np.isfinite(array))[0]
        raise UserError(f"{path}: NaN or Inf in row {row}, column {column}; compute these features again")
    return array


def _frames(count: int) -> str:
    return f"{count} frame" if count == 1 else f"{count} frames"
