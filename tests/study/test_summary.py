import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from mer_jax.clips.layouts import LABELS
from mer_jax.errors import UserError
from mer_jax.evaluation.thresholds import tune_thresholds
from mer_jax.study.held_out import held_out, resolve_evaluation
from mer_jax.study.summary import format_p, summarise, write_summary

_spec = importlib.util.spec_from_file_location("fake_study", Path(__file__).with_name("fake_study.py"))
fake_study = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_study)
make_results = fake_study.make_results

QUICK = {"bootstrap": 200}
LEAKY_NAMES = ("best_epoch", "best_epoch_untuned", "heldout_thresholds", "both")
AVERAGES = ("pooled", "fold_mean")


def f1_score(truth, prediction):
    from sklearn.metrics import f1_score

    return f1_score(truth, prediction, average="macro", zero_division=0)


def clip_probability(results, values, clip, how):
    """``(5,)`` of one member's ``values (N, 5)``."""
    views = values[results.sample_clip == clip]
    return views.mean(axis=0) if how == "mean" else views.max(axis=0)


def exclude(prediction):
    prediction = prediction.copy()
    prediction[prediction[:, 0] == 1, 1] = 0
    return prediction


@pytest.mark.parametrize("how", ["mean", "or"])
@pytest.mark.parametrize("mode", ["fixed", "global", "per_class"])
@pytest.mark.parametrize("rule", [False, True])
def test_honest_figures_equal_plain_loops(rng, how, mode, rule):
    results = make_results(rng, num_seeds=3, single_view=[1, 4])
    fixed = [0.6, 0.3, 0.3, 0.5, 0.4]
    settings = {"views": how, "thresholds": mode, "fixed_threshold": fixed, "negative_excludes_positive": rule}
    summary = summarise(results, {**QUICK, **settings})
    clips = [np.flatnonzero(results.clip_fold == fold) for fold in range(3)]
    cuts = []
    for fold in range(3):
        truth, probabilities = [], []
        for m in np.flatnonzero(results.member_fold == fold):
            for clip in np.unique(results.sample_clip[results.inner[m]]):
                assert results.clip_fold[clip] not in (fold, -1)
                truth.append(results.clip_labels[clip])
                probabilities.append(clip_probability(results, results.probabilities[m], clip, how))
        tuned = fixed if mode == "fixed" else tune_thresholds(np.array(truth), np.array(probabilities), mode)
        cuts.append(np.asarray(tuned, np.float32))
        np.testing.assert_allclose(summary["folds"][fold]["thresholds"], cuts[fold])
    for seed in range(3):
        truth, predictions = [], []
        for fold in range(3):
            m = np.flatnonzero((results.member_fold == fold) & (results.member_seed == seed)).item()
            probabilities = [clip_probability(results, results.probabilities[m], c, how) for c in clips[fold]]
            made = (np.array(probabilities) >= cuts[fold]).astype(int)
            predictions.append(exclude(made) if rule else made)
            truth.append(results.clip_labels[clips[fold]])
        by_fold = [f1_score(t, p) for t, p in zip(truth, predictions, strict=True)]
        figures = summary["honest"]["macro_f1"]
        assert figures["pooled"]["values"][seed] == pytest.approx(f1_score(np.vstack(truth), np.vstack(predictions)))
        assert figures["fold_mean"]["values"][seed] == pytest.approx(np.mean(by_fold))
        assert [fold["macro_f1"][seed] for fold in summary["folds"]] == pytest.approx(by_fold)


def test_is_plain_json_with_finite_numbers_and_all_documented_keys(rng):
    summary = summarise(make_results(rng), QUICK)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert set(summary) == {
        *("schema", "labels", "task", "definitions", "evaluation", "study", "honest", "untuned", "fixed", "databases"),
        *("ensemble", "auroc", "average_precision", "chance", "baselines", "variance", "seeds_needed", "folds"),
        *("threshold_curve", "leaky", "settings", "search", "notes"),
    }
    for block in (summary["honest"], summary["untuned"], *(summary["leaky"][name] for name in LEAKY_NAMES)):
        for average in AVERAGES:
            score = block["macro_f1"][average]
            assert set(score) == {"mean", "sd", "seed_ci", "seed_ci_bca", "clip_ci", "values"}
            low, high = score["clip_ci"]
            assert 0 <= low <= score["mean"] <= high <= 1
            assert set(block["per_class_f1"]) == set(LABELS)


