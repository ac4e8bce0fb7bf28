"""What the MEGC2019 composite is: its databases, classes, names and counts."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

DATABASES = ("casme2", "samm", "smic")
CLASSES = ("negative", "positive", "surprise")  # in the order of the labels 0, 1, 2

# Clips per class and subjects of the composite as the challenge defined it.
EXPECTED = {
    "casme2": {"clips": (88, 32, 25), "subjects": 24},
    "samm": {"clips": (92, 26, 15), "subjects": 28},
    "smic": {"clips": (70, 51, 43), "subjects": 16},
}

# Estimated emotions of the coding sheets, in small letters, to classes; None is left out by the challenge.
EMOTIONS = {
    "casme2": {
        "disgust": 0,
        "repression": 0,
        "happiness": 1,
        "surprise": 2,
        "fear": None,
        "sadness": None,
        "others": None,
    },
    "samm": {
        "anger": 0,
        "contempt": 0,
        "disgust": 0,
        "fear": 0,
        "sadness": 0,
        "happiness": 1,
        "surprise": 2,
        "other": None,
        "others": None,
    },
}
# Clips (subject, file name) of CASME II that the challenge left out although their emotion has a class: the first sheet
# has no apex for the first of them and the onset as that of the second; later sheets call the three of sub24, which
# there are sadness, surprise.
DROPPED_CASME2 = frozenset(
    {
        ("sub04", "EP12_01f"),
        ("sub05", "EP09_05f"),
        ("sub24", "EP07_01"),
        ("sub24", "EP07_04f"),
        ("sub24", "EP10_03"),
    }
)

MAX_NAMED = 10
_ALIASES = {"casme2": "casme2", "casmeii": "casme2", "samm": "samm", "smic": "smic", "smichs": "smic"}


def database_of(name: str) -> str | None:
    """The database that a name such as ``'CASME II'`` means; None if it is none of :data:`DATABASES`."""
    return _ALIASES.get(re.sub(r"[^a-z0-9]", "", name.lower()))


def database_of_clip(name: str) -> str | None:
    """The database to which a clip's name belongs: ``sub..`` CASME II, ``s..`` SMIC, digits SAMM."""
    for database, pattern in (("casme2", r"sub\d+_"), ("smic", r"s\d+_"), ("samm", r"\d+_")):
        if re.match(pattern, name):
            return database
    return None


def padded(name: str) -> str:
    """The name of a SMIC clip with all its zeros: ``s1_s1_ne_01`` becomes ``s01_s01_ne_01``.

    The published table writes ``s01_s1_ne_01``, the files are called ``s01_s01_ne_01``. Names of the other
    databases have no such part and stay as they are.
    """
    return re.sub(r"(?<![^_])s(\d)(?=_)", r"s0\1", name)


def count(labels: Sequence[int], databases: Sequence[str], subjects: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Counts clips and subjects of each database, beside those of the composite.

    Args:
        labels: Class of each of the N clips, 0 to 2.
        databases: Database of each clip.
        subjects: Subject of each clip.

    Returns:
        Database to ``clips`` (per class), ``subjects``, ``expected_clips`` and ``expected_subjects``.
    """
    counts = {}
    for database in DATABASES:
        rows = [index for index, name in enumerate(databases) if name == database]
        per_class = Counter(labels[index] for index in rows)
        counts[database] = {
            "clips": [per_class[label] for label in range(len(CLASSES))],
            "subjects": len({subjects[index] for index in rows}),
            "expected_clips": list(EXPECTED[database]["clips"]),
            "expected_subjects": EXPECTED[database]["subjects"],
        }
    return counts


def count_notes(counts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Says of each database where it is not of the composite's size, given what :func:`count` returns."""
    lines = []
    absent = [database for database, told in counts.items() if not told["subjects"]]
    if absent:
        lines.append(f"no clips of {', '.join(absent)}: this is not the composite of {' + '.join(DATABASES)}")
    for database, told in counts.items():
        here = (told["clips"], told["subjects"])
        expected = (told["expected_clips"], told["expected_subjects"])
        if database not in absent and here != expected:
            lines.append(f"{database}: {_told(*here)}; the composite has {_told(*expected)}")
    return lines


def _told(clips: Sequence[int], people: int) -> str:
    per_class = ", ".join(f"{number} {name}" for number, name in zip(clips, CLASSES, strict=True))
    return f"{counted(sum(clips), 'clip')} ({per_class}) of {counted(people, 'subject')}"


def some(items: Iterable[object]) -> str:
    """The first ten items in words, then how many more there are."""
    items = [str(item) for item in items]
    more = f" and {len(items) - MAX_NAMED} more" if len(items) > MAX_NAMED else ""
    return ", ".join(items[:MAX_NAMED]) + more


def counted(count: int, noun: str) -> str:
    """``1 clip``, ``2 clips``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def unique_subjects(databases: Sequence[str], subjects: Sequence[str]) -> tuple[list[str], list[str]]:
    """Subjects so named that no two people share a name.

    Args:
        databases: Database of each of the N clips.
        subjects: Subject of each clip, as its database names it.

    Returns:
        (subject of each clip, the names that two databases share). A shared name gets its database in front,
        ``casme2-01``; all others stay as they are.
    """
    owners: dict[str, set[str]] = {}
    for database, subject in zip(databases, subjects, strict=True):
        owners.setdefault(subject, set()).add(database)
    shared = sorted(subject for subject, of in owners.items() if len(of) > 1)
    named = [
        f"{database}-{subject}" if subject in shared else subject
        for database, subject in zip(databases, subjects, strict=True)
    ]
    return named, shared
