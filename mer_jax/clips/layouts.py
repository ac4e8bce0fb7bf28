"""Clips as they lie on disk: the 4DMR challenge's folders and the 4DME release's workbook.

Both readers check everything that can be checked without opening an image, so that a wrong data set ends in
one line before any work is done on it.
"""

import csv
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mer_jax.clips.frames import frame_order
from mer_jax.errors import UserError
from mer_jax.files import is_utf8

LABELS = ("Negative", "Positive", "Repression", "Surprise", "Others")
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")

# The release's known fault: the AU entries of these two data rows (0-based) are exchanged.
SWAPPED_AU_ROWS = (144, 145)
_FAULTY_RELEASE = "4dme labelling micro release v1"

_ID, _SUBJECT = "Id", "subject"
_RELEASE_COLUMNS = ("sub_ID", "fold_name", "Emotion", "Onset", "Apex", "Offset", "AUs")
_AU_COLUMN = re.compile(r"AU\s*(\d+)")
_AU_TOKEN = re.compile(r"[LR]?(?:AU)?\s*[LR]?(\d+)\s*[A-E]?\s*(\(k\))?", re.IGNORECASE)
_MAX_NAMED = 5


@dataclass(frozen=True)
class Clip:
    """One micro-expression sequence.

    Attributes:
        name: Unique within a data set and fit for a file name.
        id: The integer by which a submission names the clip: the first one in the challenge's folder name,
            the 1-based data row of the release's workbook.
        subject: Whose face it is, ``''`` if unknown.
        frames: The T image files in order of time.
        labels: Five values 0 or 1 in the order of :data:`LABELS`, or None for an unlabelled clip.
        split: ``'train'`` or ``'test'``.
        two_view: Whether a frame holds two views side by side.
        onset: Index into ``frames`` where the expression starts, None if unknown; likewise:
        apex: where it is strongest,
        offset: where it ends (inclusive).
        aus: Facial action units, as ``'AU4'``, in ascending order.
    """

    name: str
    id: int
    subject: str
    frames: tuple[Path, ...]
    labels: tuple[int, ...] | None
    split: Literal["train", "test"]
    two_view: bool
    onset: int | None = None
    apex: int | None = None
    offset: int | None = None
    aus: tuple[str, ...] = ()


def read_challenge(
    root: str | os.PathLike,
    labels_csv: str | os.PathLike | None = None,
    columns: Mapping[str, str] | None = None,
    test_root: str | os.PathLike | None = None,
    *,
    min_frames: int = 2,
) -> list[Clip]:
    """Reads the 4DMR challenge layout: a folder of two-view frames per sequence and one labels CSV.

    Frames are ordered by the first integer in their name, then by name, whose further integers count by value. A row
    of the CSV belongs to the folder whose name is its Id or, where the Id is an integer, to the folder with that first
    integer in its name. Labels of test clips are never read. Hidden files and folders are passed over.

    Args:
        root: Holds ``train/<sequence>/`` and, if there are test clips, ``test/<sequence>/``. Without a
            ``train`` folder, ``root`` itself holds the training sequences.
        labels_csv: The labels, ``root/train.csv`` unless given. UTF-8, with a header.
        columns: What the CSV calls its columns where it differs from ``Id``, the five :data:`LABELS` and the
            optional ``subject``, as {our name: its name}. Other columns are ignored unless they look like a
            further class, that is, hold only 0 and 1.
        test_root: Holds the test sequences, ``root/test`` unless given.
        min_frames: Fewest frames that a clip may have; with one frame there is no motion to see.

    Returns:
        The training clips, then the test clips, each in ascending order of ``id``.

    Raises:
        UserError: The layout is not as above; the message names the file, clip or column and the remedy.
    """
    root = Path(root)
    train_root = root / "train" if (root / "train").is_dir() else root
    if test_root is not None:
        test_root = Path(test_root)
    elif (root / "test").is_dir():
        test_root = root / "test"
    labels_csv = root / "train.csv" if labels_csv is None else Path(labels_csv)

    train_folders = _sequence_folders(train_root, without=test_root)
    test_folders = _sequence_folders(test_root) if test_root else {}
    train_names = {folder.name for folder in train_folders.values()}
    for folder in test_folders.values():
        if folder.name in train_names:
            raise UserError(f"clip {folder.name!r} is both in {train_root} and in {test_root}; keep it in one of them")

    rows = _read_labels(labels_csv, columns or {}, train_folders, test_folders)
    unlabelled = [folder.name for id_, folder in train_folders.items() if id_ not in rows]
    if unlabelled:
        raise UserError(
            f"{labels_csv}: has no row for {_some(unlabelled, 'clip')} of {train_root}; add the row or move "
            "the folder away"
        )

    clips = []
    for split, folders in (("train", train_folders), ("test", test_folders)):
        for id_, folder in folders.items():
            subject, labels = rows[id_] if split == "train" else ("", None)
            frames = _ordered_frames(folder, min_frames)
            clips.append(Clip(folder.name, id_, subject, frames, labels, split, two_view=True))
    return clips


