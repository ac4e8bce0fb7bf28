"""The whole study on labels that mean something and on labels that mean nothing."""

import json

import numpy as np
import pytest

import data_builders
from configs.fusion import get_config
from mer_jax.clips.layouts import LABELS
from mer_jax.study import train as train_module
from mer_jax.study.data import StudyData

CLIPS, FRAMES, WIDTH = 99, 4, 12


def make_data():
    rng = np.random.default_rng(5)
    labels = (rng.uniform(size=(CLIPS, 5)) < [0.45, 0.25, 0.2, 0.25, 0.2]).astype(np.int8)
    sample_clip = np.repeat(np.arange(CLIPS, dtype=np.int32), 2)
    features = {}
    for name in ("appearance", "geometry"):
        values = rng.normal(size=(2 * CLIPS, FRAMES, WIDTH))
        values[..., :5] += 1.2 * labels[sample_clip][:, None, :]
        features[name] = values.astype(np.float32)
    return StudyData(
        clip_name=np.array([f"{index:03d}" for index in range(CLIPS)]),
        clip_id=np.arange(CLIPS, dtype=np.int64),
        clip_subject=np.array([""] * CLIPS),
        clip_split=np.array(["train"] * CLIPS),
        clip_database=np.array([""] * CLIPS),
        clip_labels=labels,
        sample_clip=sample_clip,
        sample_view=np.array(["l", "r"] * CLIPS),
        sample_phase=np.array([""] * (2 * CLIPS)),
        face_found=np.ones(2 * CLIPS, bool),
        features=features,
        frame_mask=np.ones((2 * CLIPS, FRAMES), bool),
        label_names=LABELS,
        task="multi_label",
    )


@pytest.fixture(scope="module")
def summaries(tmp_path_factory):
    """Summaries of one study of 3 folds x 20 seeds with true and with shuffled labels, made by the one command."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_builders, "ensure_dataset", lambda data, extractors: None)
        patch.setattr(train_module, "load_dataset", lambda *args, **settings: make_data())
        for shuffle in (False, True):
            config = get_config()
            config.study.num_seeds = 20
            config.study.members_together = 60  # one program to compile
            config.train.epochs = 12
            config.train.learning_rate = 3e-3
            config.model.key_dim = config.model.hidden_dim = 12
            config.evaluation.bootstrap = 500
            config.data.num_frames = FRAMES
            config.data.shuffle_labels = shuffle
            for step in config.data.modalities.values():
                step.reduce = 0
            workdir = tmp_path_factory.mktemp("runs") / f"shuffled_{shuffle}"
            assert train_module.train(config, workdir) == 0
            found[shuffle] = json.loads((workdir / "summary.json").read_text())
    return found


@pytest.mark.parametrize("average", ["pooled", "fold_mean"])
def test_shuffled_labels_score_at_chance_and_the_leaky_figure_above(summaries, average):
    summary = summaries[True]
    honest, chance = summary["honest"]["macro_f1"][average], summary["chance"]["macro_f1"][average]
    low, high = honest["clip_ci"]
    assert low <= chance["mean"] <= high
    assert chance["interval"][0] <= honest["mean"] <= chance["interval"][1]
    leaky = summary["leaky"]["both"]["macro_f1"][average]["mean"]
    assert leaky > chance["interval"][1]
    assert leaky > honest["mean"] + 0.05


@pytest.mark.parametrize("average", ["pooled", "fold_mean"])
def test_true_labels_score_above_chance(summaries, average):
    summary = summaries[False]
    assert summary["honest"]["macro_f1"][average]["clip_ci"][0] > summary["chance"]["macro_f1"][average]["interval"][1]


def test_shuffling_keeps_what_labels_there_are(summaries):
    assert summaries[True]["study"]["positives"] == summaries[False]["study"]["positives"]
    assert list(summaries[True]["study"]["positives"]) == list(LABELS)
