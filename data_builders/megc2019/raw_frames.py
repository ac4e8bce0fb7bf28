"""Frames of CASME II, SAMM and SMIC as their releases lay them out, with their coding sheets.

Where a release varies (raw or cropped frames, leading zeros that a spreadsheet program took away, a folder that an
archive put around everything), all variants are read; where its sheet and its frames disagree, the nearest frame is
taken and said so.
"""

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_builders.megc2019.composite import (
    CLASSES,
    DATABASES,
    DROPPED_CASME2,
    EMOTIONS,
    counted,
    database_of,
    padded,
    some,
    unique_subjects,
)
from mer_jax.errors import UserError
from mer_jax.files import is_utf8

HALF_WAY = "the frame half-way was taken"
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
_COLUMNS = {
    "Subject": ("subject",),
    "Filename": ("filename",),
    "Onset Frame": ("onsetframe", "onset"),
    "Apex Frame": ("apexframe", "apex"),
    "Offset Frame": ("offsetframe", "offset"),
    "Estimated Emotion": ("estimatedemotion", "emotion"),
}
_HEADER_ROWS = 40  # SAMM's table has notes above it
_SHEETS = {
    "casme2": ("casme2coding", "CASME2-coding-*.xlsx"),
    "samm": ("sammmicrofacscodes", "SAMM_Micro_FACS_Codes*.xlsx"),
}
_SUBJECT_FOLDERS = {"casme2": r"sub\d+", "samm": r"\d{1,3}", "smic": r"s\d+"}


@dataclass(frozen=True)
class RawClip:
    """One clip from its onset to its offset.

    Attributes:
        name: ``<subject>_<clip>``, as the published flow images are called.
        database: One of ``DATABASES``.
        subject: Whose face it is, unique over the databases.
        label: 0 negative, 1 positive, 2 surprise.
        frames: The T image files from onset to offset, T at least 2.
        apex: Index into ``frames``, at least 1.
        apex_annotated: Whether a sheet says so; if not, it is the frame half-way.
    """

    name: str
    database: str
    subject: str
    label: int
    frames: tuple[Path, ...]
    apex: int
    apex_annotated: bool


@dataclass
class _Notes:
    """What is out of the ordinary in one database, clip by clip."""

    database: str
    clips: dict[str, list[str]] = field(default_factory=dict)  # heading to clips

    def add(self, heading: str, clip: str) -> None:
        self.clips.setdefault(heading, []).append(clip)

    def lines(self) -> list[str]:
        return [
            f"{self.database}: {counted(len(clips), 'clip')} {heading}: {some(clips)}"
            for heading, clips in self.clips.items()
        ]


def read_raw(
    folders: Mapping[str, Path],
    sheets: Mapping[str, Path | None] | None = None,
    *,
    unknown_apex: str = HALF_WAY,
) -> tuple[list[RawClip], list[str]]:
    """Reads one or several of the databases, mapped to the composite's classes.

    Args:
        folders: Database to the folder of its release, or of its frames.
        sheets: Database (``'casme2'``, ``'samm'``) to its coding sheet, looked for in and above the folder unless
            given.
        unknown_apex: What is done where no apex is annotated, in words for the notes.

    Returns:
        (clips by database and in the order of the sheet, or of their names; notes).

    Raises:
        UserError: A folder or sheet is not as its release has it; the message names it and the remedy.
    """
    clips: list[RawClip] = []
    notes: list[str] = []
    for database in DATABASES:
        if database not in folders:
            continue
        if database == "smic":
            of_database, lines = _read_smic(Path(folders[database]), unknown_apex)
        else:
            sheet = (sheets or {}).get(database)
            of_database, lines = _read_coded(
                database, Path(folders[database]), Path(sheet) if sheet else None, unknown_apex
            )
        clips += of_database
        notes += lines
    subjects, shared = unique_subjects([clip.database for clip in clips], [clip.subject for clip in clips])
    if shared:
        notes.append(f"subjects of several databases share a name and got their database's in front: {some(shared)}")
    clips = [
        RawClip(clip.name, clip.database, subject, clip.label, clip.frames, clip.apex, clip.apex_annotated)
        for clip, subject in zip(clips, subjects, strict=True)
    ]
    return clips, notes


def find_databases(source: Path) -> dict[str, Path]:
    """The databases below a folder, by the names of its folders, such as ``CASME II`` or ``SMIC-HS``.

    Raises:
        UserError: There are none, or two folders mean the same database.
    """
    found: dict[str, Path] = {}
    for path in _folders(source):
        database = database_of(path.name)
        if database in found:
            raise UserError(f"{source}: {found[database].name!r} and {path.name!r} both mean {database}; name one with "
                            f"--{database}")  # fmt: skip
        if database is not None:
            found[database] = path
    if not found:
        raise UserError(
            f"{source}: holds no folder called like {', '.join(DATABASES)}; say where each is with --casme2, --samm, "
            "--smic"
        )
    return found