def read_release(
    workbook: str | os.PathLike,
    frames_root: str | os.PathLike,
    keep_k_aus: bool = False,
    *,
    two_view: bool = False,
    swap_au_rows: bool | None = None,
    min_frames: int = 2,
) -> list[Clip]:
    """Reads the 4DME release: a workbook of annotations over ``frames_root/{sub_ID}/{fold_name}/``.

    The first sheet has one clip per row and the columns ``sub_ID``, ``fold_name``, ``Emotion`` (labels joined
    by ``+``), ``Onset``, ``Apex``, ``Offset`` (frame numbers, the offset inclusive) and ``AUs`` (tokens
    joined by ``+``, such as ``AU4(k)+L7``), then a 0/1 column per action unit. A clip's frames are ``Onset ..
    Offset``: either those with these numbers in their names, or all of its folder where that holds exactly so
    many.

    All clips are training clips. A clip's name is its ``fold_name``, with ``sub_ID`` in front if two subjects
    share one. A numeric ``sub_ID`` also finds the folder with that first integer in its name.

    Args:
        workbook: The ``.xlsx`` file.
        frames_root: For example the release's ``gray_micro``.
        keep_k_aus: Whether to keep action units that are marked ``(k)`` in ``AUs``. Without, one is dropped
            unless it also stands there unmarked, as for the other side of the face.
        two_view: Whether a frame holds two views side by side.
        swap_au_rows: Whether to exchange the action units (``AUs`` and the AU columns, nothing else) of the
            data rows :data:`SWAPPED_AU_ROWS`, which version 1 of the release confuses. None does so only if
            the file bears that version's name, ``4DME_Labelling_Micro_release v1.xlsx``, and has these rows;
            so a corrected file under any other name is left alone, and under the same name False leaves it
            alone.
        min_frames: Fewest frames that a clip may have; with one frame there is no motion to see.

    Returns:
        The clips in the order of the rows.

    Raises:
        UserError: The workbook or the folders are not as above; the message names the row, clip or column and
            the remedy.
    """
    workbook, frames_root = Path(workbook), Path(frames_root)
    rows = _read_workbook(workbook)
    _entries(frames_root)  # a wrong path is told as such, not as a missing clip
    au_columns = {
        name: f"AU{int(match[1])}" for name in rows[0][1] if (match := _AU_COLUMN.fullmatch(name)) is not None
    }
    _swap_aus(workbook, rows, ("AUs", *au_columns), swap_au_rows)

    pairs = [(_text(row["sub_ID"]), _text(row["fold_name"])) for _, row in rows]
    shared_names = len({fold_name for _, fold_name in pairs}) < len(pairs)
    first_rows: dict[tuple[str, str], int] = {}
    clips = []
    for (sheet_row, row), (subject, fold_name) in zip(rows, pairs, strict=True):
        where = f"{workbook}: row {sheet_row}"
        for column in ("sub_ID", "fold_name"):
            if not _text(row[column]):
                raise UserError(f"{where} has no {column}; fill it in or delete the row")
        where = f"{where} (clip {fold_name!r} of subject {subject!r})"
        if (subject, fold_name) in first_rows:
            raise UserError(
                f"{where} repeats row {first_rows[subject, fold_name]}; delete one of them or give it its own folder"
            )
        first_rows[subject, fold_name] = sheet_row

        onset, apex, offset = (_frame_number(where, row, column) for column in ("Onset", "Apex", "Offset"))
        if not onset <= apex <= offset:
            raise UserError(
                f"{where} has Onset {onset}, Apex {apex}, Offset {offset}; they must be in ascending order: "
                "correct the row"
            )
        labels = _joined_labels(where, row["Emotion"])
        aus = _action_units(where, row, au_columns, keep_k_aus)
        folder = _clip_folder(where, frames_root, subject, fold_name)
        frames = _frames_between(folder, onset, offset)
        _require_frames(folder, len(frames), min_frames)
        clips.append(
            Clip(
                name=f"{subject}_{fold_name}" if shared_names else fold_name,
                id=sheet_row - 1,
                subject=subject,
                frames=frames,
                labels=labels,
                split="train",
                two_view=two_view,
                onset=0,
                apex=apex - onset,
                offset=offset - onset,
                aus=aus,
            )
        )
    return clips