def test_figures_belong_together(rng):
    summary = summarise(make_results(rng), QUICK)
    honest = summary["honest"]
    for average in AVERAGES:
        classes = [honest["per_class_f1"][label][average]["mean"] for label in LABELS]
        assert np.mean(classes) == pytest.approx(honest["macro_f1"][average]["mean"])
    cells = honest["confusion"]["Negative"]
    assert sum(cells.values()) == pytest.approx(summary["study"]["clips"])
    assert cells["tp"] + cells["fn"] == summary["study"]["positives"]["Negative"]
    assert summary["settings"][0]["macro_f1"]["pooled"] == pytest.approx(honest["macro_f1"]["pooled"]["mean"])
    curve = summary["threshold_curve"]
    half = curve["threshold"].index(0.5)
    assert curve["heldout_leaky"][half] == pytest.approx(summary["untuned"]["macro_f1"]["pooled"]["mean"])
    assert summary["chance"]["macro_f1"]["pooled"]["p_value"] < 0.01
    assert summary["ensemble"]["members"] == [4, 4, 4]


def test_ranks_equal_scikit_learn_and_count_what_is_undefined(rng):
    from sklearn.metrics import average_precision_score, roc_auc_score

    results = make_results(rng)
    results.clip_labels[results.clip_fold == 1, 3] = 0
    summary = summarise(results, QUICK)
    held = held_out(results)
    for c, label in enumerate(LABELS):
        truth, scores = held.truth[:, c], held.probabilities[:, :, c]
        for name, metric in (("auroc", roc_auc_score), ("average_precision", average_precision_score)):
            figure = summary[name]["per_class"][label]["pooled"]
            np.testing.assert_allclose(figure["values"], [metric(truth, s) for s in scores])
            undefined = sum(not truth[held.fold == fold].any() for fold in range(3))
            assert undefined > 0 or label != "Surprise"
            assert summary[name]["per_class"][label]["fold_mean"]["undefined"] == undefined


def test_choices_for_a_fold_do_not_read_its_labels(rng):
    results = make_results(rng, hyper={"lr": [0.1, 0.2]})
    before = held_out(results, {"thresholds": "per_class"})
    for fold in range(3):
        labels = results.clip_labels.copy()
        rows = results.clip_fold == fold
        labels[rows] = 1 - labels[rows]
        after = held_out(dataclasses.replace(results, clip_labels=labels), {"thresholds": "per_class"})
        np.testing.assert_array_equal(after.thresholds[fold], before.thresholds[fold])
        np.testing.assert_array_equal(after.member[fold], before.member[fold])
        np.testing.assert_array_equal(
            after.probabilities[:, rows[: len(after.fold)]], before.probabilities[:, before.fold == fold]
        )


def test_test_labels_and_held_out_curves_do_not_touch_honest_figures(rng):
    results = make_results(rng)
    before = summarise(results, QUICK)
    labels = results.clip_labels.copy()
    labels[results.clip_split == "test"] = 1
    curves = rng.random(results.curve_probabilities.shape).astype(np.float32)
    after = summarise(dataclasses.replace(results, clip_labels=labels, curve_probabilities=curves), QUICK)
    assert after.pop("leaky") != before.pop("leaky")
    assert after == before