# --- CASME II and SAMM ------------------------------------------------------------------------------------


def _read_coded(database: str, root: Path, sheet: Path | None, unknown_apex: str) -> tuple[list[RawClip], list[str]]:
    top = _subjects_top(database, root)
    sheet = sheet or _find_sheet(database, root, top)
    subject_of = _casme2_subject if database == "casme2" else _samm_subject
    subject_folders: dict[str, Path] = {}
    for folder in _folders(top):
        if re.fullmatch(_SUBJECT_FOLDERS[database], folder.name, re.IGNORECASE):
            subject_folders[subject_of(folder.name)] = folder

    notes = _Notes(database)
    dropped: Counter[str] = Counter()
    clips, lines = [], []
    read: dict[tuple[str, str], tuple[str, tuple]] = {}
    named: set[Path] = set()
    wanted: dict[str, int] = {}
    for number, row in _read_sheet(sheet):
        where = f"{sheet}: row {number}"
        subject, clip_name = subject_of(row["Subject"]), row["Filename"]
        if subject is None:
            raise UserError(f"{where} has the Subject {row['Subject']!r}; write a number")
        if not clip_name:
            raise UserError(f"{where} has no Filename; fill it in or delete the row")
        name, values = f"{subject}_{clip_name}", tuple(row.values())
        first = read.setdefault((subject, clip_name.lower()), (where, values))
        if first[0] != where:
            if first[1][2:] != values[2:]:
                raise UserError(f"{where} contradicts {first[0]}, which has the same Subject and Filename; delete one")
            notes.add("twice in the sheet, read once", name)
            continue
        folder = _clip_folder(subject_folders.get(subject), clip_name)
        if folder is not None:
            named.add(folder)
        label = _label(database, where, row["Estimated Emotion"])
        if label is None or ((subject, clip_name) in DROPPED_CASME2 and database == "casme2"):
            dropped[row["Estimated Emotion"].lower() if label is None else "by name"] += 1
            continue
        wanted[subject] = wanted.get(subject, 0) + 1
        if folder is None:
            notes.add("without a folder of frames, left out", name)
            continue
        clip = _cut(database, where, row, folder, name, subject, label, notes, unknown_apex)
        if clip is not None:
            clips.append(clip)
    if not clips:
        raise UserError(
            f"{top}: none of the clips of {sheet} is there; give the folder that holds {_example(database)} and its "
            "own sheet"
        )
    if dropped:
        told = ", ".join(f"{count} {name}" for name, count in sorted(dropped.items()))
        lines.append(f"{database}: {counted(dropped.total(), 'clip')} left out as the challenge does: {told}")
    there = {clip.subject for clip in clips}
    gone = [f"{subject} ({counted(count, 'clip')})" for subject, count in wanted.items() if subject not in there]
    if gone:
        lines.append(
            f"{database}: {counted(len(gone), 'whole subject')} missing, left out of the data and of the folds: "
            f"{some(gone)}"
        )
    lines += notes.lines()
    extra = [
        f"{folder.name}/{inner.name}" for folder in subject_folders.values() for inner in _folders(folder)
        if inner not in named
    ]  # fmt: skip
    if extra:
        lines.append(f"{database}: {counted(len(extra), 'folder')} not in the sheet, not read: {some(extra)}")
    return clips, lines


def _cut(
    database: str,
    where: str,
    row: Mapping[str, str],
    folder: Path,
    name: str,
    subject: str,
    label: int,
    notes: _Notes,
    unknown_apex: str,
) -> RawClip | None:
    """The frames of one row from onset to offset; None, with a note, where there are not two."""
    files = _numbered_frames(folder)
    onset, apex, offset = (_frame_number(row[f"{which} Frame"]) for which in ("Onset", "Apex", "Offset"))
    if onset is None:
        raise UserError(f"{where} has {row['Onset Frame']!r} as onset frame of {name}; write a frame number")
    if offset is None or offset < onset:
        offset = max(files, default=onset)
        notes.add("without a usable offset frame in the sheet, cut at their last frame", name)
    annotated = apex is not None and onset < apex <= offset
    if not annotated:
        apex = (onset + offset) // 2
        notes.add(f"without a usable apex frame in the sheet, so that {unknown_apex}", name)

    numbers = [number for number in files if onset <= number <= offset]
    if not numbers and len(files) == offset - onset + 1:
        # Frames that were numbered anew when they were cut out.
        numbers = list(files)
        shift = numbers[0] - onset
        onset, apex, offset = onset + shift, apex + shift, offset + shift
    if len(numbers) < 2:
        notes.add("with fewer than 2 frames from onset to offset, left out", name)
        return None
    absent = [str(number) for number in (onset, apex, offset) if number not in files]
    if absent:
        notes.add("without the very frame of onset, apex or offset, the nearest taken instead", name)
    nearest = min(range(1, len(numbers)), key=lambda index: abs(numbers[index] - apex))
    return RawClip(name, database, subject, label, tuple(files[number] for number in numbers), nearest, annotated)


