"""A search: its candidates, the choice on inner splits, and that no held-out clip has a say in it."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import data_builders
from configs.fusion_search import get_config
from mer_jax.clips.layouts import LABELS
from mer_jax.errors import UserError
from mer_jax.study import train as train_module
from mer_jax.study.config import base_config, validate
from mer_jax.study.data import StudyData
from mer_jax.study.held_out import StudyMembers, resolve_evaluation
from mer_jax.study.members import HYPER_NAMES, make_members
from mer_jax.study.results import StudyResults
from mer_jax.study.search import draw_candidates
from mer_jax.study.summary import summarise

_spec = importlib.util.spec_from_file_location("fake_study", Path(__file__).with_name("fake_study.py"))
fake_study = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_study)
make_results = fake_study.make_results

OWN = {"learning_rate": 1e-3, "weight_decay": 0.1, "dropout": 0.2, "feature_dropout": 0.3, "focal_gamma": 0.0}
RATES = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def search_config(candidates, seed=0, **ranges):
    config = base_config()
    config.seed, config.study.num_candidates = seed, candidates
    config.train.loss = "focal"
    for name, values in ranges.items():
        config.search[name] = values
    return config


def choose(results, **evaluation):
    study = StudyMembers(results, resolve_evaluation(evaluation, results.labels, results.multi_class))
    return study.choose_settings()


def test_candidates_depend_on_seed_number_and_range_alone():
    rate, drop = ("log_uniform", 1e-4, 1e-2), ("uniform", 0.1, 0.6)
    few = draw_candidates(search_config(8, learning_rate=rate), OWN)
    many = draw_candidates(search_config(200, learning_rate=rate, dropout=drop), OWN)
    assert few[0] == many[0] == OWN and len(few) == 8 and len(many) == 200
    assert [point["learning_rate"] for point in few] == [point["learning_rate"] for point in many[:8]]
    assert all(point == OWN | {"learning_rate": point["learning_rate"]} for point in few)
    other = draw_candidates(search_config(8, seed=1, learning_rate=rate), OWN)
    assert not {point["learning_rate"] for point in few[1:]} & {point["learning_rate"] for point in other}
    # As many below as above the middle of the scale, and every value is the one that four digits show.
    rates, drops = (np.array([point[name] for point in many[1:]]) for name in ("learning_rate", "dropout"))
    assert rates.min() >= 1e-4 and rates.max() <= 1e-2 and 0.4 < (rates < 1e-3).mean() < 0.6
    assert drops.min() >= 0.1 and drops.max() <= 0.6 and 0.4 < (drops < 0.35).mean() < 0.6
    assert all(float(f"{value:.4g}") == value for value in [*rates, *drops])
    assert abs(np.corrcoef(np.log(rates), drops)[0, 1]) < 0.2


def test_choices_are_drawn_without_repetition_until_there_are_none_left():
    ranges = {"focal_gamma": ("choice", 0, 1, 2), "dropout": ("choice", 0.2, 0.5)}
    points = draw_candidates(search_config(6, **ranges), OWN)
    assert {(point["focal_gamma"], point["dropout"]) for point in points} == {
        (g, d) for g in (0, 1, 2) for d in (0.2, 0.5)
    }
    with pytest.raises(UserError, match=r"num_candidates=7: config.search holds only 6 different points"):
        draw_candidates(search_config(7, **ranges), OWN)


def test_members_of_a_search_are_named_by_their_candidate():
    points = draw_candidates(search_config(3, dropout=("uniform", 0, 0.5)), OWN)
    members = make_members((1,), range(4, 6), OWN, {}, points)
    assert [member.id for member in members] == [f"fold1-seed{s}-candidate{n}" for n in range(3) for s in (4, 5)]
    assert [dict(member.hyper) for member in members[::2]] == points
    # A grid begins with the config's own values where it has them.
    grid = make_members((0,), (0,), OWN, {"dropout": (0.5, 0.2, 0.1)})
    assert [dict(member.hyper)["dropout"] for member in grid] == [0.2, 0.5, 0.1]


@pytest.mark.parametrize(
    "candidates, ranges, change, message",
    [
        (0, {"dropout": ("uniform", 0, 0.5)}, {}, "config.search gives ranges of dropout: set config.study.num_cand"),
        (4, {}, {}, "config.study.num_candidates=4 needs ranges to draw from, such as config.search.learning_rate="),
        (1, {"dropout": ("uniform", 0, 0.5)}, {}, "config.study.num_candidates=1: must be 0, or at least 2"),
        (4, {"dropout": (0.1, 0.5)}, {}, "config.search.dropout=(0.1, 0.5): must be ('uniform', low, high), ('log_"),
        (4, {"dropout": ("uniform", 0.1, 1.0)}, {}, "config.search.dropout=('uniform', 0.1, 1.0): must be 'uniform' a"),
        (4, {"dropout": ("uniform", 0.5, 0.1)}, {}, "config.search.dropout=('uniform', 0.5, 0.1): must be 'uniform', "),
        (
            4,
            {"weight_decay": ("log_uniform", 0, 1)},
            {},
            "config.search.weight_decay=('log_uniform', 0, 1): must be '",
        ),
        (4, {"focal_gamma": ("choice", 2)}, {}, "config.search.focal_gamma=('choice', 2): must be 'choice' and at lea"),
        (4, {"focal_gamma": ("choice", 1, "a")}, {}, "config.search.focal_gamma=('choice', 1, 'a'): must be 'choice'"),
        (4, {"focal_gamma": ("choice", 1, 2)}, {"train.loss": "bce"}, "config.train.loss='bce' has no focal_gamma"),
        (4, {"dropout": ("choice", 0, 0.1)}, {"grid.dropout": (0.1,)}, "config.grid and config.search are two ways"),
        (4, {"dropout": ("choice", 0, 0.1)}, {"study.num_inner": 0}, "config.search is chosen from on inner splits"),
        (0, {}, {"evaluation.selection": "auroc"}, "evaluation.selection='auroc': must be one of average_precision"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused_in_one_line(candidates, ranges, change, message):
    config = search_config(candidates, **ranges)
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError) as told:
        validate(config)
    assert str(told.value).startswith(message) and "\n" not in str(told.value)


def by_hand(probabilities):
    """One label, six clips of one view in two folds; both settings of fold 0 predict clips 3 to 5 as given."""
    rng = np.random.default_rng(0)
    results = make_results(
        rng,
        clip_fold=[0, 0, 0, 1, 1, 1],
        labels=np.array([[1], [0], [1], [1], [0], [0]], np.int8),
        label_names=("A",),
        subject=[""] * 6,
        views=("c",),
        hyper={"rate": [0.5, 0.25]},  # the first is not the smallest
        num_seeds=1,
        gate=False,
        frames=0,
    )
    inner = np.stack([results.clip_fold != fold for fold in results.member_fold])
    made = results.probabilities.copy()
    for setting, values in enumerate(probabilities):
        rows = (results.member_fold == 0) & (results.hyper["rate"] == [0.5, 0.25][setting])
        made[rows, 3:, 0] = values
    return dataclasses.replace(results, inner=inner, probabilities=made)


def test_the_choice_worked_out_by_hand():
    # Truth of the inner clips of fold 0: 1 0 0. The first setting ranks a negative first: AP = 1/2, and its loss is
    # -(ln .5 + ln .4 + ln .9) / 3 = 0.571. The second ranks rightly, AP = 1, but is sure that all are present:
    # -(ln .99 + ln .02 + ln .05) / 3 = 2.306. At its best threshold the first has F1 2/3, the second 1.
    results = by_hand([[0.5, 0.6, 0.1], [0.99, 0.98, 0.95]])
    study = StudyMembers(results, resolve_evaluation({}, results.labels, False))
    assert study.settings == [{"rate": 0.5}, {"rate": 0.25}]
    assert [study.inner_score(setting, 0) for setting in (0, 1)] == pytest.approx([0.5, 1.0])
    assert [study.inner_loss(setting, 0) for setting in (0, 1)] == pytest.approx([0.5715, 2.3060], abs=1e-4)
    assert choose(results)[0] == choose(results, selection="macro_f1")[0] == 1
    assert choose(results, selection="loss")[0] == 0
    study = StudyMembers(results, resolve_evaluation({"selection": "macro_f1"}, results.labels, False))
    assert [study.inner_score(setting, 0) for setting in (0, 1)] == pytest.approx([2 / 3, 1.0])
    # Of equals the first; and never one of whose members more diverged.
    assert choose(by_hand([[0.9, 0.2, 0.1], [0.8, 0.7, 0.6]]))[0] == 0
    bad = (results.hyper["rate"] == 0.25) & (results.member_fold == 0)
    diverged = np.where(bad[:, None, None], np.nan, results.probabilities).astype(np.float32)
    status = np.where(bad, "diverged", "ok")
    assert choose(dataclasses.replace(results, probabilities=diverged, member_status=status))[0] == 0


def test_no_held_out_label_and_no_held_out_prediction_changes_the_choice(rng):
    results = make_results(rng, hyper={"rate": RATES}, signal=0.4)
    for selection in ("average_precision", "loss", "macro_f1"):
        chosen = choose(results, selection=selection)
        for fold in range(3):
            clips = results.clip_fold == fold
            labels = results.clip_labels.copy()
            labels[clips] = rng.integers(0, 2, labels[clips].shape)
            assert choose(dataclasses.replace(results, clip_labels=labels), selection=selection)[fold] == chosen[fold]
            drawn = results.probabilities.copy()
            rows = np.ix_(results.member_fold == fold, clips[results.sample_clip])
            drawn[rows] = rng.random(drawn[rows].shape)
            assert choose(dataclasses.replace(results, probabilities=drawn), selection=selection)[fold] == chosen[fold]
    # Inner labels do change it, or the test could not fail.
    labels = rng.permuted(results.clip_labels, axis=0)
    shuffled = dataclasses.replace(results, clip_labels=np.where(results.clip_fold[:, None] < 0, -1, labels))
    assert choose(shuffled) != choose(results) or choose(shuffled, selection="loss") != choose(results)


def test_choosing_by_the_answer_pays_on_noise_and_choosing_honestly_does_not(rng):
    """Candidates that all know nothing: the nested score is at chance, the leaky ones above both."""
    results = make_results(rng, hyper={"rate": RATES}, num_seeds=5, clips_per_fold=33, signal=0.0, num_epochs=0)
    summary = summarise(results, {"bootstrap": 300})
    search, chance = summary["search"], summary["chance"]["macro_f1"]["pooled"]
    honest = summary["honest"]["macro_f1"]["pooled"]
    assert honest["clip_ci"][0] <= chance["mean"] <= honest["clip_ci"][1]
    low, high = search["default"]["nested_minus_default"]["pooled"]["clip_ci"]
    assert low <= 0 <= high
    overall, per_fold = (search["leaky"][name] for name in ("best_overall", "best_per_fold"))
    assert per_fold["inflation"]["fold_mean"]["mean"] > 0 and overall["inflation"]["pooled"]["mean"] > 0
    assert overall["macro_f1"]["pooled"]["mean"] == max(entry["macro_f1"]["pooled"] for entry in summary["settings"])
    assert per_fold["macro_f1"]["fold_mean"]["mean"] >= overall["macro_f1"]["fold_mean"]["mean"]


def test_the_figures_of_a_search_belong_together(rng):
    results = make_results(rng, hyper={"rate": RATES[:3], "drop": [0.1, 0.2]}, diverged=[(1, 3)])
    summary = summarise(results, {"bootstrap": 200})
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    search, settings = summary["search"], summary["settings"]
    assert search["varied"] == ["drop", "rate"] and search["selection"] == "average_precision"
    assert [entry["hyper"]["rate"] for entry in settings] == results.hyper["rate"][::12].tolist()
    assert {entry["members_ok"] for entry in settings} == {11} and all(len(entry["inner"]) == 3 for entry in settings)
    default, honest = search["default"], summary["honest"]["macro_f1"]
    for average in ("pooled", "fold_mean"):
        fixed = default["macro_f1"][average]["mean"]
        assert fixed == pytest.approx(settings[0]["macro_f1"][average])
        gain = default["nested_minus_default"][average]
        assert gain["mean"] == pytest.approx(honest[average]["mean"] - fixed)
        assert gain["clip_ci"][0] <= gain["mean"] <= gain["clip_ci"][1] and 0 < gain["p_value"] <= 1
        leak = search["leaky"]["best_per_fold"]
        claimed = leak["macro_f1"][average]["mean"] - honest[average]["mean"]
        assert leak["inflation"][average]["mean"] == pytest.approx(claimed)
    counts = [len(entry["chosen_for_folds"]) for entry in settings]
    assert search["stability"]["counts"] == counts and sum(counts) == 3
    best = [max(range(6), key=lambda s, f=f: settings[s]["inner"][f]) for f in range(3)]
    assert [f in settings[setting]["chosen_for_folds"] for f, setting in enumerate(best)] == [True] * 3
    assert -1 <= search["rank_correlation"] <= 1
    by_loss = summarise(results, {"bootstrap": 200, "selection": "loss"})
    assert by_loss["search"]["higher_is_better"] is False
    assert all(entry["inner"] == entry["inner_loss"] for entry in by_loss["settings"])
    assert summarise(make_results(rng), {"bootstrap": 200})["search"] is None


def test_a_multi_class_search_on_subjects(rng):
    results = make_results(
        rng,
        task="multi_class",
        label_names=fake_study.EMOTIONS,
        views=("c",),
        clip_fold=np.repeat(np.arange(6), 6),
        labels=fake_study.one_hot(np.tile(np.arange(3), 12)),
        subject=[f"s{fold}" for fold in np.repeat(np.arange(6), 6)],
        hyper={"rate": RATES[:3]},
        num_seeds=2,
    )
    summary = summarise(results, {"bootstrap": 100})
    assert summary["study"]["single_subject_folds"] and sum(summary["search"]["stability"]["counts"]) == 6
    assert {"macro_f1", "uar", "inflation", "chosen"} == set(summary["search"]["leaky"]["best_per_fold"])
    assert all(None not in entry["inner"] for entry in summary["settings"])


CLIPS, FRAMES, WIDTH = 36, 3, 6


def make_data(changed=slice(0)):
    """Features that know a little of the labels; those of clips ``changed`` are other random numbers."""
    rng = np.random.default_rng(3)
    labels = (rng.uniform(size=(CLIPS, 5)) < 0.4).astype(np.int8)
    features = {}
    for name in ("appearance", "geometry"):
        values = rng.normal(size=(CLIPS, FRAMES, WIDTH))
        values[..., :5] += 0.8 * labels[:, None, :]
        values[changed] = np.random.default_rng(8).normal(size=values[changed].shape)
        features[name] = values.astype(np.float32)
    return StudyData(
        clip_name=np.array([f"{index:03d}" for index in range(CLIPS)]),
        clip_id=np.arange(CLIPS, dtype=np.int64),
        clip_subject=np.array([""] * CLIPS),
        clip_split=np.array(["train"] * CLIPS),
        clip_database=np.array([""] * CLIPS),
        clip_labels=labels,
        sample_clip=np.arange(CLIPS, dtype=np.int32),
        sample_view=np.array(["l"] * CLIPS),
        sample_phase=np.array([""] * CLIPS),
        face_found=np.ones(CLIPS, bool),
        features=features,
        frame_mask=np.ones((CLIPS, FRAMES), bool),
        label_names=LABELS,
        task="multi_label",
    )


def tiny_search(patch, workdir, data, **change):
    """A study of ``configs/fusion_search.py``, small, through the one command."""
    patch.setattr(data_builders, "ensure_dataset", lambda data, extractors: None)
    patch.setattr(train_module, "load_dataset", lambda *args, **settings: data)
    config = get_config()
    config.study.num_seeds = config.study.num_inner = 2
    config.study.num_candidates, config.study.members_together = 4, 4
    config.study.only_folds = (0,)
    config.train.epochs = 4
    config.model.key_dim = config.model.hidden_dim = 6
    config.model.num_queries.appearance = config.model.num_queries.geometry = 2
    config.evaluation.bootstrap = 100
    config.data.num_frames = FRAMES
    for step in config.data.modalities.values():
        step.reduce = 0
    config.update_from_flattened_dict(change)
    assert train_module.train(config, workdir) == 0
    return StudyResults.load(workdir), json.loads((workdir / "summary.json").read_text())


def test_members_of_a_search_learn_nothing_from_held_out_clips_nor_from_each_other(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        results, summary = tiny_search(patch, tmp_path / "a", make_data())
        held_out = results.clip_fold == 0
        other, other_summary = tiny_search(patch, tmp_path / "b", make_data(held_out))
        fewer, _ = tiny_search(patch, tmp_path / "c", make_data(), **{"study.num_candidates": 2})
    ids = [f"fold0-seed{seed}-candidate{number}" for number in range(4) for seed in range(2)]
    assert results.member_id.tolist() == ids and set(results.hyper) == set(HYPER_NAMES)
    gamma, seed_one = results.hyper["focal_gamma"], results.member_seed == 1
    assert gamma[0] == 0 and len(np.unique(gamma)) > 1 and len(np.unique(results.curve_train_loss[seed_one, -1])) == 4
    # Other clips are held out: not one bit of the others' predictions, of the inner scores or of the choice differs.
    np.testing.assert_array_equal(other.clip_fold, results.clip_fold)
    np.testing.assert_array_equal(other.probabilities[:, ~held_out], results.probabilities[:, ~held_out])
    assert np.abs(other.probabilities[:, held_out] - results.probabilities[:, held_out]).max() > 0.01
    for one, two in zip(summary["settings"], other_summary["settings"], strict=True):
        assert [one[name] for name in ("hyper", "inner", "chosen_for_folds")] == [
            two[name] for name in ("hyper", "inner", "chosen_for_folds")
        ]
    # How many other candidates there are changes no bit either.
    assert fewer.member_id.tolist() == ids[:4]
    np.testing.assert_array_equal(fewer.probabilities, results.probabilities[:4])
