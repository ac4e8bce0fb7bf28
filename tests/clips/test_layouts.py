import csv
import os
import warnings

import openpyxl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mer_jax.clips import layouts
from mer_jax.clips.layouts import LABELS, read_challenge, read_release
from mer_jax.errors import UserError

HEADER = ["Id", *LABELS]
ROWS = [["1", 1, 0, 0, 0, 0], ["2", 0, 1, 0, 1, 0], ["10", 0, 0, 0, 0, 1]]


def make_frames(folder, names=("1.jpg", "2.jpg", "3.jpg")):
    folder.mkdir(parents=True)
    for name in names:
        Image.new("RGB", (8, 4)).save(folder / name, "PNG" if name.lower().endswith("png") else "JPEG")
    return folder


def write_csv(path, header=HEADER, rows=ROWS):
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


@pytest.fixture
def challenge(tmp_path):
    """Three training and two test sequences with a labels CSV, in the default places."""
    for folder in ("train/seq_2", "train/seq_10", "train/seq_1", "test/seq_30", "test/seq_4"):
        make_frames(tmp_path / folder)
    write_csv(tmp_path / "train.csv")
    return tmp_path


def said(caught):
    """The message, which is one line."""
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def refuse(root, *parts, **arguments):
    with pytest.raises(UserError) as caught:
        read_challenge(root, **arguments)
    message = said(caught)
    for part in parts:
        assert part in message
    return message


# --- the challenge: what it reads -------------------------------------------------------------------------


def test_challenge(challenge):
    clips = read_challenge(challenge)
    assert [(clip.name, clip.id, clip.split, clip.labels) for clip in clips] == [
        ("seq_1", 1, "train", (1, 0, 0, 0, 0)),
        ("seq_2", 2, "train", (0, 1, 0, 1, 0)),
        ("seq_10", 10, "train", (0, 0, 0, 0, 1)),
        ("seq_4", 4, "test", None),
        ("seq_30", 30, "test", None),
    ]
    for clip in clips:
        assert clip.frames == tuple(challenge / clip.split / clip.name / name for name in ("1.jpg", "2.jpg", "3.jpg"))
        assert (clip.subject, clip.two_view, clip.onset, clip.apex, clip.offset, clip.aus) == (
            "",
            True,
            None,
            None,
            None,
            (),
        )


def test_other_places(tmp_path):
    """Sequences directly under the root, tests and labels elsewhere or inside the root."""
    root = tmp_path / "sequences"
    for name in ("1", "2", "10"):
        make_frames(root / name)
    make_frames(root / "test" / "3")
    make_frames(tmp_path / "unseen" / "4")
    labels = write_csv(tmp_path / "labels.csv")
    assert [(c.name, c.split) for c in read_challenge(root, labels)] == [
        ("1", "train"),
        ("2", "train"),
        ("10", "train"),
        ("3", "test"),
    ]
    (root / "test" / "3").rename(root / "3")
    (root / "test").rmdir()
    write_csv(labels, rows=[*ROWS, ["3", 0, 0, 0, 0, 0]])
    clips = read_challenge(str(root), str(labels), test_root=str(tmp_path / "unseen"))
    assert [(c.name, c.split) for c in clips][-2:] == [("10", "train"), ("4", "test")]
    assert clips[2].labels == (0, 0, 0, 0, 0)


def test_frames_by_first_integer_then_name(challenge):
    names = ["img10.JPG", "img2.jpeg", "img2_b.png", "img03.Png", "a1.JPEG"]
    folder = make_frames(challenge / "train" / "seq_3", names)
    for other in ("notes.txt", "4.bmp", ".5.jpg", "._1.jpg"):
        (folder / other).touch()
    (folder / "6.jpg").mkdir()
    write_csv(challenge / "train.csv", rows=[*ROWS, ["3", 0, 0, 0, 0, 0]])
    clip = read_challenge(challenge)[2]
    assert [frame.name for frame in clip.frames] == ["a1.JPEG", "img2.jpeg", "img2_b.png", "img03.Png", "img10.JPG"]


