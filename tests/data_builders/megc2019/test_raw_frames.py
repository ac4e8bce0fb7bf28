"""Raw releases: layouts, coding sheets, classes, and what is done where sheet and frames disagree."""

import os
import shutil

import pytest

from data_builders.megc2019.composite import count, count_notes
from data_builders.megc2019.raw_frames import find_databases, read_raw
from mer_jax.errors import UserError


def by_name(clips):
    return {clip.name: clip for clip in clips}


def test_the_three_releases(raw):
    folders = find_databases(raw.root)
    assert folders == {"casme2": raw.casme2, "samm": raw.samm, "smic": raw.root / "SMIC"}
    clips, notes = read_raw(folders)
    assert [(clip.name, clip.database, clip.subject, clip.label) for clip in clips] == [
        ("sub01_EP02_01f", "casme2", "sub01", 0),
        ("sub01_EP03_02", "casme2", "sub01", 1),
        ("sub02_EP01_11f", "casme2", "sub02", 2),
        ("006_006_1_2", "samm", "006", 0),
        ("011_011_1_1", "samm", "011", 1),
        ("011_011_2_1", "samm", "011", 2),
        ("s01_s01_ne_01", "smic", "s01", 0),
        ("s01_s01_sur_01", "smic", "s01", 2),
        ("s11_s11_po_01", "smic", "s11", 1),
    ]
    for clip in clips:
        assert len(clip.frames) == 9 and clip.apex == 4
    assert [clip.apex_annotated for clip in clips] == [True, False, True, True, True, False, False, False, False]
    first = clips[0].frames
    assert (first[0].name, first[4].name, first[8].name) == ("reg_img46.jpg", "reg_img50.jpg", "reg_img54.jpg")
    assert clips[3].frames[4].name == "006_05566.jpg" and clips[6].frames[0].name == "reg_image235030.bmp"
    assert notes == [
        "casme2: 2 clips left out as the challenge does: 1 by name, 1 others",
        "casme2: 1 clip without a usable apex frame in the sheet, so that the frame half-way was taken: sub01_EP03_02",
        "samm: 1 clip left out as the challenge does: 1 other",
        "samm: 1 clip without a usable apex frame in the sheet, so that the frame half-way was taken: 011_011_2_1",
        "smic: has no annotated apex, so that the frame half-way was taken in all 3 clips",
    ]


def test_one_database_alone_and_from_its_inner_folder(raw):
    for folder in (raw.casme2, raw.casme2 / "Cropped"):
        assert len(read_raw({"casme2": folder})[0]) == 3
    for folder in (raw.root / "SMIC", raw.smic):
        assert len(read_raw({"smic": folder})[0]) == 3


def test_the_high_speed_part_of_smic_is_taken(raw):
    shutil.copytree(raw.smic, raw.root / "SMIC" / "VIS")
    clips, _ = read_raw({"smic": raw.root / "SMIC"})
    assert all("HS" in clip.frames[0].parts for clip in clips)
    raw.smic.rename(raw.smic.with_name("NIR"))
    with pytest.raises(UserError, match=r"frames of smic in NIR, VIS; give one of these"):
        read_raw({"smic": raw.root / "SMIC"})
    for release in ("all_cropped", "all_raw"):
        shutil.copytree(raw.root / "SMIC" / "VIS", raw.root / "both" / release / "HS")
    with pytest.raises(UserError, match=r"frames of smic in all_cropped/HS, all_raw/HS; give one of these"):
        read_raw({"smic": raw.root / "both"})


def test_the_clips_of_casme2_that_the_challenge_left_out(raw, raw_made):
    # By the challenge's own list of 442 clips, against the sheet of 2019.
    left_out = [(4, "EP12_01f", "disgust"), (5, "EP09_05f", "disgust"), (24, "EP07_01", "surprise"),
                (24, "EP07_04f", "surprise"), (24, "EP10_03", "surprise")]  # fmt: skip
    kept = [(5, "EP12_03f", "surprise"), (24, "EP18_03", "surprise")]
    rows = [raw_made.casme2_row(subject, name, 1, 3, 5, emotion) for subject, name, emotion in left_out + kept]
    for subject, name, *_ in rows:
        folder = raw.casme2 / "Cropped" / f"sub{subject:02d}" / name
        shutil.rmtree(folder, ignore_errors=True)
        raw_made.write_frames(folder, [f"reg_img{number}.jpg" for number in range(1, 6)], range(5))
    raw_made.write_sheet(raw.casme2_sheet, raw_made.casme2_header, rows)
    clips, notes = read_raw({"casme2": raw.casme2})
    assert [clip.name for clip in clips] == ["sub05_EP12_03f", "sub24_EP18_03"]
    assert notes[0] == "casme2: 5 clips left out as the challenge does: 5 by name"


