"""What networks attend to: kept beside features that stay as they are, and found again with the frames it is of."""

import json
import os

import jax
import numpy as np
import pytest
from PIL import Image

from data_builders import four_dme
from data_builders.four_dme.attention_maps import see_frames
from mer_jax.clips.crops import CropConfig, crop_clip, face_box
from mer_jax.clips.faces import FaceDetector
from mer_jax.clips.frames import read_frame
from mer_jax.clips.layouts import read_challenge
from mer_jax.clips.views import split_views
from mer_jax.errors import UserError

CROP = CropConfig(size=96)


@pytest.fixture
def attend(extract):
    """Extracts features and maps."""
    return lambda **changes: extract("tiny_attentive", **{"attention": True, **changes})


def features_folder(tmp_path):
    (folder,) = (tmp_path / "data" / "features" / "four_dme" / "challenge").iterdir()
    return folder


def kept(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.npz")}


def crops_of(challenge, name, view):
    (clip,) = (clip for clip in read_challenge(challenge, columns={"Negative": "neg"}) if clip.name == name)
    frames = [split_views(read_frame(path))[view] for path in clip.frames]
    with FaceDetector(CROP.min_confidence) as detector:
        return frames, face_box(frames, CROP, detector)


def see(tmp_path, wanted, choose=lambda num_frames: np.array([0, num_frames - 1]), size=40):
    return see_frames("challenge", tmp_path / "data", wanted, ("tiny_attentive", "hog"), choose, size)


def test_maps_do_not_change_features_and_can_come_later(built, extract, attend, tmp_path):
    extract("tiny_attentive")
    folder = features_folder(tmp_path)
    plain = kept(folder)
    assert attend() == built
    assert kept(folder) == plain and sorted(kept(folder / "attention")) == sorted(plain)
    # Both at once, and again after a loss: the same bits.
    maps = kept(folder / "attention")
    for lost in (folder / "seq_7.npz", folder / "attention" / "seq_2.npz", folder / "attention" / "seq_7.npz"):
        lost.unlink()
    attend()
    assert kept(folder) == plain and kept(folder / "attention") == maps


def test_maps_are_the_network_s_own(built, attend, challenge, tiny_networks, tmp_path):
    attend()
    folder = features_folder(tmp_path)
    assert json.loads((folder / "attention" / "record.json").read_text())["dim"] == 16
    frames, box = crops_of(challenge, "seq_7", "r")
    images, _ = tiny_networks.prepare(crop_clip(frames, box, CROP.size))
    with jax.default_matmul_precision("highest"):
        expected = np.asarray(tiny_networks.attention({"params": tiny_networks.random_state()}, images))
    assert expected.shape == (5, 4, 4)
    wanted = [("seq_7", "r"), ("seq_11", "l")]
    seen = see(tmp_path, wanted, choose=lambda num_frames: np.array([1, num_frames - 1]))
    assert set(seen) == set(wanted)
    found = seen["seq_7", "r"]
    maps = found.maps["tiny_attentive"]
    assert maps.dtype == np.float16 and set(found.maps) == {"tiny_attentive"}
    np.testing.assert_allclose(maps, expected[[1, 4]], rtol=2e-3)
    assert (maps.astype(float).sum(axis=(1, 2)) <= 1 + 1e-3).all()
    assert found.areas == {"tiny_attentive": (0.0, 0.0, 1.0, 1.0)}
    assert found.num_frames == 5 and found.phases == {}
    np.testing.assert_array_equal(found.crops, crop_clip([frames[1], frames[4]], box, 40))
    assert seen["seq_11", "l"].crops.shape == (2, 40, 40, 3)


def test_without_maps_there_are_the_frames(built, extract, tmp_path):
    extract("tiny_attentive")
    seen = see(tmp_path, [("seq_2", "l")])["seq_2", "l"]
    assert seen.crops.shape == (2, 40, 40, 3) and seen.maps == {} and seen.areas == {}


def test_the_known_phases_of_a_clip(release, tmp_path):
    workbook, source = release
    four_dme.build("release", data_dir=tmp_path / "data", source=source, workbook=workbook, extractors=("hog",),
                   crop=CROP, workers=1)  # fmt: skip
    (name,) = (path.stem for path in (tmp_path / "data" / "work" / "four_dme" / "release").rglob("*b_1*.npz"))
    seen = see_frames("release", tmp_path / "data", [(name, "c")], ("hog",), lambda num_frames: np.arange(2), 24)
    assert seen[name, "c"].phases == {"onset": 0, "apex": 1, "offset": 4} and seen[name, "c"].num_frames == 5


def test_other_weights_maps_are_not_taken_for_these(built, attend, weights, tmp_path):
    attend()
    facts = json.loads((built / "metadata.json").read_text())
    facts["extractors"]["tiny_attentive"]["weights_sha256"] = "0" * 64
    (built / "metadata.json").write_text(json.dumps(facts))
    assert see(tmp_path, [("seq_2", "l")])["seq_2", "l"].maps == {}


def test_what_has_no_attention_is_refused(built, extract, challenge, tmp_path):
    with pytest.raises(UserError, match=r"^--attention: tiny is no transformer and has no attention to keep; leave"):
        extract("tiny", attention=True)
    with pytest.raises(UserError, match=r"^--attention: what was attended to is not known of the features in .*bundle"):
        extract("tiny_attentive", attention=True, bundle=tmp_path / "bundle")
    assert not (tmp_path / "data" / "features").exists()


def test_frames_that_are_gone_are_one_line(built, challenge, tmp_path):
    with pytest.raises(UserError, match=r"holds no clip seq_5, view l; it was built anew with other clips"):
        see(tmp_path, [("seq_2", "l"), ("seq_5", "l")])
    path = challenge / "train" / "seq_2" / "img1.png"
    status, image = path.stat(), Image.open(path)
    for other in sorted(path.parent.iterdir()):
        image.resize((40, 30)).save(other)
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match=r"clip seq_2: its frames are of another size than the data set's; build it"):
        see(tmp_path, [("seq_2", "l")])
    for other in sorted(path.parent.iterdir())[2:]:
        other.unlink()
    with pytest.raises(UserError, match=r"clip seq_2: its frames are not those that the data set was built of"):
        see(tmp_path, [("seq_2", "l")])
    with pytest.raises(UserError, match=r"1\.0\.0: the data set is not there; say with config\.data\.data_dir where"):
        see_frames("demo", tmp_path / "data", [("a", "l")], (), np.arange, 8)


def test_a_demo_without_its_frames_is_not_rendered_again(built, tmp_path):
    demo = tmp_path / "data" / "four_dme" / "demo"
    demo.mkdir()
    built.rename(demo / "1.0.0")
    with pytest.raises(UserError, match=r"four_dme_demo: the demo's frames are not there; restore this folder"):
        see_frames("demo", tmp_path / "data", [("seq_2", "l")], (), np.arange, 8)