def test_frames_that_begin_with_the_number_of_their_clip(challenge):
    names = ["3_1.jpg", "3_2.jpg", "3_9.jpg", "3_10.jpg", "3_11.jpg", "3_100.jpg"]
    make_frames(challenge / "train" / "seq_3", sorted(names))
    write_csv(challenge / "train.csv", rows=[*ROWS, ["3", 0, 0, 0, 0, 0]])
    assert [frame.name for frame in read_challenge(challenge)[2].frames] == names


@settings(deadline=None, max_examples=25)
@given(numbers=st.lists(st.integers(0, 10**9), min_size=2, max_size=8, unique=True), width=st.integers(1, 10))
def test_any_numbering_is_in_order_of_numbers(tmp_path_factory, numbers, width):
    root = tmp_path_factory.mktemp("order")
    (root / "7").mkdir()
    for number in numbers:
        (root / "7" / f"frame{number:0{width}d}.jpg").touch()
    write_csv(root / "train.csv", rows=[["7", 0, 0, 0, 0, 0]])
    (clip,) = read_challenge(root)
    assert [int(frame.stem[5:]) for frame in clip.frames] == sorted(numbers)


def test_other_things_lie_about(challenge):
    (challenge / "train" / "readme.txt").touch()
    (challenge / "train" / ".cache").mkdir()
    (challenge / "train" / "__MACOSX").mkdir()
    (challenge / "ground_truth").mkdir()
    assert len(read_challenge(challenge)) == 5


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffId,Negative,Positive,Repression,Surprise,Others\n1,1,0,0,0,0\n2,0,1,0,1,0\n10,0,0,0,0,1\n",
        'Id, "Negative" ,Positive,Repression, Surprise ,Others\r\n"1", 1,"0",0,0,0\r\n"2",0,1,0,1,0\r\n10,0,0,0,0,1',
        "\n id,negative,POSITIVE,Repression,Surprise,Others\n1.0,1.0,0.0,0.,0.00,0\n\n002,0,1,0,1,0\n,,,,,\n"
        "10,0,0,0,0,1",
        "Others,Surprise,Id,Repression,Positive,Negative\n0,0,seq_1,0,0,1\n0,1,seq_2,0,1,0\n1,0,seq_10,0,0,0\n",
        "Id,note,Negative,Positive,Repression,Surprise,Others,frames\n"
        '1,"a, ""b""",1,0,0,0,0,3\n2,,0,1,0,1,0,3\n10,,0,0,0,0,1,3\n',
    ],
    ids=["BOM", "quotes and spaces", "floats, case, blank lines", "order and folder names", "further columns"],
)
def test_csv_in_many_hands(challenge, content):
    (challenge / "train.csv").write_bytes(content.encode())
    assert [clip.labels for clip in read_challenge(challenge)[:3]] == [
        (1, 0, 0, 0, 0),
        (0, 1, 0, 1, 0),
        (0, 0, 0, 0, 1),
    ]


def test_columns_by_other_names(challenge):
    header = ["video", "neg", "Positive", "Repression", "Surprise", "oth", "sub", "n"]
    rows = [[*row, subject, 3] for row, subject in zip(ROWS, ["s1", " 07 ", ""], strict=True)]
    write_csv(challenge / "train.csv", header, rows)
    columns = {"Id": "video", "Negative": "neg", "Others": "oth", "subject": "sub"}
    clips = read_challenge(challenge, columns=columns)
    assert [clip.labels for clip in clips[:3]] == [tuple(row[1:]) for row in ROWS]
    assert [clip.subject for clip in clips] == ["s1", "07", "", "", ""]


