"""From frames to the flow of two phases: clip by clip, in parallel, each finished clip kept at once."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_builders.clip_work import ClipTask, finish_clips, work_folder
from data_builders.flow_records import PHASES
from data_builders.four_dme.preparation import face_boxes, fingerprint, split_frame
from mer_jax.clips.apex import ApexConfig, find_apex, motion_intensity
from mer_jax.clips.crops import Box, CropConfig, crop_clip
from mer_jax.clips.flow import FlowConfig, dense_flow, to_grey
from mer_jax.clips.frames import read_frames
from mer_jax.clips.layouts import Clip
from mer_jax.errors import UserError
from mer_jax.files import atomic_savez
from mer_jax.parallel import Workers

VERSION = 1  # of what is kept per clip; to be raised whenever it changes


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
class _Task(ClipTask):
    clip: Clip
    crop: CropConfig
    apex: ApexConfig
    flow: FlowConfig


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
    workers: Workers = None,
) -> dict[str, Path]:
    """Computes apex and flow of all clips; finished clips are found again, also after a kill.

    Args:
        clips: What to prepare.
        crop: How faces are cut out.
        apex: How the apex is found.
        flow: How flow is computed.
        folder: Where the finished clips are kept, under the hash of the settings, one file per clip.
        workers: Number of processes, one per available processor unless given; or a cluster.

    Returns:
        Clip name to the file that :func:`load_prepared` reads.

    Raises:
        UserError: Clips cannot be prepared: their names and the first reasons, after all others were finished.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what was finished is kept.
    """
    folder = work_folder(folder, settings_of(crop, apex, flow))
    tasks = []
    for clip in clips:
        told = fingerprint(clip, clip.onset, clip.apex, clip.offset)
        tasks.append(_Task(clip.name, folder / f"{clip.name}.npz", told, clip, crop, apex, flow))
    return finish_clips(
        _prepare_clip, tasks, workers=workers, desc="computing flow", sources=[clip.frames[0] for clip in clips]
    )


def load_prepared(path: Path, view: str) -> PreparedFlow:
    """Reads what was computed from one view of a finished clip."""
    with np.load(path) as stored:
        told = json.loads(str(stored["told"]))["views"][view]
        flow = {phase: stored[f"{view}.{phase}"] for phase in PHASES}
        return PreparedFlow(Box(**told["box"]), told["apex"], told["annotated"], told["still"], flow)


def _prepare_clip(task: _Task) -> None:
    """Worker: finishes one clip on disk."""
    import cv2

    # The processes are the parallelism; OpenCV's own threads would only get into their way.
    cv2.setNumThreads(1)
    clip, crop = task.clip, task.crop
    # What the data set says of onset and offset bounds the phases; where it says nothing, clips are trimmed to them.
    onset = clip.onset or 0
    offset = len(clip.frames) - 1 if clip.offset is None else clip.offset
    if offset - onset < 1:
        raise UserError(
            f"has {offset - onset + 1} frame from onset to offset, at least 2 are needed to see a motion; restore its "
            "frames, or remove the clip and its labels"
        )
    boxes = face_boxes(clip, crop)
    grey = {view: np.empty((offset - onset + 1, crop.size, crop.size), np.uint8) for view in boxes}
    for index, frame in enumerate(read_frames(clip.frames[onset : offset + 1])):
        for view, image in split_frame(frame, clip.two_view).items():
            grey[view][index] = to_grey(crop_clip([image], boxes[view], crop.size)[0])

    annotated = task.apex.use_annotated and clip.apex is not None
    arrays, told = {}, {}
    for view, frames in grey.items():
        if annotated:
            apex = clip.apex - onset
        else:
            intensity = motion_intensity(frames, task.flow, task.apex.compensate, task.apex.blink)
            apex = find_apex(intensity, task.apex.smooth)
        ends = frames[[0, apex, -1]]
        phases = dense_flow(ends[:-1], ends[1:], task.flow)
        arrays |= {f"{view}.{phase}": flow for phase, flow in zip(PHASES, phases, strict=True)}
        still = not phases.any()
        told[view] = {"box": asdict(boxes[view]), "apex": onset + apex, "annotated": annotated, "still": still}
    facts = {"fingerprint": task.fingerprint, "views": told}
    atomic_savez(task.path, told=np.array(json.dumps(facts)), **arrays)
