import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from mer_jax.errors import UserError
from mer_jax.study.results import StudyResults

_spec = importlib.util.spec_from_file_location("fake_study", Path(__file__).with_name("fake_study.py"))
fake_study = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_study)


@pytest.fixture
def results(rng):
    return fake_study.make_results(rng, diverged=[(1, 2)], hyper={"lr": [1e-3, 3e-3]}, single_view=[3])


def test_round_trip(results, tmp_path):
    results.save(tmp_path / "predictions.npz")
    for place in (tmp_path, tmp_path / "predictions.npz"):
        again = StudyResults.load(place)
        for field in dataclasses.fields(StudyResults):
            ours, theirs = getattr(results, field.name), getattr(again, field.name)
            if isinstance(ours, dict):
                assert ours.keys() == theirs.keys()
                for name in ours:
                    np.testing.assert_array_equal(ours[name], theirs[name])
            else:
                np.testing.assert_array_equal(ours, theirs)
                assert ours.dtype == theirs.dtype


def test_keys_on_disk(results, tmp_path):
    results.save(tmp_path / "predictions.npz")
    with np.load(tmp_path / "predictions.npz") as archive:
        keys = set(archive.files)
    fields = {field.name for field in dataclasses.fields(StudyResults)} - {"hyper", "attention"}
    assert keys == fields | {"hyper_lr", "attention_appearance"}


def test_views_of_the_results(results):
    assert results.ok.sum() == len(results.member_id) - 2
    assert results.scored.sum() == 36  # neither the test split nor clips without a label
    unlabelled = results.clip_labels.copy()
    unlabelled[5] = -1
    assert dataclasses.replace(results, clip_labels=unlabelled).scored.sum() == 35
    np.testing.assert_array_equal(results.inner_clips()[:, results.sample_clip], results.inner)


def test_missing_damaged_and_outdated_files(results, tmp_path):
    with pytest.raises(UserError, match=r"predictions\.npz: not found; train the study first"):
        StudyResults.load(tmp_path)
    path = tmp_path / "predictions.npz"
    results.save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"predictions\.npz: cannot be read"):
        StudyResults.load(tmp_path)
    np.savez(path, clip_name=results.clip_name)
    with pytest.raises(UserError, match="lacks clip_database, clip_fold"):
        StudyResults.load(tmp_path)


def test_a_file_of_five_fixed_labels_is_refused(results, tmp_path):
    path = tmp_path / "predictions.npz"
    results.save(path)
    with np.load(path) as archive:
        arrays = dict(archive)
    for name in ("label_name", "task", "clip_database", "sample_phase", "stream_name"):
        del arrays[name]
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=r"lacks clip_database, label_name, .*; written by another version, train"):
        StudyResults.load(path)


def test_a_multi_class_study_of_phases_and_streams(rng, tmp_path):
    results = fake_study.make_results(
        rng,
        task="multi_class",
        label_names=fake_study.EMOTIONS,
        phases=("onset_apex", "apex_offset"),
        single_phase=[2],
        databases=["smic", "samm"] * 20,
        streams=("u", "v", "m"),
        num_epochs=0,
    )
    results.save(tmp_path / "predictions.npz")
    again = StudyResults.load(tmp_path)
    assert again.labels == fake_study.EMOTIONS and again.multi_class
    assert again.curve_probabilities.shape == (12, 0, 48, 3)
    assert again.attention["streams2"].shape == (12, 48, 3) and again.clip_database[1] == "samm"
    with pytest.raises(UserError, match=r"attention_streams1 has shape .* instead of \(M=12, V=48, S=2\)"):
        dataclasses.replace(again, stream_name=again.stream_name[:2]).validate()
    for value in ([1, 1, 0], [0, 0, 0], [1, -1, 0]):
        with pytest.raises(UserError, match="clip_labels gives a clip of a multi-class study not exactly one class"):
            changed(again, "clip_labels", 0, value).validate()
    changed(again, "clip_labels", 0, -1).validate()


def changed(results, name, index, value):
    array = getattr(results, name).copy()
    array[index] = value
    return dataclasses.replace(results, **{name: array})


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("clip_name", 1, "seq_000", "clip_name has duplicates"),
        ("member_id", 1, "fold0-seed0-lr0.001", "member_id has duplicates"),
        ("clip_split", 0, "val", "clip_split"),
        ("clip_labels", (0, 0), 2, "clip_labels"),
        ("clip_fold", 0, -2, "clip_fold is below"),
        ("clip_fold", -1, 0, "clip_fold puts a test clip"),
        ("sample_clip", 0, 400, "sample_clip points outside"),
        ("sample_phase", 0, "apex", "sample_phase is not all onset_apex or apex_offset, or ''"),
        ("sample_view", 0, "r", "sample_phase gives two samples the same clip, view and phase"),
        ("label_name", 1, "Negative", "label_name has duplicates"),
        ("task", (), "regression", "task is not multi_label or multi_class"),
        ("sample_clip", slice(0, 2), 5, "sample_clip leaves a clip without samples"),
        ("member_status", 0, "late", "member_status"),
        ("member_fold", 0, 7, "member_fold names a fold without clips"),
        ("probabilities", (0, 0, 0), 1.5, "probabilities of a member that is ok"),
        ("probabilities", (0, 0, 0), np.nan, "probabilities of a member that is ok"),
        ("inner", (0, slice(0, 2)), True, "inner contains held-out or test samples"),
        ("inner", (0, slice(-2, None)), True, "inner contains held-out or test samples"),
        ("curve_sample", (0, 0), 4000, "curve_sample points outside"),
        ("curve_sample", (0, 0), 2, "curve_sample contains samples that are not held out"),
    ],
)
def test_contradictions_are_named(results, tmp_path, name, index, value, message):
    broken = changed(results, name, index, value)
    with pytest.raises(UserError, match=message):
        broken.save(tmp_path / "predictions.npz")
    assert not (tmp_path / "predictions.npz").exists()


def test_views_of_a_clip_share_the_inner_split(results):
    member, sample = np.argwhere(results.inner)[0]
    with pytest.raises(UserError, match="inner splits the samples of a clip"):
        changed(results, "inner", (member, sample), False).validate()


def test_phases_of_a_clip_share_the_inner_split(rng):
    results = fake_study.make_results(rng, phases=("onset_apex", "apex_offset"))
    results.validate()
    member, sample = np.argwhere(results.inner)[1]
    with pytest.raises(UserError, match="inner splits the samples of a clip"):
        changed(results, "inner", (member, sample), False).validate()


def test_shapes_and_types_are_named(results):
    with pytest.raises(UserError, match=r"probabilities has shape .* instead of \(M=24, N=79, L=5\)"):
        dataclasses.replace(results, probabilities=results.probabilities[:, :-1]).validate()
    with pytest.raises(UserError, match="clip_fold holds float64 instead of int32"):
        dataclasses.replace(results, clip_fold=results.clip_fold.astype(float)).validate()
    with pytest.raises(UserError, match="hyper_lr has shape"):
        dataclasses.replace(results, hyper={"lr": np.zeros(3, np.float32)}).validate()
    with pytest.raises(UserError, match="attention_x has shape"):
        dataclasses.replace(results, attention={"x": np.zeros((24, 3, 7), np.float32)}).validate()