def test_exact_name_comes_before_the_number(tmp_path):
    """'12' is a folder's name and '3' another one's number, whatever else is in the names."""
    make_frames(tmp_path / "12")
    make_frames(tmp_path / "take3_of_12")
    write_csv(tmp_path / "train.csv", rows=[["take3_of_12", 1, 0, 0, 0, 0], ["12", 0, 1, 0, 0, 0]])
    assert [(c.name, c.id, c.labels[0]) for c in read_challenge(tmp_path)] == [("take3_of_12", 3, 1), ("12", 12, 0)]


# --- the challenge: what it refuses -----------------------------------------------------------------------


def test_missing_folders(challenge):
    refuse(challenge / "nowhere", "nowhere", "check the path")
    refuse(challenge / "train.csv", "train.csv", "check the path")
    refuse(challenge, "unseen", "check the path", test_root=challenge / "unseen")


def test_no_sequences(tmp_path):
    refuse(tmp_path, str(tmp_path), "no sequence folders")


def test_empty_test_folder(challenge):
    for folder in (challenge / "test").iterdir():
        folder.rename(challenge / folder.name)
    refuse(challenge, "test", "no sequence folders")


def test_no_labels_file(challenge):
    (challenge / "train.csv").unlink()
    refuse(challenge, "train.csv", "give its path")
    refuse(challenge, "cannot be read", labels_csv=challenge / "train")


def test_sequence_without_frames(challenge):
    (challenge / "test" / "seq_5").mkdir()
    (challenge / "test" / "seq_5" / "clip.avi").touch()
    refuse(challenge, "test/seq_5", "no frames", ".jpg", "restore")


@pytest.mark.parametrize("split", ["train", "test"])
def test_one_frame(challenge, split):
    folder = challenge / split / ("seq_2" if split == "train" else "seq_4")
    for name in ("1.jpg", "2.jpg"):
        (folder / name).unlink()
    refuse(challenge, str(folder), "has 1 frame,", "at least 2", "motion")
    assert len(read_challenge(challenge, min_frames=1)) == 5
    refuse(challenge, "has 1 frame,", "at least 3", min_frames=3)


def test_frame_without_a_number(challenge):
    make_frames(challenge / "test" / "seq_5", ["1.jpg", "thumb.jpg"])
    refuse(challenge, "seq_5/thumb.jpg", "no number", "rename")


def test_frame_in_two_formats(challenge):
    make_frames(challenge / "test" / "seq_5", ["1.jpg", "2.jpg", "1.png"])
    refuse(challenge, "test/seq_5", "2 files for the frame '1'", "keep one")


def test_a_folder_whose_name_is_not_utf8(challenge):
    make_frames(challenge / "train" / os.fsdecode(b"\xd0\xc2 77"))  # as archives from Chinese systems have them
    refuse(challenge, "77: the folder's name is not UTF-8; rename it")


def test_folder_without_a_number(challenge):
    make_frames(challenge / "train" / "extra")
    refuse(challenge, "train/extra", "no number", "rename")


@pytest.mark.parametrize("split", ["train", "test"])
def test_two_folders_of_one_number(challenge, split):
    make_frames(challenge / split / "04_again")
    make_frames(challenge / split / "4_more")
    refuse(challenge, "'04_again' and '4_more'", "Id 4", "rename")


def test_clip_in_both_splits(challenge):
    make_frames(challenge / "test" / "seq_2")
    refuse(challenge, "'seq_2' is both in", "keep it in one")


def test_labelled_clip_without_folder(challenge):
    write_csv(challenge / "train.csv", rows=[*ROWS, ["11", 0, 0, 0, 0, 0]])
    refuse(challenge, "train.csv", "line 5", "'11'", "no such sequence folder")
    write_csv(challenge / "train.csv", rows=[*ROWS, ["seq 1", 0, 0, 0, 0, 0]])
    refuse(challenge, "line 5", "'seq 1'")
    write_csv(challenge / "train.csv", rows=[*ROWS, ["", 0, 0, 0, 0, 0]])
    refuse(challenge, "line 5", "''")


