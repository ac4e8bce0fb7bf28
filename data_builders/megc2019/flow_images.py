"""Flow images: three channels of 8 bits in the order u, v, optical strain, as the field hands them around."""

import struct
from pathlib import Path

import numpy as np
from PIL import Image

from mer_jax.clips.flow import FlowConfig, dense_flow, optical_strain, resize_flow
from mer_jax.errors import UserError

CHANNELS = ("u", "v", "strain")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}


def read_flow_image(path: Path) -> tuple[np.ndarray, bool]:
    """Reads one flow image.

    Args:
        path: A PNG file: 8 bits per channel, in colour. A palette or an alpha channel is taken off, which
            changes no colour.

    Returns:
        ((H, W, 3) uint8 in the order u, v, strain; whether the file was no plain RGB).

    Raises:
        UserError: The file is damaged, no PNG, grey, or of 16 bits per channel.
    """
    restore = "restore the file, or remove it to do without its clip"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {restore}") from error
    if data[:8] != _PNG_SIGNATURE or len(data) < 26:
        raise UserError(f"{path}: is no PNG file, or a damaged one; {restore}")
    depth, colour = struct.unpack(">BB", data[24:26])
    kind = _COLOUR_TYPES.get(colour, "unknown")
    if kind not in ("RGB", "palette", "RGBA"):
        raise UserError(f"{path}: is a {kind} image without the three channels u, v and strain; {restore}")
    if depth > 8:
        raise UserError(f"{path}: has {depth} bits per channel, flow images have 8; {restore}")
    try:
        with Image.open(path) as image:
            # A palette's transparency would make Pillow warn on the direct way to RGB.
            return np.array(image.convert("RGBA" if kind != "RGB" else "RGB"))[..., :3], kind != "RGB"
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as an image ({reason}); {restore}") from error


def flow_maps(pictures: np.ndarray, config: FlowConfig, size: int) -> np.ndarray:
    """Flow and optical strain from each picture to the next, at the size at which a model looks at them.

    The strain is that of the flow at full size; both are then resized by the mean over the area of a new pixel.

    Args:
        pictures: (P + 1, H, W) uint8 grey, such as onset, apex and offset.
        config: Method and its settings.
        size: Side S of the result.

    Returns:
        (P, S, S, 3) float32: u and v in px of ``pictures``, strain in px per px.
    """
    flow = dense_flow(pictures[:-1], pictures[1:], config)
    # (P, H, W, 2) and (P, H, W, 1) -> (P, H, W, 3)
    return resize_flow(np.concatenate([flow, optical_strain(flow)[..., None]], axis=-1), size)


def as_image(maps: np.ndarray) -> np.ndarray:
    """Stretches each channel of each map from its minimum and maximum to 0 and 255, as the published images are.

    How far and, where all of a face moves one way, even in which direction it moved cannot be told from the result.

    Args:
        maps: (..., S, S, C) float.

    Returns:
        (..., S, S, C) uint8; a constant channel is 0.
    """
    low, high = maps.min(axis=(-3, -2), keepdims=True), maps.max(axis=(-3, -2), keepdims=True)
    extent = np.where(high > low, high - low, 1)
    return np.rint((maps - low) / extent * 255).astype(np.uint8)
