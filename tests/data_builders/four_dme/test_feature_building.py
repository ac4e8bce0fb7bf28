"""Features of networks: what is extracted, kept, gone on with, added to the data set, and refused."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from data_builders import ensure_dataset, four_dme
from data_builders.four_dme import feature_building, feature_store, frame_images
from mer_jax.clips.crops import CropConfig, crop_clip, face_box
from mer_jax.clips.faces import FaceDetector
from mer_jax.clips.frames import read_frame
from mer_jax.clips.layouts import read_challenge
from mer_jax.clips.views import split_views
from mer_jax.errors import UserError
from mer_jax.study.data import load_dataset

COLUMNS = {"Negative": "neg"}
CROP = CropConfig(size=96)
pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture
def ran(monkeypatch):
    """What the workers were asked for since, clip by clip, with the views."""
    chunks, original = [], feature_building.prepare_chunk

    def recording(chunk):
        chunks.append((chunk.clip.name, chunk.views))
        return original(chunk)

    monkeypatch.setattr(feature_building, "prepare_chunk", recording)
    return chunks


def read(folder):
    source = tfds.builder_from_directory(folder).as_data_source()
    return {split: list(source[split].__getitems__(list(range(len(source[split]))))) for split in source}


def metadata(folder):
    return json.loads((folder / "metadata.json").read_text())


def folders(tmp_path):
    return sorted((tmp_path / "data" / "features" / "four_dme" / "challenge").iterdir())


def kept(folder):
    """Content of the clips of a folder of features."""
    return {path.name: path.read_bytes() for path in folder.glob("*.npz")}


def test_features_of_all_samples_computed_step_by_step(built, extract, challenge, tiny_networks, tmp_path):
    folder = extract()
    assert folder == built
    records = read(folder)
    variables = {"params": tiny_networks.random_state()}
    clips = {clip.name: clip for clip in read_challenge(challenge, columns=COLUMNS)}
    compared = 0
    for record in records["train"] + records["test"]:
        clip, view = clips[record["clip"].decode()], record["view"].decode()
        frames = [split_views(read_frame(path))[view] for path in clip.frames]
        with FaceDetector(CROP.min_confidence) as detector:
            box = face_box(frames, CROP, detector)
        images, _ = tiny_networks.prepare(crop_clip(frames, box, CROP.size))
        with jax.default_matmul_precision("highest"):
            expected = np.asarray(tiny_networks.apply(variables, images))
        assert set(record["features"]) == {"hog", "tiny"}
        assert record["features"]["tiny"].dtype == np.float32
        np.testing.assert_allclose(record["features"]["tiny"], expected, rtol=1e-5, atol=1e-6)
        compared += len(expected)
    assert compared == 2 * (4 + 3 + 5 + 3)


def test_what_a_data_set_and_its_folder_say(built, extract, weights, tmp_path):
    before = read(built)
    facts = metadata(extract())
    told = facts["extractors"]["tiny"]
    sha256 = hashlib.sha256(weights().read_bytes()).hexdigest()
    expected = {
        "modality": "appearance", "dim": 12, "licence": "Test-1.0", "weights": "official_0_1.0.pt",
        "weights_sha256": sha256, "preprocessing": "resized to 32 x 32 (area)", "dtype": "float32",
        "store": "float32", "imported": "", "imported_samples": 0, "samples": 8,
    }  # fmt: skip
    assert {name: told[name] for name in expected} == expected
    assert told["made_with"]["jax"] == jax.__version__ and told["made_with"]["device"] == "cpu"
    card = (built / "data_card.md").read_text()
    assert (
        f"| tiny | appearance | 12 | Test-1.0 | resized to 32 x 32 (area) | official_0_1.0.pt, {sha256}, float32 |"
        in card
    )
    assert "| hog | appearance | 1296 |" in card
    for old, new in zip(before["train"], read(built)["train"], strict=True):
        np.testing.assert_array_equal(old["features"]["hog"], new["features"]["hog"])

    (folder,) = folders(tmp_path)
    assert folder.name.startswith("tiny-") and len(folder.name) == len("tiny-") + 12
    record = json.loads((folder / "record.json").read_text())
    assert record["recipe"]["weights_sha256"] == sha256 and record["recipe"]["crop"]["size"] == 96
    assert record["batch_size"] == 4 and record["licence"] == "Test-1.0"
    with np.load(folder / "seq_7.npz") as clip:
        assert set(clip.files) == {"told", "l", "r"} and clip["l"].shape == (5, 12)


def test_a_new_data_set_gets_the_embedded_extractors_too(extract):
    assert set(read(extract())["train"][0]["features"]) == {"hog", "facemesh", "tiny"}


def test_nothing_is_said_twice_to_a_data_set_that_knows(built, extract, ran):
    folder = extract(source=None, columns=None, crop=None)
    assert folder == built and len(ran) == 4
    assert read(folder)["train"][0]["features"]["tiny"].shape == (4, 12)
    # And nothing is done twice.
    stamp = (folder / "metadata.json").stat().st_mtime_ns
    assert extract(source=None, columns=None, crop=None) == folder and len(ran) == 4
    assert (folder / "metadata.json").stat().st_mtime_ns == stamp


def test_a_study_finds_the_features(built, extract, challenge, tmp_path):
    from ml_collections import ConfigDict

    data = ConfigDict(dict(dataset="four_dme/challenge", data_dir=str(tmp_path / "data"), source="", test_source="",
                           labels="", columns=(), workbook="", features=(), workers=1))  # fmt: skip
    message = r"no features tiny; extract them with scripts/extract_features\.py --dataset four_dme/challenge --extr"
    with pytest.raises(UserError, match=message):
        ensure_dataset(data, ("tiny", "hog"))
    extract()
    assert ensure_dataset(data, ("tiny", "hog")) == built
    chosen = {"appearance": "tiny", "geometry": "hog"}
    study = load_dataset(built, chosen, num_frames=6, short="repeat")
    assert study.features["appearance"].shape == (8, 6, 12) and study.features["geometry"].shape == (8, 6, 1296)
    # What was extracted before comes back into a data set that is built anew, and into one that lacks it.
    shutil.rmtree(built)
    data.source, data.columns = str(challenge), ("Negative=neg",)
    crop = dict(data_dir=tmp_path / "data", source=challenge, columns=COLUMNS, crop=CROP, workers=1)
    four_dme.build("challenge", extractors=("hog",), **crop)
    assert ensure_dataset(data, ("tiny", "hog")) == built
    assert set(read(built)["train"][0]["features"]) == {"hog", "tiny"}
    shutil.rmtree(built)
    four_dme.build("challenge", extractors=("tiny",), **crop)
    assert set(read(built)["train"][0]["features"]) == {"tiny"}


def test_an_interrupted_extraction_ends_like_a_whole_one(built, extract, ran, tmp_path):
    extract(data_dir=tmp_path / "data")
    (folder,) = folders(tmp_path)
    whole = kept(folder)
    assert sorted(whole) == ["seq_10.npz", "seq_11.npz", "seq_2.npz", "seq_7.npz"]
    del ran[:]
    # Clips whose frames share batches with others, at either end and in the middle.
    for lost in (["seq_2.npz"], ["seq_7.npz", "seq_11.npz"], ["seq_10.npz", "seq_2.npz", "seq_7.npz"]):
        for name in lost:
            (folder / name).unlink()
        (folder / f".{lost[0]}.0123.tmp").write_bytes(b"half a file")
        extract()
        assert kept(folder) == whole and not list(folder.glob(".*.tmp"))
        assert {name for name, _ in ran} == {Path(name).stem for name in lost}
        del ran[:]
    # A clip that is only half there, or of other frames, is extracted again.
    (folder / "seq_7.npz").write_bytes(whole["seq_7.npz"][:-100])
    extract()
    assert kept(folder) == whole and {name for name, _ in ran} == {"seq_7"}


def test_neither_workers_nor_devices_nor_parts_change_a_bit(built, extract, tmp_path, monkeypatch):
    import mer_jax.extractors.pipeline as pipeline

    extract()
    (folder,) = folders(tmp_path)
    whole = kept(folder)
    shutil.rmtree(folder)
    available = jax.local_devices()
    monkeypatch.setattr(pipeline, "local_devices", lambda: available[:3])
    monkeypatch.setattr(frame_images, "_CHUNK_BYTES", 1)  # a frame at a time
    extract(workers=2)
    assert kept(folder) == whole


def test_going_on_with_other_software_is_refused(built, extract, tmp_path, monkeypatch):
    extract()
    (folder,) = folders(tmp_path)
    # What is finished needs no software.
    made_with = feature_building._made_with
    monkeypatch.setattr(feature_building, "_made_with", lambda device: made_with(device) | {"jax": "9.9"})
    extract(batch_size=2)
    (folder / "seq_7.npz").unlink()
    message = (
        rf"begun with jax {jax.__version__}, now 9\.9; --batch_size 4, now 2, and 1 of 4 clips are left; go on with"
    )
    with pytest.raises(UserError, match=message):
        extract(batch_size=2)


def test_a_lost_or_damaged_record_is_told(built, extract, tmp_path):
    extract()
    (folder,) = folders(tmp_path)
    (folder / "record.json").write_text("{}")
    with pytest.raises(UserError, match=r"record\.json: damaged; remove its folder and run the same command again"):
        extract()
    (folder / "record.json").unlink()
    with pytest.raises(UserError, match=r"lacks its record\.json; remove this folder to extract all clips again"):
        extract()
    shutil.rmtree(folder)
    assert extract() == built


def test_the_batch_size_is_remembered(built, extract, tmp_path):
    extract(batch_size=3)
    (folder,) = folders(tmp_path)
    whole = kept(folder)
    (folder / "seq_7.npz").unlink()
    extract(batch_size=None)
    assert kept(folder) == whole
    assert feature_store.read_record(folder).batch_size == 3


def test_other_weights_precision_and_crops_are_not_mixed(built, extract, weights, tmp_path, ran):
    extract()
    del ran[:]
    sha = [feature_store.read_record(folder).recipe.weights_sha256[:12] for folder in folders(tmp_path)]
    for changes, difference in (
        ({"weights": weights(1)}, rf"features tiny of weights {sha[0]}, asked [0-9a-f]{{12}}"),
        ({"dtype": "bfloat16"}, r"features tiny dtype float32, asked bfloat16"),
        ({"store": "float16"}, r"features tiny store float32, asked float16"),
        ({"crop": CropConfig(size=64)}, r"crop size 96, asked 64"),
    ):
        message = rf"built with other settings \({difference}\); remove this folder to build it again, or give another"
        with pytest.raises(UserError, match=message):
            extract(**changes)
    assert ran == [] and len(folders(tmp_path)) == 1
    # As the message says; what was extracted before is kept, and not mistaken for the new.
    shutil.rmtree(built)
    extract(weights=weights(1))
    assert len(folders(tmp_path)) == 2
    shutil.rmtree(built)
    message = (
        r"features tiny of 2 kinds \(tiny-\w+ of weights \w+; tiny-\w+ of weights \w+\); remove all folders but one"
    )
    with pytest.raises(UserError, match=message):
        four_dme.build("challenge", data_dir=tmp_path / "data", extractors=("tiny",), crop=CROP, workers=1,
                       source=tmp_path / "4dmr", columns=COLUMNS)  # fmt: skip


def test_another_version_of_a_network_is_not_mixed(built, extract, tiny_networks, monkeypatch, tmp_path):
    extract()
    changed = dataclasses.replace(tiny_networks.TINY, preprocessing="resized to 32 x 32 (bicubic)")
    monkeypatch.setitem(tiny_networks.NETWORKS, "tiny", changed)
    with pytest.raises(UserError, match=r"built with other settings \(features tiny of another version\)"):
        extract()
    with pytest.raises(UserError, match=r"built with other settings \(features tiny of another version\)"):
        four_dme.build("challenge", data_dir=tmp_path / "data", extractors=("tiny",))


def test_features_from_files_are_not_mixed(built, extract, challenge, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "files").mkdir()
    for name, length in {"seq_2": 4, "seq_7": 5, "seq_10": 3, "seq_11": 3}.items():
        for view in "lr":
            np.save(tmp_path / "files" / f"{name}_{view}.npy", rng.normal(size=(length, 12)))
    four_dme.build("challenge", data_dir=tmp_path / "data", extractors=(), features={"tiny": tmp_path / "files"})
    with pytest.raises(UserError, match=r"other settings \(features tiny read from files in .*files\); remove"):
        extract()
    # A study takes them all the same.
    assert four_dme.build("challenge", data_dir=tmp_path / "data", extractors=("tiny",)) == built


def test_frames_without_a_face_are_filled_and_told(built, extract, challenge, ran):
    # The crops of a clip's dark frames are not found by this network.
    for index in (1, 2):
        path = challenge / "train" / "seq_7" / f"img{index + 1}.png"
        frame = np.array(Image.open(path))
        frame[:, 150:] = 0
        Image.fromarray(frame).save(path)
    for path in (challenge / "test" / "seq_11").iterdir():
        Image.fromarray(np.zeros((150, 300, 3), np.uint8)).save(path)
    shutil.rmtree(built)
    folder = extract("tiny_geometry")
    facts = metadata(folder)
    assert facts["missing_frames"]["tiny_geometry"] == {"seq_7_r": [2, 5], "seq_11_l": [3, 3], "seq_11_r": [3, 3]}
    records = read(folder)
    features = records["train"][3]["features"]["tiny_geometry"]
    for index in (1, 2):
        expected = ((3 - index) * features[0] + index * features[3]) / 3
        np.testing.assert_allclose(features[index], expected, rtol=1e-5, atol=1e-6)
    assert not records["test"][0]["features"]["tiny_geometry"].any()
    assert (
        "tiny_geometry found nothing in some frames of 1 sample, which were filled"
        in (folder / "data_card.md").read_text()
    )


def test_half_precision_on_disk(built, extract, weights, tmp_path):
    exact = read(extract())["train"][0]["features"]["tiny"]
    shutil.rmtree(built)
    half = read(extract(store="float16"))["train"][0]["features"]["tiny"]
    assert half.dtype == np.float32
    np.testing.assert_array_equal(half, exact.astype(np.float16).astype(np.float32))
    sizes = {feature_store.read_record(folder).recipe.store: folder for folder in folders(tmp_path)}
    with np.load(sizes["float16"] / "seq_2.npz") as clip:
        assert clip["l"].dtype == np.float16
    shutil.rmtree(built)
    with pytest.raises(
        UserError, match=r"clip seq_\w+: features of tiny up to [\d.e+]+ do not fit into float16; give --st"
    ):
        extract(weights=weights(scale=60.0), store="float16")


def test_weights_that_give_nan_are_one_line(built, extract, weights):
    with pytest.raises(UserError, match=r"clip seq_2: tiny gives NaN or Inf; the weights are damaged or not its own"):
        extract(weights=weights(scale=1e30))


def test_grey_and_transparent_frames_are_read_as_what_they_show(weights, tmp_path, rng):
    frames = rng.integers(0, 256, (3, 48, 96), np.uint8)
    found = {}
    for kind in ("RGB", "L", "RGBA"):
        clip = tmp_path / kind / "train" / "1"
        clip.mkdir(parents=True)
        for index, frame in enumerate(frames):
            image = Image.fromarray(frame).convert(kind)
            if kind == "RGBA":
                image.putalpha(40 * index)
            image.save(clip / f"{index}.png")
        (tmp_path / kind / "train.csv").write_text("Id,Negative,Positive,Repression,Surprise,Others\n1,1,0,0,0,0\n")
        options = dict(source=tmp_path / kind, data_dir=tmp_path / kind / "data", crop=CropConfig(size=32), workers=1)
        four_dme.build("challenge", extractors=("hog",), **options)
        records = read(four_dme.extract_features("tiny", "challenge", weights=weights(), **options))["train"]
        found[kind] = np.stack([record["features"]["tiny"] for record in records])
    assert found["RGB"].shape == (2, 3, 12) and np.ptp(found["RGB"], axis=1).min() > 0
    np.testing.assert_array_equal(found["RGB"], found["L"])
    np.testing.assert_array_equal(found["RGB"], found["RGBA"])


def test_one_bad_clip_costs_no_other(built, extract, challenge, ran, tmp_path):
    bad = challenge / "train" / "seq_7" / "img3.png"
    content, status = bad.read_bytes(), bad.stat()
    bad.write_bytes(content[:100])
    message = (
        r"^1 of 4 clips cannot be extracted \(clip seq_7: .*img3\.png: .*\); the others are finished and kept: repair"
    )
    shutil.rmtree(built)
    with pytest.raises(UserError, match=message):
        extract()
    (folder,) = folders(tmp_path)
    assert sorted(kept(folder)) == ["seq_10.npz", "seq_11.npz", "seq_2.npz"]
    bad.write_bytes(content)
    os.utime(bad, ns=(status.st_atime_ns, status.st_mtime_ns))
    del ran[:]
    mended = extract()
    assert ran == [("seq_7", ("l", "r"))]
    assert len(read(mended)["train"]) == 6
    whole = kept(folder)
    shutil.rmtree(folder)
    extract()
    assert kept(folder) == whole


def test_no_readable_clip_at_all(built, extract, challenge):
    for path in challenge.rglob("*.png"):
        path.write_bytes(b"no image")
    shutil.rmtree(built)
    with pytest.raises(UserError, match=r"^4 of 4 clips cannot be extracted .*; and 1 more\); the others"):
        extract()


def test_frames_of_another_size_in_a_later_part_are_told(built, extract, challenge, monkeypatch):
    path = challenge / "train" / "seq_7" / "img5.png"
    Image.open(path).resize((200, 100)).save(path)
    monkeypatch.setattr(frame_images, "_CHUNK_BYTES", 1)
    shutil.rmtree(built)
    with pytest.raises(UserError, match=r"clip seq_7: .*img5\.png: is 200 x 100 pixels while .*img1\.png is 300 x 150"):
        extract()


def test_a_release_of_single_views(release, weights, tmp_path):
    workbook, frames = release
    folder = four_dme.extract_features("tiny", "release", weights=weights(), data_dir=tmp_path / "data", source=frames,
                                       workbook=workbook, crop=CROP, workers=1)  # fmt: skip
    first, second = read(folder)["train"]
    assert (first["view"], first["features"]["tiny"].shape) == (b"c", (4, 12))
    assert second["features"]["tiny"].shape == (5, 12)


# --- bundles -------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(extract, challenge, tmp_path, tiny_networks):
    """The published layout: features of some samples, one file per frame, and crops of others."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    root = tmp_path / "bundle"
    features = {}
    for sample, length in {"seq_2_l": 4, "seq_2_r": 4, "seq_7_l": 5}.items():
        (root / "feat2d" / sample).mkdir(parents=True)
        features[sample] = rng.normal(size=(length, 12)).astype(np.float32)
        for frame, row in enumerate(features[sample]):
            torch.save(torch.from_numpy(row[None].copy()), root / "feat2d" / sample / f"f_{frame:06d}.pt")
    crops = {}
    for sample, length in {"seq_7_l": 5, "seq_7_r": 5}.items():
        (root / "lr_image" / sample).mkdir(parents=True)
        crops[sample] = rng.integers(0, 256, (length, 64, 64, 3), np.uint8)
        for frame, crop in enumerate(crops[sample]):
            Image.fromarray(crop).save(root / "lr_image" / sample / f"f_{frame:06d}.png")
    return root, features, crops


