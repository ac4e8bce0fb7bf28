"""Published flow images and their table: names, channels, maps, and one line for everything that is wrong."""

import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from data_builders.megc2019.composite import padded
from data_builders.megc2019.flow_folder import read_flow_folder, read_table
from mer_jax.errors import UserError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("s01_s1_ne_01", "s01_s01_ne_01"),
        ("s01_s01_ne_01", "s01_s01_ne_01"),
        ("s11_s11_po_02", "s11_s11_po_02"),
        ("s3_s3_sur_1", "s03_s03_sur_1"),
        ("sub01_EP02_01f", "sub01_EP02_01f"),
        ("006_006_1_2", "006_006_1_2"),
    ],
)
def test_zeros_of_smic(name, expected):
    assert padded(name) == expected


def test_all_442_clips_are_found_in_the_order_of_the_table(published, made):
    read = read_flow_folder(published)
    rows = made.table_rows()
    assert [row.name for row in read.rows] == [made.file_stem(row) for row in rows]
    assert [row.subject for row in read.rows] == [row["sub"] for row in rows]
    assert [(row.database, row.label) for row in read.rows] == [(row["dataset"], row["label"]) for row in rows]
    assert len({row.subject for row in read.rows}) == 68
    assert list(read.images) == ["onset_apex"] and read.images["onset_apex"].shape == (442, 28, 28, 3)
    assert read.images["onset_apex"].dtype == np.uint8
    for index in (0, 200, 441):
        np.testing.assert_array_equal(read.images["onset_apex"][index], made.image_of(made.file_stem(rows[index])))
    assert read.notes == ()


def test_channels_are_the_reverse_of_what_opencv_reads(few):
    read = read_flow_folder(few.folder)
    path = few.folder / f"{read.rows[0].name} .png"
    # STSTNet's weights were trained on this: strain, v, u.
    np.testing.assert_array_equal(read.images["onset_apex"][0][..., ::-1], cv2.imread(str(path)))


def test_files_without_a_blank_and_with_few_zeros_are_found_too(few):
    for path in list(few.folder.iterdir()):
        path.rename(few.folder / path.name.replace(" .png", ".PNG").replace("_s01_", "_s1_"))
    assert (few.folder / "s01_s1_ne_01.PNG").exists()
    read = read_flow_folder(few.folder, few.table)
    assert len(read.rows) == 12 and read.rows[8].name == "s01_s01_ne_01" and read.notes == ()


def test_several_maps_per_clip(few, made):
    names = [made.file_stem(row) for row in few.rows]
    assert any(name.endswith("_1") for name in names)
    for name in names:
        for plane in (1, 2, 3):
            made.save(made.image_of(name, plane=plane), few.folder / f"{name}_{plane} .png")
    read = read_flow_folder(few.folder)
    assert list(read.images) == ["onset_apex", "apex_offset"] and read.notes == ()
    for phase, plane in (("onset_apex", 0), ("apex_offset", 1)):
        for image, name in zip(read.images[phase], names, strict=True):
            np.testing.assert_array_equal(image, made.image_of(name, plane=plane))

    (few.folder / f"{names[3]}_1 .png").unlink()
    read = read_flow_folder(few.folder)
    assert [row.name for row in read.rows] == names[:3] + names[4:]
    assert read.notes == (f"no images of 1 clip, left out: {names[3]}",)


def test_a_clip_is_no_second_map_of_another(few, made):
    # 006_006_1 and 006_006_1_1 are both clips; so are sub01_x and sub01_x_1.
    rows = [row for row in few.rows if row["dataset"] == "samm"]
    rows += [rows[0] | {"filename_o": "006_1", "imagename": "006_006_1.jpg"}]
    made.save(made.image_of("006_006_1"), few.folder / "006_006_1 .png")
    made.write_table(few.table, rows)
    read = read_flow_folder(few.folder)
    assert list(read.images) == ["onset_apex"]
    np.testing.assert_array_equal(read.images["onset_apex"][4], made.image_of("006_006_1"))
    np.testing.assert_array_equal(read.images["onset_apex"][0], made.image_of("006_006_1_1"))


def test_zeros_that_a_spreadsheet_took_are_restored(few, made):
    rows = [row | {"sub": {"006": "6", "007": "7.0", "s01": "s1"}.get(row["sub"], row["sub"])} for row in few.rows]
    made.write_table(few.table, [row | {"label": f"{row['label']}.0"} for row in rows])
    read = read_flow_folder(few.folder)
    assert [row.subject for row in read.rows] == [row["sub"] for row in few.rows]
    assert [row.label for row in read.rows] == [row["label"] for row in few.rows]


