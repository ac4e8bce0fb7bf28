"""Frames from image files."""

import math
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from mer_jax.errors import UserError

# What Pillow raises for bytes that are no whole image: mostly OSError, but some decoders differ.
_BROKEN_IMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def read_frame(path: str | os.PathLike) -> np.ndarray:
    """Reads one image as RGB.

    Grey images are repeated over the three channels, an alpha channel is dropped. Orientation tags are not
    applied: the frames of a clip are compared pixel by pixel.

    Args:
        path: A jpg, jpeg or png file.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        UserError: The file is missing, unreadable or truncated, or it is grey with more than 8 bits, whose
            range is anybody's guess.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise UserError(f"{path}: has more than 8 bits per pixel of grey; convert the frame to 8 bits")
            # A palette's transparency would make Pillow warn on the direct way to RGB.
            image = image.convert("RGBA") if image.mode in ("P", "PA") else image
            return np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such frame; restore the file or remove its clip") from None
    except _BROKEN_IMAGE as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "no known format" if unknown else " ".join(str(error).split())
        raise UserError(
            f"{path}: cannot be read as an image ({reason}); restore the file from its source or remove its clip"
        ) from error


def frame_order(path: str | os.PathLike) -> tuple:
    """Key that sorts the files of a clip by time: by the first integer in the name, then by name.

    Further integers in a name count by value, too: ``clip3_9.png`` comes before ``clip3_10.png``.

    Args:
        path: A file, one per frame; only its name counts.

    Returns:
        Something to compare; names without an integer come last.
    """
    name = Path(path).name
    # Text and digits take turns, so that like is compared with like.
    parts = [int(part) if turn % 2 else part for turn, part in enumerate(re.split(r"(\d+)", Path(path).stem))]
    return (parts[1] if len(parts) > 1 else math.inf, parts, name)


def read_frames(paths: Iterable[str | os.PathLike]) -> Iterator[np.ndarray]:
    """Reads the frames of one clip, one at a time.

    Args:
        paths: The frame files in order.

    Yields:
        (H, W, 3) uint8 RGB, H and W the same for all.

    Raises:
        UserError: As :func:`read_frame`, or a frame differs in size from the first.
    """
    first = None
    for path in paths:
        frame = read_frame(path)
        if first is None:
            first = path, frame.shape[:2]
        elif frame.shape[:2] != first[1]:
            (height, width), (first_height, first_width) = frame.shape[:2], first[1]
            raise UserError(
                f"{path}: is {width} x {height} pixels while {first[0]} is {first_width} x {first_height}; "
                "all frames of a clip must have one size: restore the file or remove its clip"
            )
        yield frame
