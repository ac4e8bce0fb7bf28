"""Short videos of a face that moves as told: a photograph, warped and written by OpenCV."""

from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
from skimage.data import astronaut

RATE = 25.0
# Where the face is in the photograph, and how far a motion of it reaches (standard deviation, px).
MOUTH, MOUTH_SIZE = (222.0, 158.0), 16.0


def photograph() -> np.ndarray:
    """(320, 320, 3) uint8 RGB: the upper middle of the photograph, with the whole face in it."""
    return np.ascontiguousarray(astronaut()[:320, 64:384])


def face_frame(raise_mouth: float = 0.0, shift: float = 0.0) -> np.ndarray:
    """The face with its mouth raised and the whole picture moved to the right.

    Args:
        raise_mouth: Largest displacement, px.
        shift: px.

    Returns:
        (320, 320, 3) uint8 RGB.
    """
    picture = photograph()
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]].astype(np.float32)
    x = x - np.float32(shift)  # where in the photograph each pixel comes from
    near = np.exp(-((x - (MOUTH[0] - 64)) ** 2 + (y - MOUTH[1]) ** 2) / (2 * MOUTH_SIZE**2))
    return cv2.remap(picture, x, y + np.float32(raise_mouth) * near, cv2.INTER_CUBIC, None, cv2.BORDER_REFLECT)


def bump(frame: int, middle: float, width: float) -> float:
    """A motion that rises from 0 to 1 at ``middle`` and is over ``width`` frames before and after."""
    return float(np.cos(np.clip((frame - middle) / width, -1.0, 1.0) * np.pi / 2) ** 2)


def write_video(path: Path, frames: Iterable[np.ndarray], rate: float = RATE, codec: str = "FFV1") -> Path:
    """Writes (H, W, 3) uint8 RGB frames, all of one size; without loss unless told otherwise."""
    writer = None
    for frame in frames:
        if writer is None:
            writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), rate, frame.shape[1::-1])
            assert writer.isOpened()
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
    return path


def face_video(path: Path, num_frames: int, motion: Callable[[int], dict], **options) -> Path:
    """Writes a video whose frame t is ``face_frame(**motion(t))``."""
    return write_video(path, (face_frame(**motion(frame)) for frame in range(num_frames)), **options)
