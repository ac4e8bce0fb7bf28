"""The builder from files to records: what is in them, what is reused, and what is said when something is wrong."""

import dataclasses
import json
import shutil

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from skimage import data

from data_builders import megc2019
from data_builders.megc2019 import demo, preparation
from data_builders.megc2019.flow_folder import read_flow_folder
from data_builders.megc2019.flow_images import as_image, flow_maps
from mer_jax.clips.apex import ApexConfig
from mer_jax.clips.crops import CropConfig, crop_clip, face_box
from mer_jax.clips.demo import load_ground_truth
from mer_jax.clips.faces import FaceDetector
from mer_jax.clips.flow import FlowConfig, dense_flow, optical_strain, resize_flow, to_grey
from mer_jax.clips.frames import read_frame
from mer_jax.errors import UserError

FARNEBACK = FlowConfig()


def read(folder):
    source = tfds.builder_from_directory(folder).as_data_source()
    assert list(source) == ["train"]
    return list(source["train"].__getitems__(list(range(len(source["train"])))))


def metadata(folder):
    return json.loads((folder / "metadata.json").read_text())


# --- folder -----------------------------------------------------------------------------------------------


def test_the_whole_composite(published, made, tmp_path, capsys):
    folder = megc2019.build("folder", data_dir=tmp_path, source=published)
    assert folder.parts[-3] == "megc2019" and folder.parts[-2].startswith("folder-") and folder.name == "1.0.0"
    records, rows = read(folder), made.table_rows()
    assert [record["clip"].decode() for record in records] == [made.file_stem(row) for row in rows]
    assert [record["id"] for record in records] == list(range(1, 443))
    assert [record["subject"].decode() for record in records] == [row["sub"] for row in rows]
    assert [record["database"].decode() for record in records] == [row["dataset"] for row in rows]
    assert [int(record["labels"].argmax()) for record in records] == [row["label"] for row in rows]
    assert all(record["labels"].sum() == 1 and record["labels"].dtype == np.int8 for record in records)
    for record in (records[0], records[441]):
        assert list(record["flow"]) == ["onset_apex"]
        np.testing.assert_array_equal(record["flow"]["onset_apex"], made.image_of(record["clip"].decode()))
        assert record["view"] == b"c" and record["num_frames"] == -1 and record["box"].tolist() == [-1] * 4
        assert [record[name] for name in ("onset", "apex", "offset")] == [-1] * 3

    facts = metadata(folder)
    assert facts["label_names"] == ["negative", "positive", "surprise"] and facts["task"] == "multi_class"
    assert facts["channels"] == ["u", "v", "strain"] and facts["phases"] == ["onset_apex"]
    assert facts["exceptions"] == [] and capsys.readouterr().err == ""
    assert "those of the composite (442 clips)" in facts["origin"]
    train = facts["statistics"]["train"]
    assert train["clips_per_database"] == {"casme2": 145, "samm": 133, "smic": 164} and train["subjects"] == 68
    assert train["clips_per_label"] == {"negative": 250, "positive": 109, "surprise": 83}
    card = (folder / "data_card.md").read_text()
    assert "| - of samm | 133 |" in card and "need signed agreements" in card


def test_what_is_missing_is_said_on_stderr_and_in_the_card(few, tmp_path, capsys):
    next(few.folder.glob("006*")).unlink()
    folder = megc2019.build("folder", data_dir=tmp_path / "data", source=few.folder, labels=few.table)
    lines = metadata(folder)["exceptions"]
    assert lines[0] == "no images of 1 clip, left out: 006_006_1_1"
    assert lines[1].startswith(
        "casme2: 4 clips (4 negative, 0 positive, 0 surprise) of 2 subjects; the composite has 145"
    )
    assert capsys.readouterr().err.splitlines() == [f"note: {line}" for line in lines]
    assert f"- {lines[0]}" in (folder / "data_card.md").read_text()


def test_tree_and_flat_folder_give_the_same_records(few, tree, tmp_path):
    flat = megc2019.build("folder", data_dir=tmp_path / "data", source=few.folder)
    again = megc2019.build("folder", data_dir=tmp_path / "data", source=tree)
    assert flat != again
    for one, other in zip(read(flat), read(again), strict=True):
        np.testing.assert_equal(one, other)