def _label(database: str, where: str, emotion: str) -> int | None:
    known = EMOTIONS[database]
    if emotion.lower() not in known:
        raise UserError(f"{where} has the emotion {emotion!r}; {database} has {', '.join(known)}: correct the row")
    return known[emotion.lower()]


def _casme2_subject(text: str) -> str | None:
    match = re.fullmatch(r"(?:sub)?\s*(\d+)", text, re.IGNORECASE)
    return f"sub{int(match[1]):02d}" if match else None


def _samm_subject(text: str) -> str | None:
    return f"{int(text):03d}" if re.fullmatch(r"\d+", text) else None


def _clip_folder(subject_folder: Path | None, clip_name: str) -> Path | None:
    if subject_folder is None:
        return None
    exact = subject_folder / clip_name
    if exact.is_dir():
        return exact
    alike = [folder for folder in _folders(subject_folder) if folder.name.strip().lower() == clip_name.lower()]
    return alike[0] if len(alike) == 1 else None


def _example(database: str) -> str:
    return {"casme2": "sub01, sub02, ...", "samm": "006, 007, ...", "smic": "s01 or s1, ... with micro inside"}[
        database
    ]


# --- coding sheets ----------------------------------------------------------------------------------------


def _find_sheet(database: str, root: Path, top: Path) -> Path:
    start, example = _SHEETS[database]
    places = dict.fromkeys(folder.resolve() for folder in (root, top, root.parent, top.parent))
    found = {
        path.resolve()
        for folder in places
        for path in folder.glob("*.xlsx")
        # Spreadsheet programs and file systems leave such beside a sheet.
        if not path.name.startswith((".", "~$")) and re.sub(r"[^a-z0-9]", "", path.stem.lower()).startswith(start)
    }
    if len(found) != 1:
        several = f"several coding sheets ({some(sorted(path.name for path in found))})" if found else "no coding sheet"
        raise UserError(f"{root}: {several} called like {example}; say with --{database}_sheet which to read")
    return found.pop()


def _read_sheet(path: Path) -> list[tuple[int, dict[str, str]]]:
    """(sheet row, {column: text}) of the first table that has all of our columns."""
    import openpyxl

    try:
        with warnings.catch_warnings():
            # openpyxl warns of spreadsheet features, such as drop-down lists, that mean nothing here.
            warnings.simplefilter("ignore", UserWarning)
            book = openpyxl.load_workbook(path, data_only=True)
        tables = [list(sheet.iter_rows(values_only=True)) for sheet in book.worksheets]
    except FileNotFoundError:
        raise UserError(f"{path}: no such coding sheet; give its path") from None
    except Exception as error:  # a damaged file fails anywhere in the zip and XML readers below openpyxl
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as a workbook ({reason}); save it as .xlsx") from error
    nearest: set[str] = set()
    for table in tables:
        for header, cells in enumerate(table[:_HEADER_ROWS]):
            places = _columns(cells)
            if len(places) > len(nearest):
                nearest = set(places)
            if len(places) < len(_COLUMNS):
                continue
            rows = [
                (number, {name: _text(values[place]) for name, place in places.items()})
                for number, values in enumerate(table[header + 1 :], start=header + 2)
            ]
            # Notes and sums below the table have neither of the two.
            rows = [(number, row) for number, row in rows if row["Subject"] or row["Filename"]]
            if not rows:
                raise UserError(f"{path}: has no rows under its header; it needs one per clip")
            return rows
    absent = ", ".join(name for name in _COLUMNS if name not in nearest)
    raise UserError(f"{path}: no row holds the columns {absent}; give the coding sheet as it was released")


def _columns(cells: Sequence[object]) -> dict[str, int]:
    headings = [re.sub(r"[^a-z]", "", _text(cell).lower()) for cell in cells]
    places: dict[str, int] = {}
    for name, spellings in _COLUMNS.items():
        for spelling in spellings:
            if spelling in headings:
                places[name] = headings.index(spelling)
                break
    return places