@pytest.mark.parametrize("name", ["~$CASME2-coding-20140508.xlsx", "._CASME2-coding-20140508.xlsx"])
def test_what_programs_leave_beside_a_sheet_is_no_sheet(raw, name):
    (raw.casme2 / name).write_bytes(b"a lock")
    assert len(read_raw({"casme2": raw.casme2})[0]) == 3


def test_columns_stand_where_they_like(raw, raw_made):
    rows = [(None, "Happiness", "103", "011_1_1", "99", 11.0, "95")]
    header = ("x", "estimated emotion", "OFFSET FRAME", "FileName", "Apex  Frame", "subject", "Onset_Frame")
    raw_made.write_sheet(raw.samm_sheet, header, rows, above=3)
    clips, notes = read_raw({"samm": raw.samm})
    assert [(clip.name, clip.apex, clip.label) for clip in clips] == [("011_011_1_1", 4, 1)]
    assert notes == ["samm: 3 folders not in the sheet, not read: 006/006_1_2, 006/006_1_3, 011/011_2_1"]


def test_subjects_that_share_a_name_are_told_apart(raw, raw_made):
    # SAMM numbered like nobody's: only a prefix keeps two people apart.
    clips, _ = read_raw({"casme2": raw.casme2, "samm": raw.samm})
    assert {clip.subject for clip in clips} == {"sub01", "sub02", "006", "011"}


@pytest.mark.parametrize("apex", ["/", None, "", -1, 0, 45, 46, 55, "?"])
def test_an_unusable_apex_is_the_frame_half_way(raw, raw_made, apex):
    rows = [raw_made.casme2_row(1, "EP02_01f", 46, apex, 54, "Disgust")]
    raw_made.write_sheet(raw.casme2_sheet, raw_made.casme2_header, rows)
    clips, notes = read_raw({"casme2": raw.casme2})
    assert clips[0].apex == 4 and not clips[0].apex_annotated
    assert any("without a usable apex frame" in line for line in notes)


@pytest.mark.parametrize(
    ("onset", "apex", "offset", "first", "apex_name", "last", "note"),
    [
        (46, 48, 54, 46, 48, 54, None),
        (46, 54, 54, 46, 54, 54, None),
        (46, 50, 70, 46, 50, 54, "without the very frame of onset, apex or offset, the nearest taken instead"),
        (40, 50, 54, 46, 50, 54, "without the very frame of onset, apex or offset, the nearest taken instead"),
        (46, 50, 11, 46, 50, 54, "without a usable offset frame in the sheet, cut at their last frame"),
        (46, 50, "/", 46, 50, 54, "without a usable offset frame in the sheet, cut at their last frame"),
        # Numbered anew when they were cut out.
        (146, 148, 154, 46, 48, 54, None),
    ],
)
def test_sheet_and_frames(raw, raw_made, onset, apex, offset, first, apex_name, last, note):
    rows = [raw_made.casme2_row(1, "EP02_01f", onset, apex, offset, "disgust")]
    raw_made.write_sheet(raw.casme2_sheet, raw_made.casme2_header, rows)
    (clip,), notes = read_raw({"casme2": raw.casme2})
    frames = [clip.frames[index].name for index in (0, clip.apex, -1)]
    assert frames == [f"reg_img{number}.jpg" for number in (first, apex_name, last)]
    told = [line for line in notes if "not in the sheet" not in line]
    assert told == ([f"casme2: 1 clip {note}: sub01_EP02_01f"] if note else [])


