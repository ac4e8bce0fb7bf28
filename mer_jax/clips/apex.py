"""The apex of a micro-expression: the frame that moved farthest from the onset (MicroAttNet, section 3.2).

The paper sums the length of Farneback's flow from the onset to each frame and takes the largest sum. The sway of a
head, a blink or a jolt easily moves more than a micro-expression does, and then wins. Hence three remedies, each an
option: the motion of the whole head is taken out of every field, what moves as briefly as a lid counts little, and the
sums are smoothed over time. ``benchmarks/apex.py`` measures what each of them is worth.
"""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from mer_jax.clips.flow import FlowConfig, dense_flow, resize_flow
from mer_jax.errors import UserError

COMPENSATIONS = ("none", "rigid")
# Side of the grid on which head motion is fitted, in means over areas of 4 x 4 px of a crop of 224 px: flow that was
# averaged over windows of 15 px holds no more.
_GRID = 56
# Radius, in half sides, of the disc in the middle of a crop in which a face is all there is to see.
_FACE_RADIUS = 0.55
_ITERATIONS = 4
_FRAMES_AT_ONCE = 16
_STILL = 1e-6  # px


@dataclasses.dataclass(frozen=True)
class ApexConfig:
    """How the apex is found. The paper's plain rule is ``compensate='none'``, ``blink=0``, ``smooth=0``.

    Attributes:
        use_annotated: Whether an apex that the data set gives is taken as it is.
        compensate: ``'none'``, or ``'rigid'``: what moves with the whole head is taken out of each field and only the
            middle of the crop, where the face is, counts; see :func:`subtract_head_motion`.
        blink: Frames, 0 for off. A place on the face that moves for less than half as many of them in a row, as a lid
            does in a blink, counts little; see :func:`flow_intensity`. About twice as long as a lid is half shut.
        smooth: Standard deviation in frames of the smoothing of the sums, 0 for none.
    """

    use_annotated: bool = True
    compensate: str = "rigid"
    blink: int = 7
    smooth: float = 1.0

    def __post_init__(self):
        if self.compensate not in COMPENSATIONS:
            raise UserError(f"apex compensate {self.compensate!r}: must be one of {', '.join(COMPENSATIONS)}")
        if isinstance(self.blink, bool) or not isinstance(self.blink, int) or self.blink < 0:
            raise UserError(f"apex blink {self.blink!r}: must be a whole number of frames, 0 for off")
        if not 0 <= self.smooth < math.inf:
            raise UserError(f"apex smooth {self.smooth!r}: must be a number of frames of at least 0")


def motion_intensity(frames: np.ndarray, flow: FlowConfig, compensate: str = "none", blink: int = 0) -> np.ndarray:
    """How far each frame has moved from the first one (eq. 2).

    Args:
        frames: (T, H, W) uint8 or float32 grey levels; the first is the onset.
        flow: How flow is computed.
        compensate: See :class:`ApexConfig`.
        blink: See :class:`ApexConfig`.

    Returns:
        (T,) float64, as :func:`flow_intensity` gives it; exactly 0 where a frame is the first one.

    Raises:
        UserError: There are no frames, or they are too small for flow.
    """
    if not len(frames):
        raise UserError("a clip without frames has no apex; restore its files or remove it")
    some_at_a_time = range(0, len(frames), _FRAMES_AT_ONCE)
    fields = (dense_flow(frames[0], frames[start : start + _FRAMES_AT_ONCE], flow) for start in some_at_a_time)
    return flow_intensity(fields, compensate, blink)