def _text(value: object) -> str:
    """A cell as text; whole numbers without the ``.0`` that spreadsheets give them."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value).strip()


def _frame_number(text: str) -> int | None:
    """A frame number; None for the ``/``, ``-1`` or blank that stands for an unknown one."""
    return int(text) if re.fullmatch(r"\d+", text) and int(text) > 0 else None


# --- SMIC -------------------------------------------------------------------------------------------------


def _read_smic(root: Path, unknown_apex: str) -> tuple[list[RawClip], list[str]]:
    top = _subjects_top("smic", root)
    notes = _Notes("smic")
    clips: list[RawClip] = []
    extra, gone = [], []
    for folder in sorted(_folders(top), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)][:1] or [0]):
        if not re.fullmatch(_SUBJECT_FOLDERS["smic"], folder.name, re.IGNORECASE):
            continue
        subject = f"s{int(folder.name[1:]):02d}"
        before = len(clips)
        micro = [inner for inner in _folders(folder) if inner.name.lower() == "micro"]
        for of_class in (inner for path in micro for inner in _folders(path)):
            labels = [label for label, name in enumerate(CLASSES) if name in of_class.name.lower()]
            if len(labels) != 1:
                extra.append(f"{folder.name}/micro/{of_class.name}")
                continue
            for clip_folder in _folders(of_class):
                if not is_utf8(clip_folder.name):
                    raise UserError(f"{clip_folder}: the folder's name is not UTF-8; rename it, or move it away")
                name = f"{subject}_{padded(clip_folder.name.lower())}"
                frames = tuple(_numbered_frames(clip_folder).values())
                if len(frames) < 2:
                    notes.add("with fewer than 2 frames, left out", name)
                    continue
                # Frames 0 .. T - 1; half-way as in the other databases.
                apex = max(1, (len(frames) - 1) // 2)
                clips.append(RawClip(name, "smic", subject, labels[0], frames, apex, False))
        if len(clips) == before:
            gone.append(folder.name)
    if not clips:
        raise UserError(f"{top}: no clip of SMIC is there (s01/micro/negative/s01_ne_01/*.bmp); give the folder HS")
    repeated = [name for name, count in Counter(clip.name for clip in clips).items() if count > 1]
    if repeated:
        raise UserError(f"{top}: {counted(len(repeated), 'clip')} twice, such as {repeated[0]!r}; remove the copies")
    lines = [f"smic: has no annotated apex, so that {unknown_apex} in all {len(clips)} clips"]
    if gone:
        lines.append(f"smic: {counted(len(gone), 'whole subject')} without a clip: {some(gone)}")
    if extra:
        lines.append(
            f"smic: {counted(len(extra), 'folder')} of no class ({', '.join(CLASSES)}), not read: {some(extra)}"
        )
    return clips, lines + notes.lines()


# --- folders ----------------------------------------------------------------------------------------------


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__")))
    except OSError as error:
        raise UserError(f"{path}: is no folder that can be read ({error.strerror}); check the path") from error


def _subjects_top(database: str, root: Path) -> Path:
    """The folder that holds the folders of subjects: ``root`` or one at most two levels below it."""

    def is_top(folder: Path) -> bool:
        subjects = [f for f in _folders(folder) if re.fullmatch(_SUBJECT_FOLDERS[database], f.name, re.IGNORECASE)]
        return any(database != "smic" or _has_micro(subject) for subject in subjects)

    level = [root]
    for _depth in range(3):
        tops = [folder for folder in level if is_top(folder)]
        if database == "smic" and len(tops) > 1:
            # The composite takes the high-speed camera of the three.
            tops = [folder for folder in tops if folder.name.lower() == "hs"] or tops
        if len(tops) > 1:
            places = some(folder.relative_to(root) for folder in tops)
            raise UserError(f"{root}: frames of {database} in {places}; give one of these")
        if tops:
            return tops[0]
        level = [inner for folder in level for inner in _folders(folder)]
    raise UserError(
        f"{root}: holds no folders of subjects of {database} ({_example(database)}); give the folder that does"
    )


def _has_micro(subject: Path) -> bool:
    return any(inner.name.lower() == "micro" for inner in _folders(subject))


def _numbered_frames(folder: Path) -> dict[int, Path]:
    """Frame number, the last number in the file's name, to file, in ascending order."""
    frames: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in FRAME_SUFFIXES or not path.is_file():
            continue
        numbers = re.findall(r"\d+", path.stem)
        if not numbers:
            raise UserError(f"{path}: the file's name holds no number, so its place among the frames is unknown; "
                            "rename it, or move it away if it is no frame")  # fmt: skip
        number = int(numbers[-1])
        if number in frames:
            raise UserError(f"{folder}: {frames[number].name!r} and {path.name!r} are the same frame; keep one of them")
        frames[number] = path
    return dict(sorted(frames.items()))