def test_built_is_found_again_with_and_without_its_source(few, tree, tmp_path):
    data_dir = tmp_path / "data"
    with pytest.raises(UserError, match=r"megc2019/folder is not built yet: say with --source where its images are"):
        megc2019.build("folder", data_dir=data_dir)
    folder = megc2019.build("folder", data_dir=data_dir, source=few.folder)
    stamp = (folder / "metadata.json").stat().st_mtime_ns
    for options in ({}, {"source": few.folder}, {"source": few.folder, "labels": few.table}, {"labels": few.table}):
        assert megc2019.build("folder", data_dir=data_dir, **options) == folder
    assert (folder / "metadata.json").stat().st_mtime_ns == stamp
    megc2019.build("folder", data_dir=data_dir, source=tree)
    with pytest.raises(UserError, match=r"is built 2 times \(.*\): say with --source which is meant"):
        megc2019.build("folder", data_dir=data_dir)
    shutil.rmtree(few.folder)
    with pytest.raises(UserError, match=r"STSNet_whole_norm_u_v_os: no such folder of flow images"):
        megc2019.build("folder", data_dir=data_dir, source=few.folder)


def test_changed_images_and_lost_records(few, made, tmp_path):
    folder = megc2019.build("folder", data_dir=tmp_path / "data", source=few.folder)
    lost = next(folder.glob("*train.array_record*"))
    content = lost.read_bytes()
    lost.unlink()
    assert megc2019.build("folder", data_dir=tmp_path / "data", source=few.folder) == folder
    assert lost.read_bytes() == content
    (few.folder / "._006_006_1_2 .png").write_bytes(b"of a file system")
    assert megc2019.build("folder", data_dir=tmp_path / "data", source=few.folder) == folder
    made.save(made.image_of("new"), next(few.folder.glob("006*")))
    with pytest.raises(UserError, match=r"have changed since it was built; remove this folder to build it again"):
        megc2019.build("folder", data_dir=tmp_path / "data", source=few.folder)
    shutil.rmtree(folder)
    assert len(read(megc2019.build("folder", data_dir=tmp_path / "data", source=few.folder))) == 12


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("files", {}, r"config 'megc2019/files' is unknown; there are folder, raw, demo"),
        ("folder", {"casme2": "x"}, r"casme2: not used by megc2019/folder; leave it out"),
        ("folder", {"crop": CropConfig()}, r"crop: not used by megc2019/folder"),
        ("demo", {"apex": ApexConfig()}, r"apex: not used by megc2019/demo"),
        ("raw", {"labels": "x"}, r"labels: not used by megc2019/raw"),
        ("demo", {"source": "x"}, r"source: not used by megc2019/demo"),
        ("raw", {"store": "png"}, r"store 'png': choose one of image, flow"),
        ("raw", {"size": 0}, r"size 0: must be at least 1"),
        ("raw", {"apex": "middle"}, r"apex 'middle': give how it is found, or 'half_way'"),
        ("raw", {"crop": "none"}, r"crop 'none': give a crop, or 'whole'"),
        ("raw", {}, r"megc2019/raw is not built yet: say with --source where its databases are"),
        ("raw", {"smic": ".", "samm_sheet": "x"}, r"samm_sheet: there are no frames of samm; say with --samm"),
        ("demo", {"demo_clips": (0, 1)}, r"demo_clips \(0, 1\): at least one"),
    ],
)
def test_options_that_make_no_sense(tmp_path, config, options, message):
    with pytest.raises(UserError, match=message):
        megc2019.build(config, data_dir=tmp_path, **options)


# --- raw --------------------------------------------------------------------------------------------------


@pytest.fixture
def build_raw(raw, tmp_path):
    """Builds the small releases from whole frames with Farneback's flow, unless told otherwise."""

    def call(**changes):
        options = dict(data_dir=tmp_path / "data", source=raw.root, crop="whole", flow=FARNEBACK, workers=1)
        return megc2019.build("raw", **{**options, **changes})

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


