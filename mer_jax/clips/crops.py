"""Face crops: one box per view, found in one of its frames and kept for the whole clip."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from mer_jax.clips.faces import Detection, FaceDetector
from mer_jax.errors import UserError

FALLBACKS = ("centre", "released")
RULES = ("first", "largest")


@dataclass(frozen=True)
class CropConfig:
    """How a face is cut out.

    Attributes:
        scale: Factor by which the detected box grows about its centre.
        square: True cuts a square, as the paper says, so that the face keeps its aspect ratio: ``scale``
            times the longer side of the detected box, at most the shorter side of the image, moved (not
            shrunk or padded) where it would leave the image. False repeats the released code exactly: width
            and height are scaled separately, all numbers are cut to integers on the way, and what leaves the
            image is cut off, so that the resize stretches the face.
        size: Side of the resized crop in pixels.
        min_confidence: Lowest detector score in [0, 1] that counts as a face; below 0.6 it has no effect, see
            :class:`~mer_jax.clips.faces.FaceDetector`.
        fallback: What to cut when no face is found. ``'centre'`` is the largest square in the middle of the
            image; ``'released'`` is the released code's (left 0, top 400, right 1200, bottom 1600), cut to
            the image, which may leave a rectangle.
        bgr: Hand the detector BGR images, as the released code does although the model expects RGB.
        rule: Which frames of a view are searched for its face. ``'first'`` is the first one only (fusion,
            section 3.1.1); ``'largest'`` is every frame, of which the box with the largest area, before it
            grows, is kept (MicroAttNet, section 3.1).
    """

    scale: float = 1.5
    square: bool = True
    size: int = 1024
    min_confidence: float = 0.005
    fallback: str = "centre"
    bgr: bool = False
    rule: str = "first"

    def __post_init__(self):
        if self.rule not in RULES:
            raise UserError(f"crop rule {self.rule!r} is unknown; choose one of {', '.join(RULES)}")
        if self.fallback not in FALLBACKS:
            raise UserError(f"crop fallback {self.fallback!r} is unknown; choose one of {', '.join(FALLBACKS)}")
        if not 0 < self.scale < float("inf"):
            raise UserError(f"crop scale {self.scale} is not positive; the paper takes 1.5")
        if self.size < 1:
            raise UserError(f"crop size {self.size} is not positive; the paper takes 1024")
        if not 0 <= self.min_confidence <= 1:
            raise UserError(f"crop min_confidence {self.min_confidence} is outside [0, 1]; the default is 0.005")

    def settings(self) -> dict[str, Any]:
        """The fields as data sets keep them: ``rule`` only where it is not ``'first'``, which is as old as they."""
        fields = asdict(self)
        if self.rule == "first":
            del fields["rule"]
        return fields


@dataclass(frozen=True)
class Box:
    """Where a face is cut out, in whole pixels inside the image.

    Attributes:
        left: First column.
        top: First row.
        width: Number of columns, at least 1.
        height: Number of rows, at least 1.
        found: Whether a face was found; if not, this is the fallback.
        score: The detector's confidence in [0, 1], 0 for the fallback.
    """

    left: int
    top: int
    width: int
    height: int
    found: bool
    score: float


def face_box(views: Iterable[np.ndarray], config: CropConfig, detector: FaceDetector) -> Box:
    """Finds where to crop one view of a clip.

    Args:
        views: (H, W, 3) uint8 RGB, the view in the clip's T frames, all of one size. ``config.rule`` says how
            many are looked at; the others are not even asked for.
        config: How to cut. Its ``min_confidence`` must be that with which ``detector`` was made.
        detector: An open detector.

    Returns:
        A box inside the image; ``found`` is False where the detector saw no face in the frames it was shown,
        or only such whose box does not touch the image. Of boxes of the same size the earliest wins.

    Raises:
        UserError: There are no frames, or no face was found and the released fallback lies outside this image.
    """
    search = FaceSearch(config, detector)
    for view in views:
        search.look(view)
        if config.rule == "first":
            break
    return search.box()


class FaceSearch:
    """Finds the box of one view while its frames come by one at a time.

    Args:
        config: How to cut; with the rule ``'first'`` only the first frame that is shown is looked at.
        detector: An open detector, made with the ``min_confidence`` of ``config``.
    """

    def __init__(self, config: CropConfig, detector: FaceDetector):
        self._config, self._detector = config, detector
        self._shape: tuple[int, int] | None = None
        self._best: Box | None = None
        self._area = 0.0  # of the detected face behind it, as a share of the frame

    def look(self, view: np.ndarray) -> None:
        """Looks for a larger face in the next frame, (H, W, 3) uint8 RGB."""
        if self._shape is not None and self._config.rule == "first":
            return
        self._shape = height, width = view.shape[:2]
        detection = self._detector.detect(view[..., ::-1] if self._config.bgr else view)
        if detection is None:
            return
        area = detection.box[2] * detection.box[3]
        if self._best is not None and area <= self._area:
            return
        expand = _square_edges if self._config.square else _released_edges
        left, top, right, bottom = expand(detection, height, width, self._config.scale)
        if right > left and bottom > top:
            self._best = Box(left, top, right - left, bottom - top, found=True, score=detection.score)
            self._area = area

    def box(self) -> Box:
        """The box for the frames seen so far, as :func:`face_box` returns it."""
        if self._shape is None:
            raise UserError("the clip has no frames to look for a face in; restore its files or remove it")
        if self._best is not None:
            return self._best
        left, top, right, bottom = _fallback_edges(self._config.fallback, *self._shape)
        return Box(left, top, right - left, bottom - top, found=False, score=0.0)


def crop_clip(frames: Iterable[np.ndarray], box: Box, size: int) -> np.ndarray:
    """Cuts the same box from every frame of one view and resizes it.

    Args:
        frames: (H, W, 3) uint8 frames, all of one size, which holds the box.
        box: What to cut.
        size: Side of the result in pixels.

    Returns:
        (T, size, size, 3) uint8, resized with Pillow's Lanczos filter.

    Raises:
        UserError: There are no frames, or a frame differs in size from the first.
        ValueError: The box does not lie inside the frames.
    """
    crops, first_shape = [], None
    for index, frame in enumerate(frames):
        first_shape = first_shape or frame.shape
        if frame.shape != first_shape:
            raise UserError(
                f"frame {index} of the clip is {frame.shape[1]} x {frame.shape[0]} pixels while frame 0 is "
                f"{first_shape[1]} x {first_shape[0]}; all frames of a clip must have one size"
            )
        crop = frame[box.top : box.top + box.height, box.left : box.left + box.width]
        if min(box.left, box.top) < 0 or crop.shape[:2] != (box.height, box.width):
            raise ValueError(f"{box} is not inside a frame of {frame.shape[1]} x {frame.shape[0]} pixels")
        # Cropped before the resize: Pillow's own box argument lets pixels outside the box in at its edges.
        image = Image.fromarray(np.ascontiguousarray(crop))
        crops.append(np.asarray(image.resize((size, size), Image.Resampling.LANCZOS)))
    if not crops:
        raise UserError("the clip has no frames to crop; restore its files or remove it")
    return np.stack(crops)


def _square_edges(detection: Detection, height: int, width: int, scale: float) -> tuple[int, int, int, int]:
    x, y, box_width, box_height = (
        value * side for value, side in zip(detection.box, (width, height, width, height), strict=True)
    )
    if not _touches(x, y, x + box_width, y + box_height, height, width):
        return 0, 0, 0, 0
    side = max(1, min(round(scale * max(box_width, box_height)), height, width))
    left = min(max(round(x + (box_width - side) / 2), 0), width - side)
    top = min(max(round(y + (box_height - side) / 2), 0), height - side)
    return left, top, left + side, top + side


def _released_edges(detection: Detection, height: int, width: int, scale: float) -> tuple[int, int, int, int]:
    x, y, box_width, box_height = (
        int(value * side) for value, side in zip(detection.box, (width, height, width, height), strict=True)
    )
    centre_x, centre_y = x + box_width // 2, y + box_height // 2
    half_width, half_height = int(box_width * scale) // 2, int(box_height * scale) // 2
    return (
        max(centre_x - half_width, 0),
        max(centre_y - half_height, 0),
        min(centre_x + half_width, width),
        min(centre_y + half_height, height),
    )


def _fallback_edges(fallback: str, height: int, width: int) -> tuple[int, int, int, int]:
    if fallback == "centre":
        side = min(height, width)
        left, top = (width - side) // 2, (height - side) // 2
        return left, top, left + side, top + side
    if height <= 400:
        raise UserError(
            "no face was found, and the released fallback box (rows 400 to 1600) lies outside a view of "
            f"{width} x {height} pixels; use crop fallback 'centre'"
        )
    return 0, 400, min(1200, width), min(1600, height)


def _touches(left: float, top: float, right: float, bottom: float, height: int, width: int) -> bool:
    return right > left and bottom > top and right > 0 and bottom > 0 and left < width and top < height
