"""Frames of video files, and the short stretch of a video that is looked at.

A study is trained on clips that begin at the onset of an expression and end at its offset. A video of one's own does
neither, so a stretch of it must be chosen: by its user, or by a plain rule of motion. The rule takes the half second
in which the face moves most and comes back. It has no notion of expressions, cannot tell a blink or a word from one,
and says nothing about whether there is any.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

from mer_jax.clips.apex import motion_intensity
from mer_jax.clips.crops import CropConfig, crop_clip, face_box
from mer_jax.clips.faces import FaceDetector
from mer_jax.clips.flow import FlowConfig, to_grey
from mer_jax.errors import UserError
from mer_jax.files import is_utf8
from mer_jax.progress import progress

# FFmpeg and OpenCV tell on stderr, each in its own way, what is told here in one line. FFmpeg is asked in time: OpenCV
# reads this when it opens its first video.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

# An onset, an apex and an offset.
MIN_FRAMES = 3
# Crops of a whole stretch are in memory at once: 150 MB at 224 x 224.
MAX_FRAMES = 1000
# A video up to this long is taken as one expression; micro-expressions themselves last up to half a second.
WHOLE_SECONDS = 1.0
STRETCH_SECONDS = 0.5
# Where a file tells no frame rate, or one that no camera has.
DEFAULT_RATE = 30.0
_RATES = (1.0, 2000.0)
# What the search looks at: so many frames of each stretch, at this size.
_LOOKS = 8
_LOOK_SIZE = 112
# Correlation of grey levels with the first look, once laid over it, below which a look shows something else. Faces that
# speak, turn and are touched keep above 0.8; another scene has none that could be laid over.
_SAME = 0.7


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Consecutive frames of a video.

    Attributes:
        onset: Number of the first frame, from 0.
        offset: Number of the last frame, which belongs to it.
        rate: Frames a second.
        chosen: ``'given'`` by the user, ``'whole'`` video, or found by ``'motion'``.
        times: When each frame is shown, in seconds, as the file says; phones do not keep a rate.
    """

    onset: int
    offset: int
    rate: float
    chosen: str
    times: tuple[float, ...] = dataclasses.field(default=(), compare=False)

    @property
    def num_frames(self) -> int:
        """How many frames it has."""
        return self.offset - self.onset + 1


def frame_rate(path: str | os.PathLike) -> float:
    """Frames a second of a video as its file tells it; ``DEFAULT_RATE`` where it tells none.

    Raises:
        UserError: The file is missing or no video.
    """
    with _opened(path) as capture:
        rate = capture.get(cv2.CAP_PROP_FPS)
        return rate if _RATES[0] <= rate <= _RATES[1] else DEFAULT_RATE


