"""Resizing as the networks' own code does it: images on the host, learned position embeddings inside the network."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal

import numpy as np

from mer_jax.extractors.networks import checked_frames

if TYPE_CHECKING:
    import jax

Kernel = Literal["linear", "cubic"]
# Images on the host: Pillow's filters, which average when they shrink; or between the nearest pixels alone.
Filter = Literal["bilinear", "bicubic", "bilinear_unfiltered"]


@functools.lru_cache(maxsize=64)
def weights(size: int, target: int, kernel: Kernel, antialias: bool) -> np.ndarray:
    """Weights of a resize along one axis, pixels being areas (no aligned corners).

    Without ``antialias`` these are ``torch.nn.functional.interpolate``'s: the kernel spans the nearest two (linear) or
    four (cubic, a = -0.75) elements, beyond the border the outermost element repeats. With it, these are Pillow's and
    torch's antialiased ones: the kernel (cubic with a = -0.5) is stretched when shrinking, cut at the border and
    normalised.

    Args:
        size: Number of elements.
        target: Number of elements wanted.
        kernel: ``'linear'`` or ``'cubic'``.
        antialias: Whether shrinking averages.

    Returns:
        (target, size) float64, each row of sum 1.
    """
    scale = size / target
    centres = (np.arange(target) + 0.5) * scale  # (target,), in units of elements; element n covers [n, n + 1]
    support = {"linear": 1, "cubic": 2}[kernel]
    if antialias:
        stretch = max(scale, 1.0)
        elements = np.arange(size)
        near = np.abs(elements + 0.5 - centres[:, None]) / stretch  # (target, size)
        # Pillow rounds the window to whole elements.
        low = np.maximum((centres - support * stretch + 0.5).astype(int), 0)
        high = np.minimum((centres + support * stretch + 0.5).astype(int), size)
        inside = (elements >= low[:, None]) & (elements < high[:, None])
        result = np.where(inside, _kernel(near, kernel, -0.5), 0.0)
        return result / result.sum(axis=1, keepdims=True)
    result = np.zeros((target, size))
    # In single precision, as torch: where a large grid shrinks, the fifth digit of the shares depends on it.
    centres = np.float32(scale) * (np.arange(target, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    start = np.floor(centres).astype(int) - support + 1
    for tap in range(2 * support):
        place = start + tap
        share = _kernel(np.abs(place - centres).astype(np.float64), kernel, -0.75)
        np.add.at(result, (np.arange(target), place.clip(0, size - 1)), share)
    return result


def _kernel(distance: np.ndarray, kernel: Kernel, a: float) -> np.ndarray:
    """Triangle, or Keys' cubic convolution kernel of parameter ``a``; distances >= 0."""
    if kernel == "linear":
        return np.maximum(1 - distance, 0)
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance < 1, near, np.where(distance < 2, far, 0))


def resize_grid(
    grid: jax.Array, rows: int, columns: int, kernel: Kernel, antialias: bool, *, crop: tuple[int, int] | None = None
) -> jax.Array:
    """Resizes a grid of vectors; traceable.

    Args:
        grid: (R, C, D).
        rows: Rows wanted.
        columns: Columns wanted.
        kernel: As :func:`weights`.
        antialias: As :func:`weights`.
        crop: Keeps only so many of the first rows and columns of the result.

    Returns:
        (rows, columns, D) or (*crop, D) float32.
    """
    import jax.numpy as jnp

    crop = crop or (rows, columns)
    down = jnp.asarray(weights(grid.shape[0], rows, kernel, antialias)[: crop[0]], jnp.float32)
    across = jnp.asarray(weights(grid.shape[1], columns, kernel, antialias)[: crop[1]], jnp.float32)
    # (r, R) (R, C, D) -> (r, C, D), then (c, C) -> (r, c, D)
    return jnp.einsum(
        "cC,rCd->rcd", across, jnp.einsum("rR,RCd->rCd", down, grid.astype(jnp.float32), precision="highest"),
        precision="highest",
    )  # fmt: skip


def resize_frames(
    frames: np.ndarray, size: tuple[int, int], how: Filter, *, shortest_edge: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Brings the crops of one sample to a network's input size.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
        size: (h, w) wanted.
        how: ``'bilinear'`` or ``'bicubic'`` as Pillow resizes 8-bit images; ``'bilinear_unfiltered'`` as torch
            interpolates numbers, without averaging and without rounding.
        shortest_edge: Brings the shorter side to this length and cuts ``size`` out of the centre; 0 resizes both sides
            on their own, whatever the aspect ratio.

    Returns:
        (T, h, w, 3), uint8 (or float32 in [0, 1] where ``'bilinear_unfiltered'``), and ``found`` (T,), all True: a crop
        needs no face to be resized.

    Raises:
        UserError: The frames are not RGB.
    """
    frames = checked_frames(frames)
    inner, (top, left) = _inner(frames.shape[1:3], size, shortest_edge)
    unfiltered = how == "bilinear_unfiltered"
    result = np.empty((len(frames), *size, 3), np.float32 if unfiltered else np.uint8)
    for frame, place in zip(frames, result, strict=True):
        resized = _interpolated(frame, inner) if unfiltered else _resampled(frame, inner, how)
        place[...] = resized[top : top + size[0], left : left + size[1]]
    return result, np.ones(len(frames), bool)


def seen_area(
    shape: tuple[int, int], size: tuple[int, int], *, shortest_edge: int = 0
) -> tuple[float, float, float, float]:
    """Which part of a crop :func:`resize_frames` keeps.

    Args:
        shape: (H, W) of the crop.
        size: As there.
        shortest_edge: As there.

    Returns:
        Top, left, bottom and right in pixels of the crop, whose pixel n covers [n, n + 1].
    """
    inner, corner = _inner(shape, size, shortest_edge)
    scale = [have / resized for have, resized in zip(shape, inner, strict=True)]
    top, left = (scale[axis] * corner[axis] for axis in (0, 1))
    return top, left, top + scale[0] * size[0], left + scale[1] * size[1]


def _inner(shape: tuple[int, int], size: tuple[int, int], shortest_edge: int) -> tuple[tuple[int, int], list[int]]:
    """To which (h, w) a crop is resized, and the top left corner of what is cut out of that."""
    inner = tuple(size)
    if shortest_edge:
        height, width = shape
        # As Hugging Face's processors round: the longer side down.
        long = shortest_edge * max(height, width) // min(height, width)
        inner = (shortest_edge, long) if height <= width else (long, shortest_edge)
    return inner, [(have - want) // 2 for have, want in zip(inner, size, strict=True)]


def _resampled(frame: np.ndarray, size: tuple[int, int], how: Filter) -> np.ndarray:
    from PIL import Image

    resampling = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[how]
    return np.asarray(Image.fromarray(frame).resize(size[::-1], resampling))


def _interpolated(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    import cv2

    # Scaled afterwards: the same numbers as torch's to float32's last digits, in whichever order.
    return cv2.resize(frame.astype(np.float32), size[::-1], interpolation=cv2.INTER_LINEAR) / np.float32(255)
