"""Predictions of studies whose labels are not the challenge's five."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from mer_jax.errors import UserError
from mer_jax.study.predict import format_predictions, predict, predict_run

_spec = importlib.util.spec_from_file_location("fake_study", Path(__file__).with_name("fake_study.py"))
fake_study = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_study)


@pytest.fixture
def results(rng):
    return fake_study.make_results(
        rng,
        task="multi_class",
        label_names=fake_study.EMOTIONS,
        phases=("onset_apex", "apex_offset"),
        single_phase=[3, 37],
        gate=False,
        frames=0,
    )


@pytest.mark.parametrize(("split", "number"), [("train", 36), ("test", 4)])
def test_the_likeliest_class_of_the_mean_over_members_is_predicted(results, split, number):
    found = predict(results, {"views": "max", "phases": "mean"}, split=split)
    assert len(found.clip_name) == number and found.thresholds is None and found.labels == fake_study.EMOTIONS
    assert (found.members == (4 if split == "train" else 12)).all()
    assert (found.decisions.sum(axis=1) == 1).all()
    for row, name in enumerate(found.clip_name):
        clip = results.clip_name.tolist().index(name)
        members = (results.member_fold == results.clip_fold[clip]) | (split == "test")
        views = []
        for view in ("l", "r"):
            samples = (results.sample_clip == clip) & (results.sample_view == view)
            views.append(results.probabilities[members][:, samples].mean(axis=1))
        expected = np.max(views, axis=0)  # (members, L)
        np.testing.assert_allclose(found.mean[row], expected.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(found.spread[row], expected.std(axis=0), rtol=1e-4)
        assert found.decisions[row].argmax() == expected.mean(axis=0).argmax()


def test_a_member_predicts_no_training_clip_that_it_has_seen(results):
    found = predict(results, {}, split="train", member="fold1-seed2")
    theirs = results.clip_fold[:36] == 1
    np.testing.assert_array_equal(found.members, theirs.astype(int))
    assert np.isnan(found.mean[~theirs]).all() and not found.decisions[~theirs].any()
    assert (found.decisions[theirs].sum(axis=1) == 1).all()


def test_the_table_is_of_the_study_s_labels(results, rng):
    lines = format_predictions(predict(results, {}, split="test")).splitlines()
    assert lines[0].split() == ["clip", *fake_study.EMOTIONS]
    assert all(line.count("*") == 1 for line in lines[1:5])
    long = ("a label of many letters, indeed", "b")
    found = predict(fake_study.make_results(rng, label_names=long), {}, split="test")
    lines = format_predictions(found).splitlines()
    assert long[0] in lines[0] and len({len(line) for line in lines[:-1]}) == 1


def test_only_the_challenge_s_labels_have_a_submission(results, tmp_path, capsys):
    results.save(tmp_path / "predictions.npz")
    (tmp_path / "config.json").write_text(json.dumps({"evaluation": {}}))
    with pytest.raises(
        UserError, match=r"--submission=x\.csv: the challenge's file is for Negative, .*are negative, pos"
    ):
        predict_run(tmp_path, submission="x.csv")
    predict_run(tmp_path)
    assert "surprise" in capsys.readouterr().out


def test_a_config_of_thresholds_is_refused_for_one_class_a_clip(results):
    with pytest.raises(UserError, match="thresholds='per_class': must be argmax in a study of one class a clip"):
        predict(results, {"thresholds": "per_class"}, split="test")
