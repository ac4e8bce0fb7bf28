"""``scripts/predict.py`` as a user opens it."""

import dataclasses
import json
import re

import numpy as np
import pytest

from mer_jax.errors import UserError
from mer_jax.study.predict import predict_run
from mer_jax.study.results import StudyResults


def test_the_submission_has_the_challenges_format(finished, door, tmp_path):
    done = door("predict.py", "--workdir", finished, "--split", "test", "--submission", "out/test.csv").end()
    assert done.status == 0 and done.stderr == ""
    text = (tmp_path / "out" / "test.csv").read_text()
    assert text.startswith("Id,Negative,Positive,Repression,Surprise,Others\n")
    assert re.fullmatch(r"(\d+(,[01]){5}\n){4}", text.partition("\n")[2])
    assert [line.split(",")[0] for line in text.split()[1:]] == ["25", "26", "27", "28"]
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["clip", "Negative", "Positive", "Repression", "Surprise", "Others"]
    assert [line.split()[0] for line in lines[1:5]] == ["clip_25", "clip_26", "clip_27", "clip_28"]
    assert lines[-2:] == ["* predicted; ± standard deviation over 6 members", "submission: out/test.csv"]
    # A star is a 1 of the submission.
    for line, row in zip(lines[1:5], text.split()[1:], strict=True):
        assert line.count("*") == row[row.index(",") :].count("1")


def test_training_clips_are_predicted_out_of_fold(finished, tmp_path, capsys):
    predict_run(finished, split="train", submission=tmp_path / "train.csv")
    assert "over 2 members" in capsys.readouterr().out
    rows = np.loadtxt(tmp_path / "train.csv", delimiter=",", skiprows=1, dtype=int)
    assert rows[:, 0].tolist() == list(range(1, 25))
    labels = StudyResults.load(finished).clip_labels[:24]
    assert (rows[:, 1:] == labels).mean() > 0.6


def test_one_member_predicts_alone(finished, capsys):
    predict_run(finished, member="fold1-seed0")
    printed = capsys.readouterr().out
    assert "±" not in printed and printed.endswith("\n* predicted\n")
    assert re.search(r"^clip_28( +[01]\.\d\d [* ]){5}$", printed, re.MULTILINE)


def test_wrong_input_is_one_line(finished, door, tmp_path):
    done = door("predict.py", "--workdir", finished, "--member", "fold1-seed7").end()
    assert "error: --member=fold1-seed7: this study has no such member; near are fold1-seed1" in done.error
    assert len(done.stderr.splitlines()) == 1


def test_an_unfinished_run_is_refused(copy):
    (copy / "predictions.npz").unlink()
    with pytest.raises(UserError, match=r"predictions.npz: not found; train the study first .*--workdir="):
        predict_run(copy)
    with pytest.raises(UserError, match=r"nowhere/predictions.npz: not found"):
        predict_run(copy / "nowhere")


def test_a_run_without_test_clips_is_refused(copy):
    results = StudyResults.load(copy)
    train = results.clip_split == "train"
    rows = train[results.sample_clip]
    clips = ("clip_name", "clip_id", "clip_subject", "clip_split", "clip_labels", "clip_fold", "clip_database")
    cut = {name: getattr(results, name)[train] for name in clips}
    cut |= {name: getattr(results, name)[rows] for name in ("sample_clip", "sample_view", "sample_phase")}
    cut |= {name: getattr(results, name)[:, rows] for name in ("probabilities", "inner")}
    dataclasses.replace(results, **cut).save(copy / "predictions.npz")
    with pytest.raises(UserError, match="the data set of this study has no test clips; build it with them"):
        predict_run(copy)


def test_a_part_of_the_training_clips_is_no_submission(finished, tmp_path):
    with pytest.raises(UserError, match="--member=fold0-seed0 held out only a part of the train clips"):
        predict_run(finished, split="train", member="fold0-seed0", submission=tmp_path / "part.csv")
    assert not (tmp_path / "part.csv").exists()


def test_evaluation_settings_are_those_of_the_run(copy, tmp_path, capsys):
    config = json.loads((copy / "config.json").read_text())
    config["evaluation"] |= {"thresholds": "fixed", "fixed_threshold": [0.0]}
    (copy / "config.json").write_text(json.dumps(config))
    predict_run(copy, submission=tmp_path / "all.csv")
    assert set((tmp_path / "all.csv").read_text().split()[1:]) == {f"{number},1,1,1,1,1" for number in range(25, 29)}
