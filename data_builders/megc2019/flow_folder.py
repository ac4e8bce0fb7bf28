"""Published flow images: a folder of small PNG files, or the tree of folds made from it, and their table.

The formats are those of STSTNet, HTNet and CausalNet. An image holds one flow map: red is u, green is v, blue
is the optical strain, each stretched to 0..255. (OpenCV reads the same file as strain, v, u, and that is what
STSTNet's weights were trained on.)
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_builders.megc2019.composite import (
    CLASSES,
    DATABASES,
    counted,
    database_of,
    padded,
    some,
    unique_subjects,
)
from data_builders.megc2019.flow_images import read_flow_image
from data_builders.megc2019.loso_tree import TreeClip, is_loso_tree, read_loso_tree
from mer_jax.errors import UserError

TABLE = "combined_3_class2_for_optical_flow.csv"
COLUMNS = ("dataset", "sub", "filename_o", "label", "imagename")
PHASES = ("onset_apex", "apex_offset")
EXPECTED_SIZE = 28
_DIRECTION_MAPS = ("_2", "_3")  # further maps of a clip that are no flow


@dataclass(frozen=True)
class TableRow:
    """One clip as the table or the tree of folds tells it.

    Attributes:
        where: The row or file, for messages.
        name: ``<subject>_<clip>``, with all zeros of SMIC.
        database: One of ``DATABASES``.
        subject: Whose face it is, as the table writes it.
        label: 0 negative, 1 positive, 2 surprise.
    """

    where: str
    name: str
    database: str
    subject: str
    label: int


@dataclass(frozen=True)
class FlowImages:
    """All clips of a folder whose images are there, in the order of the table.

    Attributes:
        rows: The N clips; ``subject`` is unique over the databases.
        images: Phase to (N, S, S, 3) uint8 in the order u, v, strain.
        notes: What is out of the ordinary, one line each.
    """

    rows: tuple[TableRow, ...]
    images: Mapping[str, np.ndarray]
    notes: tuple[str, ...]


def read_flow_folder(source: str | os.PathLike, labels: str | os.PathLike | None = None) -> FlowImages:
    """Reads a flat folder of flow images with its table, or the tree of folds with or without it.

    File stems may end in blanks. A SMIC clip is found under ``s01_s1_ne_01`` and under ``s01_s01_ne_01``. Where
    most clips have a second file with ``_1`` at the end of the name, that is their flow from apex to offset;
    which file belongs to which clip follows from the names in the table, because a clip's own name may end in
    ``_1``, too.

    Args:
        source: Folder of PNG files, or folder of ``<subject>/{u_train,u_test}/<class>/*.png``.
        labels: The table, a CSV with the columns :data:`COLUMNS`; unless given, the file :data:`TABLE` in
            ``source`` or one of the two folders above it. A tree of folds may do without.

    Returns:
        The clips, their images and what was found missing or left over.

    Raises:
        UserError: Nothing fits, or an image or row is wrong; the message names it and the remedy.
    """
    source = Path(source)
    if not source.is_dir():
        raise UserError(f"{source}: no such folder of flow images; check the path")
    table = find_table(source) if labels is None else Path(labels)
    notes: list[str] = []
    if is_loso_tree(source):
        tree, notes = read_loso_tree(source)
        files = {stem: copy.path for stem, copy in tree.items()}
        rows = read_table(table) if table else _rows_of_tree(source, tree)
        if table:
            _compare(rows, tree)
    else:
        files, notes = _image_files(source)
        if table is None:
            raise UserError(
                f"{source}: its table {TABLE} is neither here nor in the folders above; say with --labels where it is"
            )
        rows = read_table(table)
    return _read_images(source, table, rows, files, notes)


# --- the table --------------------------------------------------------------------------------------------


def read_table(path: Path) -> list[TableRow]:
    """Reads the published table, one clip per row.

    Args:
        path: CSV in UTF-8 with at least the columns :data:`COLUMNS`; the others (apex, sub_filename) are empty
            in the published one and not read.

    Returns:
        Its rows in their order; blank lines are passed over.

    Raises:
        UserError: The file or a row is wrong; the message names the row and the remedy.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, restval="")
            header = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = header
            lines = [(reader.line_num, line) for line in reader if any(_cell(value) for value in line.values())]
    except FileNotFoundError:
        raise UserError(f"{path}: no such table; say with --labels where {TABLE} is") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a CSV file ({error}); save it as CSV in UTF-8") from error
    for name in COLUMNS:
        if header.count(name) != 1:
            raise UserError(
                f"{path}: has {header.count(name) or 'no'} column{'s' * (header.count(name) > 1)} {name!r} "
                f"(it has {', '.join(map(repr, header))}); it needs one each of {', '.join(COLUMNS)}"
            )
    rows: list[TableRow] = []
    first: dict[str, str] = {}
    for number, line in lines:
        row = _table_row(f"{path}: row {number}", {name: _cell(line[name]) for name in COLUMNS})
        if row.name in first:
            raise UserError(f"{row.where} repeats the clip {row.name!r} of {first[row.name]}; delete one of them")
        first[row.name] = f"row {number}"
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: has no rows under its header; it needs one per clip")
    return rows


def _table_row(where: str, cells: Mapping[str, str]) -> TableRow:
    database = database_of(cells["dataset"])
    if database is None:
        raise UserError(f"{where} has the dataset {cells['dataset']!r}; write one of {', '.join(DATABASES)}")
    labels = {str(label): label for label in range(len(CLASSES))}
    label = labels.get(cells["label"].removesuffix(".0"))
    if label is None:
        meaning = ", ".join(f"{label} ({name})" for label, name in enumerate(CLASSES))
        raise UserError(f"{where} has the label {cells['label']!r}; write {meaning}")
    if not cells["sub"]:
        raise UserError(f"{where} has no sub; write whose face it is")
    stem = cells["imagename"]
    if stem.lower().endswith((".jpg", ".jpeg", ".png")):
        stem = stem.rpartition(".")[0].strip()
    subject = cells["sub"]
    if not stem:
        if not cells["filename_o"]:
            raise UserError(f"{where} has neither imagename nor filename_o; write the name of its image")
        stem = f"{subject}_{cells['filename_o']}"
    if database == "smic":
        stem, subject = padded(stem), padded(f"{subject}_")[:-1]
    owner = stem.partition("_")[0]
    if owner != subject:
        # Spreadsheet programs make 6 of 006; the image's name keeps what the subject is called.
        if _number(owner) is None or _number(owner) != _number(subject):
            raise UserError(f"{where} has the sub {subject!r} but the image {stem!r} of {owner!r}; correct one of them")
        subject = owner
    return TableRow(where, stem, database, subject, label)


def _number(subject: str) -> int | None:
    match = re.fullmatch(r"[a-z]*(\d+)(?:\.0)?", subject, re.IGNORECASE)
    return int(match[1]) if match else None


def _cell(value: object) -> str:
    # A row with more fields than the header comes with the surplus as a list.
    return value.strip() if isinstance(value, str) else ""


def find_table(source: Path) -> Path | None:
    """The file :data:`TABLE` in a folder or one of the two above it; None if there is none."""
    folder = source.resolve()
    for candidate in (folder, folder.parent, folder.parent.parent):
        if (candidate / TABLE).is_file():
            return candidate / TABLE
    return None


# --- the tree ---------------------------------------------------------------------------------------------


def _rows_of_tree(source: Path, tree: Mapping[str, TreeClip]) -> list[TableRow]:
    several = [stem for stem in tree if {f"{stem}_{index}" for index in (1, 2, 3)} <= tree.keys()]
    if len(several) > len(tree) / 8:  # a quarter of all where every clip has four
        raise UserError(
            f"{source}: several maps per clip, which only the table can tell apart; say with --labels where {TABLE} is"
        )
    return [TableRow(str(clip.path), stem, clip.database, clip.subject, clip.label) for stem, clip in tree.items()]


def _compare(rows: Sequence[TableRow], tree: Mapping[str, TreeClip]) -> None:
    """Refuses a table and a tree that tell different things of one clip."""
    for row in rows:
        clip = tree.get(row.name)
        if clip is None:
            continue
        for what, ours, theirs in (("label", row.label, clip.label), ("subject", row.subject, clip.subject)):
            if ours != theirs:
                raise UserError(
                    f"{row.where} gives the clip {row.name!r} the {what} {ours}, the folder {clip.path.parent} says "
                    f"{theirs}; correct one of them"
                )


# --- images -----------------------------------------------------------------------------------------------


def _image_files(source: Path) -> tuple[dict[str, Path], list[str]]:
    """PNG files of a folder by their stem without blanks at its end, and a note of other files."""
    files: dict[str, Path] = {}
    others = []
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name == TABLE:
            continue
        if path.suffix.lower() != ".png" or not path.is_file():
            others.append(path.name)
            continue
        stem = path.stem.strip()
        if stem in files:
            raise UserError(f"{source}: {files[stem].name!r} and {path.name!r} are one name; keep one of them")
        files[stem] = path
    if not files:
        inner = sorted({path.parent for path in source.glob("*/*.png")})
        hint = f"; there are some in {inner[0]}" if inner else ""
        raise UserError(f"{source}: no flow images (*.png) at all{hint}; give the folder that holds them")
    return files, [f"not read, because no PNG files: {some(others)}"] if others else []


