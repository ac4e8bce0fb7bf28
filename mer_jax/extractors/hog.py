"""Appearance without a network: how histograms of oriented gradients of the face change from the onset on.

Dalal and Triggs, "Histograms of Oriented Gradients for Human Detection", CVPR 2005. The face is aligned by
its crop, which is the same for all frames of a clip. The descriptor of the first frame is subtracted, as in
the geometry
features: whose face it is and how it is lit outweighs a micro-expression by far, and is the same in all
    frames.
"""

import contextlib
import functools
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
    interpolate: bool = True,
    epsilon: float = 1e-5,
) -> np.ndarray:
    """Computes the HOG descriptor of a grey image.

    Central differences (0 at the border), magnitudes voted into orientation bins of square cells and divided
    by a cell's area, blocks of neighbouring cells normalised by L2-Hys (L2, clipped at 0.2, L2 again), blocks
    overlapping by all but one cell.

    Args:
        image: (H, W) grey values, any real type and scale.
        orientations: Number of bins over 180 degrees, or over 360 if ``signed``.
        cell: Side of a cell in pixels; what remains of the image on the right and below is not used.
        block: Side of a block in cells.
        signed: Whether opposite gradients (dark to light, light to dark) are told apart.
        interpolate: True shares a vote linearly between the two nearest orientations and the four nearest
            cells, as Dalal and Triggs do, so that a small motion makes a small change. False gives all of it
            to the one bin that a pixel falls into; with unsigned orientations this is
            ``skimage.feature.hog``.
        epsilon: Keeps the norm of flat blocks from 0.

    Returns:
        (D,) float32, D = (rows - block + 1) (columns - block + 1) block^2 orientations, rows and columns in
        cells.

    Raises:
        ValueError: The image is smaller than one block.
    """
    rows, columns = image.shape[0] // cell, image.shape[1] // cell
    if min(rows, columns) < block:
        raise ValueError(f"image of {image.shape} is smaller than one block of {block} cells of {cell} pixels")
    image = image.astype(np.float32)
    down, right = np.zeros_like(image), np.zeros_like(image)
    down[1:-1] = image[2:] - image[:-2]
    right[:, 1:-1] = image[:, 2:] - image[:, :-2]

    # Only here is the image cut to whole cells: the differences above still see beyond their last pixels.
    down, right = (part[: rows * cell, : columns * cell].ravel() for part in (down, right))
    magnitude = np.hypot(down, right)
    turn = 360 if signed else 180
    # In float64: some processors' float32 puts a gradient of exactly 45 degrees, as grey levels give, just below it.
    angle = np.rad2deg(np.arctan2(down, right, dtype=np.float64)) % turn * (orientations / turn)
    if interpolate:
        # Bin k is centred at k + 0.5, and the bins close a circle.
        below = np.floor(angle - 0.5)
        share = (angle - 0.5 - below).astype(np.float32)
        below = below.astype(np.int32)
        votes = ((below % orientations, magnitude * (1 - share)), ((below + 1) % orientations, magnitude * share))
    else:
        # The remainder of a tiny negative angle rounds up to the full turn, which is bin 0 again.
        votes = ((angle.astype(np.int32) % orientations, magnitude),)
    histogram = np.zeros(rows * columns * orientations)
    for place, weight in _cell_shares(rows, columns, cell, interpolate):
        for bins, vote in votes:
            histogram += np.bincount(place * orientations + bins, weight * vote, len(histogram))
    histogram = histogram.reshape(rows, columns, orientations) / cell**2

    # (rows - block + 1, columns - block + 1, orientations, block, block) -> block cells before orientations
    blocks = np.lib.stride_tricks.sliding_window_view(histogram, (block, block), axis=(0, 1))
    blocks = blocks.transpose(0, 1, 3, 4, 2).reshape(-1, block * block * orientations)
    for limit in (0.2, None):
        blocks = blocks / np.sqrt((blocks**2).sum(axis=1, keepdims=True) + epsilon**2)
        blocks = blocks if limit is None else np.minimum(blocks, limit)
    return blocks.ravel().astype(np.float32)


@functools.lru_cache(maxsize=8)
def _cell_shares(
    rows: int, columns: int, cell: int, interpolate: bool
) -> tuple[tuple[np.ndarray, np.ndarray | float], ...]:
    """To which cells each pixel's vote goes, and how much of it: pairs of (pixels,) cell index and share."""
    if not interpolate:
        row, column = np.indices((rows * cell, columns * cell), np.int32) // cell
        return (((row * columns + column).ravel(), np.float32(1)),)
    row_shares, column_shares = _line_shares(rows, cell), _line_shares(columns, cell)
    return tuple(
        (
            (row[:, None] * columns + column).ravel(),
            (row_share[:, None] * column_share).ravel(),
        )
        for row, row_share in row_shares
        for column, column_share in column_shares
    )


def _line_shares(cells: int, cell: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The same along one axis, for the cell before and the cell after; beyond the border a share is lost."""
    position = (np.arange(cells * cell) + 0.5) / cell - 0.5
    before = np.floor(position).astype(np.int32)
    share = (position - before).astype(np.float32)
    pairs = ((before, 1 - share), (before + 1, share))
    return [(index.clip(0, cells - 1), part * ((index >= 0) & (index < cells))) for index, part in pairs]


def grey(frame: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Resizes an (H, W, 3) uint8 RGB crop to (size, size) grey, float32 in [0, 255].

    Grey values are not rounded back to integers: averaging over a large crop carries motions below one pixel.
    """
    shrinks = min(frame.shape[:2]) >= size
    frame = cv2.cvtColor(frame.astype(np.float32), cv2.COLOR_RGB2GRAY)
    return cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


@contextlib.contextmanager
def _open() -> Iterator[Session]:
    def session(frames: np.ndarray) -> np.ndarray:
        features = np.stack([hog(grey(frame)) for frame in frames])
        return features - features[:1]

    yield session


_BLOCKS = SIZE // CELL - BLOCK + 1

EXTRACTOR = Extractor(
    name="hog",
    modality="appearance",
    dim=_BLOCKS**2 * BLOCK**2 * ORIENTATIONS,
    licence="Apache-2.0 (no weights)",
    preprocessing=(
        f"crop resized to {SIZE} x {SIZE} (area), grey (Rec. 601); HOG: cells of {CELL} px, {BLOCK} x "
        f"{BLOCK} cells per block, {ORIENTATIONS} unsigned orientations, trilinear votes, L2-Hys; change "
        "from the first frame"
    ),
    open=_open,
)
