"""From however many frames a clip has to the number that a model takes."""

import numpy as np

from mer_jax.errors import UserError


def resample_indices(num_frames: int, k: int) -> np.ndarray:
    """Indices of ``k`` frames spread evenly over a clip, as the released inference chooses them.

    A longer clip gives ``round(i * (num_frames - 1) / (k - 1))`` for i = 0 .. k - 1, so that its first and
    last frames are always among them; ties go to the even index (with 16 or 18 frames there are none). A clip
    of at most ``k`` frames gives all of them, the last one repeated. A single frame is the middle one.

    Args:
        num_frames: Frames that the clip has, at least 1.
        k: Frames wanted, at least 1 (the paper takes 18, the released code 16).

    Returns:
        (k,) int64, ascending, each in [0, num_frames).

    Raises:
        UserError: The clip has no frames, or fewer than one frame is wanted.
    """
    if num_frames < 1:
        raise UserError(f"cannot choose among {num_frames} frames; a clip needs at least one")
    if k < 1:
        raise UserError(f"cannot resample a clip to {k} frames; ask for at least one")
    if num_frames <= k:
        return np.minimum(np.arange(k), num_frames - 1)
    if k == 1:
        return np.array([num_frames // 2])
    return np.rint(np.arange(k) * (num_frames - 1) / (k - 1)).astype(np.int64)