@pytest.mark.parametrize("written", ["4", "seq_30"])
def test_labels_of_test_clips_are_refused(challenge, written):
    write_csv(challenge / "train.csv", rows=[*ROWS, [written, 0, 0, 0, 0, 0]])
    refuse(challenge, "line 5", repr(written), "never read", "delete the line")


def test_folder_without_labels(challenge):
    write_csv(challenge / "train.csv", rows=ROWS[:2])
    refuse(challenge, "train.csv", "no row for clip 'seq_10' of", "add the row")
    for number in range(20, 28):
        make_frames(challenge / "train" / f"seq_{number}")
    refuse(challenge, "clips 'seq_10', 'seq_20'", "and 4 more")


@pytest.mark.parametrize("written", ["2", "seq_2", "02", "2.0"])
def test_duplicate_id(challenge, written):
    write_csv(challenge / "train.csv", rows=[*ROWS, [written, 0, 1, 0, 1, 0]])
    refuse(challenge, "line 5", f"Id {written!r} again, after line 3", "delete one")


@pytest.mark.parametrize("value", ["2", "-1", "0.5", "", "yes", "nan", "1e0", "1 0"])
def test_value_that_is_no_label(challenge, value):
    write_csv(challenge / "train.csv", rows=[ROWS[0], ["2", 0, 1, 0, value, 0], ROWS[2]])
    refuse(challenge, "train.csv", "line 3", "Id '2'", repr(value), "'Surprise'", "write 0 or 1")


def test_unknown_class(challenge):
    write_csv(challenge / "train.csv", [*HEADER, "Happy"], [[*row, index % 2] for index, row in enumerate(ROWS)])
    refuse(challenge, "train.csv", "'Happy'", "unknown class", "Repression")


def test_missing_column(challenge):
    write_csv(challenge / "train.csv", ["Id", *LABELS[:4], "Other"])
    refuse(challenge, "train.csv", "no column 'Others'", "'Other'", "Others=<its name>")
    columns = {"Others": "Other", "subject": "person"}
    refuse(challenge, "no column 'person'", columns=columns)
    assert read_challenge(challenge, columns={"Others": "Other"})[2].labels == (0, 0, 0, 0, 1)
    write_csv(challenge / "train.csv", ["name", *LABELS])
    refuse(challenge, "no column 'Id'", "'name'")


def test_doubtful_columns(challenge):
    refuse(challenge, "'id'", "none of our columns", columns={"id": "video"})
    refuse(challenge, "Negative and Positive", "'Positive'", columns={"Negative": "Positive"})
    write_csv(challenge / "train.csv", [*HEADER, "OTHERS"], [[*row, 0] for row in ROWS])
    refuse(challenge, "2 columns 'Others'")


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff", ",,,\n"])
def test_empty_csv(challenge, content):
    (challenge / "train.csv").write_text(content)
    refuse(challenge, "train.csv", "no content")


def test_csv_of_a_header_only(challenge):
    write_csv(challenge / "train.csv", rows=[])
    refuse(challenge, "train.csv", "no rows under its header")


@pytest.mark.parametrize("line", ["2,0,1,0,1", "2,0,1,0,1,0,0", '"2,0,1,0,1,0'])
def test_line_of_another_length(challenge, line):
    (challenge / "train.csv").write_text(f"{','.join(HEADER)}\n1,1,0,0,0,0\n{line}\n10,0,0,0,0,1\n")
    refuse(challenge, "train.csv", "fields where the header has 6")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_columns_of_other_separators(challenge, separator):
    with (challenge / "train.csv").open("w", newline="") as stream:
        csv.writer(stream, delimiter=separator).writerows([HEADER, *ROWS])
    refuse(challenge, "train.csv", "not separated by commas")