def flow_intensity(fields: Iterable[np.ndarray], compensate: str = "none", blink: int = 0) -> np.ndarray:
    """How much motion there is in each flow field (eq. 2).

    Without remedies, the length of the flow summed over all pixels. With one, the square root of its mean square over
    the face, times the number of pixels: motion that is left everywhere, of the head or of noise, counts for less than
    as much motion in one place.

    With ``blink``, the motion of a place is multiplied by the square of the share of its greatest length that is left
    when its course is filtered by a running median of so many frames: of a motion that is gone after half of them
    little is left, of one that lasts longer most, and the time of its peak is not touched.

    Args:
        fields: Parts of T flow fields in order of time, each (t, H, W, 2) px.
        compensate: See :class:`ApexConfig`.
        blink: See :class:`ApexConfig`.

    Returns:
        (T,) float64, px times pixels.
    """
    sums, lengths, pixels = [], [], 0
    for part in fields:
        pixels = part[0, ..., 0].size
        if compensate == "none" and not blink:
            sums.append(np.hypot(part[..., 0], part[..., 1]).sum(axis=(1, 2), dtype=np.float64))
            continue
        part = resize_flow(part, _GRID)  # (t, G, G, 2)
        if compensate == "rigid":
            part = subtract_head_motion(part)
        lengths.append(np.hypot(part[..., 0], part[..., 1], dtype=np.float64))
    if sums:
        return np.concatenate(sums)
    face = _in_disc(*_grid(_GRID, _GRID)) if compensate == "rigid" else np.ones((_GRID, _GRID), bool)
    lengths = np.concatenate(lengths)[:, face]  # (T, G, G) -> (T, P)
    if blink:
        from scipy.ndimage import median_filter

        lasting = median_filter(lengths, size=(blink, 1), mode="nearest").max(axis=0)  # (P,)
        lengths = lengths * (lasting / np.maximum(lengths.max(axis=0), _STILL)) ** 2
    return np.sqrt(np.mean(lengths**2, axis=1)) * pixels


def subtract_head_motion(fields: np.ndarray) -> np.ndarray:
    """Takes what moves with the whole head out of flow fields.

    A face that is shifted, turned and brought nearer by little moves by a smooth function of the place, for its relief
    is smooth: here the general polynomial of degree 2 of x and y, 6 coefficients for u and 6 for v. (A similarity,
    which has 4 in all, leaves what relief adds when a head turns.) It is fitted to the disc in the middle, to which a
    background does not reach, by least squares, reweighted with Cauchy's weights at the scale of the median residual,
    so that the parts of a face that move by themselves have little say.

    Args:
        fields: (T, H, W, 2) flow, px.

    Returns:
        (T, H, W, 2) float64, what the fits leave; outside the disc it is of no use.
    """
    count, height, width = fields.shape[:3]
    y, x = _grid(height, width)
    powers = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)  # (H, W, 6)
    inside = _in_disc(y, x)
    basis = powers[inside]  # (P, 6)
    products = (basis[:, :, None] * basis[:, None, :]).reshape(len(basis), -1)  # (P, 6, 6) -> (P, 36)
    flow = fields[:, inside].astype(np.float64)  # (T, P, 2)
    weights = np.ones(flow.shape[:2])
    for _ in range(_ITERATIONS):
        normal = (weights @ products).reshape(count, 6, 6)  # (T, P) (P, 36) -> (T, 6, 6)
        moments = basis.T @ (weights[..., None] * flow)  # (6, P) (T, P, 2) -> (T, 6, 2)
        coefficients = np.linalg.solve(normal, moments)
        residual = flow - basis @ coefficients  # (P, 6) (T, 6, 2) -> (T, P, 2)
        length = np.hypot(residual[..., 0], residual[..., 1])
        scale = 1.4826 * np.median(length, axis=1, keepdims=True) + _STILL
        weights = 1 / (1 + (length / scale) ** 2)
    return fields - powers @ coefficients[:, None]  # (H, W, 6) (T, 1, 6, 2) -> (T, H, W, 2)


def find_apex(intensity: np.ndarray, smooth: float = 0.0) -> int:
    """The frame of the largest intensity (eq. 3) that leaves both phases.

    Args:
        intensity: (T,), as :func:`motion_intensity` gives it.
        smooth: See :class:`ApexConfig`.

    Returns:
        Index of the apex: 1 to T - 2, so that neither phase is empty, the earliest of equals; 1 where T = 2; the middle
        where nothing moves.

    Raises:
        UserError: There are fewer than two frames.
    """
    count = len(intensity)
    if count < 2:
        raise UserError(f"a clip of {count} frame{'s' if count != 1 else ''} has no apex; at least 2 are needed")
    if count == 2:
        return 1
    if not np.any(intensity):
        return min(max(count // 2, 1), count - 2)
    if smooth:
        from scipy.ndimage import gaussian_filter1d

        intensity = gaussian_filter1d(intensity, smooth, mode="nearest")
    return 1 + int(np.argmax(intensity[1:-1]))


def _grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) y and x of pixel centres in half sides from the middle."""
    rows, columns = (2 * np.arange(length) + 1 - length for length in (height, width))
    y, x = np.meshgrid(rows / height, columns / width, indexing="ij")
    return y, x


def _in_disc(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return x**2 + y**2 < _FACE_RADIUS**2