def test_order_of_members_and_clips_does_not_matter(rng):
    results = make_results(rng)
    order = rng.permutation(len(results.member_id))
    fields = [f.name for f in dataclasses.fields(results)]
    per_member = [f for f in fields if f.startswith("member_")] + [
        *("probabilities", "inner", "curve_train_loss", "curve_inner_loss", "curve_heldout_loss"),
        *("curve_sample", "curve_probabilities", "gate"),
    ]
    shuffled = dataclasses.replace(
        results,
        **{name: getattr(results, name)[order] for name in per_member},
        attention={name: values[order] for name, values in results.attention.items()},
    )
    assert summarise(shuffled, QUICK) == summarise(results, QUICK)


def test_diverged_members_are_left_out_counted_and_named(rng):
    results = make_results(rng, diverged=[(1, 2)])
    summary = summarise(results, QUICK)
    assert summary["study"]["diverged"] == ["fold1-seed2"]
    assert summary["study"]["incomplete_seeds"] == [2] and summary["study"]["seeds"] == [0, 1, 3]
    assert [fold["seeds"] for fold in summary["folds"]] == [[0, 1, 2, 3], [0, 1, 3], [0, 1, 2, 3]]
    assert any("fold1-seed2" in note for note in summary["notes"])
    everyone = [(fold, seed) for fold in (0, 1) for seed in range(4) if (fold + seed) % 2]
    none_left = make_results(rng, diverged=everyone)
    with pytest.raises(UserError, match=r"no seed finished in every fold \(fold0-seed1, "):
        summarise(none_left, QUICK)


def test_one_seed_and_one_fold(rng):
    summary = summarise(make_results(rng, num_seeds=1), QUICK)
    score = summary["honest"]["macro_f1"]["pooled"]
    assert score["sd"] is None and score["seed_ci"] is None and score["clip_ci"] is not None
    assert summary["variance"] is None
    assert all(row["seeds"] is None for row in summary["seeds_needed"])
    assert any("One seed only" in note for note in summary["notes"])


def test_folds_of_one_subject_are_not_one_subject_a_fold(rng):
    results = make_results(rng)
    alone = summarise(dataclasses.replace(results, clip_subject=np.full(len(results.clip_name), "s1")), QUICK)
    assert alone["study"]["subjects"] == 1 and not alone["study"]["single_subject_folds"]
    assert alone["variance"] is not None and alone["chance"]["within"] == "folds"
    assert [note for note in alone["notes"] if "subject" in note] == [
        "One subject only: clips are resampled as if independent, and no interval speaks of other people."
    ]
    each = np.array([f"s{fold}" for fold in results.clip_fold])
    assert summarise(dataclasses.replace(results, clip_subject=each), QUICK)["study"]["single_subject_folds"]


def test_few_subjects_are_told_of(rng):
    results = make_results(rng)  # 18 subjects
    people = np.unique(results.clip_subject[results.scored], return_inverse=True)[1]
    for number, told in ((18, False), (9, True)):
        subject = results.clip_subject.copy()
        subject[results.scored] = [f"s{person % number}" for person in people]
        summary = summarise(dataclasses.replace(results, clip_subject=subject), QUICK)
        assert summary["study"]["subjects"] == number
        assert any(note.startswith(f"Only {number} subjects") for note in summary["notes"]) == told


def test_the_interval_over_few_seeds_is_student_s_and_no_narrower(rng):
    from scipy.stats import ttest_1samp

    score = summarise(make_results(rng, num_seeds=3), {**QUICK, "confidence": 0.9})["honest"]["macro_f1"]["pooled"]
    expected = ttest_1samp(score["values"], 0).confidence_interval(0.9)
    np.testing.assert_allclose(score["seed_ci"], expected)
    perfect = make_results(rng, num_seeds=2, signal=4.0)
    for figure in summarise(perfect, QUICK)["honest"]["per_class_f1"].values():
        assert 0 <= figure["pooled"]["seed_ci"][0] <= figure["pooled"]["seed_ci"][1] <= 1


@pytest.mark.parametrize(("value", "text"), [(1.0, "1.0000"), (1 / 2001, "0.0005"), (1 / 100_001, "1e-05")])
def test_a_p_value_is_never_shown_as_zero(value, text):
    assert format_p(value) == text


