"""Weights from elsewhere: predictions against PyTorch's own, the folder of the run, and files that do not fit."""

import csv
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.megc2019 import get_config
from mer_jax.errors import UserError
from mer_jax.study import imported
from mer_jax.study.data import StudyData
from mer_jax.study.imported import find_weights, import_study
from mer_jax.study.results import StudyResults
from mer_jax.study.summary import write_summary

_spec = importlib.util.spec_from_file_location("torch_ststnet", Path(__file__).parents[1] / "torch_ststnet.py")
torch_ststnet = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(torch_ststnet)

SUBJECTS = ("006", "007", "s01", "s02", "sub01", "sub02")
CLIPS = 24


@pytest.fixture(scope="module")
def data():
    """Images of noise, as the published ones are laid out: 8 bits as floats, (strain, v, u)."""
    rng = np.random.default_rng(5)
    subjects = np.array([SUBJECTS[number % len(SUBJECTS)] for number in range(CLIPS)])
    databases = {"0": "samm", "s0": "smic", "su": "casme2"}
    return StudyData(
        clip_name=np.array([f"{subject}_{number:02d}" for number, subject in enumerate(subjects)]),
        clip_id=np.arange(1, CLIPS + 1),
        clip_subject=subjects,
        clip_split=np.full(CLIPS, "train"),
        clip_database=np.array([databases.get(s[:2], databases.get(s[:1], "")) for s in subjects]),
        clip_labels=np.eye(3, dtype=np.int8)[rng.integers(0, 3, CLIPS)],
        sample_clip=np.arange(CLIPS, dtype=np.int32),
        sample_view=np.full(CLIPS, "c"),
        sample_phase=np.full(CLIPS, "onset_apex"),
        face_found=np.ones(CLIPS, bool),
        features={"flow": rng.integers(0, 256, (CLIPS, 28, 28, 3)).astype(np.float32)},
        frame_mask=None,
        label_names=("negative", "positive", "surprise"),
        task="multi_class",
    )


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder of weights and PyTorch's own networks."""
    folder = tmp_path_factory.mktemp("STSTNet_Weights")
    return folder, torch_ststnet.write_weights(folder, SUBJECTS)


def make_config():
    config = get_config("ststnet")
    config.evaluation.bootstrap = 100
    return config


@pytest.fixture(scope="module", autouse=True)
def _loaded(data):
    """Every study here is one of these data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imported, "load_data", lambda config: data)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, published):
    """The folder of a run; read-only, as tests share it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    import_study(make_config(), published[0], folder, overrides={"evaluation.bootstrap": 100})
    return folder


def test_every_subject_is_predicted_by_the_weights_that_never_saw_it(run, data, published, capsys):
    networks = published[1]
    results = StudyResults.load(run)
    images = torch.from_numpy(data.features["flow"].transpose(0, 3, 1, 2).copy())  # (N, H, W, C) -> (N, C, H, W)
    assert len(results.member_id) == len(SUBJECTS) and results.ok.all() and not results.inner.any()
    decided = np.zeros(CLIPS, int)
    for fold, subject in enumerate(SUBJECTS):
        held_out = data.clip_subject == subject
        assert (results.clip_fold[held_out] == fold).all()
        (row,) = np.flatnonzero(results.member_fold == fold)
        with torch.no_grad():
            expected = networks[subject](images).softmax(dim=1).numpy()
        np.testing.assert_allclose(results.probabilities[row], expected, rtol=0, atol=1e-5)
        decided[held_out] = expected[held_out].argmax(axis=1)
    # UF1 as the challenge defines it, by hand from PyTorch's decisions pooled over all subjects.
    truth, scores = data.clip_labels.argmax(axis=1), []
    for label in range(3):
        hits = np.sum((decided == label) & (truth == label))
        scores.append(2 * hits / (np.sum(decided == label) + np.sum(truth == label)))
    assert write_summary(run)["honest"]["macro_f1"]["pooled"]["mean"] == pytest.approx(np.mean(scores), abs=1e-6)
    import_study(make_config(), published[0], run)
    assert f"{CLIPS} clips: UF1 {np.mean(scores):.4f}, UAR " in capsys.readouterr().out


def test_the_folder_is_that_of_a_finished_study(run):
    for name in ("predictions.npz", "summary.json", "report.html", "versions.json", "data.json", "params/block_0000"):
        assert (run / name).exists(), name
    assert json.loads((run / "config.json").read_text())["study"]["num_seeds"] == 1
    assert json.loads((run / "overrides.json").read_text()) == {"evaluation.bootstrap": 100}
    record = json.loads((run / "weights.json").read_text())
    assert list(record) == list(SUBJECTS) and len(record["006"]["sha256"]) == 64
    with open(run / "folds.csv", newline="") as stream:
        folds = list(csv.DictReader(stream))
    assert len(folds) == CLIPS and {row["subject"]: row["fold"] for row in folds} == {
        subject: str(fold) for fold, subject in enumerate(SUBJECTS)
    }
    with open(run / "members.csv", newline="") as stream:
        assert [row["member"] for row in csv.DictReader(stream)] == [f"fold{fold}-seed0" for fold in range(6)]


def test_again_is_only_reported_and_other_weights_are_refused(run, published, tmp_path):
    before = (run / "predictions.npz").stat().st_mtime_ns
    (run / "report.html").unlink()
    import_study(make_config(), published[0], run)
    assert (run / "predictions.npz").stat().st_mtime_ns == before
    assert (run / "report.html").is_file()
    torch_ststnet.write_weights(tmp_path / "other", reversed(SUBJECTS))
    with pytest.raises(UserError, match=r"run holds a study of other weights; choose another --workdir"):
        import_study(make_config(), tmp_path / "other", run)