def test_a_bundle_is_imported_and_continued(built, extract, bundle, ran, tiny_networks, tmp_path):
    root, features, crops = bundle
    folder = extract(bundle=root)
    assert ran == [("seq_7", ("r",)), ("seq_10", ("l", "r")), ("seq_11", ("l", "r"))]
    records = read(folder)
    found = {
        f"{r['clip'].decode()}_{r['view'].decode()}": r["features"]["tiny"] for r in records["train"] + records["test"]
    }
    for sample, values in features.items():
        np.testing.assert_array_equal(found[sample], values)
    images, _ = tiny_networks.prepare(crops["seq_7_r"])
    expected = tiny_networks.apply({"params": tiny_networks.random_state()}, images)
    np.testing.assert_allclose(found["seq_7_r"], expected, rtol=1e-5, atol=1e-6)
    told = metadata(folder)["extractors"]["tiny"]
    assert (told["imported_samples"], told["samples"]) == (3, 8)
    assert told["imported"].startswith("features of feat2d/ and crops of lr_image/ (content ")
    assert "; 3 of 8 samples from features of feat2d/" in (folder / "data_card.md").read_text()
    # What no bundle was used for is something else.
    with pytest.raises(UserError, match=r"features tiny imported features of feat2d/ .*, asked no\); remove"):
        extract()
    # Gone on with, it is the same.
    (kind,) = folders(tmp_path)
    whole = kept(kind)
    for name in ("seq_2.npz", "seq_7.npz"):
        (kind / name).unlink()
    extract(bundle=root)
    assert kept(kind) == whole