def test_a_sure_gain_is_not_told_with_a_p_value_of_zero(rng):
    results = make_results(rng, hyper={"lr": [0.1, 0.2]}, signal=0.0)
    good = results.hyper["lr"] == np.float32(0.2)
    truth = results.clip_labels[results.sample_clip]
    results.probabilities[good] = np.where(truth == 1, 0.9, 0.1)
    summary = summarise(results, {"bootstrap": 4000})
    assert summary["search"]["default"]["nested_minus_default"]["pooled"]["p_value"] == 1 / 4001
    assert any(note.endswith("over candidate 0 in every fold, p = 0.0002.") for note in summary["notes"])


def test_without_learning_curves_or_inner_splits(rng):
    results = make_results(rng, num_epochs=0)
    leaky = summarise(results, QUICK)["leaky"]
    assert leaky["best_epoch"] is leaky["both"] is None and leaky["heldout_thresholds"] is not None
    bare = make_results(rng, inner_share=0)
    with pytest.raises(UserError, match=r"fold 0: no inner-split predictions.*'fixed'"):
        summarise(bare, QUICK)
    summary = summarise(bare, {**QUICK, "thresholds": "fixed"})
    assert summary["honest"] == summary["untuned"] and summary["threshold_curve"]["inner"] is None


def test_hyper_parameter_settings_are_chosen_on_inner_splits(rng):
    results = make_results(rng, hyper={"lr": [0.1, 0.2]})
    good = results.hyper["lr"] == np.float32(0.2)
    sharpened = results.probabilities.copy()
    truth = results.clip_labels[results.sample_clip]
    sharpened[good] = np.where(truth == 1, 0.9, 0.1)
    summary = summarise(dataclasses.replace(results, probabilities=sharpened), QUICK)
    assert [entry["chosen_for_folds"] for entry in summary["settings"]] == [[], [0, 1, 2]]
    assert summary["settings"][1]["hyper"] == {"lr": pytest.approx(0.2)}
    assert summary["honest"]["macro_f1"]["pooled"]["mean"] == 1
    assert summary["settings"][0]["macro_f1"]["pooled"] < 1
    twice = dataclasses.replace(results, hyper={})
    with pytest.raises(UserError, match="share fold, seed and hyper-parameters"):
        summarise(twice, QUICK)


def test_partly_unknown_labels_are_left_out(rng):
    results = make_results(rng)
    results.clip_labels[0, 1] = -1
    results.clip_labels[3] = -1
    summary = summarise(results, QUICK)
    assert summary["study"]["clips"] == 35
    confusion = summary["honest"]["confusion"]
    assert sum(confusion["Positive"].values()) == pytest.approx(34)
    assert sum(confusion["Negative"].values()) == pytest.approx(35)
    results.clip_labels[:] = -1
    with pytest.raises(UserError, match="no labelled clip"):
        summarise(results, QUICK)


def test_leaky_choices_can_only_gain_on_each_fold(rng):
    summary = summarise(make_results(rng, signal=0.5), {**QUICK, "thresholds": "per_class"})
    honest = np.array(summary["honest"]["macro_f1"]["fold_mean"]["values"])
    untuned = np.array(summary["untuned"]["macro_f1"]["fold_mean"]["values"])
    leaky = {n: np.array(summary["leaky"][n]["macro_f1"]["fold_mean"]["values"]) for n in LEAKY_NAMES}
    assert (leaky["best_epoch"] >= honest).all() and (leaky["best_epoch_untuned"] >= untuned).all()
    assert (leaky["heldout_thresholds"] >= honest).all()
    assert (leaky["both"] >= np.maximum(leaky["best_epoch"], leaky["heldout_thresholds"])).all()
    inflation = summary["leaky"]["both"]["inflation"]["fold_mean"]
    assert inflation["mean"] == pytest.approx(np.mean(leaky["both"] - honest))