def test_both_formats_wrapped_or_not_are_the_same(tmp_path, run):
    folder = tmp_path / "zipped"
    networks = torch_ststnet.write_weights(folder, SUBJECTS, zipped=True)
    wrapped = {"state_dict": {f"module.{k}": v for k, v in networks["s01"].state_dict().items()}, "epoch": 800}
    torch.save(wrapped, folder / "s01.pth")
    import_study(make_config(), folder, tmp_path / "run")
    np.testing.assert_array_equal(
        StudyResults.load(tmp_path / "run").probabilities, StudyResults.load(run).probabilities
    )


def test_missing_subjects_stop_or_are_left_out(tmp_path, published, capsys):
    folder = tmp_path / "weights"
    shutil.copytree(published[0], folder)
    (folder / "s01.pth").unlink()
    (folder / "sub02.pth").unlink()
    shutil.copy(folder / "006.pth", folder / "s99.pth")
    (folder / "README.txt").write_text("not weights")
    with pytest.raises(
        UserError, match=r"no weights for 2 subjects \(s01, sub02\); restore.*--allow-missing"
    ) as caught:
        import_study(make_config(), folder, tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    import_study(make_config(), folder, tmp_path / "run", allow_missing=True)
    told = capsys.readouterr().err
    assert "note: 1 file of subjects that the data set lacks: s99" in told
    assert "note: 2 subjects without weights, not scored: s01, sub02" in told
    results = StudyResults.load(tmp_path / "run")
    assert sorted(results.member_fold.tolist()) == [0, 1, 3, 4]
    study = write_summary(tmp_path / "run")["study"]
    assert (study["clips"], study["folds_left_out"]) == (CLIPS * 4 // 6, [2, 5])


def test_folders_without_these_weights_are_one_line(tmp_path, published):
    with pytest.raises(UserError, match=r"--weights=.*absent: no such folder; it must hold a file <subject>\.pth"):
        find_weights(tmp_path / "absent", SUBJECTS)
    with pytest.raises(UserError, match=r"no weights of the data set's subjects, such as 006\.pth; there are no \.pth"):
        find_weights(tmp_path, SUBJECTS)
    with pytest.raises(UserError, match=r"such as x1\.pth; the \.pth files there are 006, 007, s01"):
        find_weights(published[0], ["x1", "x2"])


def test_a_blank_after_the_subject_does_not_matter(tmp_path, published):
    shutil.copy(published[0] / "006.pth", tmp_path / "006 .pth")
    (tmp_path / "._006.pth").write_bytes(b"of a file system")
    found, strange = find_weights(tmp_path, SUBJECTS[:1])
    assert found == {"006": tmp_path / "006 .pth"} and strange == []


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), r"007\.pth: not a torch\.save file, or damaged"),
        (lambda path: path.write_bytes(b"<html>not found</html>"), r"007\.pth: not a torch\.save file, or damaged"),
        (
            lambda path: torch.save(torch_ststnet.TorchSTSTNet(streams=(3, 5, 16)).state_dict(), path),
            r"007\.pth: conv3\.weight has shape \(16, 3, 3, 3\), the config's model \(8, 3, 3, 3\); .* another arch",
        ),
        (
            lambda path: torch.save(torch_ststnet.TorchSTSTNet(classes=5).state_dict(), path),
            r"007\.pth: fc\.\w+ has shape \(5.*\), the config's model \(3",
        ),
        (
            lambda path: torch.save(torch_ststnet.TorchSTSTNet(streams=(3, 5)).state_dict(), path),
            r"007\.pth: (lacks|bn3|conv3|fc)",
        ),
        (lambda path: torch.save(torch.nn.Linear(3, 2), path), r"007\.pth: refused, its pickle asks for"),
    ],
    ids=["truncated", "html", "wider", "classes", "two streams", "whole network"],
)
def test_a_bad_file_is_one_line_and_binds_no_folder(tmp_path, published, damage, told):
    folder = tmp_path / "weights"
    shutil.copytree(published[0], folder)
    damage(folder / "007.pth")
    with pytest.raises(UserError, match=told) as caught:
        import_study(make_config(), folder, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    "field, value, told",
    [
        (
            "channels",
            ("u", "v", "strain"),
            r"config\.data\.channels=\('u', 'v', 'strain'\): the published weights were",
        ),
        ("normalise", "standard", r"config\.data\.normalise='standard': the published weights .* with 'none'"),
    ],
)
def test_input_that_the_weights_never_saw_is_refused(tmp_path, published, field, value, told):
    config = make_config()
    config.data[field] = value
    with pytest.raises(UserError, match=told):
        import_study(config, published[0], tmp_path / "run")


def test_another_model_is_refused(tmp_path, published):
    with pytest.raises(UserError, match=r"config\.model\.name='micro_attnet': the published weights .*:ststnet"):
        import_study(get_config("micro_attnet"), published[0], tmp_path / "run")


def test_a_trained_study_is_not_written_over(tmp_path, run, published):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "weights.json").unlink()  # as a trained study has none
    with pytest.raises(UserError, match="holds a study that was trained; choose another --workdir"):
        import_study(make_config(), published[0], tmp_path / "run")
