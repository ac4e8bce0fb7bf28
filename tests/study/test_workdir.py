import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from mer_jax.errors import UserError
from mer_jax.study.config import base_config
from mer_jax.study.data import StudyData
from mer_jax.study.workdir import check_data, check_workdir, default_workdir, start_workdir, versions


@pytest.fixture
def config():
    config = base_config()
    config.name = "fusion"
    return config


@pytest.fixture
def data(rng):
    return StudyData(
        clip_name=np.array(["a", "b"]),
        clip_id=np.array([1, 2]),
        clip_subject=np.array(["s1", "s2"]),
        clip_split=np.array(["train", "train"]),
        clip_database=np.array(["", ""]),
        clip_labels=np.zeros((2, 3), np.int8),
        sample_clip=np.array([0, 0, 1, 1], np.int32),
        sample_view=np.array(["l", "r", "l", "r"]),
        sample_phase=np.array([""] * 4),
        face_found=np.ones(4, bool),
        features={"appearance": rng.normal(size=(4, 3, 2)).astype(np.float32)},
        frame_mask=np.ones((4, 3), bool),
        label_names=("negative", "positive", "surprise"),
        task="multi_label",
    )


def test_the_name_of_a_run_tells_its_overrides(config):
    assert default_workdir(config, {}) == Path("runs/fusion")
    told = {"train.epochs": 7, "folds.scheme": "loso", "study.checkpoint_seconds": 1.0, "platform": "cpu"}
    assert default_workdir(config, told) == Path("runs/fusion-folds.scheme=loso-train.epochs=7")
    assert default_workdir(config, {"data.data_dir": "a/b c"}) == Path("runs/fusion-data.data_dir=a_b_c")
    one, other = (default_workdir(config, {"data.source": "x" * 200, "seed": seed}) for seed in (1, 2))
    assert one != other and len(one.name) < 30


def test_a_start_is_found_again_and_never_rewritten(config, tmp_path):
    check_workdir(config, tmp_path / "runs" / "run")
    start_workdir(config, tmp_path / "runs" / "run", {"train.epochs": 50})
    run = tmp_path / "runs" / "run"
    assert json.loads((run / "overrides.json").read_text()) == {"train.epochs": 50}
    assert json.loads((run / "versions.json").read_text()) == versions()
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    check_workdir(config, run)
    start_workdir(config, run, {"platform": "cpu"})
    assert before == {path.name: path.stat().st_mtime_ns for path in run.iterdir()}


@pytest.mark.parametrize("left", [[], ["overrides.json"], ["overrides.json", ".versions.json.x1.tmp", "versions.json"]])
def test_a_start_that_was_killed_is_begun_again(config, tmp_path, left):
    for name in left:
        (tmp_path / name).write_text("{")
    check_workdir(config, tmp_path)
    start_workdir(config, tmp_path, {})
    assert json.loads((tmp_path / "overrides.json").read_text()) == {}


def test_folders_of_other_things_and_damaged_ones_are_refused(config, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no study; choose another --workdir"):
        check_workdir(config, tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: cannot be read .*delete .* to start afresh"):
        check_workdir(config, tmp_path)
    with pytest.raises(UserError, match=r"cannot be used \(File name too long\); choose another --workdir"):
        check_workdir(config, tmp_path / ("a" * 300))


def test_other_data_are_refused(tmp_path, data):
    check_data(tmp_path, data)
    check_data(tmp_path, data)
    labels, features = data.clip_labels.copy(), data.features["appearance"].copy()
    labels[1, 2], features[3, 2, 1] = 1, 0.0
    for change in (
        {"clip_labels": labels},
        {"clip_subject": np.array(["s1", "s1"])},
        {"clip_name": np.array(["a", "c"])},
        {"features": {"appearance": features}},
        {"features": {"geometry": data.features["appearance"]}},
        {"clip_database": np.array(["", "samm"])},
        {"sample_phase": np.array(["onset_apex"] * 4)},
        {"frame_mask": None},
        {"label_names": ("negative", "positive", "other")},
        {"task": "multi_class"},
    ):
        with pytest.raises(UserError, match="holds a study of other data"):
            check_data(tmp_path, dataclasses.replace(data, **change))
    check_data(tmp_path, data)