def test_raw_frames_become_images_like_the_published_ones(build_raw, raw):
    folder = build_raw()
    records = read(folder)
    assert len(records) == 9
    record = records[0]
    assert record["clip"] == b"sub01_EP02_01f" and record["labels"].tolist() == [1, 0, 0]
    assert [record[name] for name in ("onset", "apex", "offset", "num_frames")] == [0, 4, 8, 9]
    assert record["apex_annotated"] and not records[1]["apex_annotated"] and record["face_found"]
    assert record["box"].tolist() == [0, 0, 96, 112]
    assert list(record["flow"]) == ["apex_offset", "onset_apex"]

    # The same, step by step.
    names = [raw.casme2 / "Cropped" / "sub01" / "EP02_01f" / f"reg_img{number}.jpg" for number in (46, 50, 54)]
    resized = [
        np.array(Image.fromarray(read_frame(name)).resize((224, 224), Image.Resampling.LANCZOS)) for name in names
    ]
    grey = to_grey(np.stack(resized))
    for phase, first, second in (("onset_apex", 0, 1), ("apex_offset", 1, 2)):
        flow = dense_flow(grey[first], grey[second], FARNEBACK)
        channels = np.concatenate([flow, optical_strain(flow)[..., None]], axis=-1)
        np.testing.assert_array_equal(record["flow"][phase], as_image(resize_flow(channels, 28)))
    facts = metadata(folder)
    assert facts["channels"] == ["u", "v", "strain"] and facts["phases"] == ["onset_apex", "apex_offset"]
    assert facts["settings"]["crop"] == "whole" and facts["settings"]["flow"]["method"] == "farneback"
    assert any(line.startswith("smic: has no annotated apex") for line in facts["exceptions"])
    assert facts["composite"]["smic"]["clips"] == [1, 1, 1] and facts["composite"]["smic"]["expected_subjects"] == 16


def test_flow_in_pixels_is_kept_on_request(build_raw):
    folder = build_raw(store="flow", size=56)
    record = read(folder)[0]
    flow = record["flow"]["onset_apex"]
    assert flow.shape == (56, 56, 2) and flow.dtype == np.float32
    # 1 px of 96 to the right and back, seen at 224.
    np.testing.assert_allclose(np.median(flow[..., 0]), 224 / 96, rtol=0.1)
    np.testing.assert_allclose(np.median(record["flow"]["apex_offset"][..., 0]), -224 / 96, rtol=0.1)
    assert abs(np.median(flow[..., 1])) < 0.1
    assert metadata(folder)["channels"] == ["u", "v"]


def test_an_apex_is_looked_for_where_none_is_annotated(raw_made, tmp_path):
    top = tmp_path / "CASME II"
    header, row = raw_made.casme2_header, raw_made.casme2_row
    sheet = top / "CASME2-coding-20140508.xlsx"
    names = [f"img{number}.jpg" for number in range(1, 14)]
    # Farthest at the fourth of 13 frames, index 3.
    shifts = [0, 0.5, 1, 1.5, *np.linspace(1.35, 0, 9)]
    for clip in ("EP01_01", "EP02_01"):
        raw_made.write_frames(top / "sub01" / clip, names, shifts)
    raw_made.write_sheet(
        sheet, header, [row(1, "EP01_01", 1, 10, 13, "disgust"), row(1, "EP02_01", 1, "/", 13, "surprise")]
    )

    def apexes(**options):
        folder = megc2019.build(
            "raw", data_dir=tmp_path / "data", casme2=top, crop="whole", flow=FARNEBACK, workers=1, **options
        )
        return [(int(record["apex"]), bool(record["apex_annotated"])) for record in read(folder)], metadata(folder)

    plain = ApexConfig(compensate="none", blink=0, smooth=0.0)
    assert apexes()[0] == [(9, True), (6, False)]
    assert apexes(apex="half_way") == apexes()
    found, facts = apexes(apex=plain)
    assert found == [(9, True), (3, False)] and facts["settings"]["apex"]["smooth"] == 0.0
    assert any(
        line.endswith("apex frame in the sheet, so that it was found by motion: sub01_EP02_01")
        for line in facts["exceptions"]
    )
    found, facts = apexes(apex=dataclasses.replace(plain, use_annotated=False))
    assert found == [(3, False), (3, False)]
    assert facts["statistics"]["train"]["apex_annotated"] == 0