# --- folders and frames -----------------------------------------------------------------------------------


def _entries(folder: Path) -> list[os.DirEntry]:
    """What a folder holds, hidden entries aside, by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(
                (entry for entry in entries if not entry.name.startswith((".", "__"))),
                key=lambda entry: entry.name,
            )
    except OSError as error:
        raise UserError(f"{folder}: is no folder that can be read ({error.strerror}); check the path") from error


def _require_frames(folder: Path, count: int, min_frames: int) -> None:
    if count < min_frames:
        plural = "frame" if count == 1 else "frames"
        raise UserError(
            f"{folder}: the clip has {count} {plural}, at least {min_frames} are needed to see a motion; "
            "restore its frames, or remove the clip and its labels"
        )


def _sequence_folders(root: Path, without: Path | None = None) -> dict[int, Path]:
    """The sequence folders of ``root`` by the first integer in their names, in ascending order."""
    folders: dict[int, Path] = {}
    for folder in (root / entry.name for entry in _entries(root) if entry.is_dir()):
        if without is not None and folder.resolve() == without.resolve():
            continue
        if not is_utf8(folder.name):
            raise UserError(f"{folder}: the folder's name is not UTF-8; rename it, or move it away if it is no clip")
        id_ = _first_integer(folder.name)
        if id_ is None:
            raise UserError(
                f"{folder}: the folder's name holds no number to be the clip's Id; rename it, or move it "
                "away if it is no clip"
            )
        if id_ in folders:
            raise UserError(
                f"{root}: the folders {folders[id_].name!r} and {folder.name!r} both have the Id {id_}, the "
                "first number in their names; rename one"
            )
        folders[id_] = folder
    if not folders:
        raise UserError(f"{root}: holds no sequence folders; give the folder that has one folder of frames per clip")
    return dict(sorted(folders.items()))


def _frame_files(folder: Path) -> list[Path]:
    files = [
        folder / entry.name
        for entry in _entries(folder)
        if entry.name.lower().endswith(FRAME_SUFFIXES) and entry.is_file()
    ]
    if not files:
        raise UserError(
            f"{folder}: the clip has no frames ({', '.join(FRAME_SUFFIXES)}) directly inside; restore them, "
            "or remove the clip and its labels"
        )
    for stem, count in Counter(file.stem for file in files).items():
        if count > 1:
            raise UserError(f"{folder}: has {count} files for the frame {stem!r}; keep one of them")
    return files


def _ordered_frames(folder: Path, min_frames: int) -> tuple[Path, ...]:
    """All frames of a folder in the order of :func:`~mer_jax.clips.frames.frame_order`."""
    files = _frame_files(folder)
    _require_frames(folder, len(files), min_frames)
    for file in files:
        if _first_integer(file.stem) is None:
            raise UserError(
                f"{file}: the file's name holds no number, so its place among the frames is unknown; rename "
                "it, or move it away if it is no frame"
            )
    return tuple(sorted(files, key=frame_order))


def _frames_between(folder: Path, onset: int, offset: int) -> tuple[Path, ...]:
    """The frames with the numbers ``onset .. offset``, or all of a folder that was trimmed to them."""
    files = _frame_files(folder)
    numbers = _frame_numbers(folder, files)
    wanted = offset - onset + 1
    if len(files) == wanted:
        return tuple(numbers[number] for number in sorted(numbers))
    if all(number in numbers for number in range(onset, offset + 1)):
        return tuple(numbers[number] for number in range(onset, offset + 1))
    raise UserError(
        f"{folder}: holds {len(files)} frames, numbered {min(numbers)} to {max(numbers)}; the workbook's "
        f"Onset {onset} and Offset {offset} want either exactly {wanted} or these numbers: restore the "
        "frames or correct the row"
    )


def _frame_numbers(folder: Path, files: Sequence[Path]) -> dict[int, Path]:
    """Files by frame number: the first number in their names that differs from frame to frame.

    The release's clips are called ``S13_1st_001_01_1`` and the like; should its frames repeat that, the first
    number says nothing.
    """
    found = [[int(digits) for digits in re.findall(r"\d+", file.stem)] for file in files]
    for column in zip(*found, strict=False):
        if len(set(column)) == len(files):
            return dict(zip(column, files, strict=True))
    raise UserError(
        f"{folder}: the names of the frames, such as {min(files).name!r}, hold no number that tells them "
        "apart; number the frames"
    )


def _clip_folder(where: str, frames_root: Path, subject: str, fold_name: str) -> Path:
    subject_folder = frames_root / subject
    number = _integer(subject)
    if not subject_folder.is_dir() and number is not None:
        candidates = [
            frames_root / entry.name
            for entry in _entries(frames_root)
            if entry.is_dir() and _first_integer(entry.name) == number
        ]
        if len(candidates) == 1:
            subject_folder = candidates[0]
    folder = subject_folder / fold_name
    if not folder.is_dir():
        raise UserError(f"{where} has no folder {folder}; restore it or delete the row")
    return folder


def _first_integer(name: str) -> int | None:
    match = re.search(r"\d+", name)
    return int(match[0]) if match else None


# --- the challenge's CSV ----------------------------------------------------------------------------------


def _read_labels(
    path: Path, columns: Mapping[str, str], train_folders: dict[int, Path], test_folders: dict[int, Path]
) -> dict[int, tuple[str, tuple[int, ...]]]:
    """Subject and labels of each training folder that has a row, by the folder's Id."""
    header, lines = _read_csv(path)
    positions = _column_positions(path, header, columns)
    _refuse_further_classes(path, header, positions, lines)

    ids_by_name = {folder.name: id_ for id_, folder in train_folders.items()}
    test_names = {folder.name for folder in test_folders.values()}
    rows: dict[int, tuple[str, tuple[int, ...]]] = {}
    line_of: dict[int, int] = {}
    for number, fields in lines:
        written = fields[positions[_ID]]
        integer = _integer(written)
        id_ = ids_by_name.get(written, integer)
        if id_ not in train_folders:
            if written in test_names or integer in test_folders:
                raise UserError(
                    f"{path}: line {number} labels {written!r}, a test clip; labels of test clips are never "
                    "read: delete the line"
                )
            raise UserError(
                f"{path}: line {number} labels {written!r}, but there is no such sequence folder; restore it "
                "or delete the line"
            )
        if id_ in line_of:
            raise UserError(
                f"{path}: line {number} gives Id {written!r} again, after line {line_of[id_]}; delete one of them"
            )
        line_of[id_] = number
        labels = []
        for label in LABELS:
            value = _zero_or_one(fields[positions[label]])
            if value is None:
                raise UserError(
                    f"{path}: line {number} (Id {written!r}) has {fields[positions[label]]!r} in column "
                    f"{header[positions[label]]!r}; write 0 or 1"
                )
            labels.append(value)
        subject = fields[positions[_SUBJECT]] if _SUBJECT in positions else ""
        rows[id_] = subject, tuple(labels)
    return rows


