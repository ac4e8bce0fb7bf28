"""From frames to features: clip by clip, in parallel, each finished clip kept at once."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_builders.clip_work import ClipTask, files_fingerprint, finish_clips, work_folder
from mer_jax.clips.crops import Box, CropConfig, FaceSearch, crop_clip
from mer_jax.clips.faces import FaceDetector
from mer_jax.clips.frames import read_frames
from mer_jax.clips.layouts import Clip
from mer_jax.clips.views import split_views
from mer_jax.extractors.base import fill_missing, get_extractor
from mer_jax.files import atomic_savez
from mer_jax.parallel import Workers

VERSION = 1  # of what is kept per clip; to be raised whenever it changes


@dataclass(frozen=True)
class PreparedView:
    """What is computed from one view of a clip of T frames.

    Attributes:
        box: Where the face was cut out.
        features: Extractor name to (T, D) float32.
        missing: Extractor name to the number of frames in which it found nothing (their features are filled
            from their neighbours, see :func:`mer_jax.extractors.base.fill_missing`).
    """

    box: Box
    features: dict[str, np.ndarray]
    missing: dict[str, int]


@dataclass(frozen=True)
class _Task(ClipTask):
    clip: Clip
    crop: CropConfig
    extractors: tuple[str, ...]


def views_of(clip: Clip) -> tuple[str, ...]:
    """Names of the views of a clip: left and right, or 'c' for a single one."""
    return ("l", "r") if clip.two_view else ("c",)


def sample_name(clip: Clip, view: str) -> str:
    """Name of one view of a clip, as in the released code; just the clip's for a single view."""
    return clip.name if view == "c" else f"{clip.name}_{view}"


def fingerprint(clip: Clip, *facts: Any) -> str:
    """Changes when a clip's frames are replaced, or ``facts`` change; no image is read.

    Raises:
        UserError: A frame is gone.
    """
    return files_fingerprint(clip.frames, clip.two_view, *facts)


def prepare(
    clips: Sequence[Clip],
    crop: CropConfig,
    extractors: Sequence[str],
    folder: Path,
    *,
    workers: Workers = None,
) -> dict[str, Path]:
    """Computes boxes and features of all clips; finished clips are found again, also after a kill.

    Args:
        clips: What to prepare.
        crop: How faces are cut out.
        extractors: Names of the embedded extractors to run; may be empty.
        folder: Where the finished clips are kept, under the hash of the settings, one file per clip.
        workers: Number of processes, one per available processor unless given; or a cluster.

    Returns:
        Clip name to the file that :func:`load_prepared` reads.

    Raises:
        UserError: Clips cannot be prepared: their names and the first reasons, after all others were
            finished.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what was finished is kept.
    """
    told = {name: get_extractor(name).preprocessing for name in extractors}
    folder = work_folder(folder, [VERSION, crop.settings(), told])
    tasks = [
        _Task(clip.name, folder / f"{clip.name}.npz", fingerprint(clip), clip, crop, tuple(extractors))
        for clip in clips
    ]
    desc = "extracting features" if extractors else "finding faces"
    return finish_clips(_prepare_clip, tasks, workers=workers, desc=desc, sources=[clip.frames[0] for clip in clips])


def load_prepared(path: Path, view: str) -> PreparedView:
    """Reads what was computed from one view of a finished clip."""
    with np.load(path) as stored:
        told = json.loads(str(stored["told"]))
        return PreparedView(
            box=Box(**told["views"][view]["box"]),
            features={name: stored[f"{view}.{name}"] for name in told["extractors"]},
            missing=told["views"][view]["missing"],
        )


def _prepare_clip(task: _Task) -> None:
    """Worker: finishes one clip on disk."""
    import cv2

    # The processes are the parallelism; OpenCV's own threads would only get into their way.
    cv2.setNumThreads(1)
    clip, crop = task.clip, task.crop
    views = views_of(clip)
    boxes = face_boxes(clip, crop)

    arrays: dict[str, np.ndarray] = {}
    missing: dict[str, dict[str, int]] = {view: {} for view in views}
    if task.extractors:
        shape = (len(clip.frames), crop.size, crop.size, 3)
        crops = {view: np.empty(shape, np.uint8) for view in views}
        for index, frame in enumerate(read_frames(clip.frames)):
            for view, image in split_frame(frame, clip.two_view).items():
                crops[view][index] = crop_clip([image], boxes[view], crop.size)[0]
        for name in task.extractors:
            extractor = get_extractor(name)
            with extractor.open() as session:
                for view in views:
                    features = session(crops[view])
                    if features.shape != (len(clip.frames), extractor.dim) or features.dtype != np.float32:
                        raise ValueError(f"extractor {name} returned {features.shape} {features.dtype}")
                    arrays[f"{view}.{name}"], missing[view][name] = fill_missing(features)
    told = {
        "fingerprint": task.fingerprint,
        "extractors": list(task.extractors),
        "views": {view: {"box": asdict(boxes[view]), "missing": missing[view]} for view in views},
    }
    atomic_savez(task.path, told=np.array(json.dumps(told)), **arrays)


def face_boxes(clip: Clip, crop: CropConfig) -> dict[str, Box]:
    """Where to cut each view of a clip; only the frames that the crop's rule looks at are read."""
    with FaceDetector(crop.min_confidence) as detector:
        searches = {view: FaceSearch(crop, detector) for view in views_of(clip)}
        for frame in read_frames(clip.frames[:1] if crop.rule == "first" else clip.frames):
            for view, image in split_frame(frame, clip.two_view).items():
                searches[view].look(image)
    return {view: search.box() for view, search in searches.items()}


def split_frame(frame: np.ndarray, two_view: bool) -> dict[str, np.ndarray]:
    """The views of a frame by name, 'c' for a single one."""
    return split_views(frame) if two_view else {"c": frame}
