"""Hand-made files in the formats of the field: flow images with their table, and raw frames with coding sheets."""

import csv
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import openpyxl
import pytest
from PIL import Image

TABLE = "combined_3_class2_for_optical_flow.csv"
HEADER = ("dataset", "sub", "filename_o", "label", "apex", "imagename", "sub_filename")
# Clips per class, subjects, first number of a subject: the real composite's.
COUNTS = {"casme2": ((88, 32, 25), 24, 1), "samm": ((92, 26, 15), 28, 6), "smic": ((70, 51, 43), 16, 1)}


def table_rows():
    """The 442 rows of a table like the published one, with its names."""
    rows = []
    for database, (per_class, people, first) in COUNTS.items():
        labels = [label for label, number in enumerate(per_class) for _ in range(number)]
        for index, label in enumerate(labels):
            number, turn = first + index % people, index // people + 1
            if database == "casme2":
                subject, name = f"sub{number:02d}", f"EP{turn:02d}_{label + 1:02d}f"
            elif database == "samm":
                # Names that end in _1, _2, _3 by themselves.
                subject, name = f"{number:03d}", f"{number:03d}_{turn}_{label + 1}"
            else:
                subject, name = f"s{number:02d}", f"s{number}_{('ne', 'po', 'sur')[label]}_{turn:02d}"
            rows.append(
                dict(zip(HEADER, (database, subject, name, label, "", f"{subject}_{name}.jpg", ""), strict=True))
            )
    return rows


def file_stem(row):
    """The stem of a row's file, without the blank at its end."""
    stem = row["imagename"].removesuffix(".jpg")
    if row["dataset"] == "smic":
        subject, _, rest = stem.partition("_")
        stem = f"{subject}_{subject}_{rest.partition('_')[2]}"
    return stem


def write_table(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, HEADER)
        writer.writeheader()
        writer.writerows(rows)


def image_of(stem, size=28, plane=0):
    """(size, size, 3) uint8 that nothing but this name and map has."""
    seed = [plane, *stem.encode()]
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def save(array, path):
    Image.fromarray(array).save(path, compress_level=1)


@pytest.fixture(scope="session")
def made():
    """The functions above."""
    return SimpleNamespace(
        TABLE=TABLE, table_rows=table_rows, file_stem=file_stem, write_table=write_table, image_of=image_of, save=save
    )


