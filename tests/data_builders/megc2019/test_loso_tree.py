"""The tree of folds: the flat set comes back from it, and folds that contradict each other are refused."""

import shutil

import numpy as np
import pytest
from PIL import Image

from data_builders.megc2019.flow_folder import read_flow_folder
from mer_jax.errors import UserError


@pytest.fixture
def alone(tree, few):
    """The tree without any table in reach."""
    few.table.unlink()
    return tree


def copies(tree, stem):
    return sorted(tree.glob(f"*/*/*/{stem} .png"))


def test_the_flat_set_comes_back(tree, few):
    flat, read = read_flow_folder(few.folder), read_flow_folder(tree)
    assert [(row.name, row.subject, row.label) for row in read.rows] == [
        (row.name, row.subject, row.label) for row in flat.rows
    ]
    np.testing.assert_array_equal(read.images["onset_apex"], flat.images["onset_apex"])
    assert read.notes == ()


def test_hidden_files_are_passed_over(tree):
    plain = read_flow_folder(tree)
    for path in list(tree.glob("*/u_train/*/*.png"))[:3]:
        path.with_name(f"._{path.name}").write_bytes(b"of a file system")
    read = read_flow_folder(tree)
    assert [row.name for row in read.rows] == [row.name for row in plain.rows] and read.notes == ()


def test_it_does_without_a_table(few, tree):
    flat = {row.name: (row.database, row.subject, row.label) for row in read_flow_folder(few.folder).rows}
    few.table.unlink()
    read = read_flow_folder(tree)
    assert {row.name: (row.database, row.subject, row.label) for row in read.rows} == flat
    subjects = [row.subject for row in read.rows]
    assert subjects == sorted(subjects) and read.notes == ()


def test_table_and_tree_must_agree(tree, few):
    few.table.write_text(few.table.read_text().replace("EP01_01f,0", "EP01_01f,2"))
    with pytest.raises(UserError, match=r"row 2 gives the clip 'sub01_EP01_01f' the label 2, the folder .* says 0"):
        read_flow_folder(tree)


def test_several_maps_need_the_table(tree, few, made):
    for path in list(tree.glob("*/*/*/*.png")):
        stem = path.stem.strip()
        for plane in (1, 2, 3):
            made.save(made.image_of(stem, plane=plane), path.with_name(f"{stem}_{plane} .png"))
    read = read_flow_folder(tree)
    assert list(read.images) == ["onset_apex", "apex_offset"] and len(read.rows) == 12
    np.testing.assert_array_equal(read.images["apex_offset"][5], made.image_of(read.rows[5].name, plane=1))
    few.table.unlink()
    with pytest.raises(
        UserError, match=r"several maps per clip, which only the table can tell apart; say with --labels"
    ):
        read_flow_folder(tree)


def test_a_clip_on_both_sides_of_a_fold(alone):
    test = next(alone.glob("sub01/u_test/0/*.png"))
    leak = alone / "sub01" / "u_train" / "0" / test.name
    shutil.copy(test, leak)
    with pytest.raises(
        UserError, match=r"u_train/0/sub01_.*is a training clip of the fold that leaves its own subject"
    ):
        read_flow_folder(alone)
    # Absent from the test side it is no less of a leak.
    test.unlink()
    with pytest.raises(UserError, match=r"is a training clip of the fold that leaves its own subject sub01 out"):
        read_flow_folder(alone)


def test_a_clip_with_two_labels(alone):
    path = copies(alone, "006_006_1_1")[-1]
    other = path.parents[1] / "2"
    other.mkdir(exist_ok=True)
    shutil.move(path, other / path.name)
    with pytest.raises(UserError, match=r"006_006_1_1 .png has the label 0 and .*2/006_006_1_1 .png the label 2"):
        read_flow_folder(alone)
    shutil.copy(other / path.name, path)
    with pytest.raises(UserError, match=r"are one clip; remove the wrong one"):
        read_flow_folder(alone)


def test_a_clip_with_two_images(alone):
    path = copies(alone, "s01_s01_ne_01")[-1]
    image = np.array(Image.open(path))
    # Other bytes, same pixels.
    Image.fromarray(image).save(path, compress_level=9)
    assert len(read_flow_folder(alone).rows) == 12
    image[3, 4, 2] ^= 1
    Image.fromarray(image).save(path)
    with pytest.raises(UserError, match=r"are one clip with different images; remove the wrong one"):
        read_flow_folder(alone)


def test_a_clip_tested_twice_or_in_the_wrong_fold(alone):
    test = next(alone.glob("sub01/u_test/0/*.png"))
    (alone / "006" / "u_test" / "0").mkdir(parents=True, exist_ok=True)
    wrong = alone / "006" / "u_test" / "0" / test.name
    shutil.copy(test, wrong)
    with pytest.raises(UserError, match=r"is a test clip of fold 006, but belongs to sub01"):
        read_flow_folder(alone)


def test_unknown_classes_and_names(alone):
    folder = alone / "sub01" / "u_test" / "0"
    folder.rename(folder.with_name("negative"))
    with pytest.raises(UserError, match=r"folders of classes are called 0, 1, 2; rename or remove it"):
        read_flow_folder(alone)
    folder.with_name("negative").rename(folder)
    path = next(folder.iterdir())
    shutil.copy(path, folder / "person.png")
    with pytest.raises(UserError, match=r"person\.png: its name fits none of the databases"):
        read_flow_folder(alone)


def test_missing_folds_and_clips_are_listed(alone):
    shutil.rmtree(alone / "s01")
    copies(alone, "006_006_1_1")[-1].unlink()
    read = read_flow_folder(alone)
    assert len(read.rows) == 12
    assert {row.subject for row in read.rows if row.database == "smic"} == {"s01", "s02"}
    untested, lacking = read.notes
    assert untested == "2 clips tested in no fold; no fold of s01: s01_s01_ne_01, s01_s01_ne_02"
    assert lacking.startswith("training clips absent from 1 fold of the tree: sub02 (1 clip, such as 006_006_1_1")


def test_a_tree_without_images(tmp_path):
    (tmp_path / "tree" / "sub01" / "u_train" / "0").mkdir(parents=True)
    with pytest.raises(UserError, match=r"its folds hold no flow images \(\*\.png\) at all"):
        read_flow_folder(tmp_path / "tree")
