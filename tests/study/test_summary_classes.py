"""Summaries of studies of one class a clip, of several databases, phases, and a fixed threshold."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from mer_jax.errors import UserError
from mer_jax.evaluation import metrics, statistics
from mer_jax.study.held_out import StudyMembers, held_out, resolve_evaluation
from mer_jax.study.summary import definitions, summarise

_spec = importlib.util.spec_from_file_location("fake_study", Path(__file__).with_name("fake_study.py"))
fake_study = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_study)

QUICK = {"bootstrap": 200}


@pytest.fixture(scope="module")
def composite():
    return fake_study.make_composite(np.random.default_rng(3), num_seeds=3, num_epochs=6, signal=0.7)


@pytest.fixture(scope="module")
def summary(composite):
    return summarise(composite, QUICK)


def small(rng, **settings):
    return fake_study.make_results(
        rng, **{"task": "multi_class", "label_names": fake_study.EMOTIONS, "frames": 0, "gate": False, **settings}
    )


def pooled_classes(results, probabilities_of):
    """True and predicted classes of the scored clips of each seed, by plain loops; samples are clips."""
    found = []
    for seed in np.unique(results.member_seed):
        pairs = []
        for clip in np.flatnonzero(results.scored):
            member = np.flatnonzero(
                (results.member_seed == seed) & (results.member_fold == results.clip_fold[clip])
            ).item()
            pairs.append((results.clip_labels[clip].argmax(), int(np.argmax(probabilities_of(member, clip)))))
        found.append(np.array(pairs).T)
    return found


def scores(truth, predicted):
    from sklearn.metrics import accuracy_score, f1_score, recall_score

    settings = {"labels": [0, 1, 2], "average": "macro", "zero_division": 0}
    return {
        "macro_f1": f1_score(truth, predicted, **settings),
        "uar": recall_score(truth, predicted, **settings),
        "accuracy": accuracy_score(truth, predicted),
    }


def test_uf1_and_uar_equal_the_metrics_and_scikit_learn(composite, summary):
    for seed, (truth, predicted) in enumerate(
        pooled_classes(composite, lambda member, clip: composite.probabilities[member, clip])
    ):
        expected = scores(truth, predicted)
        for name, value in expected.items():
            assert summary["honest"][name]["pooled"]["values"][seed] == pytest.approx(value, abs=1e-12)
        assert expected["macro_f1"] == pytest.approx(metrics.uf1(truth, predicted, 3))
        assert expected["uar"] == pytest.approx(metrics.uar(truth, predicted, 3))


def test_databases_are_the_pooled_predictions_filtered(composite, summary):
    pooled = pooled_classes(composite, lambda member, clip: composite.probabilities[member, clip])
    assert [entry["database"] for entry in summary["databases"]] == ["full", "casme2", "samm", "smic"]
    for entry in summary["databases"]:
        rows = np.isin(composite.clip_database, entry["database"])
        rows = rows | (entry["database"] == "full")
        assert entry["clips"] == rows.sum()
        assert entry["subjects"] == len(set(composite.clip_subject[rows]))
        assert list(entry["positives"].values()) == composite.clip_labels[rows].sum(axis=0).tolist()
        for seed, (truth, predicted) in enumerate(pooled):
            expected = scores(truth[rows], predicted[rows])
            for name, value in expected.items():
                assert entry["honest"][name]["values"][seed] == pytest.approx(value, abs=1e-12)
        for figure in ("macro_f1", "uar"):
            low, high = entry["honest"][figure]["clip_ci"]
            assert low <= entry["honest"][figure]["mean"] <= high
            assert entry["honest"][figure]["seed_ci"] is not None
    full, honest = summary["databases"][0]["honest"]["macro_f1"], summary["honest"]["macro_f1"]["pooled"]
    assert full == honest  # the same draws, too
    assert summary["databases"][0]["ensemble"]["uar"] == summary["ensemble"]["uar"]["pooled"]


def test_the_ensemble_decides_by_the_mean_over_seeds(composite, summary):
    def mean(member, clip):
        others = composite.member_fold == composite.member_fold[member]
        return composite.probabilities[others, clip].mean(axis=0)

    truth, predicted = pooled_classes(composite, mean)[0]
    for name, value in scores(truth, predicted).items():
        assert summary["ensemble"][name]["pooled"]["value"] == pytest.approx(value)


def test_leaky_takes_the_first_epoch_of_highest_accuracy_in_each_fold(composite, summary):
    results, decisions = composite, []
    for seed in range(3):
        pairs = []
        for fold in range(68):
            member = np.flatnonzero((results.member_fold == fold) & (results.member_seed == seed)).item()
            clips = results.curve_sample[member][results.curve_sample[member] >= 0]  # a sample a clip
            truth = results.clip_labels[clips].argmax(axis=1)
            made = results.curve_probabilities[member][:, : len(clips)].argmax(axis=-1)  # (E, n)
            right = [(row == truth).mean() for row in made]
            pairs.append((truth, made[right.index(max(right))]))
        decisions.append(np.concatenate([np.stack(pair) for pair in pairs], axis=1))
    block = summary["leaky"]["best_epoch"]
    for name in ("macro_f1", "uar", "accuracy"):
        expected = [scores(*pair)[name] for pair in decisions]
        assert block[name]["pooled"]["values"] == pytest.approx(expected)
    for figure, inflation in (("macro_f1", block["inflation"]), ("uar", block["inflation"]["uar"])):
        gain = inflation["pooled"]
        honest = summary["honest"][figure]["pooled"]["mean"]
        assert gain["mean"] == pytest.approx(block[figure]["pooled"]["mean"] - honest)
        assert 0 < gain["clip_ci"][0] < gain["mean"] < gain["clip_ci"][1]
    assert summary["leaky"]["both"] is summary["leaky"]["heldout_thresholds"] is None


def test_ties_in_accuracy_go_to_the_first_epoch(rng):
    results = small(rng, num_seeds=1, num_epochs=3, views=("c",))
    curve = np.full_like(results.curve_probabilities, 0.1)
    for member, clips in enumerate(results.curve_sample):
        truth = results.clip_labels[clips].argmax(axis=1)
        places = np.arange(len(clips))
        curve[member, 0, places, (truth + 1) % 3] = 0.8  # all wrong
        for epoch, half in ((1, places % 2), (2, 1 - places % 2)):  # each of these has one half right
            curve[member, epoch, places, (truth + half) % 3] = 0.8
    found = summarise(dataclasses.replace(results, curve_probabilities=curve), QUICK)["leaky"]["best_epoch"]
    order = np.concatenate([np.flatnonzero(results.clip_fold == fold) for fold in range(3)])
    truth = results.clip_labels[order].argmax(axis=1)
    first = (truth + np.arange(36) % 12 % 2) % 3
    assert found["macro_f1"]["pooled"]["mean"] == pytest.approx(scores(truth, first)["macro_f1"])


def test_equal_probabilities_go_to_the_first_class(rng):
    results = small(rng, views=("c",))
    even = np.full_like(results.probabilities, 1 / 3)
    summary = summarise(dataclasses.replace(results, probabilities=even), QUICK)
    matrix = summary["honest"]["confusion_matrix"]
    counts = results.clip_labels[results.scored].sum(axis=0)
    for name, count in zip(fake_study.EMOTIONS, counts, strict=True):
        assert matrix[name] == {"negative": count, "positive": 0, "surprise": 0}
    truth = results.clip_labels[results.scored].argmax(axis=1)
    assert summary["honest"]["macro_f1"]["pooled"]["mean"] == pytest.approx(metrics.uf1(truth, np.zeros(36, int), 3))


def test_majority_class_of_the_composite(summary):
    baseline = summary["baselines"]["majority"]
    assert summary["study"]["positives"] == {"negative": 250, "positive": 109, "surprise": 83}
    assert round(baseline["macro_f1"]["pooled"], 4) == 0.2408
    assert round(baseline["uar"]["pooled"], 4) == 0.3333
    assert "all_positive" not in summary["baselines"]


def test_confusion_matrix_belongs_to_the_figures(summary):
    matrix = np.array([list(row.values()) for row in summary["honest"]["confusion_matrix"].values()])
    np.testing.assert_allclose(matrix.sum(axis=1), [250, 109, 83])
    assert np.trace(matrix) / 442 == pytest.approx(summary["honest"]["accuracy"]["pooled"]["mean"])
    recall = np.diag(matrix) / matrix.sum(axis=1)
    assert recall.mean() == pytest.approx(summary["honest"]["uar"]["pooled"]["mean"])


def test_a_study_without_thresholds_says_so(summary):
    assert summary["task"] == "multi_class" and summary["evaluation"]["thresholds"] == "argmax"
    assert summary["untuned"] is summary["fixed"] is summary["threshold_curve"] is None
    assert all(fold["thresholds"] is None for fold in summary["folds"])
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert set(summary["definitions"]) == set(definitions(True)) and "untuned" not in definitions(True)


def test_single_subject_folds_have_no_split_of_variance_and_chance_trades_within_databases(composite, summary):
    assert summary["study"]["single_subject_folds"] and summary["study"]["subjects"] == 68
    assert summary["variance"] is None
    assert summary["chance"]["within"] == "databases" and summary["chance"]["macro_f1"]["fold_mean"] is None
    held = held_out(composite, QUICK)
    expected, _ = statistics.chance_level(held.truth, held.decisions, held.mask, held.database, 200)
    assert summary["chance"]["macro_f1"]["pooled"]["mean"] == expected.mean
    assert abs(expected.mean - 1 / 3) < 0.03
    first = summary["folds"][0]
    clips = composite.clip_fold == 0
    assert first["subject"] == composite.clip_subject[clips][0] and first["database"] == "casme2"
    truth = composite.clip_labels[clips].argmax(axis=1)
    made = composite.probabilities[composite.member_fold == 0][:, clips].argmax(axis=-1)
    np.testing.assert_allclose(first["accuracy"], (made == truth).mean(axis=1))
    assert any("Each fold is one subject" in note for note in summary["notes"])


def test_subjects_of_the_same_name_in_two_databases_are_two_people(rng):
    numbers = np.repeat(np.arange(6), 6)
    results = small(
        rng,
        clip_fold=numbers,
        subject=[f"{number % 3:02d}" for number in numbers],
        databases=["smic" if number < 3 else "samm" for number in numbers],
        labels=fake_study.one_hot(np.arange(36) % 3),
    )
    summary = summarise(results, QUICK)
    assert summary["study"]["subjects"] == 6 and summary["study"]["single_subject_folds"]
    assert [entry["subjects"] for entry in summary["databases"]] == [6, 3, 3]


def test_imported_weights_of_one_seed(rng):
    results = fake_study.make_composite(rng, num_seeds=1, num_epochs=0, inner_share=0)
    summary = summarise(results, QUICK)
    score = summary["honest"]["uar"]["pooled"]
    assert score["sd"] is score["seed_ci"] is None and score["clip_ci"] is not None
    assert all(summary["leaky"][name] is None for name in ("best_epoch", "both", "heldout_thresholds"))
    assert all(entry["leaky"] is None and entry["honest"]["uar"]["sd"] is None for entry in summary["databases"])
    assert any("best test epoch" in note for note in summary["notes"])
    assert any("One seed only" in note for note in summary["notes"])


def test_a_class_that_a_database_lacks_counts_zero(rng):
    classes = np.concatenate([np.arange(18) % 3, np.arange(18) % 2])
    results = small(
        rng,
        clip_fold=np.arange(36) % 3,
        subject=[""] * 36,
        databases=["smic"] * 18 + ["samm"] * 18,
        labels=fake_study.one_hot(classes),
        signal=40.0,
    )
    perfect = {entry["database"]: entry["honest"]["uar"]["mean"] for entry in summarise(results, QUICK)["databases"]}
    assert perfect == {"full": 1.0, "samm": pytest.approx(2 / 3), "smic": 1.0}


def test_settings_are_chosen_by_the_cross_entropy_of_the_true_class(rng):
    results = small(rng, hyper={"lr": [0.1, 0.2]}, views=("c",))
    good = results.hyper["lr"] == np.float32(0.2)
    sharpened = results.probabilities.copy()
    sharpened[good] = np.where(results.clip_labels[results.sample_clip] == 1, 0.8, 0.1)
    results = dataclasses.replace(results, probabilities=sharpened)
    summary = summarise(results, QUICK)
    assert [entry["chosen_for_folds"] for entry in summary["settings"]] == [[], [0, 1, 2]]
    assert summary["settings"][1]["inner_loss"] == pytest.approx([-np.log(0.8)] * 3)
    study = StudyMembers(results, resolve_evaluation(QUICK, results.labels, True))
    member, clip = np.nonzero(results.inner & (results.member_fold == 1)[:, None] & ~good[:, None])
    expected = -np.log(sharpened[member, clip, results.clip_labels[clip].argmax(axis=1)]).mean()
    assert study.inner_loss(0, 1) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_order_of_members_and_names_of_folds_do_not_matter(seed):
    rng = np.random.default_rng(seed)
    results = small(
        rng,
        num_seeds=2,
        databases=["a", "b"] * 20,
        phases=("onset_apex", "apex_offset"),
        single_phase=[1, 5],
        single_view=[2],
        num_epochs=3,
    )
    before = summarise(results, QUICK)
    members = rng.permutation(len(results.member_id))
    per_member = [f.name for f in dataclasses.fields(results) if f.name.startswith("member_")]
    per_member += ["probabilities", "inner", "gate", "curve_sample", "curve_probabilities"]
    per_member += [f"curve_{name}_loss" for name in ("train", "inner", "heldout")]
    moved = dataclasses.replace(results, **{name: getattr(results, name)[members] for name in per_member})
    assert summarise(moved, QUICK) == before
    # Other numbers for the same folds: only what goes fold by fold may come in another order.
    number = rng.permutation(3).astype(np.int32)
    renamed = dataclasses.replace(
        results,
        clip_fold=np.where(results.clip_fold < 0, -1, number[results.clip_fold.clip(0)]).astype(np.int32),
        member_fold=number[results.member_fold],
    )
    after = summarise(renamed, QUICK)
    for name in ("macro_f1", "uar", "accuracy"):
        for average in ("pooled", "fold_mean"):
            for kind in (before["honest"], before["leaky"]["best_epoch"]):
                other = after["honest"] if kind is before["honest"] else after["leaky"]["best_epoch"]
                assert other[name][average]["values"] == pytest.approx(kind[name][average]["values"])
    for old, new in enumerate(number):
        assert after["folds"][new]["macro_f1"] == before["folds"][old]["macro_f1"]
    # Samples in another order.
    samples = rng.permutation(len(results.sample_clip))
    place = np.argsort(samples)
    shuffled = dataclasses.replace(
        results,
        **{name: getattr(results, name)[samples] for name in ("sample_clip", "sample_view", "sample_phase")},
        probabilities=results.probabilities[:, samples],
        inner=results.inner[:, samples],
        curve_sample=np.where(results.curve_sample >= 0, place[results.curve_sample], -1).astype(np.int32),
    )
    again = summarise(shuffled, QUICK)
    assert again["honest"]["macro_f1"]["pooled"]["values"] == before["honest"]["macro_f1"]["pooled"]["values"]
    assert again["leaky"]["best_epoch"] == before["leaky"]["best_epoch"]


def test_no_choice_for_a_fold_reads_its_labels(rng):
    results = small(rng, hyper={"lr": [0.1, 0.2]})
    before = held_out(results, QUICK)
    for fold in range(3):
        labels = results.clip_labels.copy()
        rows = results.clip_fold == fold
        labels[rows] = np.roll(labels[rows], 1, axis=1)
        after = held_out(dataclasses.replace(results, clip_labels=labels), QUICK)
        np.testing.assert_array_equal(after.member[fold], before.member[fold])
        here = before.fold == fold
        np.testing.assert_array_equal(after.decisions[:, here], before.decisions[:, here])


def test_phases_combine_before_the_score(rng):
    results = small(rng, phases=("onset_apex", "apex_offset"), views=("c",), num_seeds=1)
    by_sample = results.probabilities.reshape(3, 40, 2, 3)  # (M, C, phase, L)
    for phases, expected in (
        ("mean", by_sample.mean(axis=2)),
        ("max", by_sample.max(axis=2)),
        ("onset_apex", by_sample[:, :, 0]),
    ):
        held = held_out(results, {**QUICK, "phases": phases})
        np.testing.assert_allclose(held.probabilities[0], expected[held.fold, np.arange(36)], rtol=1e-6)


def test_the_fixed_threshold_stands_beside_tuned_and_untuned(rng):
    results = fake_study.make_results(rng, phases=("onset_apex", "apex_offset"), gate=False, frames=0)
    summary = summarise(results, {**QUICK, "fixed_threshold": [0.2], "thresholds": "global"})
    held = held_out(results, QUICK)
    expected = [
        float(metrics.macro_f1(metrics.confusion_counts(held.truth, seed >= np.float32(0.2), held.mask)))
        for seed in held.probabilities
    ]
    assert summary["evaluation"]["fixed_threshold"] == 0.2
    assert summary["fixed"]["macro_f1"]["pooled"]["values"] == pytest.approx(expected)
    curve = summary["threshold_curve"]
    at = curve["threshold"].index(0.2)
    assert curve["heldout_leaky"][at] == pytest.approx(summary["fixed"]["macro_f1"]["pooled"]["mean"])
    best = summary["leaky"]["global_threshold"]
    assert best["macro_f1"] == max(curve["heldout_leaky"])
    assert curve["threshold"][curve["heldout_leaky"].index(best["macro_f1"])] == best["threshold"]
    assert summarise(results, QUICK)["fixed"] is None  # 0.5 is the untuned one
    alone = summarise(results, {**QUICK, "fixed_threshold": 0.2, "thresholds": "fixed"})
    assert alone["fixed"] is None and alone["honest"] == summary["fixed"]


def test_other_labels_than_the_challenge_s(rng):
    names = ("Positive", "AU4", "Negative")
    results = fake_study.make_results(rng, label_names=names, signal=0.3)
    summary = summarise(results, {**QUICK, "negative_excludes_positive": True})
    assert list(summary["honest"]["per_class_f1"]) == list(names)
    held = held_out(results, {**QUICK, "negative_excludes_positive": True})
    assert not (held.decisions[..., 0] & held.decisions[..., 2]).any()
    plain = held_out(results, QUICK).decisions
    assert (plain[..., 0] & plain[..., 2]).any()
    np.testing.assert_array_equal(held.decisions[..., 1:], plain[..., 1:])


@pytest.mark.parametrize(
    ("settings", "labels", "multi_class", "message"),
    [
        ({"thresholds": "global"}, fake_study.EMOTIONS, True, "thresholds='global': must be argmax in a study of one"),
        ({"thresholds": "argmax"}, ("a", "b"), False, "thresholds='argmax': must be one of fixed, global, per_class"),
        ({"fixed_threshold": [0.1, 0.2, 0.3]}, ("a", "b"), False, "or 2 of them in the order a, b"),
        ({"negative_excludes_positive": True}, ("a", "b"), False, "false where Negative and Positive are not two lab"),
        ({"negative_excludes_positive": True}, ("Negative", "Positive"), True, "false where Negative and Positive"),
    ],
)
def test_settings_that_do_not_fit_the_study_are_named(settings, labels, multi_class, message):
    resolve_evaluation(settings)  # a config does not know the labels yet
    with pytest.raises(UserError, match=message):
        resolve_evaluation(settings, labels, multi_class)


def test_a_learning_curve_without_a_phase_of_a_clip_is_refused(rng):
    results = small(rng, phases=("onset_apex", "apex_offset"), num_seeds=1)
    curve = results.curve_sample.copy()
    curve[1, 5] = -1
    with pytest.raises(UserError, match="member fold1-seed0: its learning curve lacks held-out clips; train again"):
        summarise(dataclasses.replace(results, curve_sample=curve), QUICK)