def test_a_whole_bundle_needs_no_weights(built, extract, challenge, tmp_path, ran):
    rng = np.random.default_rng(0)
    (tmp_path / "bundle" / "feat3d").mkdir(parents=True)
    for name, length in {"seq_2": 4, "seq_7": 5, "seq_10": 3, "seq_11": 3}.items():
        for view in "lr":
            np.save(tmp_path / "bundle" / "feat3d" / f"{name}_{view}.npy", rng.normal(size=(length, 12)))
    folder = extract("tiny_geometry", bundle=tmp_path / "bundle", weights=None)
    told = metadata(folder)["extractors"]["tiny_geometry"]
    assert (told["weights"], told["weights_sha256"], told["imported_samples"]) == ("", "", 8) and ran == []
    expected = np.load(tmp_path / "bundle" / "feat3d" / "seq_7_l.npy").astype(np.float32)
    np.testing.assert_array_equal(read(folder)["train"][2]["features"]["tiny_geometry"], expected)


def test_bundles_that_do_not_fit(built, extract, bundle, tmp_path, ran):
    root, _, _ = bundle
    with pytest.raises(
        UserError, match=r"bundle: lacks features of 5 samples \(seq_7_r, seq_10_l, seq_10_r, \.\.\.\); say"
    ):
        extract(bundle=root, weights=None)
    with pytest.raises(
        UserError, match=r"elsewhere: neither feat2d/ nor lr_image/ with anything .*feat2d/seq_2_l; give"
    ):
        extract(bundle=tmp_path / "elsewhere")
    (root / "lr_image" / "seq_7_r" / "f_000004.png").unlink()
    with pytest.raises(UserError, match=r"seq_7_r: 4 crops, but the clip has 5 frames; restore them"):
        extract(bundle=root)
    (root / "feat2d" / "seq_7_l" / "f_000004.pt").unlink()
    with pytest.raises(UserError, match=r"seq_7_l: 4 feature files, but the clip has 5 frames"):
        extract(bundle=root)
    shutil.rmtree(root / "feat2d" / "seq_2_r")
    np.save(root / "feat2d" / "seq_2_r.npy", np.ones((4, 13), np.float32))
    with pytest.raises(
        UserError, match=r"feat2d: 13 features per frame of 'seq_2_r', but tiny gives 12; name the extr"
    ):
        extract(bundle=root)
    assert ran == []


# --- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dtype": "float64"}, r"--dtype float64: choose float32 or bfloat16"),
        ({"store": "int8"}, r"--store int8: choose float32 or float16"),
        ({"batch_size": 0}, r"--batch_size 0: at least 1 image is needed"),
        ({"workbook": "x"}, r"workbook: not used by four_dme/challenge"),
        ({"weights": "absent.pt"}, r"absent\.pt: no such file of weights"),
        ({"source": None, "columns": None}, r"four_dme/challenge is not built yet: say with --source"),
        ({"extractor": "hog"}, r"extractor 'hog' is unknown; networks are siglip2_b16_224"),
    ],
)
def test_senseless_options(extract, changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        extract(**changes)
    assert not (tmp_path / "data").exists()


def test_an_unknown_configuration(weights, tmp_path):
    with pytest.raises(UserError, match=r"config 'four_dme/demoo' is unknown"):
        four_dme.extract_features("tiny", "demoo", weights=weights(), data_dir=tmp_path)