def test_a_row_without_an_imagename_has_that_of_its_other_columns(few, made):
    made.write_table(few.table, [row | {"imagename": ""} for row in few.rows])
    assert [row.name for row in read_flow_folder(few.folder).rows] == [made.file_stem(row) for row in few.rows]


def test_subjects_that_share_a_name_are_told_apart(few, made):
    rows = [
        row | {"sub": "01", "imagename": f"01_{index}.jpg", "filename_o": index} for index, row in enumerate(few.rows)
    ]
    made.write_table(few.table, rows)
    for index in range(12):
        made.save(made.image_of(str(index)), few.folder / f"01_{index} .png")
    read = read_flow_folder(few.folder)
    assert [row.subject for row in read.rows[::4]] == ["casme2-01", "samm-01", "smic-01"]
    assert read.notes[-1] == "subjects of several databases share a name and got their database's in front: 01"


# --- missing and extra files ------------------------------------------------------------------------------


def test_missing_and_extra_files_are_listed(published, made, tmp_path):
    folder = shutil.copytree(published, tmp_path / "images")
    gone = [row for row in made.table_rows() if row["sub"] == "sub05"]
    some = [row for row in made.table_rows() if row["sub"] == "s03"][:1]
    for row in (*gone, *some):
        (folder / f"{made.file_stem(row)} .png").unlink()
    for index in range(12):
        made.save(made.image_of("x"), folder / f"sub99_EP{index:02d}_01f .png")
    (folder / "Thumbs.db").write_bytes(b"")
    read = read_flow_folder(folder, published.parent / made.TABLE)
    assert len(read.rows) == 442 - len(gone) - 1
    others, whole, missing, extra = read.notes
    assert others == "not read, because no PNG files: Thumbs.db"
    assert whole == (
        f"1 whole subject missing, left out of the data and of the folds: sub05 of casme2 ({len(gone)} clips)"
    )
    assert missing.startswith(f"no images of {len(gone) + 1} clips, left out: sub05_")
    assert extra.startswith("12 files without a clip, not read: sub99_EP00_01f .png, ")
    assert extra.endswith("sub99_EP09_01f .png and 2 more")


def test_no_images_at_all(few, tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such folder of flow images"):
        read_flow_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no flow images \(\*\.png\) at all; there are some in .*STSNet_whole"):
        read_flow_folder(few.folder.parent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no flow images \(\*\.png\) at all; give the folder"):
        read_flow_folder(tmp_path / "empty")


def test_images_of_another_set(few, made):
    for path in list(few.folder.iterdir()):
        path.rename(few.folder / f"x{path.name}")
    with pytest.raises(UserError, match=r"none of its 12 images belongs to a clip of .*'sub01_EP01_01f', the images"):
        read_flow_folder(few.folder)


def test_one_name_twice(few):
    path = next(few.folder.glob("sub01*"))
    shutil.copy(path, few.folder / path.name.replace(" .png", ".png"))
    with pytest.raises(UserError, match=r"are one name; keep one of them"):
        read_flow_folder(few.folder)


# --- the table --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "casme3"}, r"row 3 has the dataset 'casme3'; write one of casme2, samm, smic"),
        ({"label": "3"}, r"row 3 has the label '3'; write 0 \(negative\), 1 \(positive\), 2 \(surprise\)"),
        ({"label": ""}, r"row 3 has the label ''"),
        ({"label": "0.5"}, r"row 3 has the label '0\.5'"),
        ({"label": "-1"}, r"row 3 has the label '-1'"),
        ({"sub": ""}, r"row 3 has no sub"),
        ({"sub": "sub07"}, r"row 3 has the sub 'sub07' but the image 'sub01_EP02_01f' of 'sub01'"),
        ({"imagename": "", "filename_o": ""}, r"row 3 has neither imagename nor filename_o"),
        ({"imagename": "sub01_EP01_01f.jpg"}, r"row 3 repeats the clip 'sub01_EP01_01f' of row 2"),
    ],
)
def test_a_wrong_row_is_named(few, made, change, message):
    rows = list(few.rows)
    rows[1] = rows[1] | change
    made.write_table(few.table, rows)
    with pytest.raises(UserError, match=message) as caught:
        read_flow_folder(few.folder)
    assert "\n" not in str(caught.value)


