"""Appearance without a network: dense histograms of oriented gradients of the face crop.

Dalal and Triggs, "Histograms of Oriented Gradients for Human Detection", CVPR 2005. The face is aligned by
its crop, which is the same for all frames of a clip, so that a change of a feature is a change of the face.
"""

import contextlib
from collections.abc import Iterator

import cv2
import numpy as np

from mer_jax.extractors.base import Extractor, Session

SIZE = 224
CELL = 32
BLOCK = 2
ORIENTATIONS = 9


def hog(
    image: np.ndarray,
    *,
    orientations: int = ORIENTATIONS,
    cell: int = CELL,
    block: int = BLOCK,
    signed: bool = False,
    epsilon: float = 1e-5,
) -> np.ndarray:
    """Computes the HOG descriptor of a grey image.

    Central differences (0 at the border), magnitudes voted into one orientation bin per pixel and averaged
    over square cells, blocks of neighbouring cells normalised by L2-Hys (L2, clipped at 0.2, L2 again),
    blocks overlapping by all but one cell. With unsigned orientations this is ``skimage.feature.hog`` with
    its default normalisation.

    Args:
        image: (H, W) grey values, any real type and scale.
        orientations: Number of bins over 180 degrees, or over 360 if ``signed``.
        cell: Side of a cell in pixels; what remains of the image on the right and below is not used.
        block: Side of a block in cells.
        signed: Whether opposite gradients (dark to light, light to dark) are told apart.
        epsilon: Keeps the norm of flat blocks from 0.

    Returns:
        (D,) float32, D = (rows - block + 1) (columns - block + 1) block^2 orientations, rows and columns in
        cells.

    Raises:
        ValueError: The image is smaller than one block.
    """
    rows, columns = image.shape[0] // cell, image.shape[1] // cell
    if min(rows, columns) < block:
        raise ValueError(
            f"image of {image.shape} is smaller than one block of {block} cells of {cell} pixels"
        )
    image = image.astype(np.float32)
    down, right = np.zeros_like(image), np.zeros_like(image)
    down[1:-1] = image[2:] - image[:-2]
    right[:, 1:-1] = image[:, 2:] - image[:, :-2]

    # Cells' last pixels: the border differences above still see beyond them.
    down, right = (part[: rows * cell, : columns * cell] for part in (down, right))
    turn = 360 if signed else 180
    angle = np.rad2deg(np.arctan2(down, right)) % turn
    # The remainder of a tiny negative angle rounds up to the full turn, which is bin 0 again.
    bins = (angle * np.float32(orientations / turn)).astype(np.int32) % orientations
    cell_row = np.arange(rows * cell, dtype=np.int32)[:, None] // cell
    cell_column = np.arange(columns * cell, dtype=np.int32)[None] // cell
    places = (cell_row * columns + cell_column) * orientations + bins
    histogram = np.bincount(
        places.ravel(), np.hypot(down, right).ravel(), minlength=rows * columns * orientations
    )
    histogram = histogram.reshape(rows, columns, orientations) / cell**2

    # (rows - block + 1, columns - block + 1, orientations, block, block) -> block cells before orientations
    blocks = np.lib.stride_tricks.sliding_window_view(histogram, (block, block), axis=(0, 1))
    blocks = blocks.transpose(0, 1, 3, 4, 2).reshape(-1, block * block * orientations)
    for limit in (0.2, None):
        blocks = blocks / np.sqrt((blocks**2).sum(axis=1, keepdims=True) + epsilon**2)
        blocks = blocks if limit is None else np.minimum(blocks, limit)
    return blocks.ravel().astype(np.float32)


def grey(frame: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Resizes an (H, W, 3) uint8 RGB crop to (size, size) grey, float32 in [0, 255].

    Grey values are not rounded back to integers: averaging over a large crop carries motions below one pixel.
    """
    shrinks = min(frame.shape[:2]) >= size
    frame = cv2.cvtColor(frame.astype(np.float32), cv2.COLOR_RGB2GRAY)
    return cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


@contextlib.contextmanager
def _open() -> Iterator[Session]:
    yield lambda frames: np.stack([hog(grey(frame)) for frame in frames])


_BLOCKS = SIZE // CELL - BLOCK + 1

EXTRACTOR = Extractor(
    name="hog",
    modality="appearance",
    dim=_BLOCKS**2 * BLOCK**2 * ORIENTATIONS,
    licence="Apache-2.0 (no weights)",
    preprocessing=(
        f"crop resized to {SIZE} x {SIZE} (area), grey (Rec. 601); HOG: cells of {CELL} px, "
        f"{BLOCK} x {BLOCK} cells per block, {ORIENTATIONS} unsigned orientations, L2-Hys"
    ),
    open=_open,
)
