"""The authors' rules of alignment, written anew: a frame (H, W, 3) and points (468, 2) to the network's image."""

import cv2
import numpy as np
from PIL import Image

from mer_jax.extractors.alignment import STANDARD_FACE


def smirk(frame, points):
    """The same square interpolated by hand, in double precision, before it is cut to whole numbers."""
    low, high = points.min(0), points.max(0)
    side = int(np.mean(high - low) * 1.4)
    bordered = np.pad(frame.astype(float), ((side, side), (side, side), (0, 0)))  # black, as far as it can reach
    x, y = ((low + high) / 2 - side / 2 + side)[:, None] + np.linspace(0, side, 224)
    left, upper = np.floor(x).astype(int), np.floor(y).astype(int)
    across, down = (x - left)[None, :, None], (y - upper)[:, None, None]
    above, below = (
        bordered[row][:, left] * (1 - across) + bordered[row][:, left + 1] * across for row in (upper, upper + 1)
    )
    return above * (1 - down) + below * down


def deep3d(frame, points):
    """All ten equations at once, and Pillow's resize and crop."""
    eyes = (points[33] + points[133]) / 2, (points[362] + points[263]) / 2
    five = np.array([*eyes, points[1], points[61], points[291]])
    five[:, 1] = frame.shape[0] - 1 - five[:, 1]
    equations = np.zeros((5, 2, 8))
    equations[:, 0, :3] = equations[:, 1, 4:7] = STANDARD_FACE
    equations[:, 0, 3] = equations[:, 1, 7] = 1
    solution, *_ = np.linalg.lstsq(equations.reshape(10, 8), five.reshape(10), rcond=None)
    ratio = 102 / ((np.sqrt(sum(solution[:3] ** 2)) + np.sqrt(sum(solution[4:7] ** 2))) / 2)
    height, width = frame.shape[:2]
    image = Image.fromarray(frame).resize((int(width * ratio), int(height * ratio)), resample=Image.BICUBIC)
    left = int(image.width / 2 - 112 + (solution[3] - width / 2) * ratio)
    upper = int(image.height / 2 - 112 + (height / 2 - solution[7]) * ratio)
    result = np.zeros((224, 224, 3), np.uint8)  # rows and columns of the image that fall into the square
    rows, columns = np.arange(upper, upper + 224), np.arange(left, left + 224)
    inside = np.ix_((rows >= 0) & (rows < image.height), (columns >= 0) & (columns < image.width))
    result[inside] = np.asarray(image)[
        np.ix_(rows[(rows >= 0) & (rows < image.height)], columns[(columns >= 0) & (columns < image.width)])
    ]
    return result


def faceverse(frame, points):
    """On a canvas so large that nothing is cut off."""
    x0, y0, x1, y1 = (int(value) for value in (*points.min(0), *points.max(0)))
    half = max(x1 - x0, y1 - y0) // 2
    x, y, length = (x0 + x1) // 2, (y0 + y1) // 2, 2 * half
    room = 2 * max(frame.shape)
    canvas = np.zeros((frame.shape[0] + 2 * room, frame.shape[1] + 2 * room, 3), np.uint8)
    canvas[room:-room, room:-room] = frame
    left, right = int(x - length * 0.65), int(x + length * 0.65)
    upper, lower = int(y - length * 0.7), int(y + length * 0.6)
    return cv2.resize(canvas[room + upper : room + lower, room + left : room + right], (256, 256))