@pytest.mark.parametrize("content", [",".join(HEADER).encode("utf-16"), b"\xff\xd8\xff\xe0picture", b"x" * 200_000])
def test_no_csv_at_all(challenge, content):
    (challenge / "train.csv").write_bytes(content)
    refuse(challenge, "train.csv", "is no UTF-8 CSV")


# --- the release ------------------------------------------------------------------------------------------

RELEASE = ["sub_ID", "fold_name", "Emotion", "Onset", "Apex", "Offset", "AUs", "AU4", "AU7", "AU12"]


def release_row(subject="S1", fold="a_1", emotion="Negative", onset=5, apex=7, offset=9, aus="AU4", flags=(1, 0, 0)):
    return [subject, fold, emotion, onset, apex, offset, aus, *flags]


def write_workbook(path, rows, header=RELEASE):
    book = openpyxl.Workbook()
    for row in [header, *rows]:
        book.active.append(row)
    book.create_sheet("other").append(["nothing"])
    book.save(path)
    return path


def release(root, *rows, frames=range(5, 10), name="labels.xlsx", pattern="img{:04d}.jpg", header=RELEASE, **arguments):
    """Writes a workbook and the frames of each of its rows, then reads both."""
    for row in rows:
        folder = root / "gray_micro" / str(row[0]) / str(row[1])
        if not folder.exists():
            folder.mkdir(parents=True)
            for number in frames:
                (folder / pattern.format(number)).touch()
    return read_release(write_workbook(root / name, rows, header), root / "gray_micro", **arguments)


def refuse_release(root, *rows, parts, **arguments):
    with pytest.raises(UserError) as caught:
        release(root, *rows, **arguments)
    message = said(caught)
    for part in parts:
        assert part in message


def test_release(tmp_path):
    rows = [
        release_row("S1", "S1_1st_001", "Surprise+Positive", aus="AU4(k)+L7", flags=(1, 1, 0)),
        release_row("S2", "S2_1st_001", "Others", 1, 1, 5, "AU12", (0, 0, 1)),
    ]
    first, second = release(tmp_path, *rows)
    assert first.name == "S1_1st_001"
    assert (first.id, first.subject, first.split, first.two_view) == (1, "S1", "train", False)
    assert first.labels == (0, 1, 0, 1, 0)
    assert (first.onset, first.apex, first.offset, len(first.frames)) == (0, 2, 4, 5)
    assert first.aus == ("AU7",)
    assert [frame.name for frame in first.frames] == [f"img{number:04d}.jpg" for number in range(5, 10)]
    assert first.frames[0].parent == tmp_path / "gray_micro" / "S1" / "S1_1st_001"
    assert (second.id, second.labels, second.onset, second.apex) == (2, (0, 0, 0, 0, 1), 0, 0)
    assert all(clip.two_view for clip in release(tmp_path, *rows, two_view=True))
    assert release(tmp_path, *rows, keep_k_aus=True)[0].aus == ("AU4", "AU7")


@pytest.mark.parametrize(
    ("frames", "pattern", "expected"),
    [
        (range(0, 40), "{}.jpg", range(5, 10)),  # the whole recording
        (range(5, 10), "{:03d}.png", range(5, 10)),  # trimmed, numbered as in the recording
        (range(1, 6), "f{}.JPG", range(1, 6)),  # trimmed, numbered anew
        (range(0, 5), "S1_1st_001_{:03d}.jpg", range(0, 5)),  # the clip's name repeated before the number
        (range(0, 40), "S1_1st_001_{}.jpg", range(5, 10)),
        (range(3, 12), "{:05d}_gray2.jpg", range(5, 10)),
        ([20, 8, 30, 9, 10], "{}.jpg", [8, 9, 10, 20, 30]),  # as many as wanted: trimmed, in order of numbers
    ],
)
def test_release_frames(tmp_path, frames, pattern, expected):
    (clip,) = release(tmp_path, release_row(), frames=frames, pattern=pattern)
    assert [frame.name for frame in clip.frames] == [pattern.format(number) for number in expected]


