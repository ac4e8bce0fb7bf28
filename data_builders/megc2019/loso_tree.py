"""The tree of folds that is handed around instead of the flat folder, and whether it holds together.

``<subject>/{u_train,u_test}/<class>/*.png`` has a copy of every clip in every fold: 68 times 442 files for the
whole composite. What is read from it is one copy of each clip; the others are only compared with it.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_builders.megc2019.composite import CLASSES, counted, database_of_clip, padded, some
from data_builders.megc2019.flow_images import read_flow_image
from mer_jax.errors import UserError

PARTS = ("u_train", "u_test")


@dataclass(frozen=True)
class TreeClip:
    """One clip of the tree.

    Attributes:
        path: The first copy of its image.
        database: By its name.
        subject: The fold in which it is tested, or by its name where that fold is missing.
        label: By its folder: 0 negative, 1 positive, 2 surprise.
    """

    path: Path
    database: str
    subject: str
    label: int


def is_loso_tree(source: Path) -> bool:
    """Whether a folder holds folds."""
    return any((path / part).is_dir() for path in source.iterdir() for part in PARTS)


def read_loso_tree(source: Path) -> tuple[dict[str, TreeClip], list[str]]:
    """Reads every clip once and checks that the folds agree.

    Args:
        source: The folder of the folds.

    Returns:
        (stem without blanks at its end, SMIC with all zeros, to the clip, in the order of subjects; notes).

    Raises:
        UserError: A clip is on both sides of a fold, has two labels or two images, or is tested twice.
    """
    folds = {path.name: path for path in sorted(source.iterdir()) if any((path / part).is_dir() for part in PARTS)}
    copies = {name: {part: _clips_of(path / part) for part in PARTS} for name, path in folds.items()}
    owners = _owners(copies)
    stems = dict.fromkeys(stem for fold in copies.values() for part in PARTS for stem in fold[part])
    if not stems:
        raise UserError(f"{source}: its folds hold no flow images (*.png) at all; give the folder that holds them")

    clips: dict[str, TreeClip] = {}
    for stem in stems:
        database = database_of_clip(stem)
        found = [fold[part][stem] for fold in copies.values() for part in PARTS if stem in fold[part]]
        if database is None:
            raise UserError(
                f"{found[0][1]}: its name fits none of the databases (sub01_..., 006_..., s01_...); rename or remove it"
            )
        label, path = found[0]
        for other, other_path in found[1:]:
            if other != label:
                raise UserError(
                    f"{path} has the label {label} and {other_path} the label {other}; correct one of them: a clip "
                    "has one label"
                )
        _require_same([path for _, path in found])
        subject = owners.get(stem, stem.partition("_")[0])
        clips[stem] = TreeClip(path, database, subject, label)
    _refuse_leaks(copies, clips)
    clips = dict(sorted(clips.items(), key=lambda item: (item[1].subject, item[0])))
    return clips, _notes(copies, clips, owners)


def _clips_of(folder: Path) -> dict[str, tuple[int, Path]]:
    """Stem to (label, file) of one side of a fold."""
    clips: dict[str, tuple[int, Path]] = {}
    labels = {str(label): label for label in range(len(CLASSES))}
    classes = sorted(folder.iterdir()) if folder.is_dir() else []
    for of_class in (path for path in classes if path.is_dir() and not path.name.startswith(".")):
        if of_class.name not in labels:
            raise UserError(f"{of_class}: folders of classes are called {', '.join(labels)}; rename or remove it")
        with os.scandir(of_class) as entries:
            pictures = (entry.name for entry in entries if entry.name.lower().endswith(".png"))
            names = sorted(name for name in pictures if not name.startswith("."))
        for name in names:
            stem = padded(name[:-4].strip())
            if stem in clips:
                raise UserError(f"{of_class / name} and {clips[stem][1]} are one clip; remove the wrong one")
            clips[stem] = (labels[of_class.name], of_class / name)
    return clips


def _owners(copies: Mapping[str, Mapping[str, Mapping[str, tuple[int, Path]]]]) -> dict[str, str]:
    """Clip to the fold that tests it."""
    owners: dict[str, str] = {}
    for name, fold in copies.items():
        for stem, (_, path) in fold["u_test"].items():
            named = stem.partition("_")[0]
            if stem in owners or (named != padded(f"{name}_")[:-1] and named in copies):
                other = owners.get(stem, named)
                raise UserError(f"{path}: is a test clip of fold {name}, but belongs to {other}; remove it from one")
            owners[stem] = name
    return owners


def _refuse_leaks(copies: Mapping, clips: Mapping[str, TreeClip]) -> None:
    for name, fold in copies.items():
        for stem, (_, path) in fold["u_train"].items():
            if clips[stem].subject == name:
                raise UserError(
                    f"{path}: is a training clip of the fold that leaves its own subject {name} out; remove it there"
                )


def _require_same(paths: list[Path]) -> None:
    """Refuses copies of a clip that differ in a pixel."""
    digests: dict[bytes, Path] = {}
    for path in paths:
        try:
            digests.setdefault(hashlib.sha256(path.read_bytes()).digest(), path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); restore the file") from error
    first, *others = digests.values()
    for other in others:
        if not np.array_equal(read_flow_image(first)[0], read_flow_image(other)[0]):
            raise UserError(f"{first} and {other} are one clip with different images; remove the wrong one")


def _notes(copies: Mapping, clips: Mapping[str, TreeClip], owners: Mapping[str, str]) -> list[str]:
    notes = []
    untested = [stem for stem in clips if stem not in owners]
    if untested:
        gone = sorted({clips[stem].subject for stem in untested} - set(copies))
        folds = f"; no fold of {some(gone)}" if gone else ""
        notes.append(f"{counted(len(untested), 'clip')} tested in no fold{folds}: {some(untested)}")
    lacking = []
    for name, fold in copies.items():
        absent = [stem for stem in clips if clips[stem].subject != name and stem not in fold["u_train"]]
        if absent:
            lacking.append(f"{name} ({counted(len(absent), 'clip')}, such as {absent[0]})")
    if lacking:
        notes.append(f"training clips absent from {counted(len(lacking), 'fold')} of the tree: {some(lacking)}")
    return notes
