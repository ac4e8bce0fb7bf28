"""What a network attends to in each frame, kept beside its features, and the crops of single clips to show it on.

``<folder of the features>/attention/`` is itself a folder as :mod:`data_builders.four_dme.feature_store` has it: where
that has the D features of a frame, this has the shares of its h' w' patches, row by row.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_builders.four_dme.building import find_clips, version_dir
from data_builders.four_dme.feature_store import features_root, load_clip, read_record
from data_builders.four_dme.preparation import fingerprint, split_frame
from data_builders.tfds_files import read_metadata
from mer_jax.clips.crops import Box, CropConfig, crop_clip
from mer_jax.clips.frames import read_frames
from mer_jax.clips.layouts import Clip
from mer_jax.errors import UserError
from mer_jax.extractors.networks import NETWORKS, get_network


@dataclass(frozen=True)
class SeenFrames:
    """Some frames of one view of a clip, and what networks attend to in them.

    Attributes:
        num_frames: T, the number of frames that the data set has of it.
        phases: ``onset``, ``apex`` and ``offset``, those that are known, to their frames.
        crops: (K, S, S, 3) uint8 RGB, the face in the frames asked for.
        maps: Extractor to shares of its patches, (K, h', w') float16, for those whose maps are kept.
        areas: Extractor to the part of a crop that they cover: top, left, bottom, right as shares of its sides.
    """

    num_frames: int
    phases: dict[str, int]
    crops: np.ndarray
    maps: dict[str, np.ndarray]
    areas: dict[str, tuple[float, ...]]


def maps_folder(features: Path) -> Path:
    """Where the maps to a folder of features are."""
    return features / "attention"


def see_frames(
    config_name: str,
    data_dir: str | os.PathLike,
    wanted: Sequence[tuple[str, str]],
    extractors: Sequence[str],
    choose: Callable[[int], np.ndarray],
    size: int,
) -> dict[tuple[str, str], SeenFrames]:
    """Reads frames of a built data set from where they were when it was built.

    Args:
        config_name: As in :func:`data_builders.four_dme.build`, as is ``data_dir``.
        data_dir: See there.
        wanted: Clips and their views.
        extractors: Whose maps are wanted where they are kept.
        choose: T, the number of a clip's frames, to those that are wanted, (K,) indices.
        size: S, side of a crop.

    Returns:
        (clip, view) to what is seen of it.

    Raises:
        UserError: The data set or its frames are not there, or have changed.
    """
    import tensorflow_datasets as tfds

    target = version_dir(config_name, data_dir)
    built = read_metadata(target, ("settings", "extractors"))
    if built is None:
        raise UserError(f"{target}: the data set is not there; say with config.data.data_dir where it is")
    clips = _clips(config_name, data_dir, built["settings"])
    folders = {name: _folder_of(name, built, features_root(config_name, data_dir)) for name in extractors}
    source = tfds.builder_from_directory(target).as_data_source()
    seen = {}
    for split in source:
        for record in source[split].__getitems__(range(len(source[split]))):
            key = record["clip"].decode(), record["view"].decode()
            if key in wanted:
                seen[key] = _see(clips.get(key[0]), record, choose(int(record["num_frames"])), folders, size)
    lacking = next((f"{clip}, view {view}" for clip, view in wanted if (clip, view) not in seen), None)
    if lacking:
        raise UserError(f"{target}: holds no clip {lacking}; it was built anew with other clips")
    return seen


def _clips(config_name: str, data_dir: str | os.PathLike, settings: Mapping) -> dict[str, Clip]:
    told = {name: settings[name] for name in ("source", "test_source", "labels", "columns", "workbook", "seed")}
    demo = Path(data_dir) / "clips" / "four_dme_demo"
    if config_name == "demo" and not demo.is_dir():  # it would be rendered anew, which takes long
        raise UserError(f"{demo}: the demo's frames are not there; restore this folder")
    demo_clips = tuple(settings["demo_clips"] or ())
    told["seed"] = told["seed"] or 0
    clips = find_clips(config_name, data_dir=data_dir, workers=None, demo_clips=demo_clips, **told)
    return {clip.name: clip for clip in clips}


def _folder_of(name: str, built: Mapping, root: Path) -> Path | None:
    """The folder of maps to the very features that a data set holds; None where there is none."""
    facts = built["extractors"].get(name, {})
    if name not in NETWORKS or get_network(name).attention is None or "weights_sha256" not in facts:
        return None
    crop = CropConfig(**built["settings"]["crop"]).settings()
    for folder in sorted(root.glob(f"{name}-*")):
        record = read_record(folder)
        if record is None or record.recipe.extractor != name or record.recipe.crop != crop:
            continue
        told = record.facts()
        if all(told[field] == facts[field] for field in ("weights_sha256", "preprocessing", "dtype", "store")):
            return maps_folder(folder)
    return None


def _see(
    clip: Clip | None, record: Mapping, frames: np.ndarray, folders: Mapping[str, Path | None], size: int
) -> SeenFrames:
    name, view, num_frames = record["clip"].decode(), record["view"].decode(), int(record["num_frames"])
    if clip is None or len(clip.frames) < num_frames or frames.max() >= num_frames:
        raise UserError(f"clip {name}: its frames are not those that the data set was built of; build it anew")
    images = read_frames([clip.frames[index] for index in frames])
    left, top, width, height = (int(value) for value in record["box"])
    box = Box(left, top, width, height, found=bool(record["face_found"]), score=0.0)
    try:
        crops = crop_clip((split_frame(image, clip.two_view)[view] for image in images), box, size)
    except ValueError as error:
        raise UserError(f"clip {name}: its frames are of another size than the data set's; build it anew") from error
    maps, areas = {}, {}
    for extractor, folder in folders.items():
        kept = folder and load_clip(folder / f"{name}.npz", fingerprint(clip))
        if kept is None or view in kept.imported:
            continue
        network = get_network(extractor)
        maps[extractor] = kept.features[view][frames].reshape(-1, *network.attention_grid)  # (K, h' w') -> (K, h', w')
        areas[extractor] = network.attention_area((1, 1))
    phases = {phase: int(record[phase]) for phase in ("onset", "apex", "offset") if record[phase] >= 0}
    return SeenFrames(num_frames, phases, crops, maps, areas)
