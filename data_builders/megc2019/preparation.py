"""From raw frames to flow maps: clip by clip, in parallel, each finished clip kept at once."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_builders.clip_work import ClipTask, files_fingerprint, finish_clips, work_folder
from data_builders.megc2019.flow_images import flow_maps
from data_builders.megc2019.raw_frames import RawClip
from mer_jax.clips.apex import ApexConfig, find_apex, motion_intensity
from mer_jax.clips.crops import Box, CropConfig, crop_clip, face_box
from mer_jax.clips.faces import FaceDetector
from mer_jax.clips.flow import FlowConfig, to_grey
from mer_jax.clips.frames import read_frame, read_frames
from mer_jax.files import atomic_savez
from mer_jax.parallel import Workers

VERSION = 2  # of what is kept per clip; to be raised whenever it changes
WHOLE_SIZE = 224  # px; to what frames are brought that are no crops of ours, so that flow has one unit everywhere


@dataclass(frozen=True)
class PreparedClip:
    """What is computed from one clip.

    Attributes:
        box: Where the face was cut out.
        apex: Index of the apex among the clip's frames.
        maps: (2, S, S, 3) float32: u, v (px of the crop) and strain of onset-apex and apex-offset.
    """

    box: Box
    apex: int
    maps: np.ndarray


@dataclass(frozen=True)
class _Task(ClipTask):
    clip: RawClip
    crop: CropConfig | None
    apex: ApexConfig | None
    flow: FlowConfig
    size: int


def settings_of(crop: CropConfig | None, apex: ApexConfig | None, flow: FlowConfig, size: int) -> dict[str, Any]:
    """What the maps depend on, JSON-able; the arguments are those of :func:`prepare`."""
    return {
        "crop": crop.settings() if crop else "whole",
        "apex": asdict(apex) if apex else "half_way",
        "flow": asdict(flow),
        "size": size,
    }


def fingerprint(clip: RawClip) -> str:
    """Changes when a clip's frames are replaced; no image is read.

    Raises:
        UserError: A frame is gone.
    """
    return files_fingerprint(clip.frames, clip.apex)


def prepare(
    clips: Sequence[RawClip],
    crop: CropConfig | None,
    apex: ApexConfig | None,
    flow: FlowConfig,
    size: int,
    folder: Path,
    *,
    workers: Workers = None,
) -> dict[str, Path]:
    """Computes the maps of all clips; finished clips are found again, also after a kill.

    Args:
        clips: What to prepare.
        crop: How faces are cut out; None takes the frames whole, brought to ``WHOLE_SIZE``.
        apex: How the apex is found where none is annotated, or in all clips, as ``use_annotated`` says; by Farneback's
            flow, whatever ``flow`` is. None takes the frame half-way where none is annotated.
        flow: How flow is computed.
        size: Side of the maps.
        folder: Where the finished clips are kept, under the hash of the settings, one file per clip.
        workers: Number of processes, one per available processor unless given; or a cluster.

    Returns:
        Clip name to the file that :func:`load_prepared` reads.

    Raises:
        UserError: Clips cannot be prepared: their names and the first reasons, after all others were finished.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what was finished is kept.
    """
    folder = work_folder(folder, [VERSION, settings_of(crop, apex, flow, size)])
    tasks = [
        _Task(clip.name, folder / f"{clip.name}.npz", fingerprint(clip), clip, crop, apex, flow, size) for clip in clips
    ]
    return finish_clips(
        _prepare_clip, tasks, workers=workers, desc="computing flow", sources=[clip.frames[0] for clip in clips]
    )


def load_prepared(path: Path) -> PreparedClip:
    """Reads what was computed from a finished clip."""
    with np.load(path) as stored:
        told = json.loads(str(stored["told"]))
        return PreparedClip(Box(**told["box"]), told["apex"], stored["maps"])


def _prepare_clip(task: _Task) -> None:
    """Worker: finishes one clip on disk."""
    import cv2

    # The processes are the parallelism; OpenCV's own threads would only get into their way.
    cv2.setNumThreads(1)
    clip = task.clip
    if task.crop is None:
        height, width = read_frame(clip.frames[0]).shape[:2]
        box, side = Box(0, 0, width, height, found=True, score=0.0), WHOLE_SIZE
    else:
        with FaceDetector(task.crop.min_confidence) as detector:
            box, side = face_box(read_frames(clip.frames), task.crop, detector), task.crop.size
    apex = clip.apex
    if task.apex is not None and not (clip.apex_annotated and task.apex.use_annotated):
        grey = to_grey(crop_clip(read_frames(clip.frames), box, side))
        apex = find_apex(motion_intensity(grey, FlowConfig(), task.apex.compensate, task.apex.blink), task.apex.smooth)
    three = read_frames([clip.frames[index] for index in (0, apex, -1)])
    maps = flow_maps(to_grey(crop_clip(three, box, side)), task.flow, task.size)
    told = {"fingerprint": task.fingerprint, "box": asdict(box), "apex": apex}
    atomic_savez(task.path, told=np.array(json.dumps(told)), maps=maps)