def test_a_missing_apex_frame_is_replaced_by_its_neighbour(raw):
    (raw.casme2 / "Cropped" / "sub01" / "EP02_01f" / "reg_img50.jpg").unlink()
    clips, notes = read_raw({"casme2": raw.casme2})
    assert clips[0].frames[clips[0].apex].name == "reg_img49.jpg" and clips[0].apex_annotated
    assert (
        "casme2: 1 clip without the very frame of onset, apex or offset, the nearest taken instead: sub01_EP02_01f"
        in notes
    )


def test_missing_and_extra_folders_are_listed(raw):
    top = raw.casme2 / "Cropped"
    shutil.rmtree(top / "sub01" / "EP03_02")
    shutil.rmtree(top / "sub02")
    (top / "sub01" / "EP99_01").mkdir()
    clips, notes = read_raw({"casme2": raw.casme2})
    assert [clip.name for clip in clips] == ["sub01_EP02_01f"]
    assert notes[1:] == [
        "casme2: 1 whole subject missing, left out of the data and of the folds: sub02 (1 clip)",
        "casme2: 2 clips without a folder of frames, left out: sub01_EP03_02, sub02_EP01_11f",
        "casme2: 1 folder not in the sheet, not read: sub01/EP99_01",
    ]


def test_clips_of_one_frame_are_left_out(raw):
    for folder in (raw.casme2 / "Cropped" / "sub01" / "EP02_01f", raw.smic / "s1" / "micro" / "negative" / "s1_ne_01"):
        for path in sorted(folder.iterdir())[1:]:
            path.unlink()
    clips, notes = read_raw({"casme2": raw.casme2, "smic": raw.smic})
    assert not {"sub01_EP02_01f", "s01_s01_ne_01"} & by_name(clips).keys()
    assert "casme2: 1 clip with fewer than 2 frames from onset to offset, left out: sub01_EP02_01f" in notes
    assert "smic: 1 clip with fewer than 2 frames, left out: s01_s01_ne_01" in notes


def test_a_folder_whose_name_is_not_utf8(raw):
    # As archives from Chinese systems have them.
    (raw.casme2 / "Cropped" / "sub01" / os.fsdecode(b"\xd0\xc2\xbd\xa8")).mkdir()
    notes = read_raw({"casme2": raw.casme2})[1]
    assert "1 folder not in the sheet, not read: sub01/" in notes[-1]
    clip = raw.smic / "s1" / "micro" / "negative"
    (clip / "s1_ne_01").rename(clip / os.fsdecode(b"s1_ne_01\xd0\xc2"))
    with pytest.raises(UserError, match=r"s1_ne_01.*: the folder's name is not UTF-8; rename it"):
        read_raw({"smic": raw.smic})


def test_smic_says_what_it_cannot_place(raw):
    (raw.smic / "s1" / "micro" / "tense" / "s1_te_01").mkdir(parents=True)
    shutil.rmtree(raw.smic / "s11" / "micro" / "positive")
    _, notes = read_raw({"smic": raw.smic})
    assert notes[1:] == [
        "smic: 1 whole subject without a clip: s11",
        "smic: 1 folder of no class (negative, positive, surprise), not read: s1/micro/tense",
    ]


def test_rows_twice(raw, raw_made):
    row = raw_made.casme2_row(1, "EP02_01f", 46, 50, 54, "disgust")
    raw_made.write_sheet(raw.casme2_sheet, raw_made.casme2_header, [row, ("01", *row[1:])])
    clips, notes = read_raw({"casme2": raw.casme2})
    assert len(clips) == 1 and "casme2: 1 clip twice in the sheet, read once: sub01_EP02_01f" in notes
    other = raw_made.casme2_row(1, "EP02_01f", 46, 49, 54, "disgust")
    raw_made.write_sheet(raw.casme2_sheet, raw_made.casme2_header, [row, other])
    with pytest.raises(UserError, match=r"row 3 contradicts .*row 2, which has the same Subject and Filename"):
        read_raw({"casme2": raw.casme2})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("x", "EP02_01f", 46, 50, 54, "disgust"), r"row 2 has the Subject 'x'; write a number"),
        ((1, None, 46, 50, 54, "disgust"), r"row 2 has no Filename"),
        ((1, "EP02_01f", "?", 50, 54, "disgust"), r"row 2 has '\?' as onset frame of sub01_EP02_01f"),
        ((1, "EP02_01f", 46, 50, 54, "joy"), r"row 2 has the emotion 'joy'; casme2 has disgust, repression"),
    ],
)
def test_a_wrong_row_is_named(raw, raw_made, row, message):
    raw_made.write_sheet(raw.casme2_sheet, raw_made.casme2_header, [raw_made.casme2_row(*row)])
    with pytest.raises(UserError, match=message) as caught:
        read_raw({"casme2": raw.casme2})
    assert "\n" not in str(caught.value)


