"""Features and crops that others published, in the layout of the fusion paper's first author.

``feat2d/<sample>/`` and ``feat3d/<sample>/`` hold features of appearance and of geometry in the layouts of
:mod:`mer_jax.extractors.feature_files`, ``lr_image/<sample>/f_000000.png, ...`` the face crops that they were extracted
from. A sample is one view of one clip, ``<sequence>_l`` or ``<sequence>_r``.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_builders.four_dme.preparation import sample_name, views_of
from mer_jax.clips.frames import frame_order
from mer_jax.clips.layouts import FRAME_SUFFIXES, Clip
from mer_jax.errors import UserError
from mer_jax.extractors.feature_files import read_sample_features
from mer_jax.extractors.networks import Network

_FEATURES = {"appearance": "feat2d", "geometry": "feat3d"}
_CROPS = "lr_image"


@dataclass(frozen=True)
class Bundle:
    """What a bundle has for one network; nothing where there is no bundle.

    Attributes:
        features: Sample to (T, D) float32.
        crops: Sample without features to the files of its T face crops, in order.
        told: What was taken, in words that change with its content; ``''`` without a bundle.
    """

    features: dict[str, np.ndarray] = field(default_factory=dict)
    crops: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    told: str = ""


def read_bundle(root: str | os.PathLike, network: Network, clips: Sequence[Clip]) -> Bundle:
    """Reads what a bundle has of some clips for a network.

    Args:
        root: The folder of ``feat2d/``, ``feat3d/`` and ``lr_image/``, any of them.
        network: The extractor that made the features, or that shall continue them.
        clips: The clips; what else is in the bundle is left alone.

    Returns:
        Features of some of the clips' samples, and crops of some of the others.

    Raises:
        UserError: There is nothing of these clips, or what is there does not fit them or the network.
    """
    name = _FEATURES[network.modality]
    features_root, crops_root = Path(root) / name, Path(root) / _CROPS
    features: dict[str, np.ndarray] = {}
    crops: dict[str, tuple[Path, ...]] = {}
    digest = hashlib.sha256()
    for clip in clips:
        for view in views_of(clip):
            sample = sample_name(clip, view)
            if any((features_root / each).exists() for each in (sample, f"{sample}.npy", f"{sample}.pt")):
                features[sample] = _features(features_root, sample, network, len(clip.frames))
                digest.update(sample.encode() + features[sample].tobytes())
            elif (crops_root / sample).is_dir():
                crops[sample] = _crops(crops_root / sample, len(clip.frames))
                sizes = [(path.name, path.stat().st_size) for path in crops[sample]]
                digest.update(f"{sample} {sizes}".encode())
    if not features and not crops:
        raise UserError(
            f"{root}: neither {name}/ nor {_CROPS}/ with anything of these clips, such as "
            f"{name}/{sample_name(clips[0], views_of(clips[0])[0])}; give the bundle of this data set"
        )
    taken = [f"features of {name}/"] * bool(features) + [f"crops of {_CROPS}/"] * bool(crops)
    return Bundle(features, crops, f"{' and '.join(taken)} (content {digest.hexdigest()[:12]})")


def _features(root: Path, sample: str, network: Network, num_frames: int) -> np.ndarray:
    found = read_sample_features(root, sample, num_frames=num_frames)
    if found.shape[1] != network.dim:
        raise UserError(
            f"{root}: {found.shape[1]} features per frame of '{sample}', but {network.name} gives {network.dim}; name "
            "the extractor that made them"
        )
    return found


def _crops(folder: Path, num_frames: int) -> tuple[Path, ...]:
    files = (path for path in folder.iterdir() if not path.name.startswith("."))
    paths = sorted((path for path in files if path.suffix.lower() in FRAME_SUFFIXES), key=frame_order)
    if len(paths) != num_frames:
        raise UserError(
            f"{folder}: {len(paths)} crops, but the clip has {num_frames} frames; restore them, or move this folder "
            "away to have them cut out anew"
        )
    return tuple(paths)
