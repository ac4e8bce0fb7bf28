"""The builder from frames to records: what is in them, what is reused, and what is said when something is
wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from data_builders import four_dme, tfds_files
from data_builders.four_dme import preparation
from mer_jax.clips.crops import CropConfig, crop_clip, face_box
from mer_jax.clips.faces import FaceDetector
from mer_jax.clips.frames import read_frame
from mer_jax.clips.layouts import read_challenge
from mer_jax.clips.views import split_views
from mer_jax.errors import UserError
from mer_jax.extractors.base import get_extractor

COLUMNS = {"Negative": "neg"}
CROP = CropConfig(size=96)


@pytest.fixture
def build(challenge, tmp_path):
    """Builds the hand-made challenge data with HOG only, unless told otherwise."""

    def call(**changes):
        options = dict(data_dir=tmp_path / "data", source=challenge, columns=COLUMNS, extractors=("hog",),
                       crop=CROP, workers=1)  # fmt: skip
        return four_dme.build("challenge", **{**options, **changes})

    return call


@pytest.fixture
def prepared(monkeypatch):
    """Names of the clips that were prepared since, in order."""
    names, original = [], preparation._prepare_clip

    def recording(task):
        names.append(task.clip.name)
        return original(task)

    monkeypatch.setattr(preparation, "_prepare_clip", recording)
    return names


def read(folder):
    source = tfds.builder_from_directory(folder).as_data_source()
    return {split: list(source[split].__getitems__(list(range(len(source[split]))))) for split in source}


def test_records_hold_everything_in_order(build, challenge):
    folder = build(extractors=("hog", "facemesh"))
    records = read(folder)
    assert [(r["clip"], r["view"]) for r in records["train"]] == [
        (name, view) for name in (b"seq_2", b"seq_7", b"seq_10") for view in (b"l", b"r")
    ]
    assert [r["id"] for r in records["train"]] == [2, 2, 7, 7, 10, 10]
    assert [r["subject"] for r in records["train"][::2]] == [b"s1", b"s1", b"s2"]
    assert [r["num_frames"] for r in records["train"][::2]] == [4, 5, 3]
    np.testing.assert_array_equal(records["train"][1]["labels"], [1, 0, 0, 1, 0])
    assert [(r["clip"], r["view"]) for r in records["test"]] == [(b"seq_11", b"l"), (b"seq_11", b"r")]
    for record in records["test"]:
        assert record["labels"].tolist() == [-1] * 5
        assert record["labels"].dtype == np.int8
        assert [record[name] for name in ("onset", "apex", "offset")] == [-1] * 3

    # The same, computed step by step, for one sample.
    clip = next(clip for clip in read_challenge(challenge, columns=COLUMNS) if clip.name == "seq_7")
    frames = [split_views(read_frame(path))["r"] for path in clip.frames]
    with FaceDetector(CROP.min_confidence) as detector:
        box = face_box(frames, CROP, detector)
    record = records["train"][3]
    assert record["box"].tolist() == [box.left, box.top, box.width, box.height]
    assert record["face_found"] and box.found
    for name in ("hog", "facemesh"):
        with get_extractor(name).open() as session:
            expected = session(crop_clip(frames, box, CROP.size))
        np.testing.assert_array_equal(record["features"][name], expected)


def test_metadata_and_card(build):
    folder = build()
    facts = tfds.builder_from_directory(folder).info.metadata
    assert facts["settings"]["crop"]["size"] == 96
    assert facts["extractors"]["hog"]["modality"] == "appearance" and facts["extractors"]["hog"]["dim"] == 1296
    assert facts["no_face"] == [] and facts["missing_frames"] == {}
    train = facts["statistics"]["train"]
    assert (train["clips"], train["samples"], train["subjects"], train["faces_found"]) == (3, 6, 2, 6)
    assert train["clips_per_label"] == {
        "Negative": 2, "Positive": 1, "Repression": 0, "Surprise": 1, "Others": 0
    }  # fmt: skip
    assert train["clips_per_number_of_labels"] == {"1": 2, "2": 1}
    assert train["frames"] == {"min": 3, "median": 4.0, "max": 5, "total": 12}
    assert facts["statistics"]["test"]["labelled_clips"] == 0
    card = (folder / "data_card.md").read_text()
    for line in ("| clips | 3 | 1 |", "| - Negative | 2 | 0 |", "| hog | appearance | 1296 |", "None: a face"):
        assert line in card


def test_built_is_returned_at_once(build, prepared):
    folder = build()
    assert sorted(prepared) == ["seq_10", "seq_11", "seq_2", "seq_7"]
    stamp = (folder / "metadata.json").stat().st_mtime_ns
    for changes in ({}, {"crop": None}, {"source": None, "columns": None}):
        assert build(**changes) == folder
    assert len(prepared) == 4 and (folder / "metadata.json").stat().st_mtime_ns == stamp


def test_other_settings_are_refused_and_finished_clips_reused(build, prepared, challenge, tmp_path):
    folder = build()
    for changes, difference in (
        ({"crop": CropConfig(size=64)}, r"crop size 96, asked 64"),
        ({"columns": {"Negative": "Negative"}}, r"columns"),
    ):
        if "columns" in changes:
            text = (challenge / "train.csv").read_text()
            (challenge / "train.csv").write_text(text.replace("neg", "Negative"))
        with pytest.raises(UserError, match=rf"built with other settings \({difference}.*remove this folder"):
            build(**changes)
    (challenge / "train.csv").write_text(text.replace("10,0,1", "10,1,0"))
    with pytest.raises(UserError, match=r"labels, frames or feature files have changed since"):
        build()
    shutil.rmtree(folder)
    assert build() == folder
    assert len(prepared) == 4
    assert read(folder)["train"][-1]["labels"].tolist() == [1, 0, 0, 0, 0]


def test_lacking_features_are_added_to_what_is_there(build, prepared, features, tmp_path, capsys):
    whole = build(extractors=("hog", "facemesh"), features=features, data_dir=tmp_path / "whole")
    del prepared[:]
    folder = build()
    # Crops and clips are what they were, though nothing is said of them.
    assert build(extractors=("facemesh",), source=None, columns=None, crop=None) == folder
    assert build(extractors=(), features={"faceverse": features["faceverse"]}) == folder
    assert build(extractors=(), features={"radio": features["radio"]}, feature_frames="strict") == folder
    assert len(prepared) == 12  # hog; facemesh; the boxes alone
    facts = [json.loads((each / "metadata.json").read_text()) for each in (whole, folder)]
    assert facts[0].pop("content") != facts[1].pop("content")  # in which the order counts
    assert facts[0] == facts[1]
    assert list(facts[0]["extractors"]) == ["hog", "facemesh", "radio", "faceverse"]
    assert list(facts[1]["extractors"]) == ["hog", "facemesh", "faceverse", "radio"]
    for path in whole.glob("*.array_record*"):
        assert path.read_bytes() == (folder / path.name).read_bytes()
    # And now it is all there.
    stamp = (folder / "metadata.json").stat().st_mtime_ns
    assert build(extractors=("facemesh", "hog"), features=features) == folder
    assert (folder / "metadata.json").stat().st_mtime_ns == stamp


def test_what_viewers_leave_among_features_is_no_change(build, features):
    folder = build(features=features)
    for name in (".DS_Store", "Thumbs.db"):
        (Path(features["radio"]) / name).write_bytes(b"of a viewer")
    assert build(features=features) == folder
    (Path(features["radio"]) / "new.npy").write_bytes(b"one more")
    with pytest.raises(UserError, match=r"labels, frames or feature files have changed since"):
        build(features=features)


def test_features_are_only_added_to_the_same_clips(build, challenge, features):
    build()
    text = (challenge / "train.csv").read_text()
    (challenge / "train.csv").write_text(text.replace("10,0,1", "10,1,0"))
    with pytest.raises(UserError, match=r"labels, frames or feature files have changed since it was built; remove"):
        build(extractors=("facemesh",), source=None, columns=None)


def test_added_features_shorten_what_is_there(build, features):
    build(features={"faceverse": features["faceverse"]})
    np.save(features["radio"] / "seq_7_r.npy", np.load(features["radio"] / "seq_7_r.npy")[:3])
    with pytest.raises(UserError, match=r"feature_frames strict, asked shortest"):
        build(features={"radio": features["radio"]}, feature_frames="shortest")


def test_added_features_of_fewer_frames_cut_the_others(build, features):
    build()
    np.save(features["radio"] / "seq_7_r.npy", np.load(features["radio"] / "seq_7_r.npy")[:3])
    folder = build(features={"radio": features["radio"]}, feature_frames="shortest")
    record = read(folder)["train"][3]
    assert record["num_frames"] == 3 and {len(value) for value in record["features"].values()} == {3}
    # What was cut stays cut when more is added.
    folder = build(extractors=("facemesh",))
    assert read(folder)["train"][3]["features"]["facemesh"].shape == (3, 1404)
    assert json.loads((folder / "metadata.json").read_text())["cut"] == {"seq_7_r": [3, 5]}


def test_a_kill_between_the_two_moves_of_a_replacement_loses_nothing(build, prepared, tmp_path):
    folder = build()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    staging = tmp_path / "data" / "work" / "four_dme" / "challenge" / "staging"
    staging.mkdir()
    folder.rename(staging / "replaced")
    assert build() == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and len(prepared) == 4


def test_a_lost_record_file_is_rebuilt_in_place(build, prepared):
    folder = build()
    before = read(folder)
    lost = next(folder.glob("*train.array_record*"))
    content = lost.read_bytes()
    lost.unlink()
    # Left to its defaults the crop would be another one.
    with pytest.raises(UserError, match=r"files of records are missing; remove this folder"):
        build(crop=None)
    assert build() == folder
    assert lost.read_bytes() == content and len(prepared) == 4
    assert len(read(folder)["train"]) == len(before["train"])


def test_something_else_in_the_place_is_left_alone(build, tmp_path):
    folder = four_dme.version_dir("challenge", tmp_path / "data")
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"not a data set of this library"):
        build()
    assert (folder / "thesis.txt").exists()


def test_one_bad_clip_costs_no_other(build, prepared, challenge):
    bad = challenge / "train" / "seq_7" / "img3.png"
    content = bad.read_bytes()
    bad.write_bytes(content[:100])
    with pytest.raises(UserError, match=r"1 of 4 clips cannot be prepared \(clip seq_7: .*img3\.png: ") as caught:
        build()
    assert "\n" not in str(caught.value)
    assert sorted(prepared) == ["seq_10", "seq_11", "seq_2", "seq_7"]
    bad.write_bytes(content)
    assert len(read(build())["train"]) == 6
    assert prepared[4:] == ["seq_7"]


def test_a_replaced_clip_is_prepared_again(build, prepared, challenge):
    folder = build()
    shutil.copy(challenge / "train" / "seq_7" / "img1.png", challenge / "train" / "seq_7" / "img5.png")
    shutil.rmtree(folder)
    build()
    assert prepared[4:] == ["seq_7"]


def test_no_face_is_said_and_kept(build, challenge, capsys):
    for path in (challenge / "train" / "seq_7").iterdir():
        image = np.array(Image.open(path))
        image[:, 150:] = 90
        Image.fromarray(image).save(path)
    folder = build(extractors=("facemesh",))
    facts = json.loads((folder / "metadata.json").read_text())
    assert facts["no_face"] == ["seq_7_r"]
    assert facts["missing_frames"] == {"facemesh": {"seq_7_r": [5, 5]}}
    notes = capsys.readouterr().err
    for text in (notes, (folder / "data_card.md").read_text()):
        assert "no face was found in the first frame of 1 sample, so the 'centre' box was cut out: seq_7_r" in text
        assert "facemesh found nothing in any frame of 1 sample, whose features are 0: seq_7_r" in text
    record = read(folder)["train"][3]
    assert not record["face_found"] and record["box"].tolist() == [0, 0, 150, 150]
    assert not record["features"]["facemesh"].any()


def test_release_is_single_view_with_phases(release, tmp_path):
    workbook, frames = release
    folder = four_dme.build("release", data_dir=tmp_path / "data", source=frames, workbook=workbook,
                            extractors=("hog",), crop=CROP, workers=1)  # fmt: skip
    records = read(folder)
    assert list(records) == ["train"]
    first, second = records["train"]
    assert (first["view"], second["view"]) == (b"c", b"c")
    assert first["labels"].tolist() == [0, 1, 0, 1, 0]
    assert [first[name] for name in ("onset", "apex", "offset")] == [0, 2, 3]
    assert first["features"]["hog"].shape == (4, 1296)


@pytest.fixture
def features(tmp_path):
    """Features from elsewhere for all samples of the challenge: one file, or one file per frame."""
    rng = np.random.default_rng(0)
    lengths = {"seq_2": 4, "seq_7": 5, "seq_10": 3, "seq_11": 3}
    for name, length in lengths.items():
        for view in "lr":
            (tmp_path / "feat2d").mkdir(exist_ok=True)
            np.save(tmp_path / "feat2d" / f"{name}_{view}.npy", rng.normal(size=(length, 6)))
            (tmp_path / "feat3d" / f"{name}_{view}").mkdir(parents=True)
            for frame in range(length):
                coeffs = {"coeffs": rng.normal(size=(1, 621))}
                np.save(tmp_path / "feat3d" / f"{name}_{view}" / f"f_{frame:06d}.npy", coeffs)
    return {"radio": tmp_path / "feat2d", "faceverse": tmp_path / "feat3d"}


def test_features_from_elsewhere_beside_embedded_ones(build, features):
    record = read(build(features=features))["train"][3]
    assert {name: value.shape for name, value in record["features"].items()} == {
        "hog": (5, 1296), "radio": (5, 6), "faceverse": (5, 171)
    }  # fmt: skip
    expected = np.load(features["radio"] / "seq_7_r.npy").astype(np.float32)
    np.testing.assert_array_equal(record["features"]["radio"], expected)


def test_features_from_elsewhere_alone(build, features, monkeypatch):
    records = read(build(extractors=(), features=features))
    assert set(records["test"][0]["features"]) == {"radio", "faceverse"}
    assert records["test"][0]["face_found"]


def test_feature_frames_strict_and_shortest(build, features):
    path = features["radio"] / "seq_7_r.npy"
    np.save(path, np.load(path)[:3])
    message = r"feat2d: features of 3 frames for 'seq_7_r', whose clip has 5; .*--feature_frames shortest"
    with pytest.raises(UserError, match=message):
        build(features=features)
    folder = build(features=features, feature_frames="shortest")
    left, right = read(folder)["train"][2:4]
    assert (left["num_frames"], right["num_frames"]) == (5, 3)
    assert {len(value) for value in right["features"].values()} == {3}
    assert "1 sample cut to the shortest of their features: seq_7_r (3 of 5)" in (folder / "data_card.md").read_text()


def test_bad_features_stop_before_any_extraction(build, features, prepared):
    np.save(features["radio"] / "seq_10_l.npy", np.ones((3, 7)))
    with pytest.raises(UserError, match=r"seq_10_l\.npy: 7 features per frame, the others have 6"):
        build(features=features)
    (features["radio"] / "seq_10_l.npy").unlink()
    with pytest.raises(UserError, match=r"feat2d: no features of 'seq_10_l'"):
        build(features=features)
    assert prepared == []


@pytest.mark.parametrize(
    "config, changes, message",
    [
        ("demoo", {}, r"config 'four_dme/demoo' is unknown; there are demo, challenge, release"),
        ("demo", {"workbook": "x"}, r"workbook: not used by four_dme/demo; leave it out"),
        ("challenge", {"extractors": ("hogg",), "source": "x"}, r"extractor 'hogg' is unknown"),
        ("challenge", {"extractors": ("hog", "hog"), "source": "x"}, r"names one twice"),
        ("challenge", {"extractors": (), "source": "x"}, r"name at least one source of features"),
        ("challenge", {"features": {"hog": "."}, "source": "x"}, r"hog is an extractor of this library"),
        ("challenge", {"features": {"A b": "."}, "source": "x"}, r"small letters, digits and _ only"),
        ("challenge", {"features": {"a": "absent"}, "source": "x"}, r"absent: no such folder of features"),
        ("demo", {"demo_clips": (1, 0)}, r"at least one training and one test clip"),
        ("challenge", {}, r"four_dme/challenge is not built yet: say with --source"),
        ("challenge", {"source": "absent"}, r"absent: .*No such file or directory"),
        ("release", {"source": "x"}, r"say with --workbook"),
        ("challenge", {"source": "x", "feature_frames": "loose"}, r"choose strict or shortest"),
    ],
)
def test_senseless_options(tmp_path, config, changes, message):
    with pytest.raises(UserError, match=message):
        four_dme.build(config, data_dir=tmp_path / "data", **changes)


def test_a_full_disk_leaves_nothing_half_done(build, prepared, monkeypatch):
    def full(*_unused, **_also):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tfds_files, "atomic_write_text", full)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); free space"):
            build()
    assert len(prepared) == 4
    assert len(read(build())["train"]) == 6 and len(prepared) == 4


def test_demo_withholds_test_labels(tmp_path):
    folder = four_dme.build("demo", data_dir=tmp_path, demo_clips=(2, 1), extractors=("hog",), workers=1)
    records = read(folder)
    assert (len(records["train"]), len(records["test"])) == (4, 2)
    assert all(record["labels"].min() >= 0 and record["labels"].sum() >= 1 for record in records["train"])
    assert all(record["labels"].tolist() == [-1] * 5 for record in records["test"])
    assert all(record["subject"] for record in records["train"])
    facts = json.loads((folder / "metadata.json").read_text())
    assert facts["settings"]["crop"]["size"] == 256 and "no benchmark" in facts["origin"]
    with pytest.raises(UserError, match=r"seed 0, asked 1"):
        four_dme.build("demo", data_dir=tmp_path, demo_clips=(2, 1), extractors=("hog",), seed=1)