@pytest.fixture(scope="session")
def _published(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    folder = root / "STSNet_whole_norm_u_v_os"
    folder.mkdir()
    for row in table_rows():
        save(image_of(file_stem(row)), folder / f"{file_stem(row)} .png")
    write_table(root / TABLE, table_rows())
    return root


@pytest.fixture(scope="session")
def published(_published):
    """All 442 images, read only: folder ``STSNet_whole_norm_u_v_os`` beside its table."""
    return _published / "STSNet_whole_norm_u_v_os"


@pytest.fixture
def few(tmp_path):
    """A writable folder of 12 clips, four of each database, two subjects each."""
    rows = []
    for database in COUNTS:
        of_database = [row for row in table_rows() if row["dataset"] == database]
        subjects = list(dict.fromkeys(row["sub"] for row in of_database))[:2]
        for subject in subjects:
            rows += [row for row in of_database if row["sub"] == subject][:2]
    folder = tmp_path / "published" / "STSNet_whole_norm_u_v_os"
    folder.mkdir(parents=True)
    for row in rows:
        save(image_of(file_stem(row)), folder / f"{file_stem(row)} .png")
    write_table(folder.parent / TABLE, rows)
    return SimpleNamespace(folder=folder, table=folder.parent / TABLE, rows=rows)


@pytest.fixture
def tree(few):
    """The same 12 clips as the tree of folds."""
    root = few.folder.parent / "three_norm_u_v_os"
    for subject in dict.fromkeys(row["sub"] for row in few.rows):
        for row in few.rows:
            part = "u_test" if row["sub"] == subject else "u_train"
            folder = root / subject / part / str(row["label"])
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{file_stem(row)} .png"
            shutil.copy(few.folder / name, folder / name)
    return root


# --- raw frames -------------------------------------------------------------------------------------------


def texture(height=112, width=96):
    """A picture on which flow can be seen."""
    noise = np.random.default_rng(7).uniform(0, 255, (height, width, 3))
    smooth = cv2.GaussianBlur(noise, (0, 0), 2)
    return ((smooth - smooth.min()) / np.ptp(smooth) * 255).astype(np.uint8)


def write_frames(folder, names, shifts, picture=None):
    """Frames that move to the right by as many pixels as ``shifts`` says."""
    folder.mkdir(parents=True)
    picture = texture() if picture is None else picture
    size = picture.shape[1::-1]
    for name, shift in zip(names, shifts, strict=True):
        move = np.array([[1, 0, shift], [0, 1, 0]], np.float32)
        frame = cv2.warpAffine(picture, move, size, borderMode=cv2.BORDER_REFLECT)
        Image.fromarray(frame).save(folder / name, **({"quality": 98} if name.endswith("jpg") else {}))


def there_and_back(count):
    """Shifts of ``count`` frames: 0 at both ends, 1 px in the middle."""
    return np.sin(np.linspace(0, np.pi, count))


def write_sheet(path, header, rows, above=0):
    book = openpyxl.Workbook()
    for line in range(above):
        book.active.append([f"note {line}"])
    book.active.append(list(header))
    for row in rows:
        book.active.append(list(row))
    book.save(path)


CASME2_HEADER = ("Subject", "Filename", None, "OnsetFrame", "ApexFrame", "OffsetFrame", None, "Action Units",
                 "Estimated Emotion")  # fmt: skip
SAMM_HEADER = ("Subject", "Filename", "Inducement Code", "Onset Frame", "Apex Frame", "Offset Frame", "Duration",
               "Micro", "Action Units", "Estimated Emotion", "Objective Classes", "Notes")  # fmt: skip


def casme2_row(subject, name, onset, apex, offset, emotion):
    return (subject, name, None, onset, apex, offset, None, "4", emotion)


def samm_row(subject, name, onset, apex, offset, emotion):
    return (subject, name, 1, onset, apex, offset, 9, "1/2", "AU4", emotion, 1, None)


@pytest.fixture
def raw(tmp_path):
    """A root with the three databases, each as its release lays it out."""
    root = tmp_path / "databases"
    casme2 = root / "CASME II"
    rows = [
        casme2_row(1, "EP02_01f", 46, 50, 54, "disgust"),
        casme2_row("01", "EP03_02", 10, "/", 18, "happiness"),
        casme2_row(2, "EP01_11f", 1, 5, 9, "surprise"),
        casme2_row(2, "EP06_01f", 1, 5, 9, "others"),
        casme2_row(4, "EP12_01f", 1, 5, 9, "disgust"),
    ]
    for subject, name, _, onset, _, offset, *_ in rows:
        names = [f"reg_img{number}.jpg" for number in range(onset, offset + 1)]
        write_frames(casme2 / "Cropped" / f"sub{int(subject):02d}" / name, names, there_and_back(len(names)))
    write_sheet(casme2 / "CASME2-coding-20140508.xlsx", CASME2_HEADER, rows)

    samm = root / "SAMM"
    rows = [
        samm_row(6, "006_1_2", 5562, 5566, 5570, "Anger"),
        samm_row(6, "006_1_3", 100, 104, 108, "Other"),
        samm_row("011", "011_1_1", 95, 99, 103, "Happiness"),
        samm_row("011", "011_2_1", 1, -1, 9, "Surprise"),
    ]
    for _, name, _, onset, _, offset, *_ in rows:
        names = [f"{name[:3]}_{number:05d}.jpg" for number in range(onset, offset + 1)]
        write_frames(samm / name[:3] / name, names, there_and_back(len(names)))
    write_sheet(samm / "SAMM_Micro_FACS_Codes_v2.xlsx", SAMM_HEADER, rows, above=13)

    smic = root / "SMIC" / "HS"
    for subject, name, emotion in (
        ("s1", "s1_ne_01", "negative"),
        ("s1", "s1_sur_01", "surprise"),
        ("s11", "s11_po_01", "positive"),
    ):
        names = [f"reg_image{235030 + number}.bmp" for number in range(9)]
        write_frames(smic / subject / "micro" / emotion / name, names, there_and_back(9))
    (smic / "s1" / "non_micro" / "s1_non").mkdir(parents=True)
    return SimpleNamespace(
        root=root,
        casme2=casme2,
        samm=samm,
        smic=smic,
        casme2_sheet=casme2 / "CASME2-coding-20140508.xlsx",
        samm_sheet=samm / "SAMM_Micro_FACS_Codes_v2.xlsx",
    )


@pytest.fixture(scope="session")
def raw_made():
    """The functions with which raw releases are made."""
    return SimpleNamespace(
        write_frames=write_frames,
        there_and_back=there_and_back,
        write_sheet=write_sheet,
        casme2_header=CASME2_HEADER,
        casme2_row=casme2_row,
        samm_header=SAMM_HEADER,
        samm_row=samm_row,
    )


@pytest.fixture(scope="session")
def repository():
    return Path(__file__).resolve().parents[3]