def _read_csv(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and (line number, fields) of a CSV, stripped, without blank lines."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, skipinitialspace=True)
            lines = [(reader.line_num, [field.strip() for field in fields]) for fields in reader]
    except FileNotFoundError:
        raise UserError(f"{path}: no such labels file; give its path") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is no UTF-8 CSV ({error}); save it as comma-separated UTF-8") from error
    lines = [(number, fields) for number, fields in lines if any(fields)]
    if len(lines) < 2:
        raise UserError(
            f"{path}: has no {'rows under its header' if lines else 'content'}; it needs a header and one "
            "row per training clip"
        )
    (_, header), *lines = lines
    if len(header) == 1 and re.search(r"[;\t]", header[0]):
        raise UserError(f"{path}: its columns are not separated by commas; save it as comma-separated UTF-8")
    for number, fields in lines:
        if len(fields) != len(header):
            raise UserError(
                f"{path}: line {number} has {len(fields)} fields where the header has {len(header)}; correct the line"
            )
    return header, lines


def _column_positions(path: Path, header: list[str], columns: Mapping[str, str]) -> dict[str, int]:
    """Where our columns are, by our names."""
    ours = (_ID, *LABELS, _SUBJECT)
    for name in columns:
        if name not in ours:
            raise UserError(f"columns: {name!r} is none of our columns; map one of {', '.join(ours)}")
    positions: dict[str, int] = {}
    for name in ours:
        theirs = columns.get(name, name).strip()
        # A mapped name is meant literally; our own names may be written in any case.
        matches = [
            position
            for position, field in enumerate(header)
            if field == theirs or (name not in columns and field.lower() == theirs.lower())
        ]
        if len(matches) > 1:
            raise UserError(f"{path}: has {len(matches)} columns {theirs!r}; keep one or rename the others")
        if matches:
            positions[name] = matches[0]
        elif name != _SUBJECT or name in columns:
            raise UserError(
                f"{path}: has no column {theirs!r} (it has {', '.join(map(repr, header))}); add it, or say "
                f"what it is called with the column mapping {name}=<its name>"
            )
    for position, count in Counter(positions.values()).items():
        if count > 1:
            names = [name for name in ours if positions.get(name) == position]
            raise UserError(f"columns: {' and '.join(names)} are both mapped to {header[position]!r}; correct one")
    return positions


def _refuse_further_classes(
    path: Path, header: list[str], positions: dict[str, int], lines: list[tuple[int, list[str]]]
) -> None:
    """Raises where a column that nobody asked for holds labels, lest a misnamed class is silently lost."""
    for position, name in enumerate(header):
        if not name or position in positions.values():
            continue
        if all(_zero_or_one(fields[position]) is not None for _, fields in lines):
            raise UserError(
                f"{path}: column {name!r} looks like an unknown class; the classes are {', '.join(LABELS)}: "
                "map it to one of them or delete the column"
            )


def _zero_or_one(text: str) -> int | None:
    return {0: 0, 1: 1}.get(_integer(text))


# --- the release's workbook -------------------------------------------------------------------------------


def _read_workbook(path: Path) -> list[tuple[int, dict[str, object]]]:
    """(sheet row, {column: value}) for each row of the first sheet that is not blank."""
    import openpyxl

    try:
        with warnings.catch_warnings():
            # openpyxl warns of spreadsheet features, such as drop-down lists, that mean nothing here.
            warnings.simplefilter("ignore", UserWarning)
            sheet = openpyxl.load_workbook(path, data_only=True).worksheets[0]
        table = list(sheet.iter_rows(values_only=True))
    except FileNotFoundError:
        raise UserError(f"{path}: no such workbook; give its path") from None
    except Exception as error:  # a damaged file fails anywhere in the zip and XML readers below openpyxl
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as a workbook ({reason}); save it as .xlsx") from error
    header = [_text(name) for name in table[0]] if table else []
    for name in _RELEASE_COLUMNS:
        if header.count(name) != 1:
            raise UserError(
                f"{path}: has {header.count(name) or 'no'} column{'s' * (header.count(name) > 1)} {name!r} "
                f"in the first row of its first sheet; it needs one each of {', '.join(_RELEASE_COLUMNS)}"
            )
    rows = [
        (sheet_row, dict(zip(header, values, strict=True)))
        for sheet_row, values in enumerate(table[1:], start=2)
        if any(_text(value) for value in values)
    ]
    if not rows:
        raise UserError(f"{path}: has no rows under its header; it needs one per clip")
    return rows


def _swap_aus(
    workbook: Path, rows: list[tuple[int, dict[str, object]]], columns: Iterable[str], wanted: bool | None
) -> None:
    # The sheet counts its rows from 1, the header's.
    swapped = [row for sheet_row, row in rows if sheet_row - 2 in SWAPPED_AU_ROWS]
    if wanted is None:
        # Downloads turn the blank in the file's name into an underscore.
        wanted = workbook.stem.lower().replace("_", " ") == _FAULTY_RELEASE and len(swapped) == 2
    if not wanted:
        return
    if len(swapped) < 2:
        raise UserError(
            f"{workbook}: has no data rows {SWAPPED_AU_ROWS[0]} and {SWAPPED_AU_ROWS[1]} whose AUs could be "
            "exchanged; leave swap_au_rows unset"
        )
    first, second = swapped
    for column in columns:
        first[column], second[column] = second[column], first[column]


def _joined_labels(where: str, emotion: object) -> tuple[int, ...]:
    known = {label.lower(): label for label in LABELS}
    present = set()
    for part in _text(emotion).split("+"):
        if part.strip().lower() not in known:
            raise UserError(
                f"{where} has the Emotion {_text(emotion)!r}; write one or several of {', '.join(LABELS)}, joined by +"
            )
        present.add(known[part.strip().lower()])
    return tuple(int(label in present) for label in LABELS)


def _action_units(
    where: str, row: Mapping[str, object], au_columns: Mapping[str, str], keep_k_aus: bool
) -> tuple[str, ...]:
    """The action units of a row: from the AU columns and, for units without a column, from ``AUs``."""
    marked, unmarked = set(), set()
    for token in _text(row["AUs"]).split("+"):
        match = _AU_TOKEN.fullmatch(token.strip())
        if match:
            (marked if match[2] else unmarked).add(f"AU{int(match[1])}")
        elif token.strip() and (not au_columns or "(k)" in token.lower()):
            raise UserError(
                f"{where} has {token.strip()!r} among its AUs; write units as AU4 or L7, a mark as AU4(k) or L7(k)"
            )
    present = (marked | unmarked) - set(au_columns.values())
    for column, au in au_columns.items():
        value = {0: 0, 1: 1}.get(_integer(_text(row[column]) or "0"))
        if value is None:
            raise UserError(f"{where} has {_text(row[column])!r} in column {column!r}; write 0 or 1")
        if value:
            present.add(au)
    if not keep_k_aus:
        present -= marked - unmarked
    return tuple(sorted(present, key=lambda au: int(au[2:])))


def _frame_number(where: str, row: Mapping[str, object], column: str) -> int:
    number = _integer(_text(row[column]))
    if number is None:
        raise UserError(f"{where} has {_text(row[column])!r} as {column}; write a frame number")
    return number


# --- values -----------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    """A cell as text; whole numbers without the ``.0`` that spreadsheets give them."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _integer(text: str) -> int | None:
    """A whole number, also as 1.0, or None."""
    match = re.fullmatch(r"(\d+)(?:\.0*)?", text.strip(), re.ASCII)
    return int(match[1]) if match else None


def _some(names: Sequence[str], noun: str) -> str:
    """``clip 'a'`` or ``clips 'a', 'b' and 7 more``."""
    listed = ", ".join(map(repr, names[:_MAX_NAMED]))
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"{noun}{'s' * (len(names) > 1)} {listed}{more}"