def test_settings_have_their_own_folders_and_share_finished_clips(build_raw, prepared, raw, tmp_path):
    folder = build_raw()
    assert len(prepared) == 9
    assert build_raw() == folder and build_raw(source=None) == folder
    # Flow in pixels comes from the same maps.
    other = build_raw(store="flow")
    assert other != folder and len(prepared) == 9
    assert build_raw(source=None, crop=None, flow=None, store="flow") == other
    with pytest.raises(UserError, match=r"is built 2 times"):
        build_raw(source=None)
    with pytest.raises(UserError, match=r"is not built yet"):
        build_raw(source=None, size=14)
    alone = build_raw(source=None, smic=raw.smic, size=14)
    assert len(read(alone)) == 3 and len(prepared) == 12
    assert read(alone)[0]["flow"]["onset_apex"].shape == (14, 14, 3)
    assert metadata(alone)["exceptions"][1].startswith("no clips of casme2, samm: this is not the composite")


def test_one_bad_frame_costs_no_other_clip(build_raw, prepared, raw):
    bad = raw.samm / "011" / "011_1_1" / "011_00099.jpg"
    content = bad.read_bytes()
    bad.write_bytes(content[:100])
    with pytest.raises(
        UserError, match=r"1 of 9 clips cannot be prepared \(clip 011_011_1_1: .*011_00099\.jpg: "
    ) as caught:
        build_raw()
    assert "\n" not in str(caught.value) and len(prepared) == 9
    bad.write_bytes(content)
    assert len(read(build_raw())) == 9
    assert prepared[9:] == ["011_011_1_1"]


def test_replaced_frames_and_labels_are_noticed(build_raw, prepared, raw, raw_made):
    folder = build_raw()
    frames = raw.samm / "011" / "011_1_1"
    shutil.copy(frames / "011_00095.jpg", frames / "011_00099.jpg")
    with pytest.raises(
        UserError, match=r"images, frames or labels have changed since it was built; remove this folder"
    ):
        build_raw()
    shutil.rmtree(folder)
    folder = build_raw()
    assert prepared[9:] == ["011_011_1_1"]
    assert "no motion at all in onset_apex of 1 clip; check: 011_011_1_1" in metadata(folder)["exceptions"]
    assert not read(folder)[4]["flow"]["onset_apex"].any()
    raw_made.write_sheet(raw.samm_sheet, raw_made.samm_header, [raw_made.samm_row(11, "011_1_1", 95, 99, 103, "Anger")])
    with pytest.raises(UserError, match=r"have changed since"):
        build_raw()


def test_faces_are_cut_out(raw_made, tmp_path):
    photograph = cv2.resize(data.astronaut()[:300, 60:360], (200, 200))
    top = tmp_path / "HS" / "s01" / "micro"
    names = [f"image{number}.bmp" for number in range(5)]
    raw_made.write_frames(top / "negative" / "s01_ne_01", names, raw_made.there_and_back(5), photograph)
    blank = np.full((200, 200, 3), 90, np.uint8)
    raw_made.write_frames(top / "positive" / "s01_po_01", names, raw_made.there_and_back(5), blank)
    crop = CropConfig(size=112, rule="largest", scale=1.2)
    folder = megc2019.build("raw", data_dir=tmp_path, smic=tmp_path / "HS", crop=crop, flow=FARNEBACK, workers=1)
    first, second = read(folder)
    left, top_, width, height = first["box"]
    assert first["face_found"] and width == height and 0 < width < 200 and left > 0 and top_ >= 0
    assert not second["face_found"] and second["box"].tolist() == [0, 0, 200, 200]
    lines = metadata(folder)["exceptions"]
    assert "no face was found in 1 clip, so the 'centre' box was cut out; check: s01_s01_po_01" in lines
    assert metadata(folder)["settings"]["crop"]["rule"] == "largest"


# --- demo -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built_demo(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("demo")
    return data_dir, megc2019.build("demo", data_dir=data_dir, demo_clips=(7, 1))


