"""``scripts/predict.py --video`` as a user opens it, on a study of flow that was built and trained from faces."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mer_jax.clips.views import split_views
from mer_jax.study.results import StudyResults

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("face_videos", ROOT / "tests" / "face_videos.py")
face_videos = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(face_videos)

LABELS = ("Negative", "Positive", "Repression", "Surprise", "Others")
NUM_TRAIN, NUM_FRAMES = 6, 7
FIELDS = {
    "data.dataset": "four_dme_flow/challenge",
    "data.data_dir": "data",
    "data.source": "source",
    "data.workers": 1,
    "data.size": 12,
    "model.features": (2, 3),
    "model.pools": (2, 2),
    "model.hidden_dim": 4,
    "train.epochs": 2,
    "train.patience": 0,
    "study.num_seeds": 1,
    "study.num_inner": 2,
    "evaluation.bootstrap": 100,
}


def open_door(script, *arguments, cwd):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": os.environ["HURRIED_XLA"]}
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six training clips and a test clip of two faces side by side, a study of them, and a video of the left one."""
    root = tmp_path_factory.mktemp("flow")
    rows = []
    for number in range(1, NUM_TRAIN + 2):
        clip = root / "source" / ("train" if number <= NUM_TRAIN else "test") / f"clip_{number}"
        clip.mkdir(parents=True)
        for t in range(NUM_FRAMES):
            motion = (1 + number % 3) * face_videos.bump(t, 3, 3)
            pair = np.concatenate([face_videos.face_frame(motion), face_videos.face_frame(-motion)], axis=1)
            Image.fromarray(pair).save(clip / f"{t}.png", compress_level=1)
        if number <= NUM_TRAIN:
            rows.append([number, *(int(number % 5 == label or number % 3 == label) for label in range(5))])
    with open(root / "source" / "train.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([["Id", *LABELS], *rows])
    fields = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    done = open_door("train.py", "--config", ROOT / "configs" / "micro_attnet.py", *fields, "--workdir=run", cwd=root)
    assert done.returncode == 0, done.stderr
    test_clip = root / "source" / "test" / f"clip_{NUM_TRAIN + 1}"
    frames = [np.asarray(Image.open(test_clip / f"{t}.png")) for t in range(NUM_FRAMES)]
    face_videos.write_video(root / "left.avi", [split_views(frame)["l"] for frame in frames])
    return root


def test_a_video_of_a_test_clip_is_predicted_as_that_clip_was(folder, tmp_path):
    """Whatever the builder did to the clip's left view in training's name, the door does to its video."""
    done = open_door("predict.py", "--workdir=run", "--video=left.avi", f"--picture={tmp_path / 'p.png'}", cwd=folder)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    results = StudyResults.load(folder / "run")
    samples = (results.clip_split[results.sample_clip] == "test") & (results.sample_view == "l")
    assert samples.sum() == 2  # both phases
    phases = results.probabilities[:, samples].astype(float)  # (M, 2, L)
    mean, spread = phases.mean(axis=(0, 1)), phases.mean(axis=1).std(axis=0)
    lines = done.stdout.splitlines()
    assert lines[0] == "left.avi: frames 0 to 6 (0.00 to 0.24 s) of 25 a second, the whole video"
    for line, label, expected, deviation in zip(lines[4:9], LABELS, mean, spread, strict=True):
        told = line.split()
        assert told[0] == label
        assert float(told[1]) == pytest.approx(expected, abs=0.0051)
        assert float(told[2]) == pytest.approx(deviation, abs=0.0051)
    assert f"picture: {tmp_path / 'p.png'}" == lines[-1]
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.format == "PNG" and picture.size[0] == 2160


@pytest.mark.parametrize(
    "arguments, told",
    [
        (
            ["--video=run/folds.csv"],
            "run/folds.csv: cannot be read as a video; choose another file or convert it to mp4",
        ),
        (["--video=left.avi", "--split=test"], "--split does not go with --video"),
        (["--picture=p.png"], "--picture needs --video"),
    ],
)
def test_wrong_input_is_one_line(folder, arguments, told):
    done = open_door("predict.py", "--workdir=run", *arguments, cwd=folder)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {told}") and len(done.stderr.splitlines()) == 1