@pytest.mark.parametrize("frames", [range(5, 9), range(7, 20), [1, 2, 3, 5, 6, 7, 9]])
def test_release_frames_that_do_not_fit(tmp_path, frames):
    parts = ["S1/a_1", f"{len(frames)} frames", "Onset 5", "Offset 9", "exactly 5"]
    refuse_release(tmp_path, release_row(), frames=frames, parts=parts)


def test_release_frames_without_numbers(tmp_path):
    folder = make_frames(tmp_path / "gray_micro" / "S1" / "a_1", ["a1.jpg", "b1.jpg"])
    refuse_release(tmp_path, release_row(), parts=[str(folder), "'a1.jpg'", "number the frames"])


def test_numeric_subjects_and_cells(tmp_path):
    """Spreadsheets turn ids into numbers and numbers into text."""
    for folder in ("1/a_1", "S02/7", "S13/x", "S20/y"):
        make_frames(tmp_path / "gray_micro" / folder, [f"{n}.jpg" for n in range(5, 10)])
    rows = [
        release_row(1, "a_1"),
        release_row(2.0, 7, onset="5", apex=7.0, offset=" 9 ", flags=("1", None, 0.0)),
        release_row("13", "x", " negative + Others "),
        release_row("S20 ", "y"),
    ]
    book = write_workbook(tmp_path / "labels.xlsx", rows)
    clips = read_release(book, tmp_path / "gray_micro")
    assert [(clip.subject, clip.name) for clip in clips] == [("1", "a_1"), ("2", "7"), ("13", "x"), ("S20", "y")]
    assert clips[1].frames[0].parent == tmp_path / "gray_micro" / "S02" / "7"
    assert (clips[1].apex, clips[1].offset, clips[1].aus) == (2, 4, ("AU4",))
    assert clips[2].labels == (1, 0, 0, 0, 1)


def test_subjects_may_share_a_folder_name(tmp_path):
    clips = release(tmp_path, release_row("S1"), release_row("S2"), release_row("S2", "b_1"))
    assert [clip.name for clip in clips] == ["S1_a_1", "S2_a_1", "S2_b_1"]


def test_blank_rows_keep_the_ids(tmp_path):
    book = write_workbook(tmp_path / "labels.xlsx", [release_row("S1"), [None, " "], release_row("S1", "b_1")])
    for fold in ("a_1", "b_1"):
        make_frames(tmp_path / "gray_micro" / "S1" / fold, [f"{n}.jpg" for n in range(5, 10)])
    assert [clip.id for clip in read_release(book, tmp_path / "gray_micro")] == [1, 3]


@pytest.mark.parametrize(
    ("aus", "flags", "plain", "kept"),
    [
        ("AU4(k)+L7", (1, 1, 0), "AU7", "AU4 AU7"),
        ("AU4+R7(k)", (1, 1, 0), "AU4", "AU4 AU7"),
        ("L7(k)+R7", (0, 1, 0), "AU7", "AU7"),  # the right side is not in doubt
        ("7 (K) + au12", (0, 1, 1), "AU12", "AU7 AU12"),
        ("AUL7(k)+LAU4(k)", (1, 1, 0), "", "AU4 AU7"),
        ("4+AU1(k)+R2+12", (1, 0, 1), "AU2 AU4 AU12", "AU1 AU2 AU4 AU12"),  # 1 and 2 have no column
        ("AU4", (0, 1, 0), "AU7", "AU7"),  # the columns decide
        (None, (0, 0, 0), "", ""),
        (4, (1, 0, 0), "AU4", "AU4"),
        ("AU4+(R?)", (1, 0, 0), "AU4", "AU4"),
    ],
)
def test_action_units(tmp_path, aus, flags, plain, kept):
    row = release_row(aus=aus, flags=flags)
    assert release(tmp_path, row)[0].aus == tuple(plain.split())
    assert release(tmp_path, row, keep_k_aus=True)[0].aus == tuple(kept.split())


