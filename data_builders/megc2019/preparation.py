"""From raw frames to flow maps: clip by clip, in parallel, each finished clip kept at once."""

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_builders.megc2019.flow_images import flow_maps
from data_builders.megc2019.raw_frames import RawClip
from mer_jax.clips.crops import Box, CropConfig, crop_clip, face_box
from mer_jax.clips.faces import FaceDetector
from mer_jax.clips.flow import FlowConfig, to_grey
from mer_jax.clips.frames import read_frames
from mer_jax.errors import UserError
from mer_jax.files import atomic_savez
from mer_jax.parallel import run_tasks

VERSION = 1  # of what is kept per clip; to be raised whenever it changes
WHOLE_SIZE = 224  # px; to what frames are brought that are no crops of ours, so that flow has one unit everywhere
_MAX_NAMED = 3


@dataclass(frozen=True)
class PreparedClip:
    """What is computed from one clip.

    Attributes:
        box: Where the face was cut out.
        maps: (2, S, S, 3) float32: u, v (px of the crop) and strain of onset-apex and apex-offset.
    """

    box: Box
    maps: np.ndarray


@dataclass(frozen=True)
class _Task:
    clip: RawClip
    crop: CropConfig | None
    flow: FlowConfig
    size: int
    path: Path
    fingerprint: str


def settings_of(crop: CropConfig | None, flow: FlowConfig, size: int) -> dict[str, Any]:
    """What the maps depend on, JSON-able; a ``crop`` of None takes frames whole."""
    return {"crop": crop.settings() if crop else "whole", "flow": asdict(flow), "size": size}


def fingerprint(clip: RawClip) -> str:
    """Changes when a clip's frames are replaced; made of names, sizes and dates, so that no image is read.

    Raises:
        UserError: A frame is gone.
    """
    facts: list[Any] = [clip.apex]
    for path in clip.frames:
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); restore the file") from error
        facts.append((path.name, status.st_size, status.st_mtime_ns))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def prepare(
    clips: Sequence[RawClip],
    crop: CropConfig | None,
    flow: FlowConfig,
    size: int,
    folder: Path,
    *,
    workers: int | None = None,
) -> dict[str, Path]:
    """Computes the maps of all clips; finished clips are found again, also after a kill.

    Args:
        clips: What to prepare.
        crop: How faces are cut out; None takes the frames whole, brought to ``WHOLE_SIZE``.
        flow: How flow is computed.
        size: Side of the maps.
        folder: Where the finished clips are kept, under the hash of the settings, one file per clip.
        workers: Number of processes, one per available processor unless given.

    Returns:
        Clip name to the file that :func:`load_prepared` reads.

    Raises:
        UserError: Clips cannot be prepared: their names and the first reasons, after all others were finished.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what was finished is kept.
    """
    told = json.dumps([VERSION, settings_of(crop, flow, size)], sort_keys=True)
    folder = folder / hashlib.sha256(told.encode()).hexdigest()[:12]
    tasks, paths, errors = [], {}, []
    for clip in clips:
        paths[clip.name] = folder / f"{clip.name}.npz"
        task = _Task(clip, crop, flow, size, paths[clip.name], fingerprint(clip))
        if not _is_finished(task):
            tasks.append(task)
    # What a kill left of a file that was being written.
    for stale in folder.glob(".*.tmp"):
        stale.unlink(missing_ok=True)
    if tasks:
        results = run_tasks(_prepare_clip, tasks, workers=workers, desc="computing flow", unit="clip")
        errors = [(task.clip.name, result) for task, result in zip(tasks, results, strict=True) if result is not None]
    if errors:
        reasons = "; ".join(f"clip {name}: {error}" for name, error in errors[:_MAX_NAMED])
        more = f"; and {len(errors) - _MAX_NAMED} more" if len(errors) > _MAX_NAMED else ""
        raise UserError(
            f"{len(errors)} of {len(clips)} clips cannot be prepared ({reasons}{more}); the others are "
            "finished and kept: repair these or remove their folders, and run the same command again"
        )
    return paths


def load_prepared(path: Path) -> PreparedClip:
    """Reads what was computed from a finished clip."""
    with np.load(path) as stored:
        return PreparedClip(Box(**json.loads(str(stored["told"]))["box"]), stored["maps"])


def _is_finished(task: _Task) -> bool:
    try:
        with np.load(task.path) as stored:
            return json.loads(str(stored["told"]))["fingerprint"] == task.fingerprint
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False


def _prepare_clip(task: _Task) -> None:
    """Worker: finishes one clip on disk."""
    import cv2

    # The processes are the parallelism; OpenCV's own threads would only get into their way.
    cv2.setNumThreads(1)
    clip = task.clip
    three = list(read_frames([clip.frames[0], clip.frames[clip.apex], clip.frames[-1]]))
    if task.crop is None:
        height, width = three[0].shape[:2]
        box, side = Box(0, 0, width, height, found=True, score=0.0), WHOLE_SIZE
    else:
        with FaceDetector(task.crop.min_confidence) as detector:
            box, side = face_box(read_frames(clip.frames), task.crop, detector), task.crop.size
    maps = flow_maps(to_grey(crop_clip(three, box, side)), task.flow, task.size)
    told = {"fingerprint": task.fingerprint, "box": asdict(box)}
    atomic_savez(task.path, told=np.array(json.dumps(told)), maps=maps)
