"""The two face views that one 4DME image holds side by side."""

import numpy as np

from mer_jax.errors import UserError


def split_views(frame: np.ndarray) -> dict[str, np.ndarray]:
    """Cuts a two-view frame at half its width.

    As in the paper (fusion, section 3.1.1); where the width is odd, the right view is the wider one, as in
    the released code.

    Args:
        frame: (H, W, 3) image; W at least 2.

    Returns:
        The left view (H, W // 2, 3) under ``'l'`` and the right view (H, W - W // 2, 3) under ``'r'``, both
        without copying.

    Raises:
        UserError: The frame is too narrow to hold two views.
    """
    width = frame.shape[1]
    if width < 2:
        raise UserError(f"a frame {width} pixel wide holds no two views; give frames with two faces side by side")
    return {"l": frame[:, : width // 2], "r": frame[:, width // 2 :]}