def test_action_units_without_columns(tmp_path):
    (clip,) = release(tmp_path, release_row(aus="L12+AU4(k)+1", flags=()), header=RELEASE[:7])
    assert clip.aus == ("AU1", "AU12")
    refuse_release(tmp_path, release_row(aus="1+x", flags=()), header=RELEASE[:7], parts=["row 2", "'x'", "AU4(k)"])


OFFICIAL = "4DME_Labelling_Micro_release v1.xlsx"


@pytest.mark.parametrize(
    ("name", "num_rows", "wanted", "swapped"),
    [
        (OFFICIAL, 147, None, True),
        ("4DME_Labelling_Micro_release_v1.xlsx", 146, None, True),
        (OFFICIAL, 145, None, False),
        (OFFICIAL, 147, False, False),
        ("4DME_Labelling_Micro_release v2.xlsx", 147, None, False),
        ("corrected.xlsx", 147, None, False),
        ("corrected.xlsx", 147, True, True),
    ],
)
def test_the_known_swap(tmp_path, name, num_rows, wanted, swapped):
    rows = [release_row("S1", f"clip_{index}") for index in range(num_rows)]
    rows[144] = release_row("S1", "clip_144", "Surprise", aus="AU7(k)", flags=(0, 1, 0))
    if num_rows > 145:
        rows[145] = release_row("S1", "clip_145", "Others", aus="AU12", flags=(0, 0, 1))
    clips = release(tmp_path, *rows, name=name, swap_au_rows=wanted, keep_k_aus=True)
    assert clips[144].aus == (("AU12",) if swapped else ("AU7",))
    assert (clips[144].name, clips[144].labels) == ("clip_144", (0, 0, 0, 1, 0))
    if num_rows > 145:
        assert clips[145].aus == (("AU7",) if swapped else ("AU12",))
        assert clips[145].labels == (0, 0, 0, 0, 1)
        # The mark moves with the string that bears it.
        marked, other = (145, 144) if swapped else (144, 145)
        plain = release(tmp_path, *rows, name=name, swap_au_rows=wanted)
        assert (plain[marked].aus, plain[other].aus) == ((), ("AU12",))
    assert {clip.aus for index, clip in enumerate(clips) if index not in (144, 145)} == {("AU4",)}


def test_swap_of_rows_that_are_not_there(tmp_path):
    refuse_release(tmp_path, release_row(), swap_au_rows=True, parts=["rows 144 and 145", "swap_au_rows"])


@pytest.mark.parametrize("column", RELEASE[:7])
def test_workbook_without_a_column(tmp_path, column):
    index = RELEASE.index(column)
    row, header = release_row(), list(RELEASE)
    del row[index], header[index]
    book = write_workbook(tmp_path / "labels.xlsx", [row], header)
    with pytest.raises(UserError) as caught:
        read_release(book, tmp_path)
    assert f"labels.xlsx: has no column {column!r}" in said(caught)
    refuse_release(tmp_path, [*release_row(), 1], header=[*RELEASE, column], parts=[f"has 2 columns {column!r}"])


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"emotion": "Happy"}, ["'Happy'", "Repression", "joined by +"]),
        ({"emotion": "Positive+"}, ["'Positive+'"]),
        ({"emotion": None}, ["''"]),
        ({"onset": None}, ["'' as Onset", "frame number"]),
        ({"apex": "late"}, ["'late' as Apex"]),
        ({"offset": 9.5}, ["'9.5' as Offset"]),
        ({"apex": 4}, ["Onset 5, Apex 4, Offset 9", "ascending"]),
        ({"apex": 10}, ["Apex 10"]),
        ({"offset": 5, "apex": 5, "onset": 6}, ["Onset 6"]),
        ({"aus": "AU4+brow(k)"}, ["'brow(k)'", "AU4(k)"]),
        ({"flags": (1, 2, 0)}, ["'2' in column 'AU7'", "0 or 1"]),
        ({"flags": (1, "x", 0)}, ["'x' in column 'AU7'"]),
    ],
)
def test_bad_cell(tmp_path, changes, parts):
    refuse_release(
        tmp_path, release_row(), release_row("S2", "b_2", **changes), parts=["row 3", "'b_2'", "'S2'", *parts]
    )


