"""From frames of a challenge folder to samples of flow, and what stands in the way."""

import dataclasses

import cv2
import numpy as np
import pytest

from data_builders import four_dme_flow
from data_builders.four_dme_flow.preparation import load_prepared, prepare
from mer_jax.clips.apex import ApexConfig
from mer_jax.clips.crops import CropConfig, crop_clip
from mer_jax.clips.flow import FlowConfig, dense_flow, to_grey
from mer_jax.clips.frames import read_frame
from mer_jax.clips.layouts import Clip
from mer_jax.errors import UserError
from mer_jax.study.flow_data import load_flow_dataset

CROP = CropConfig(rule="largest", size=64)


def write_clip(folder, count, moving=True):
    """Two-view frames of blobs, of which one moves to the right and back."""
    folder.mkdir(parents=True)
    y, x = np.mgrid[:96, :96]
    texture = 40 * np.sin(x / 5) * np.cos(y / 7) + 100
    for index in range(count):
        push = 3 * np.sin(np.pi * index / max(count - 1, 1)) if moving else 0.0
        shift = push * np.exp(-((x - 48) ** 2 + (y - 48) ** 2) / 300)
        image = cv2.remap(
            texture.astype(np.float32), (x - shift).astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR
        )
        view = np.repeat(image[..., None], 3, -1).clip(0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{index:03d}.png"), np.concatenate([view, view], axis=1))


def challenge(root, counts, still=()):
    rows = ["Id,Negative,Positive,Repression,Surprise,Others,subject"]
    for number, count in enumerate(counts, start=1):
        write_clip(root / "train" / f"clip_{number}", count, moving=number not in still)
        rows.append(f"{number},1,0,0,{number % 2},0,s{number}")
    (root / "train.csv").write_text("\n".join(rows) + "\n")
    return root


def build(root, tmp_path):
    return four_dme_flow.build("challenge", data_dir=tmp_path / "data", source=root, crop=CROP, workers=1)


def test_clips_become_samples_of_two_phases(tmp_path, capfd):
    root = challenge(tmp_path / "clips", [9, 2, 5], still=(3,))
    target = build(root, tmp_path)
    noted = capfd.readouterr().err
    assert "no face found" in noted and "nothing moves" in noted and "clip_3_l" in noted
    data = load_flow_dataset(target, channels=("u", "v", "m"), size=32)
    assert data.features["flow"].shape == (12, 32, 32, 3)  # 3 clips x 2 views x 2 phases
    assert data.sample_view[:4].tolist() == ["l", "l", "r", "r"]
    assert data.sample_phase[:2].tolist() == ["onset_apex", "apex_offset"]
    rising, falling = data.features["flow"][0], data.features["flow"][1]
    assert rising[14:18, 14:18, 0].mean() > 0.5 and falling[14:18, 14:18, 0].mean() < -0.5
    np.testing.assert_array_less(-1e-6, rising[..., 2])
    assert not data.features["flow"][data.sample_clip == 2].any()  # constant frames
    second = data.features["flow"][(data.sample_clip == 1) & (data.sample_phase == "apex_offset")]
    assert not second.any()  # two frames: the offset is the apex
    assert data.clip_labels[:, :1].all() and data.label_names[0] == "Negative"


def test_what_is_built_is_found_again_and_changes_are_refused(tmp_path):
    root = challenge(tmp_path / "clips", [4, 4])
    target = build(root, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    assert build(root, tmp_path) == target
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before
    write_clip(root / "train" / "clip_9", 4)
    (root / "train.csv").write_text((root / "train.csv").read_text() + "9,0,1,0,0,0,s9\n")
    with pytest.raises(UserError, match="changed since it was built"):
        build(root, tmp_path)


def test_finished_clips_are_kept_when_one_is_bad(tmp_path):
    root = challenge(tmp_path / "clips", [4, 4])
    frame = root / "train" / "clip_2" / "002.png"
    good = frame.read_bytes()
    frame.write_bytes(good[:50])
    with pytest.raises(UserError, match=r"1 of 2 clips cannot be prepared \(clip clip_2: .*002.png"):
        build(root, tmp_path)
    kept = list((tmp_path / "data" / "work").rglob("clip_1.npz"))
    assert len(kept) == 1
    stamp = kept[0].stat().st_mtime_ns
    frame.write_bytes(good)
    build(root, tmp_path)
    assert kept[0].stat().st_mtime_ns == stamp


def test_a_channel_or_phase_that_is_not_there_is_named(tmp_path):
    target = build(challenge(tmp_path / "clips", [4, 4]), tmp_path)
    with pytest.raises(UserError, match=r"config.data.channels.*'depth'"):
        load_flow_dataset(target, channels=("u", "depth"))
    with pytest.raises(UserError, match=r"config.data.phases.*'whole'"):
        load_flow_dataset(target, phases=("whole",))


@pytest.fixture
def annotated(tmp_path):
    """One view of 12 frames, of which those from 2 to 9 are the expression and 4 is said to be its apex."""
    folder = tmp_path / "clip"
    write_clip(folder, 12)
    for path in sorted(folder.iterdir()):
        cv2.imwrite(str(path), cv2.imread(str(path))[:, :96])
    frames = tuple(sorted(folder.iterdir()))
    return Clip("s1_a", 1, "s1", frames, (1, 0, 0, 0, 0), "train", False, onset=2, apex=4, offset=9)


def prepared(clip, tmp_path, apex=None):
    paths = prepare([clip], CROP, apex or ApexConfig(), FlowConfig(), tmp_path / "work", workers=1)
    return load_prepared(paths[clip.name], "c")


def test_a_given_apex_is_taken_and_phases_keep_to_onset_and_offset(annotated, tmp_path):
    done = prepared(annotated, tmp_path)
    assert (done.apex, done.annotated, done.still) == (4, True, False)
    frames = [read_frame(annotated.frames[index]) for index in (2, 4, 9)]
    grey = to_grey(crop_clip(frames, done.box, CROP.size))
    np.testing.assert_array_equal(done.flow["onset_apex"], dense_flow(grey[0], grey[1], FlowConfig()))
    np.testing.assert_array_equal(done.flow["apex_offset"], dense_flow(grey[1], grey[2], FlowConfig()))
    # Farthest from frame 2 are those half-way, 5 and 6.
    plain = ApexConfig(use_annotated=False, compensate="none", blink=0, smooth=0.0)
    found = prepared(annotated, tmp_path, plain)
    assert found.apex in (5, 6) and not found.annotated
    unknown = dataclasses.replace(annotated, apex=None)
    assert prepared(unknown, tmp_path, dataclasses.replace(plain, use_annotated=True)).apex == found.apex


def test_what_bounds_the_phases_is_noticed_when_it_changes(annotated, tmp_path):
    before = prepared(annotated, tmp_path)
    after = prepared(dataclasses.replace(annotated, apex=6), tmp_path)
    assert after.apex == 6 and (after.flow["onset_apex"] != before.flow["onset_apex"]).any()


def test_clips_too_short_for_a_motion(annotated, tmp_path):
    with pytest.raises(
        UserError, match=r"clip s1_a: has 1 frame from onset to offset, at least 2 are needed"
    ) as caught:
        prepared(dataclasses.replace(annotated, onset=4, apex=4, offset=4), tmp_path)
    assert "restore its frames, or remove the clip and its labels" in str(caught.value)
    two = prepared(dataclasses.replace(annotated, onset=4, apex=None, offset=5), tmp_path)
    assert two.apex == 5 and two.flow["onset_apex"].any() and not two.flow["apex_offset"].any()


def test_still_frames_have_no_flow_whoever_says_where_the_apex_is(annotated, tmp_path):
    write_clip(tmp_path / "still", 5, moving=False)
    frames = tuple(sorted((tmp_path / "still").iterdir()))
    still = Clip("s1_b", 1, "s1", frames, (1, 0, 0, 0, 0), "train", True, apex=3)
    for use_annotated, apex in ((True, 3), (False, 2)):
        paths = prepare(
            [still], CROP, ApexConfig(use_annotated=use_annotated), FlowConfig(), tmp_path / "work", workers=1
        )
        for view in "lr":
            done = load_prepared(paths["s1_b"], view)
            assert done.still and done.apex == apex and not done.flow["onset_apex"].any()


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("files", {}, r"config 'four_dme_flow/files' is unknown; there are demo, challenge, release"),
        ("demo", {"source": "x"}, r"source: not used by four_dme_flow/demo; leave it out"),
        ("release", {"labels": "x"}, r"labels: not used by four_dme_flow/release"),
        ("challenge", {"workbook": "x"}, r"workbook: not used by four_dme_flow/challenge"),
        ("demo", {"demo_clips": (1, 0)}, r"demo_clips \(1, 0\): at least one training and one test clip are needed"),
        ("release", {}, r"four_dme_flow/release is not built yet with these settings: say with --source"),
    ],
)
def test_options_that_make_no_sense(tmp_path, config, options, message):
    with pytest.raises(UserError, match=message):
        four_dme_flow.build(config, data_dir=tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()
