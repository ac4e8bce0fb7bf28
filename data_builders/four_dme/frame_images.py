"""From frames on disk to what a network takes: faces cut out, aligned and resized, in worker processes."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_builders.four_dme.preparation import face_boxes, split_frame
from mer_jax.clips.crops import Box, CropConfig, crop_clip
from mer_jax.clips.frames import read_frames
from mer_jax.clips.layouts import Clip
from mer_jax.extractors.networks import network_at

_CHUNK_BYTES = 2**28  # of crops and images that a worker holds at a time


@dataclass(frozen=True)
class Chunk:
    """Some frames of one clip, to be turned into a network's images.

    Attributes:
        place: Where the worker finds the network, see :func:`mer_jax.extractors.networks.network_at`.
        network: The network's name.
        clip: The clip.
        crop: How faces are cut out.
        views: Which views are wanted.
        start: First frame.
        stop: Frame after the last.
        crops: View to the files of finished crops of all frames, for views that need not be cut out.
    """

    place: str
    network: str
    clip: Clip
    crop: CropConfig
    views: tuple[str, ...]
    start: int
    stop: int
    crops: dict[str, tuple[Path, ...]] = field(default_factory=dict)


def spans(num_frames: int, num_views: int, crop_size: int, input_shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Parts of a clip that a worker can hold, as (first frame, frame after the last).

    Args:
        num_frames: T of the clip.
        num_views: Number of its views that are wanted.
        crop_size: Side of a crop in pixels.
        input_shape: (H, W) of a network's image.
    """
    height, width = input_shape
    per_frame = num_views * 3 * (crop_size**2 + 4 * height * width)
    length = max(1, _CHUNK_BYTES // per_frame)
    return [(start, min(start + length, num_frames)) for start in range(0, num_frames, length)]


def prepare_chunk(chunk: Chunk) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads, cuts out, aligns and resizes some frames; runs in a worker.

    Returns:
        View to images (m, h, w, 3), uint8 or float32, of the m frames, and which of them show a face, (m,) bool.

    Raises:
        UserError: A frame cannot be read, or differs in size from the clip's others.
    """
    import cv2

    # The processes are the parallelism; OpenCV's own threads would only get into their way.
    cv2.setNumThreads(1)
    network = network_at(chunk.place, chunk.network)
    crops = {view: np.stack(list(read_frames(paths[chunk.start : chunk.stop]))) for view, paths in chunk.crops.items()}
    to_cut = [view for view in chunk.views if view not in crops]
    if to_cut:
        crops |= _cut(chunk, to_cut)
    prepared = {}
    for view in chunk.views:
        images, found = network.prepare(crops[view])
        expected = (chunk.stop - chunk.start, *network.input_shape, 3)
        if images.shape != expected or images.dtype not in (np.uint8, np.float32) or found.shape != expected[:1]:
            raise ValueError(f"{network.name} prepared {images.shape} {images.dtype} and {found.shape}")
        prepared[view] = images, found
    return prepared


def _cut(chunk: Chunk, views: Sequence[str]) -> dict[str, np.ndarray]:
    """View to the faces of a chunk, (m, size, size, 3) uint8 RGB."""
    clip, size = chunk.clip, chunk.crop.size
    boxes = _boxes(clip, chunk.crop)
    crops = {view: np.empty((chunk.stop - chunk.start, size, size, 3), np.uint8) for view in views}
    # The clip's first frame comes along, so that a frame of another size than it is told.
    more = min(chunk.start, 1)
    paths = clip.frames[:more] + clip.frames[chunk.start : chunk.stop]
    for index, frame in enumerate(itertools.islice(read_frames(paths), more, None)):
        of_frame = split_frame(frame, clip.two_view)
        for view in views:
            crops[view][index] = crop_clip([of_frame[view]], boxes[view], size)[0]
    return crops


@functools.lru_cache(maxsize=2)
def _boxes(clip: Clip, crop: CropConfig) -> dict[str, Box]:
    return face_boxes(clip, crop)