def _second_maps(names: Sequence[str], stems: Set[str]) -> bool:
    """Whether clips have an apex-offset map, too: most of those that are there do."""
    own = set(names)
    found = own & stems
    # A clip's own name may end in _1.
    seconds = [name for name in found if f"{name}_1" in stems - own]
    return 2 * len(seconds) > len(found)


def _read_images(
    source: Path, table: Path | None, rows: Sequence[TableRow], files: dict[str, Path], notes: list[str]
) -> FlowImages:
    # The table may be written with fewer zeros than the files, and the other way round.
    by_name = {padded(stem): stem for stem in files}
    by_name |= {stem: stem for stem in files}
    names = [row.name for row in rows]
    seconds = _second_maps(names, by_name.keys())
    phases = PHASES if seconds else PHASES[:1]

    kept, paths, missing, used = [], [], [], set()
    for row in rows:
        stems = [by_name.get(row.name), *([by_name.get(f"{row.name}_1")] if seconds else [])]
        used |= {stem for stem in stems if stem is not None}
        if seconds:
            used |= {by_name[name] for suffix in _DIRECTION_MAPS if (name := row.name + suffix) in by_name}
        if None in stems:
            missing.append(row)
            continue
        kept.append(row)
        paths.append([files[stem] for stem in stems])
    if not kept:
        raise UserError(
            f"{source}: none of its {len(files)} images belongs to a clip of {table}; its clips are called like "
            f"{rows[0].name!r}, the images like {min(files)!r}: give the folder and the table of one set"
        )
    notes += _missing_notes(rows, kept, missing)
    extra = sorted(files[stem].name for stem in set(files) - used)
    if extra:
        notes.append(f"{counted(len(extra), 'file')} without a clip, not read: {some(extra)}")

    images, converted = _decode([path for of_clip in paths for path in of_clip])
    if converted:
        notes.append(f"{counted(len(converted), 'image')} converted to RGB without loss: {some(converted)}")
    size = images.shape[1]
    if size != EXPECTED_SIZE:
        notes.append(f"images are {size} x {size} pixels; the published ones are {EXPECTED_SIZE} x {EXPECTED_SIZE}")
    # (N * P, S, S, 3) -> (N, P, S, S, 3): clips by phases
    images = images.reshape(len(kept), len(phases), size, size, 3)

    subjects, shared = unique_subjects([row.database for row in kept], [row.subject for row in kept])
    if shared:
        notes.append(f"subjects of several databases share a name and got their database's in front: {some(shared)}")
    kept = [
        TableRow(row.where, row.name, row.database, subject, row.label)
        for row, subject in zip(kept, subjects, strict=True)
    ]
    return FlowImages(tuple(kept), {phase: images[:, index] for index, phase in enumerate(phases)}, tuple(notes))