def read_video(path: str | os.PathLike, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
    """Reads frames of a video one at a time, upright where the file says how the camera was held.

    All frames from the first are decoded: the seeking of video files is not exact to a frame.

    Args:
        path: Any file that OpenCV can read as a video.
        start: Number of the first frame, from 0.
        stop: Number of the frame to stop before; None for the end. A video may end earlier.

    Yields:
        (H, W, 3) uint8, RGB.

    Raises:
        UserError: The file is missing, no video, or holds no frame at all.
    """
    with _opened(path) as capture:
        number = 0
        while stop is None or number < stop:
            if not capture.grab():
                break
            number += 1
            if number > start:
                decoded, frame = capture.retrieve()
                if not decoded:
                    break
                yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        if not number and stop != 0:
            raise UserError(f"{path}: holds no frame that can be decoded; choose another video or convert it to mp4")


def choose_stretch(
    path: str | os.PathLike,
    detector: FaceDetector,
    *,
    onset: str | None = None,
    offset: str | None = None,
    crop: CropConfig | None = None,
) -> Stretch:
    """Chooses the frames of a video that are taken for one expression.

    What the user gives is taken; where only one end is given, the other is half a second away. Otherwise a video of
    up to a second is taken whole, and of a longer one :func:`find_motion` chooses half a second.

    Args:
        path: The video.
        detector: An open face detector.
        onset: Number of the first frame (``'12'``, from 0) or its time (``'0.4s'``); None where it is not known.
        offset: The same for the last frame.
        crop: How faces are cut out in the search.

    Returns:
        A stretch of 3 to 1000 frames.

    Raises:
        UserError: The video cannot be read or is too short, the given ends do not fit it, or it shows no face.
    """
    rate = frame_rate(path)
    half = max(MIN_FRAMES, round(STRETCH_SECONDS * rate)) - 1
    if onset is not None or offset is not None:
        first = None if onset is None else _frame_number(onset, path, rate, "--onset")
        last = None if offset is None else _frame_number(offset, path, rate, "--offset")
        total = _count(path, max(first or 0, last if last is not None else first + half) + 1)
        for flag, number in (("--onset", first), ("--offset", last)):
            if number is not None and number >= total:
                raise UserError(f"{flag}: frame {number} is beyond the end of {path}, which has {total} frames")
        first = max(0, last - half) if first is None else first
        last = min(total - 1, first + half) if last is None else last
        if last - first + 1 < MIN_FRAMES:
            raise UserError(
                f"{path}: frames {first} to {last} are fewer than an onset, an apex and an offset; choose --onset and "
                f"--offset at least {MIN_FRAMES - 1} frames apart"
            )
        if last - first + 1 > MAX_FRAMES:
            raise UserError(
                f"{path}: frames {first} to {last} are more than {MAX_FRAMES}; choose --onset and --offset about one "
                "expression"
            )
        return _stretch(path, first, last, rate, "given")
    whole = max(MIN_FRAMES, math.floor(WHOLE_SECONDS * rate))
    total = _count(path, whole + 1)
    if total < MIN_FRAMES:
        raise UserError(
            f"{path}: has {total} frame{'s' if total > 1 else ''}; an onset, an apex and an offset need at least "
            f"{MIN_FRAMES}"
        )
    if total <= whole:
        return _stretch(path, 0, total - 1, rate, "whole")
    first, last = find_motion(path, detector, rate, crop)
    return _stretch(path, first, last, rate, "motion")


def find_motion(
    path: str | os.PathLike, detector: FaceDetector, rate: float, crop: CropConfig | None = None
) -> tuple[int, int]:
    """Finds the half second of a video in which the face moves most and comes back.

    Stretches of half a second start every eighth of a second. In each, the face of the first frame is cut out of
    eight frames, which are laid over the first as rigid pictures, so that motion of the whole head is gone; what
    motion remains is summed as for the apex. A stretch counts as much as its motion rises above what is left at its
    end: an expression counts that is over by then, a face that stays turned does not. A stretch in which the picture
    changes to another one, as at a cut, is passed over. This is a rule of motion and no method of spotting: blinks and
    speech count, too.

    Args:
        path: The video, of any length; one frame and some dozens of small crops are in memory at a time.
        detector: An open face detector.
        rate: Frames a second.
        crop: How the face is cut out.

    Returns:
        Numbers of the first and the last frame; the earliest of equals.

    Raises:
        UserError: The video cannot be read, is shorter than the stretch, or shows no face for so long.
    """
    crop = dataclasses.replace(crop or CropConfig(), size=_LOOK_SIZE)
    length = max(MIN_FRAMES, round(STRETCH_SECONDS * rate))
    hop = max(1, length // 4)
    looks = set(np.linspace(0, length - 1, _LOOKS).round().astype(int).tolist())
    open_stretches: list[tuple[int, object, list[np.ndarray]]] = []
    best, best_start, looked, seen = -1.0, None, 0, 0
    with progress(total=_reported_frames(path), desc="looking for motion", unit="frames") as bar:
        for number, frame in enumerate(read_video(path)):
            if number % hop == 0:
                looked += 1
                box = face_box([frame], crop, detector)
                seen += box.found
                if box.found:
                    open_stretches.append((number, box, []))
            for start, box, grey in open_stretches:
                if number - start in looks:
                    grey.append(to_grey(crop_clip([frame], box, _LOOK_SIZE)[0]))
            while open_stretches and number - open_stretches[0][0] == length - 1:
                start, _, grey = open_stretches.pop(0)
                laid = _aligned(grey)
                if laid is None:
                    continue
                intensity = motion_intensity(laid, FlowConfig(), "none")
                rise = float(intensity.max() - intensity[-1])
                if rise > best:
                    best, best_start = rise, start
            bar.update()
        bar.total = bar.n
    if best_start is None and seen:
        raise UserError(
            f"{path}: shows no face for half a second without a break; choose --onset and --offset, or another video"
        )
    if best_start is None:
        raise UserError(f"{path}: no face found in {looked} frames looked at; choose a video of a face")
    return best_start, best_start + length - 1


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[cv2.VideoCapture]:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such video file")
    if not is_utf8(str(path)):  # OpenCV would end the process
        raise UserError(f"{path}: the path is not UTF-8; rename the file, or move it")
    logging = cv2.utils.logging
    level = logging.setLogLevel(logging.LOG_LEVEL_SILENT)
    try:
        capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)  # in every OpenCV of PyPI; others are chattier
    finally:
        logging.setLogLevel(level)
    try:
        if not capture.isOpened():
            raise UserError(f"{path}: cannot be read as a video; choose another file or convert it to mp4")
        capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
        yield capture
    finally:
        capture.release()


def _aligned(grey: Sequence[np.ndarray]) -> np.ndarray | None:
    """Lays (H, W) frames over the first of them by turning and shifting; (T, H, W), None if one shows something else.

    Flow less its rigid part would not do here: where a face is smooth, flow does not see the head move.
    """
    first, laid = grey[0], [grey[0]]
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 1e-3)
    for frame in grey[1:]:
        try:
            start = np.eye(2, 3, dtype=np.float32)
            correlation, warp = cv2.findTransformECC(first, frame, start, cv2.MOTION_EUCLIDEAN, criteria, None, 5)
        except cv2.error:  # nothing in common, or nothing to see at all
            return None
        if correlation < _SAME:
            return None
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        laid.append(cv2.warpAffine(frame, warp, frame.shape[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE))
    return np.stack(laid)


def _reported_frames(path: str | os.PathLike) -> int | None:
    """What the file says, which may be off by a few, or None."""
    with _opened(path) as capture:
        count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        return int(count) if count > 0 else None


def _stretch(path: str | os.PathLike, onset: int, offset: int, rate: float, chosen: str) -> Stretch:
    return Stretch(onset, offset, rate, chosen, tuple(itertools.islice(_frame_times(path), onset, offset + 1)))


def _frame_times(path: str | os.PathLike) -> Iterator[float]:
    """When each frame is shown, in rising seconds: as the file says, or by the rate where it says nothing."""
    with _opened(path) as capture:
        told = capture.get(cv2.CAP_PROP_FPS)
        believed = _RATES[0] <= told <= _RATES[1]
        step, before = 1 / (told if believed else DEFAULT_RATE), None
        while capture.grab():
            now = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            if before is None:
                now = now if believed and now > 0 else 0.0
            elif not believed or now <= before:
                now = before + step
            yield now
            before = now


def _count(path: str | os.PathLike, most: int) -> int:
    """How many frames there are, up to ``most``."""
    count = sum(1 for _ in itertools.islice(_frame_times(path), most))
    if not count:
        raise UserError(f"{path}: holds no frame that can be decoded; choose another video or convert it to mp4")
    return count


def _frame_number(text: str, path: str | os.PathLike, rate: float, flag: str) -> int:
    frames, seconds = re.fullmatch(r"\d+", text), re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*s", text)
    if frames:
        return int(text)
    if seconds:
        return _nearest_frame(path, float(seconds[1]), rate)
    raise UserError(f"{flag}={text!r}: must be the number of a frame, such as 12, or a time, such as 0.4s")


def _nearest_frame(path: str | os.PathLike, seconds: float, rate: float) -> int:
    """Number of the frame whose time is nearest, the earlier of two; beyond the end as many more as the rate says."""
    number, before = -1, 0.0
    for number, now in enumerate(_frame_times(path)):
        if now >= seconds:
            return number - (number > 0 and seconds - before <= now - seconds)
        before = now
    return max(number, 0) + round((seconds - before) * rate)
