"""Features of networks on disk: a folder per extractor, weights and preprocessing, a file per clip, and what made them.

``data_dir/features/<data set>/<extractor>-<hash>/`` holds ``record.json`` and ``<clip>.npz`` with one array (T, D) per
view. The hash is that of the :class:`Recipe`, so that features of two kinds never share a folder.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_builders.four_dme.preparation import fingerprint
from mer_jax.clips.layouts import Clip
from mer_jax.errors import UserError
from mer_jax.files import atomic_savez, atomic_write_text

VERSION = 1  # of what is kept per clip; to be raised whenever it changes
RECORD = "record.json"
_MAX_NAMED = 3


@dataclass(frozen=True)
class Recipe:
    """What the features of a frame depend on beside the frame.

    Attributes:
        extractor: Name of the network.
        preprocessing: The network's own words.
        weights_sha256: Of the checkpoint; '' where all features are imported.
        crop: Settings of the face crop, :meth:`mer_jax.clips.crops.CropConfig.settings`.
        dtype: In which the network computes.
        store: In which the features are kept.
        imported: What the features of some or all samples were imported from; '' if none were.
    """

    extractor: str
    preprocessing: str
    weights_sha256: str
    crop: dict[str, Any]
    dtype: str
    store: str
    imported: str = ""

    def folder(self, root: Path) -> Path:
        """The features' folder below :func:`features_root`."""
        text = json.dumps([VERSION, asdict(self)], sort_keys=True)
        return root / f"{self.extractor}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Record:
    """What is known of a folder of features.

    Attributes:
        recipe: What they depend on.
        modality: The network's.
        dim: D.
        licence: Licence of the network's code and weights.
        weights: What the checkpoint was called.
        batch_size: Images per device in one batch, on which a float's last bits may depend; 0 before the first one.
        made_with: Versions of the libraries, and the kind of device; likewise.
    """

    recipe: Recipe
    modality: str
    dim: int
    licence: str
    weights: str
    batch_size: int = 0
    made_with: dict[str, str] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """What a data set that holds the features says of them."""
        recipe = asdict(self.recipe)
        del recipe["extractor"], recipe["crop"]
        own = {name: getattr(self, name) for name in ("modality", "dim", "licence", "weights", "made_with")}
        return own | recipe


@dataclass(frozen=True)
class ClipFeatures:
    """The features of one finished clip.

    Attributes:
        features: View to (T, D), float16 or float32.
        missing: View to the number of frames in which the extractor found nothing (their features are filled from
            their neighbours, see :func:`mer_jax.extractors.base.fill_missing`).
        imported: Views whose features were imported.
    """

    features: dict[str, np.ndarray]
    missing: dict[str, int]
    imported: tuple[str, ...] = ()


def features_root(config_name: str, data_dir: str | os.PathLike) -> Path:
    """The folder of all features of ``four_dme/<config_name>``."""
    return Path(data_dir) / "features" / "four_dme" / config_name


def write_record(folder: Path, record: Record) -> None:
    """Keeps the record of a folder of features."""
    atomic_write_text(folder / RECORD, json.dumps(asdict(record), indent=2) + "\n")


def read_record(folder: Path) -> Record | None:
    """Reads the record of a folder of features; None if there is none.

    Raises:
        UserError: It is damaged.
    """
    path = folder / RECORD
    try:
        told = json.loads(path.read_text())
        return Record(**{**told, "recipe": Recipe(**told["recipe"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: damaged; remove its folder and run the same command again") from error


def save_clip(path: Path, clip_fingerprint: str, clip: ClipFeatures) -> None:
    """Keeps the features of a finished clip at ``path``, at once."""
    told = {"fingerprint": clip_fingerprint, "missing": clip.missing, "imported": list(clip.imported)}
    atomic_savez(path, told=np.array(json.dumps(told)), **clip.features)


def load_clip(path: Path, clip_fingerprint: str) -> ClipFeatures | None:
    """Reads the features of a finished clip; None where there are none, or the clip has changed since."""
    try:
        # NumPy leaves a damaged file open if it opened it itself.
        with open(path, "rb") as stream, np.load(stream) as stored:
            told = json.loads(str(stored["told"]))
            if told["fingerprint"] != clip_fingerprint:
                return None
            features = {view: stored[view] for view in told["missing"]}
            return ClipFeatures(features, told["missing"], tuple(told["imported"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def find_folder(root: Path, extractor: str, crop: Mapping[str, Any]) -> Path:
    """Finds the one folder that holds an extractor's features of crops of one kind.

    Args:
        root: See :func:`features_root`.
        extractor: Name of the network.
        crop: Settings of the face crop.

    Raises:
        UserError: There is none, or there are several.
    """
    dataset = "/".join(root.parts[-2:])
    records = {folder: read_record(folder) for folder in sorted(root.glob(f"{extractor}-*"))}
    of_name = {folder: record for folder, record in records.items() if record and record.recipe.extractor == extractor}
    found = [folder for folder, record in of_name.items() if record.recipe.crop == dict(crop)]
    if len(found) > 1:
        told = "; ".join(f"{folder.name} of weights {of_name[folder].recipe.weights_sha256[:12]}" for folder in found)
        raise UserError(f"{root}: features {extractor} of {len(found)} kinds ({told}); remove all folders but one")
    if not found:
        others = " of these face crops" if of_name else ""
        raise UserError(
            f"{dataset}: no features {extractor}{others}; extract them with scripts/extract_features.py --dataset "
            f"{dataset} --extractor {extractor} --weights FILE"
        )
    return found[0]


def load_all(folder: Path, clips: Sequence[Clip]) -> dict[str, ClipFeatures]:
    """Reads the features of all clips, by the clip's name.

    Raises:
        UserError: Clips are missing, or have changed since.
    """
    loaded = {clip.name: load_clip(folder / f"{clip.name}.npz", fingerprint(clip)) for clip in clips}
    missing = [name for name, found in loaded.items() if found is None]
    if missing:
        more = ", ..." if len(missing) > _MAX_NAMED else ""
        raise UserError(
            f"{folder}: lacks {len(missing)} of {len(clips)} clips ({', '.join(missing[:_MAX_NAMED])}{more}), or they "
            "have changed since; run scripts/extract_features.py again to finish it"
        )
    return loaded