def test_the_demo_is_read_as_the_real_images_are(built_demo):
    data_dir, folder = built_demo
    images = data_dir / "clips" / "megc2019_demo" / "STSNet_whole_norm_u_v_os"
    read_back = read_flow_folder(images)
    records = read(folder)
    assert [record["clip"].decode() for record in records] == [row.name for row in read_back.rows]
    for record, image in zip(records, read_back.images["onset_apex"], strict=True):
        np.testing.assert_array_equal(record["flow"]["onset_apex"], image)
        assert image.shape == (28, 28, 3) and all(np.ptp(image[..., channel]) == 255 for channel in range(3))
    facts = metadata(folder)
    assert "pretended" in facts["origin"] and "no benchmark" in facts["origin"] and facts["exceptions"] == []
    # Its names have the traps of the real ones.
    assert all(path.stem.endswith(" ") for path in images.iterdir())
    table = (images.parent / "combined_3_class2_for_optical_flow.csv").read_text()
    assert "s01_s1_" in table and ".jpg" in table and "no benchmark" in (images.parent / "README.md").read_text()


def test_both_views_of_a_demo_clip_are_of_one_subject(built_demo):
    data_dir, folder = built_demo
    clips = data_dir / "clips" / "four_dme_demo"
    subjects = {}
    with open(clips / "train.csv") as stream:
        header, *lines = [line.strip().split(",") for line in stream]
    for line in lines:
        row = dict(zip(header, line, strict=True))
        of_class = [name for name in ("Negative", "Positive", "Surprise") if row[name] == "1"]
        if len(of_class) == 1:
            subjects.setdefault(row["subject"], []).append(of_class[0].lower())
    records = read(folder)
    found = {}
    for record in records:
        name = ("negative", "positive", "surprise")[int(record["labels"].argmax())]
        found.setdefault(record["subject"], []).append(name)
    # Twice the clips of each virtual subject, whatever its pretended name.
    assert sorted(sorted(names) for names in found.values()) == sorted(sorted(2 * names) for names in subjects.values())
    assert {record["database"] for record in records} == {b"casme2", b"samm", b"smic"}


def test_a_demo_image_is_the_flow_from_onset_to_the_given_apex(built_demo):
    data_dir, _ = built_demo
    images = data_dir / "clips" / "megc2019_demo" / "STSNet_whole_norm_u_v_os"
    clips = data_dir / "clips" / "four_dme_demo"
    candidates = [np.array(Image.open(path)) for path in sorted(images.glob("sub01*"))]
    matches = 0
    with FaceDetector(demo.CROP.min_confidence) as detector:
        for clip in sorted((clips / "train").iterdir()):
            apex = load_ground_truth(clips, clip.name).apex
            frames = [read_frame(clip / f"{index:04d}.jpg")[:, :320] for index in (0, apex)]
            crops = crop_clip(frames, face_box(frames, demo.CROP, detector), demo.CROP.size)
            image = as_image(flow_maps(to_grey(crops), demo.FLOW, 28))[0]
            matches += sum(np.array_equal(image, candidate) for candidate in candidates)
    # Every other one of its images shows the left view.
    assert matches == len(candidates) / 2 > 0


def test_what_is_lost_of_the_demo_is_made_again(built_demo, monkeypatch):
    data_dir, folder = built_demo
    images = data_dir / "clips" / "megc2019_demo" / "STSNet_whole_norm_u_v_os"
    lost = sorted(images.iterdir())[0]
    content = lost.read_bytes()
    lost.unlink()
    # The built data set does not need its images.
    assert megc2019.build("demo", data_dir=data_dir, demo_clips=(7, 1)) == folder
    assert not lost.exists()
    records = [path.read_bytes() for path in sorted(folder.iterdir())]
    shutil.rmtree(folder)
    made, original = [], demo._make_images
    monkeypatch.setattr(demo, "_make_images", lambda task: made.append(task.clip.name) or original(task))
    assert megc2019.build("demo", data_dir=data_dir, demo_clips=(7, 1), workers=1) == folder
    assert lost.read_bytes() == content and len(made) == 1
    assert [path.read_bytes() for path in sorted(folder.iterdir())] == records


def test_demo_images_of_other_settings_are_left_alone(built_demo):
    data_dir, _ = built_demo
    with pytest.raises(
        UserError, match=r"megc2019_demo: holds demo images of other settings; remove it or give another"
    ):
        megc2019.build("demo", data_dir=data_dir, demo_clips=(6, 1))
