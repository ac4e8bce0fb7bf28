import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from mer_jax.clips import demo, demo_actions, demo_face
from mer_jax.clips.faces import FaceDetector
from mer_jax.clips.frames import read_frame
from mer_jax.clips.layouts import LABELS, read_challenge
from mer_jax.clips.views import split_views
from mer_jax.errors import UserError

SETTINGS = dict(num_train=4, num_test=2, seed=3)


@pytest.fixture(scope="module")
def demo_dir(tmp_path_factory):
    return demo.make_demo_clips(tmp_path_factory.mktemp("demo") / "clips", **SETTINGS, workers=2)


def files_of(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_layout_is_that_of_the_challenge(demo_dir):
    clips = read_challenge(demo_dir)
    assert [clip.id for clip in clips] == list(range(1, 7))
    assert [clip.split for clip in clips] == ["train"] * 4 + ["test"] * 2
    for clip in clips:
        assert 14 <= len(clip.frames) <= 32
        assert [path.name for path in clip.frames] == [f"{index:04d}.jpg" for index in range(len(clip.frames))]
        assert sum(path.stat().st_size for path in clip.frames) < 3e6
        frame = read_frame(clip.frames[0])
        assert frame.shape == (demo_face.VIEW_SIZE, 2 * demo_face.VIEW_SIZE, 3)
    train, test = clips[:4], clips[4:]
    assert all(clip.labels is None for clip in test)
    truths = [demo.load_ground_truth(demo_dir, clip.name) for clip in train]
    assert [clip.labels for clip in train] == [tuple(truth.labels) for truth in truths]
    assert all(clip.subject for clip in train)


def test_the_readme_names_the_licence_and_warns_of_benchmarks(demo_dir):
    text = (demo_dir / "README.md").read_text()
    assert "public domain" in text
    assert "NASA" in text
    assert "no benchmark" in text


def test_test_labels_lie_with_the_ground_truth_only(demo_dir):
    with open(demo_dir / "ground_truth" / "test_labels.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["Id"]) for row in rows] == [5, 6]
    for row in rows:
        truth = demo.load_ground_truth(demo_dir, f"clip_{int(row['Id']):03d}")
        assert [int(row[label]) for label in LABELS] == list(truth.labels)
    with open(demo_dir / "train.csv", newline="") as stream:
        assert [int(row["Id"]) for row in csv.DictReader(stream)] == [1, 2, 3, 4]


def test_bytes_depend_on_neither_workers_nor_neighbours(demo_dir, tmp_path):
    # One worker, and fewer training clips: the test clips have other ids but the same content.
    other = demo.make_demo_clips(tmp_path / "other", num_train=2, num_test=1, seed=3, workers=1)
    for theirs, ours in (("train/clip_001",) * 2, ("train/clip_002",) * 2, ("test/clip_003", "test/clip_005")):
        assert files_of(other / theirs) == files_of(demo_dir / ours)


def test_another_seed_gives_other_clips(tmp_path):
    rendered = [next(demo._frames(demo._all_clips(seed, 1, 0)[0])) for seed in (3, 4)]
    assert np.abs(rendered[0].astype(int) - rendered[1]).mean() > 5


def test_only_what_is_missing_is_made(demo_dir, tmp_path):
    resumed = shutil.copytree(demo_dir, tmp_path / "resumed")
    shutil.rmtree(resumed / "train" / "clip_002")
    (resumed / "train.csv").unlink()
    # What a killed run leaves behind.
    (resumed / ".unfinished" / "clip_002-1").mkdir(parents=True)
    (resumed / ".unfinished" / "clip_002-1" / "0000.jpg").write_bytes(b"half")
    before = {path: path.stat().st_mtime_ns for path in resumed.rglob("*.jpg")}
    demo.make_demo_clips(resumed, **SETTINGS)
    assert files_of(resumed) == files_of(demo_dir)
    kept = [path for path in before if path.exists()]
    assert len(kept) == len(before) - 1
    assert all(path.stat().st_mtime_ns == before[path] for path in kept)


SCRIPT = """
import sys
from mer_jax.clips.demo import make_demo_clips
make_demo_clips(sys.argv[1], num_train=4, num_test=2, seed=3, workers=2)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_leaves_whole_clips_only_and_goes_on(demo_dir, tmp_path, how):
    # No __main__ guard in the script: it must not matter.
    (tmp_path / "script.py").write_text(SCRIPT)
    out = tmp_path / "clips"
    root = Path(demo.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", out],
        env={**os.environ, "PYTHONPATH": str(root)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not any(out.glob("train/*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(how)
    assert process.wait(timeout=30) != 0
    finished = [path for split in ("train", "test") for path in (out / split).glob("*")]
    assert 0 < len(finished) < 6
    for path in finished:
        assert files_of(path) == files_of(demo_dir / path.relative_to(out))
    if how == signal.SIGKILL:
        demo.make_demo_clips(out, **SETTINGS)
        assert files_of(out) == files_of(demo_dir)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="something else"):
        demo.make_demo_clips(tmp_path, num_train=1, num_test=0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("change", "message"), [({"seed": 4}, "seed=3"), ({"num_train": 5}, "num_train=4"), ({"num_test": 0}, "num_test=2")]
)
def test_other_settings_are_refused(demo_dir, change, message):
    with pytest.raises(UserError, match=message):
        demo.make_demo_clips(demo_dir, **{**SETTINGS, **change})


def test_another_version_is_refused(demo_dir, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    (old / demo.MANIFEST).write_text(json.dumps({"version": 0, **SETTINGS}))
    with pytest.raises(UserError, match="version 0"):
        demo.make_demo_clips(old, **SETTINGS)
    with pytest.raises(UserError, match="version 0"):
        demo.displacement_field(old, "clip_001", "l", 0)
    (old / demo.MANIFEST).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        demo.make_demo_clips(old, **SETTINGS)


@pytest.mark.parametrize("wrong", [{"num_train": 0}, {"num_test": -1}, {"seed": -1}, {"workers": 0}])
def test_numbers_out_of_range_are_named(tmp_path, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        demo.make_demo_clips(tmp_path / "clips", **wrong)


def test_a_full_disk_ends_in_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"clip_00\d.*No space left"):
        demo.make_demo_clips(tmp_path / "clips", num_train=2, num_test=0)


def test_labels_have_the_statistics_of_the_challenge():
    clips = demo._all_clips(0, 100, 28)
    for split, tolerance in (("train", 0.03), ("test", 0.06)):
        labels = np.array([clip.label_vector for clip in clips if clip.split == split])
        np.testing.assert_allclose(labels.mean(axis=0), [0.45, 0.2, 0.15, 0.25, 0.2], atol=tolerance)
        assert 0.2 <= np.mean(labels.sum(axis=1) == 2) <= 0.32
        assert labels.sum(axis=1).min() == 1
        assert labels.sum(axis=1).max() == 2
    subjects = {split: {clip.subject for clip in clips if clip.split == split} for split in ("train", "test")}
    assert len(subjects["train"] | subjects["test"]) == 24
    assert not subjects["train"] & subjects["test"]


def test_the_plan_of_every_clip_is_as_announced():
    prototypes = {label: [set(names) for names, _ in choices] for label, choices in demo_actions.PROTOTYPES.items()}
    for clip in demo._all_clips(0, 100, 28):
        plan = demo._plan(clip)
        names = [movement.name for movement in plan.aus]
        assert len(set(names)) == len(names)
        for label in clip.labels:
            assert any(prototype <= set(names) for prototype in prototypes[label])
        intensities = np.array([movement.intensity for movement in plan.aus])
        assert intensities.shape == (len(names), plan.num_frames)
        assert plan.apex == intensities.sum(axis=0).argmax()
        assert 0 < plan.apex < plan.num_frames - 1
        assert np.all((intensities.max(axis=1) >= 0.5) & (intensities.max(axis=1) <= 3.0))
        assert not intensities[:, 0].any()
        for movement in plan.others:
            assert movement.intensity[0] == 0
        assert plan.sway[0] == demo_face.HeadPose()


def test_ground_truth_is_what_was_rendered(demo_dir):
    for clip in demo._all_clips(3, 4, 2):
        truth, plan = demo.load_ground_truth(demo_dir, clip.name), demo._plan(clip)
        assert truth.apex == np.sum(list(truth.aus.values()), axis=0).argmax()
        assert list(truth.aus) == [movement.name for movement in plan.aus]
        for movement in plan.aus:
            np.testing.assert_array_equal(truth.aus[movement.name], movement.intensity)
    with pytest.raises(UserError, match="clip_999"):
        demo.load_ground_truth(demo_dir, "clip_999")


@pytest.mark.parametrize("name", sorted(demo_actions._ACTIONS))
def test_an_action_moves_its_peak_by_one_pixel_and_tears_nothing(name):
    motion = demo_actions.action(name).motion
    length = np.sqrt((motion.sum(axis=0) ** 2).sum(axis=-1))
    np.testing.assert_allclose(length.max(), 1, rtol=1e-5)
    # The strongest of all: 7 px for a blink, 3 px otherwise; the surface must not fold under it.
    largest = 7.0 if name == "blink" else 3.0
    slope_x, slope_y = np.gradient(motion[..., 0].sum(axis=0), axis=1), np.gradient(motion[..., 1].sum(axis=0), axis=0)
    assert largest * max(-slope_x.min(), -slope_y.min()) < 1
    # Nothing far from the face moves.
    border = np.ones(length.shape, bool)
    border[20:-20, 20:-20] = False
    assert length[border].max() < 0.05


def test_an_envelope_rises_from_zero_to_its_only_maximum_and_falls():
    course = demo_actions.envelope(20, onset=2.5, apex=8, offset=16.0, residual=0.2)
    assert not course[:3].any()
    assert course[8] == 1
    assert np.sum(course == 1) == 1
    assert np.all(np.diff(course[2:9]) > 0)
    assert np.all(np.diff(course[8:17]) < 0)
    np.testing.assert_allclose(course[16:], 0.2)


def test_the_face_is_as_high_as_announced():
    height = np.ptp(demo_face.base_face().landmarks[:, 1])
    np.testing.assert_allclose(height, demo_face.FACE_HEIGHT, rtol=1e-5)
    assert demo_face.FACE_HEIGHT == 224


def test_cameras_show_every_point_once():
    for number in (0, 5, 21):
        subject = demo_face.make_subject(0, number)
        for yaw in (-demo_face.CAMERA_YAW, demo_face.CAMERA_YAW):
            camera = demo_face.Camera(subject, yaw, demo_face.HeadPose(yaw=np.sign(yaw) * 2.5))
            points = camera.canvas_points
            # A surface that folds over would send neighbours to the same place, or back.
            assert np.diff(points[..., 0], axis=1).min() > 0
            assert np.diff(points[..., 1], axis=0).min() > 0
            back = camera._project(demo_face.sample(subject.surface, points))
            # The border shows less than the canvas holds.
            np.testing.assert_allclose(back, demo_face.grid(demo_face.VIEW_SIZE), atol=0.1)


def test_depth_moves_the_two_views_apart():
    forward = np.zeros((demo_face.VIEW_SIZE, demo_face.VIEW_SIZE, 3), np.float32)
    forward[..., 2] = -2.0
    subject = demo_face.make_subject(0, 0)
    centre = demo_face.VIEW_SIZE // 2
    left, right = (
        demo_face.Camera(subject, yaw, demo_face.HeadPose()).displacement(forward, demo_face.HeadPose())[centre, centre]
        for yaw in (-demo_face.CAMERA_YAW, demo_face.CAMERA_YAW)
    )
    assert left[0] * right[0] < 0
    np.testing.assert_allclose(abs(left[0]), 2 * np.sin(np.radians(demo_face.CAMERA_YAW)), rtol=0.15)


@pytest.mark.parametrize("view", demo.VIEWS)
def test_the_displacement_field_is_the_flow_of_the_pixels(demo_dir, view):
    height = demo_face.VIEW_SIZE
    pixels = demo_face.grid(height)
    face = np.zeros((height, height), bool)
    face[60:260, 70:250] = True
    for clip in read_challenge(demo_dir)[:4]:
        apex = demo.load_ground_truth(demo_dir, clip.name).apex
        first, then = (
            cv2.cvtColor(split_views(read_frame(clip.frames[index]))[view], cv2.COLOR_RGB2GRAY) for index in (0, apex)
        )
        flow = demo.displacement_field(demo_dir, clip.name, view, apex)
        assert flow.shape == (height, height, 2)
        assert flow.dtype == np.float32
        back = demo_face.sample(then.astype(np.float32), pixels + flow, cv2.INTER_CUBIC)
        warped, still = (np.abs(image - first)[face].mean() for image in (back, then.astype(np.float32)))
        assert warped < still
        # What is left is noise (of both frames, about 1.9 grey levels on average), shading and compression.
        assert warped < 3.5
        # An estimate from the pixels alone agrees on the face.
        estimator = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        blurred = [cv2.GaussianBlur(image, (0, 0), 1.0) for image in (first, then)]
        estimated = estimator.calc(*blurred, None)
        error = np.sqrt(((estimated - flow) ** 2).sum(axis=-1))[face]
        assert np.median(error) < 0.35
    assert not demo.displacement_field(demo_dir, "clip_001", view, 0).any()


def test_displacement_fields_of_what_is_not_there_are_refused(demo_dir, tmp_path):
    for arguments, message in (
        (("clip_999", "l", 0), "no clip 'clip_999'"),
        (("clip_001", "m", 0), "view 'm'"),
        (("clip_001", "l", 99), "no frame 99"),
        (("clip_001", "l", -1), "no frame -1"),
    ):
        with pytest.raises(UserError, match=message):
            demo.displacement_field(demo_dir, *arguments)
    with pytest.raises(UserError, match="no demo clips"):
        demo.displacement_field(tmp_path, "clip_001", "l", 0)


def test_faces_are_found_in_both_views(demo_dir):
    with FaceDetector() as detector:
        for clip in read_challenge(demo_dir):
            for view in split_views(read_frame(clip.frames[0])).values():
                found = detector.detect(np.ascontiguousarray(view))
                assert found is not None
                _, _, width, height = found.box
                assert 0.55 < width < 1
                assert 0.55 < height < 1