def test_leak_test_random_labels(rng):
    """Labels that have nothing to do with the probabilities: honest figures are at chance, leaky ones above it."""
    results = make_results(rng, num_seeds=20, clips_per_fold=33, signal=0.0, num_epochs=20)
    for mode in ("global", "per_class"):
        summary = summarise(results, {"thresholds": mode, "bootstrap": 500})
        for average in AVERAGES:
            chance = summary["chance"]["macro_f1"][average]
            honest = summary["honest"]["macro_f1"][average]
            assert honest["clip_ci"][0] <= chance["mean"] <= honest["clip_ci"][1]
            assert chance["p_value"] > 0.01
            for name in ("best_epoch", "heldout_thresholds", "both"):
                leaky = summary["leaky"][name]
                assert leaky["macro_f1"][average]["mean"] > chance["interval"][1]
                assert leaky["inflation"][average]["mean"] > 0
            assert summary["leaky"]["both"]["inflation"][average]["clip_ci"][0] > 0


def test_a_large_study_is_summarised(rng):
    results = make_results(rng, num_seeds=100, clips_per_fold=34, num_epochs=20)
    summary = summarise(results, {"bootstrap": 500})
    assert summary["study"]["members"] == 300
    assert len(summary["honest"]["macro_f1"]["pooled"]["values"]) == 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"view": "mean"}, r"evaluation\.view: unknown field; choose from phases, views"),
        ({"views": "median"}, r"evaluation\.views='median': must be one of mean, max, or"),
        ({"thresholds": "best"}, r"evaluation\.thresholds='best'"),
        ({"phases": "apex"}, r"evaluation\.phases='apex': must be one of mean, max, onset_apex"),
        (
            {"thresholds": "argmax"},
            r"evaluation\.thresholds='argmax': must be one of fixed, global, per_class in a stu",
        ),
        ({"fixed_threshold": [0.1, 0.2]}, r"evaluation\.fixed_threshold=.*or 5 of them"),
        ({"fixed_threshold": 1.5}, r"evaluation\.fixed_threshold=1\.5"),
        ({"fixed_threshold": None}, r"evaluation\.fixed_threshold=None"),
        ({"fixed_threshold": "half"}, r"evaluation\.fixed_threshold='half'"),
        ({"negative_excludes_positive": 1}, r"evaluation\.negative_excludes_positive=1: must be true or false"),
        ({"bootstrap": 10}, r"evaluation\.bootstrap=10"),
        ({"confidence": 95}, r"evaluation\.confidence=95"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        resolve_evaluation(settings, LABELS, False)


def test_write_summary_reads_the_config_and_overrides_it(rng, tmp_path):
    make_results(rng).save(tmp_path / "predictions.npz")
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        write_summary(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: cannot be read \("):
        write_summary(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"evaluation": {"views": "max", "bootstrap": 200}}))
    summary = write_summary(tmp_path, {"thresholds": "fixed"})
    assert (summary["evaluation"]["views"], summary["evaluation"]["thresholds"]) == ("max", "fixed")
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_a_study_of_one_fold_scores_that_fold(rng):
    whole = make_results(rng)
    kept = np.flatnonzero(whole.member_fold == 1)
    per_member = ("id", "fold", "seed", "status", "stop_epoch")
    names = [f"member_{name}" for name in per_member] + ["probabilities", "inner", "gate"]
    names += [name for name in vars(whole) if name.startswith("curve_") and name != "curve_epoch"]
    part = dataclasses.replace(
        whole,
        **{name: getattr(whole, name)[kept] for name in names},
        hyper={name: values[kept] for name, values in whole.hyper.items()},
        attention={name: values[kept] for name, values in whole.attention.items()},
    )
    expected, found = summarise(whole, {"bootstrap": 100}), summarise(part, {"bootstrap": 100})
    assert found["study"]["folds"] == [1]
    assert found["study"]["clips"] == expected["folds"][1]["clips"]
    assert found["folds"] == expected["folds"][1:2]
    assert found["honest"]["macro_f1"]["pooled"]["values"] == expected["folds"][1]["macro_f1"]
    assert any("Not all folds were trained" in note for note in found["notes"])