def test_a_wrong_sheet_is_named(raw, raw_made, tmp_path):
    def read(sheet=None):
        return read_raw({"samm": raw.samm}, {"samm": sheet})

    header = [name for name in raw_made.samm_header if name != "Apex Frame"]
    raw_made.write_sheet(raw.samm_sheet, header, [], above=13)
    with pytest.raises(
        UserError, match=r"no row holds the columns Apex Frame; give the coding sheet as it was released"
    ):
        read()
    raw_made.write_sheet(raw.samm_sheet, raw_made.samm_header, [])
    with pytest.raises(UserError, match=r"has no rows under its header"):
        read()
    raw.samm_sheet.write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match=r"cannot be read as a workbook .*save it as \.xlsx"):
        read()
    with pytest.raises(UserError, match=r"none\.xlsx: no such coding sheet"):
        read(tmp_path / "none.xlsx")
    shutil.copy(raw.samm_sheet, raw.samm / "SAMM_Micro_FACS_Codes_v3.xlsx")
    with pytest.raises(UserError, match=r"several coding sheets \(SAMM_.*v2\.xlsx, .*v3\.xlsx\).*--samm_sheet which"):
        read()
    for path in raw.samm.glob("*.xlsx"):
        path.unlink()
    with pytest.raises(
        UserError, match=r"no coding sheet called like SAMM_Micro_FACS_Codes\*\.xlsx; say with --samm_s"
    ):
        read()


def test_wrong_folders_are_named(raw, tmp_path):
    with pytest.raises(UserError, match=r"nowhere: is no folder that can be read"):
        read_raw({"smic": tmp_path / "nowhere"})
    with pytest.raises(UserError, match=r"holds no folders of subjects of samm \(006, 007, \.\.\.\)"):
        read_raw({"samm": raw.casme2})
    with pytest.raises(UserError, match=r"none of the clips of .*CASME2.* is there; give the folder that holds 006"):
        read_raw({"samm": raw.samm}, {"samm": raw.casme2_sheet})
    with pytest.raises(UserError, match=r"holds no folder called like casme2, samm, smic"):
        find_databases(raw.casme2)
    (raw.root / "casme2").mkdir()
    with pytest.raises(UserError, match=r"'CASME II' and 'casme2' both mean casme2; name one with --casme2"):
        find_databases(raw.root)


def test_frames_that_cannot_be_told_apart(raw):
    folder = raw.casme2 / "Cropped" / "sub01" / "EP02_01f"
    shutil.copy(folder / "reg_img46.jpg", folder / "img46.jpg")
    with pytest.raises(UserError, match=r"'img46\.jpg' and 'reg_img46\.jpg' are the same frame; keep one of them"):
        read_raw({"casme2": raw.casme2})
    (folder / "img46.jpg").rename(folder / "face.jpg")
    with pytest.raises(UserError, match=r"face\.jpg: the file's name holds no number"):
        read_raw({"casme2": raw.casme2})


def test_counts_beside_those_of_the_composite(made):
    rows = made.table_rows()
    counts = count(*([row[name] for row in rows] for name in ("label", "dataset", "sub")))
    assert {name: sum(told["clips"]) for name, told in counts.items()} == {"casme2": 145, "samm": 133, "smic": 164}
    assert all(told["clips"] == told["expected_clips"] for told in counts.values())
    assert count_notes(counts) == []
    rows = [row for row in rows if row["dataset"] != "samm" and row["sub"] != "s03"]
    assert count_notes(count(*([row[name] for row in rows] for name in ("label", "dataset", "sub")))) == [
        "no clips of samm: this is not the composite of casme2 + samm + smic",
        "smic: 153 clips (65 negative, 48 positive, 40 surprise) of 15 subjects; the composite has 164 clips "
        "(70 negative, 51 positive, 43 surprise) of 16 subjects",
    ]
