"""The apex of a micro-expression: the frame that moved farthest from the onset (MicroAttNet, section 3.2).

The paper sums the magnitude of Farneback's flow from the onset to each frame and takes the largest sum. A blink, a jolt
or the sway of a head can be larger than a micro-expression, hence two remedies, both options: the rigid motion of the
head is taken out of each field before it is summed, and the sums are smoothed over time.
"""

import dataclasses

import numpy as np
from scipy.ndimage import gaussian_filter1d

from mer_jax.clips.flow import FlowConfig, dense_flow
from mer_jax.errors import UserError

COMPENSATIONS = ("none", "rigid")
_ITERATIONS = 6
# Fitting and summing look at every so many pixels: flow of a 15 px window holds no more.
_STRIDE = 4
_FRAMES_AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class ApexConfig:
    """How the apex is found.

    Attributes:
        use_annotated: Whether an apex that the data set gives is taken as it is.
        compensate: ``'none'`` (the paper) or ``'rigid'``: a similarity (shift, turn, scale) is fitted to each field
            and subtracted.
        smooth: Standard deviation in frames of the smoothing of the sums; 0 (the paper) for none.
    """

    use_annotated: bool = True
    compensate: str = "rigid"
    smooth: float = 1.0

    def __post_init__(self):
        if self.compensate not in COMPENSATIONS:
            raise UserError(f"apex compensate {self.compensate!r}: must be one of {', '.join(COMPENSATIONS)}")
        if not 0 <= self.smooth < float("inf"):
            raise UserError(f"apex smooth {self.smooth}: must be a number of frames of at least 0")


def motion_intensity(frames: np.ndarray, flow: FlowConfig, compensate: str = "none") -> np.ndarray:
    """How far each frame has moved from the first one (eq. 2).

    Args:
        frames: ``(T, H, W)`` grey, values 0 to 255; the first is the onset.
        flow: How flow is computed.
        compensate: See :class:`ApexConfig`.

    Returns:
        ``(T,)`` float64, px summed over all pixels; 0 for the first.

    Raises:
        UserError: There are no frames.
    """
    if not len(frames):
        raise UserError("a clip without frames has no apex; restore its files or remove it")
    intensity = np.zeros(len(frames))
    for start in range(1, len(frames), _FRAMES_AT_ONCE):
        fields = dense_flow(frames[0], frames[start : start + _FRAMES_AT_ONCE], flow)  # (t, H, W, 2)
        if compensate == "rigid":
            residual = subtract_rigid(fields[:, ::_STRIDE, ::_STRIDE])
            pixels = fields[0, ..., 0].size / residual[0, ..., 0].size
            sums = np.hypot(residual[..., 0], residual[..., 1]).sum(axis=(1, 2)) * pixels
        else:
            sums = np.hypot(fields[..., 0], fields[..., 1]).sum(axis=(1, 2), dtype=np.float64)
        intensity[start : start + _FRAMES_AT_ONCE] = sums
    return intensity


def subtract_rigid(fields: np.ndarray) -> np.ndarray:
    """Takes the motion of the whole head out of flow fields.

    Fits ``u = a x - b y + c, v = b x + a y + d`` by iteratively reweighted least squares with Cauchy weights, so that
    the parts of the face that move by themselves have little say. The residual is weighted by nothing.

    Args:
        fields: ``(T, H, W, 2)`` flow.

    Returns:
        ``(T, H, W, 2)`` float64, what a similarity leaves.
    """
    count, height, width = fields.shape[:3]
    y, x = (grid.ravel() for grid in np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j])
    one, zero = np.ones_like(x), np.zeros_like(x)
    basis = np.stack([np.stack([x, -y, one, zero], -1), np.stack([y, x, zero, one], -1)], 1)  # (P, 2, 4)
    products = np.einsum("pci,pcj->pij", basis, basis).reshape(len(x), 16)
    flow = fields.reshape(count, -1, 2).astype(np.float64)  # (T, H, W, 2) -> (T, P, 2)
    weights = np.ones((count, len(x)))
    residual = flow
    for _ in range(_ITERATIONS):
        normal = (weights @ products).reshape(count, 4, 4)  # (T, P) (P, 16)
        right = np.einsum("tp,pci,tpc->ti", weights, basis, flow, optimize=True)
        fitted = np.linalg.solve(normal, right[..., None])[..., 0]  # (T, 4)
        residual = flow - np.einsum("pci,ti->tpc", basis, fitted, optimize=True)
        length = np.hypot(residual[..., 0], residual[..., 1])
        scale = 1.4826 * np.median(length, axis=1, keepdims=True) + 1e-6
        weights = 1.0 / (1.0 + (length / scale) ** 2)
    return residual.reshape(count, height, width, 2)


def find_apex(intensity: np.ndarray, smooth: float = 0.0) -> int:
    """The frame of the largest intensity (eq. 3) that leaves both phases.

    Args:
        intensity: ``(T,)``, as :func:`motion_intensity` gives it.
        smooth: See :class:`ApexConfig`.

    Returns:
        Index of the apex: 1 to T - 2, so that neither phase is empty; 1 where T = 2; the middle where nothing moves.

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
    smoothed = gaussian_filter1d(intensity, smooth, mode="nearest") if smooth else intensity
    return 1 + int(np.argmax(smoothed[1:-1]))
