"""From frames to the flow of two phases: clip by clip, in parallel, each finished clip kept at once."""

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_builders.four_dme.preparation import face_boxes, fingerprint, split_frame, views_of
from mer_jax.clips.apex import ApexConfig, find_apex, motion_intensity
from mer_jax.clips.crops import Box, CropConfig, crop_clip
from mer_jax.clips.flow import FlowConfig, dense_flow, to_grey
from mer_jax.clips.frames import read_frames
from mer_jax.clips.layouts import Clip
from mer_jax.errors import UserError
from mer_jax.files import atomic_savez
from mer_jax.parallel import run_tasks

VERSION = 1  # of what is kept per clip; to be raised whenever it changes
_MAX_NAMED = 3


@dataclass(frozen=True)
class PreparedFlow:
    """What is computed from one view of a clip.

    Attributes:
        box: Where the face was cut out.
        apex: Index of the apex.
        annotated: Whether the data set gave it.
        still: Whether nothing moves in the clip.
        flow: Phase to (H, W, 2) float32, u and v in px of the crop.
    """

    box: Box
    apex: int
    annotated: bool
    still: bool
    flow: dict[str, np.ndarray]


@dataclass(frozen=True)
class _Task:
    clip: Clip
    crop: CropConfig
    apex: ApexConfig
    flow: FlowConfig
    path: Path
    fingerprint: str


def settings_of(crop: CropConfig, apex: ApexConfig, flow: FlowConfig) -> dict[str, Any]:
    """All that the flow depends on beside the frames, JSON-able."""
    return {"version": VERSION, "crop": asdict(crop), "apex": asdict(apex), "flow": asdict(flow)}


def prepare(
    clips: Sequence[Clip],
    crop: CropConfig,
    apex: ApexConfig,
    flow: FlowConfig,
    folder: Path,
    *,
    workers: int | None = None,
) -> dict[str, Path]:
    """Computes apex and flow of all clips; finished clips are found again, also after a kill.

    Args:
        clips: What to prepare.
        crop: How faces are cut out.
        apex: How the apex is found.
        flow: How flow is computed.
        folder: Where the finished clips are kept, under the hash of the settings, one file per clip.
        workers: Number of processes, one per available processor unless given.

    Returns:
        Clip name to the file that :func:`load_prepared` reads.

    Raises:
        UserError: Clips cannot be prepared: their names and the first reasons, after all others were finished.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what was finished is kept.
    """
    told = json.dumps(settings_of(crop, apex, flow), sort_keys=True)
    folder = folder / hashlib.sha256(told.encode()).hexdigest()[:12]
    tasks, paths, errors = [], {}, []
    for clip in clips:
        paths[clip.name] = folder / f"{clip.name}.npz"
        task = _Task(clip, crop, apex, flow, paths[clip.name], f"{fingerprint(clip)}-{clip.apex}")
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
            "finished and kept: repair or remove these and run the same command again"
        )
    return paths


def load_prepared(path: Path, view: str) -> PreparedFlow:
    """Reads what was computed from one view of a finished clip."""
    with np.load(path) as stored:
        told = json.loads(str(stored["told"]))["views"][view]
        flow = {phase: stored[f"{view}.{phase}"] for phase in ("onset_apex", "apex_offset")}
        return PreparedFlow(Box(**told["box"]), told["apex"], told["annotated"], told["still"], flow)


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
    clip, crop = task.clip, task.crop
    count = len(clip.frames)
    if count < 2:
        raise UserError(f"has {count} frame{'s' if count != 1 else ''}; flow needs at least 2")
    views = views_of(clip)
    boxes = face_boxes(clip, crop)
    grey = {view: np.empty((count, crop.size, crop.size), np.uint8) for view in views}
    for index, frame in enumerate(read_frames(clip.frames)):
        for view, image in split_frame(frame, clip.two_view).items():
            grey[view][index] = to_grey(crop_clip([image], boxes[view], crop.size)[0])

    # What the data set says of onset and offset bounds the phases; sequences are trimmed where it says nothing.
    onset = clip.onset or 0
    offset = count - 1 if clip.offset is None else clip.offset
    arrays, told = {}, {}
    for view in views:
        frames = grey[view][onset : offset + 1]
        annotated = task.apex.use_annotated and clip.apex is not None and onset <= clip.apex <= offset
        if len(frames) < 2:
            raise UserError(f"has {len(frames)} frame between onset {onset} and offset {offset}; flow needs at least 2")
        if annotated:
            apex, still = clip.apex - onset, False
        else:
            intensity = motion_intensity(frames, task.flow, task.apex.compensate, task.apex.blink)
            apex, still = find_apex(intensity, task.apex.smooth), not intensity.any()
        arrays[f"{view}.onset_apex"] = dense_flow(frames[0], frames[apex], task.flow)
        arrays[f"{view}.apex_offset"] = dense_flow(frames[apex], frames[-1], task.flow)
        told[view] = {"box": asdict(boxes[view]), "apex": onset + apex, "annotated": annotated, "still": bool(still)}
    facts = {"fingerprint": task.fingerprint, "views": told}
    atomic_savez(task.path, told=np.array(json.dumps(facts)), **arrays)