def test_a_wrong_table_is_named(few, tmp_path):
    lines = few.table.read_text().splitlines()
    few.table.write_text("\n".join([lines[0].replace("label", "class"), *lines[1:]]))
    with pytest.raises(
        UserError, match=r"has no column 'label' \(it has 'dataset', .*it needs one each of dataset, sub"
    ):
        read_table(few.table)
    few.table.write_text(lines[0] + "\n\n")
    with pytest.raises(UserError, match=r"has no rows under its header"):
        read_table(few.table)
    few.table.write_bytes(b"dataset,sub\n\xff\xfe")
    with pytest.raises(UserError, match=r"cannot be read as a CSV file"):
        read_table(few.table)
    with pytest.raises(UserError, match=r"no\.csv: no such table"):
        read_flow_folder(few.folder, tmp_path / "no.csv")
    few.table.unlink()
    with pytest.raises(UserError, match=r"its table .* is neither here nor in the folders above; say with --labels"):
        read_flow_folder(few.folder)


def test_byte_order_mark_blank_lines_and_other_spellings_do_no_harm(few):
    text = few.table.read_text().replace("casme2", "CASME II").replace("smic,", "SMIC-HS,")
    few.table.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\n\n").encode() + b",,,,,,\n")
    assert [row.database for row in read_flow_folder(few.folder).rows[::4]] == ["casme2", "samm", "smic"]


# --- images -----------------------------------------------------------------------------------------------


def test_a_file_of_another_size_is_named(few, made):
    path = next(few.folder.glob("006*"))
    made.save(made.image_of("x", size=32), path)
    with pytest.raises(UserError, match=rf"{path.name}: is 32 x 32 pixels while 11 images are 28 x 28; .*remove it"):
        read_flow_folder(few.folder)
    Image.fromarray(made.image_of("x")[:20]).save(path)
    with pytest.raises(UserError, match=rf"{path.name}: is 28 x 20 pixels while"):
        read_flow_folder(few.folder)


def test_any_one_size_will_do_and_is_told(few, made):
    for path in few.folder.iterdir():
        made.save(made.image_of("x", size=56), path)
    read = read_flow_folder(few.folder)
    assert read.images["onset_apex"].shape == (12, 56, 56, 3)
    assert read.notes == ("images are 56 x 56 pixels; the published ones are 28 x 28",)
    for path in few.folder.iterdir():
        Image.fromarray(made.image_of("x", size=56)[:28]).save(path)
    with pytest.raises(UserError, match=r"is 56 x 28 pixels; flow images must be square"):
        read_flow_folder(few.folder)


def _grey16(path):
    Image.fromarray(np.arange(28 * 28, dtype=np.uint16).reshape(28, 28)).save(path)


def _rgb16(path):
    # Pillow reads such a file as if it had 8 bits.
    cv2.imwrite(str(path), np.arange(28 * 28 * 3, dtype=np.uint16).reshape(28, 28, 3))


def _cut(path):
    path.write_bytes(path.read_bytes()[:200])


def _jpeg(path):
    Image.open(path).convert("RGB").save(path, "JPEG")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: Image.open(path).convert("L").save(path), r"is a grey image without the three channels"),
        (lambda path: Image.open(path).convert("LA").save(path), r"is a grey with alpha image without"),
        (_grey16, r"is a grey image without the three channels"),
        (_rgb16, r"has 16 bits per channel, flow images have 8"),
        (_cut, r"cannot be read as an image"),
        (_jpeg, r"is no PNG file, or a damaged one"),
        (lambda path: path.write_bytes(b""), r"is no PNG file, or a damaged one"),
    ],
)
def test_an_unfit_image_is_named(few, spoil, message):
    path = next(few.folder.glob("006*"))
    spoil(path)
    with pytest.raises(UserError, match=rf"{path.name}: {message}.*; restore the file, or remove it") as caught:
        read_flow_folder(few.folder)
    assert "\n" not in str(caught.value)


def test_alpha_and_palettes_are_taken_off(few, made):
    first, second = sorted(few.folder.glob("006*"))
    colours = made.image_of("few") // 64 * 64
    with_alpha = np.concatenate([colours, np.full((28, 28, 1), 128, np.uint8)], axis=-1)
    Image.fromarray(with_alpha).save(first)
    image = Image.fromarray(colours).quantize(256)
    image.save(second, transparency=bytes([0, 255]))
    with Image.open(second) as saved:
        assert saved.mode == "P"
    read = read_flow_folder(few.folder)
    np.testing.assert_array_equal(read.images["onset_apex"][4], colours)
    np.testing.assert_array_equal(read.images["onset_apex"][5], np.array(image.convert("RGB")))
    assert read.notes == (f"2 images converted to RGB without loss: {first.name}, {second.name}",)