def test_rows_without_a_folder(tmp_path):
    make_frames(tmp_path / "gray_micro" / "S1" / "a_1", [f"{n}.jpg" for n in range(5, 10)])
    for rows, part in [
        ([release_row("S1", "b_1")], "S1/b_1"),
        ([release_row("S7", "a_1")], "S7/a_1"),
        ([release_row(None)], "no sub_ID"),
        ([release_row(fold=None)], "no fold_name"),
        ([release_row(), release_row()], "repeats row 2"),
    ]:
        book = write_workbook(tmp_path / "labels.xlsx", rows)
        with pytest.raises(UserError, match=rf"labels\.xlsx: row [23] .*{part}"):
            read_release(book, tmp_path / "gray_micro")


def test_numeric_subject_that_fits_two_folders(tmp_path):
    for subject in ("S1", "01"):
        make_frames(tmp_path / "gray_micro" / subject / "a_1", [f"{n}.jpg" for n in range(5, 10)])
    book = write_workbook(tmp_path / "labels.xlsx", [release_row(1)])
    with pytest.raises(UserError, match=r"no folder .*gray_micro/1/a_1"):
        read_release(book, tmp_path / "gray_micro")


def test_release_clip_of_one_frame(tmp_path):
    row = release_row(onset=7, apex=7, offset=7)
    refuse_release(tmp_path, row, parts=["S1/a_1", "has 1 frame,", "motion"])
    (clip,) = release(tmp_path, row, min_frames=1)
    assert [frame.name for frame in clip.frames] == ["img0007.jpg"]


def test_release_folder_without_frames(tmp_path):
    refuse_release(tmp_path, release_row(), frames=(), parts=["S1/a_1", "no frames", "restore"])


def test_bad_workbook_files(tmp_path):
    def refuse_book(path, part, root=tmp_path):
        with pytest.raises(UserError) as caught:
            read_release(path, root)
        assert part in said(caught)
        assert path.name in str(caught.value) or root.name in str(caught.value)

    refuse_book(tmp_path / "none.xlsx", "give its path")
    broken = tmp_path / "broken.xlsx"
    broken.write_bytes(b"PK\x03\x04 and then nothing")
    refuse_book(broken, "save it as .xlsx")
    text = tmp_path / "labels.csv"
    text.write_text("sub_ID,fold_name\n")
    refuse_book(text, "save it as .xlsx")
    refuse_book(write_workbook(tmp_path / "empty.xlsx", [], header=[]), "no column 'sub_ID'")
    refuse_book(write_workbook(tmp_path / "rowless.xlsx", []), "no rows under its header")
    book = write_workbook(tmp_path / "good.xlsx", [release_row()])
    refuse_book(book, "check the path", root=tmp_path / "gray_nowhere")


def test_workbook_with_spreadsheet_decoration_is_read_in_silence(tmp_path, monkeypatch):
    make_frames(tmp_path / "S1" / "a_1", [f"{n}.jpg" for n in range(5, 10)])
    book = write_workbook(tmp_path / "labels.xlsx", [release_row()])
    load = openpyxl.load_workbook

    def chatty(*args, **kwargs):
        warnings.warn("Data Validation extension is not supported and will be removed", UserWarning, stacklevel=2)
        return load(*args, **kwargs)

    monkeypatch.setattr(openpyxl, "load_workbook", chatty)
    assert len(read_release(book, tmp_path)) == 1


def test_labels_are_in_the_official_order():
    assert layouts.LABELS == ("Negative", "Positive", "Repression", "Surprise", "Others")
