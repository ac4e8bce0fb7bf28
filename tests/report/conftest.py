"""Synthetic runs: results whose figures look like a real study's, and the files that a run folder holds."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from mer_jax.clips.layouts import LABELS
from mer_jax.study.results import StudyResults
from mer_jax.study.summary import summarise

EVALUATION = {
    "views": "mean",
    "thresholds": "per_class",
    "fixed_threshold": 0.5,
    "negative_excludes_positive": False,
    "bootstrap": 100,
    "confidence": 0.95,
}
CONFIG = {
    "data": {"dataset": "four_dme/challenge", "extractors": ["hog", "facemesh"]},
    "study": {"num_seeds": 4},
}


def synthetic_results(num_folds=3, num_seeds=4, clips=48, test_clips=6, epochs=12, frames=18, diverged=(), seed=0):
    """Results of members that learn a little: a shared signal, a part per fold and seed, and noise."""
    rng = np.random.default_rng(seed)
    total = clips + test_clips
    prevalence = np.array([0.5, 0.3, 0.25, 0.2, 0.12])
    labels = (rng.random((total, 5)) < prevalence).astype(np.int8)
    labels[np.arange(total) % 9 == 0, np.arange(total)[np.arange(total) % 9 == 0] % 5] = 1
    labels[clips:] = -1
    fold = np.concatenate([np.arange(clips) % num_folds, np.full(test_clips, -1)]).astype(np.int32)
    sample_clip = np.repeat(np.arange(total), 2).astype(np.int32)
    member_fold = np.repeat(np.arange(num_folds), num_seeds).astype(np.int32)
    member_seed = np.tile(np.arange(num_seeds), num_folds).astype(np.int32)
    members, samples = len(member_fold), len(sample_clip)
    ids = np.array([f"fold{f}-seed{s}" for f, s in zip(member_fold, member_seed, strict=True)])
    status = np.where(np.isin(ids, diverged), "diverged", "ok")

    truth = np.where(labels < 0, rng.random((total, 5)) < prevalence, labels)[sample_clip]
    epoch = np.arange(1, epochs + 1)
    hard = np.repeat(rng.normal(0, 1.0, (total, 5)), 2, axis=0)
    skill = 0.55 + rng.normal(0, 0.15, (members, 1, 1))
    logit = skill * (2 * truth - 1) - 0.8 + hard + rng.normal(0, 0.7, (members, samples, 5))
    probabilities = 1 / (1 + np.exp(-logit))
    probabilities[status == "diverged"] = np.nan

    sample_fold = fold[sample_clip]
    train = (sample_fold[None] != member_fold[:, None]) & (sample_fold >= 0)[None]
    inner = train & ((sample_clip[None] // num_folds + member_seed[:, None]) % 4 == 0)
    held_out = [np.flatnonzero(sample_fold == f) for f in member_fold]
    width = max(map(len, held_out))
    curve_sample = np.array([np.pad(rows, (0, width - len(rows)), constant_values=-1) for rows in held_out])
    growth = (1 - np.exp(-epoch / 4))[None, :, None, None]
    rows = np.take_along_axis(logit, curve_sample.clip(0)[..., None], axis=1)  # (M, V, 5)
    wobble = rng.normal(0, 0.6, (members, epochs, width, 5))
    curve_probabilities = 1 / (1 + np.exp(-(growth * rows[:, None] + wobble)))

    def losses(floor, overfit):
        path = floor + (0.7 - floor) * np.exp(-epoch / (epochs / 5)) + overfit * (epoch / epochs) ** 2
        return (path + rng.normal(0, 0.012, (members, epochs)) + rng.normal(0, 0.02, (members, 1))).astype("f4")

    weight = np.clip(0.62 + rng.normal(0, 0.08, members) + 0.03 * member_fold, 0, 1)
    apex = np.exp(-(((np.arange(frames) - frames * 0.55) / (frames / 6)) ** 2))
    attention = {}
    for modality, peak in (("appearance", 0.6), ("geometry", 1.4)):
        raw = np.exp(peak * apex + rng.normal(0, 0.25, (members, width, frames)))
        attention[modality] = (raw / raw.sum(-1, keepdims=True)).astype("f4")
    return StudyResults(
        label_name=np.array(LABELS),
        task=np.array("multi_label"),
        clip_name=np.array([f"clip_{i:03d}" for i in range(total)]),
        clip_id=np.arange(total, dtype=np.int64),
        clip_subject=np.array([f"s{i % 12:02d}" for i in range(total)]),
        clip_split=np.where(np.arange(total) < clips, "train", "test"),
        clip_database=np.full(total, ""),
        clip_labels=labels,
        clip_fold=fold,
        sample_clip=sample_clip,
        sample_view=np.tile(["l", "r"], total),
        sample_phase=np.full(2 * total, ""),
        member_id=ids,
        member_fold=member_fold,
        member_seed=member_seed,
        member_status=status,
        member_stop_epoch=rng.integers(epochs // 2, epochs + 1, members).astype(np.int32),
        probabilities=probabilities.astype(np.float32),
        inner=inner,
        curve_epoch=epoch.astype(np.int32),
        curve_train_loss=losses(0.25, 0.0),
        curve_inner_loss=losses(0.42, 0.08),
        curve_heldout_loss=losses(0.45, 0.12),
        curve_sample=curve_sample.astype(np.int32),
        curve_probabilities=curve_probabilities.astype(np.float32),
        gate=np.stack([weight, 1 - weight], axis=1).astype(np.float32),
        gate_name=np.array(["appearance", "geometry"]),
        stream_name=np.zeros(0, "U1"),
        attention=attention,
    )


def write_run(folder, results, config=CONFIG, evaluation=EVALUATION):
    """The files that a finished study leaves behind, as far as a report reads them; returns the summary."""
    folder.mkdir(parents=True, exist_ok=True)
    results.save(folder / "predictions.npz")
    summary = summarise(results, evaluation)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "overrides.json").write_text(json.dumps({"study.num_seeds": 4}))
    (folder / "versions.json").write_text(json.dumps({"jax": "0.10.2", "python": "3.11.7"}))
    with (folder / "folds.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["clip", "fold", "face_found"])
        for index, (name, fold) in enumerate(zip(results.clip_name, results.clip_fold, strict=True)):
            writer.writerow([name, fold, int(index != 3)])
    return summary


@pytest.fixture(scope="session")
def make_results():
    return synthetic_results


@pytest.fixture(scope="session")
def finish_run():
    return write_run


@pytest.fixture(scope="session")
def results():
    return synthetic_results(diverged=("fold1-seed2",))


@pytest.fixture(scope="session")
def run_folder(results, tmp_path_factory):
    """A run of 3 folds x 4 seeds with one diverged member; tests only read it."""
    folder = tmp_path_factory.mktemp("runs") / "fusion"
    write_run(folder, results)
    return folder


@pytest.fixture(scope="session")
def without():
    """A copy of results that lacks gate, attention or inner split."""

    def change(results, *parts):
        members = len(results.member_id)
        replacements = {
            "gate": {"gate": np.zeros((members, 0), np.float32), "gate_name": np.zeros(0, "U1")},
            "attention": {"attention": {}},
            "inner": {
                "inner": np.zeros_like(results.inner),
                "curve_inner_loss": np.full_like(results.curve_inner_loss, np.nan),
            },
        }
        return dataclasses.replace(results, **{k: v for part in parts for k, v in replacements[part].items()})

    return change