def _missing_notes(rows: Sequence[TableRow], kept: Sequence[TableRow], missing: Sequence[TableRow]) -> list[str]:
    notes = []
    there = {(row.database, row.subject) for row in kept}
    gone = [key for key in dict.fromkeys((row.database, row.subject) for row in rows) if key not in there]
    if gone:
        clips = Counter((row.database, row.subject) for row in missing)
        notes.append(
            f"{counted(len(gone), 'whole subject')} missing, left out of the data and of the folds: "
            + some(
                f"{subject} of {database} ({counted(clips[database, subject], 'clip')})" for database, subject in gone
            )
        )
    if missing:
        notes.append(f"no images of {counted(len(missing), 'clip')}, left out: {some(row.name for row in missing)}")
    return notes


def _decode(paths: Sequence[Path]) -> tuple[np.ndarray, list[str]]:
    """All images as (N, S, S, 3) uint8 RGB, and the names of those that had to be converted."""
    images, converted = [], []
    for path in paths:
        image, changed = read_flow_image(path)
        images.append(image)
        if changed:
            converted.append(path.name)
    shapes = Counter(image.shape for image in images)
    # Should there be as many of two sizes, the published one is right.
    usual = max(shapes, key=lambda shape: (shapes[shape], shape[:2] == (EXPECTED_SIZE, EXPECTED_SIZE)))
    for path, image in zip(paths, images, strict=True):
        height, width = image.shape[:2]
        if image.shape != usual:
            raise UserError(
                f"{path}: is {width} x {height} pixels while {counted(shapes[usual], 'image')} are "
                f"{usual[1]} x {usual[0]}; all must have one size: restore the file, or remove it"
            )
        if height != width:
            raise UserError(f"{path}: is {width} x {height} pixels; flow images must be square: restore the files")
    return np.stack(images), converted
