import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from mer_jax.errors import UserError
from mer_jax.evaluation import metrics
from mer_jax.evaluation.statistics import weighted_scores
from mer_jax.study.comparison import compare_held_out, format_comparison
from mer_jax.study.held_out import held_out

_spec = importlib.util.spec_from_file_location("fake_study", Path(__file__).with_name("fake_study.py"))
fake_study = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_study)
QUICK = {"bootstrap": 300}


@pytest.fixture
def labels(rng):
    labels = (rng.random((40, 5)) < fake_study.PREVALENCE).astype(np.int8)
    labels[36:] = -1
    return labels


def study(rng, labels, **kwargs):
    return held_out(fake_study.make_results(rng, labels=labels, **kwargs), QUICK)


def test_better_study_wins_on_common_seeds_whatever_the_order_of_clips(rng, labels):
    good = study(rng, labels, signal=2.0, num_seeds=6)
    bad = study(rng, labels, signal=0.2, num_seeds=4)
    found = compare_held_out(good, bad)
    assert found["seeds"] == [0, 1, 2, 3] and found["seeds_left_out"] == [2, 0]
    for average in ("pooled", "fold_mean"):
        row = found["macro_f1"][average]
        assert row["difference"] == pytest.approx(row["mean_a"] - row["mean_b"])
        assert row["clip_ci"][0] > 0 and row["clip_p_value"] < 0.01 and row["probability_a_better"] > 0.99
    assert np.mean(found["members"]["matrix"]) == pytest.approx(found["members"]["difference"])
    assert np.shape(found["members"]["matrix"]) == (3, 4)
    assert compare_held_out(good, bad.take_clips(rng.permutation(36))) == found


def test_table(rng, labels):
    a, b = (study(rng, labels) for _ in range(2))
    found = compare_held_out(a, b)
    table = format_comparison(
        {"a": "hybrid", "b": "concat", "settings_that_differ": {"views": ["or", "mean"]}, **found}
    )
    assert "A = hybrid" in table and "evaluation.views is or in A and mean in B" in table
    assert "macro-F1, fold mean" in table and "95 % interval" in table and "sign-flip p" in table
    assert "4 common seeds (none left out)" in table


def test_what_differs_is_named(rng, labels):
    a, b = (study(rng, labels) for _ in range(2))
    with pytest.raises(UserError, match=r"seq_000: held out in A but not in B"):
        compare_held_out(a, b.take_clips(np.arange(1, 36)))
    with pytest.raises(UserError, match=r"seq_035: held out in hybrid but not in concat"):
        compare_held_out(a.take_clips(np.arange(35)), b, names=("concat", "hybrid"))
    folds = b.fold.copy()
    folds[[0, 1]] = folds[[1, 0]]
    with pytest.raises(UserError, match=r"seq_000, seq_001: not the same fold in A and B"):
        compare_held_out(a, dataclasses.replace(b, fold=folds))
    truth = ~b.truth
    with pytest.raises(UserError, match=r"seq_002 and 33 more: not the same labels"):
        compare_held_out(a, dataclasses.replace(b, truth=truth))
    with pytest.raises(UserError, match=r"no seed in common \(0, 1, 2 and 1 more against 10"):
        compare_held_out(a, dataclasses.replace(b, seeds=b.seeds + 10))


def composite(**kwargs):
    """Studies of the same subjects, databases and labels; what differs is what their members say."""
    return held_out(fake_study.make_composite(np.random.default_rng(5), num_epochs=0, num_seeds=3, **kwargs), QUICK)


def test_studies_of_one_class_a_clip_compare_uf1_uar_and_databases(rng):
    good, bad = composite(signal=1.2), composite(signal=0.5)
    found = compare_held_out(good, bad)
    everything = np.ones((1, 442))
    for run, key in ((good, "mean_a"), (bad, "mean_b")):
        for figure, row in (("macro_f1", found["macro_f1"]["pooled"]), ("multilabel_uar", found["uar"])):
            values = weighted_scores(run.truth, run.decisions, run.mask, everything, getattr(metrics, figure))
            assert row[key] == pytest.approx(values.mean())
        for name in ("casme2", "samm", "smic"):
            rows = run.database == name
            counts = metrics.confusion_counts(run.truth[rows], run.decisions[:, rows], run.mask[rows])
            assert found["databases"][name][key] == pytest.approx(metrics.macro_f1(counts).mean())
    assert found["macro_f1"]["pooled"]["clip_ci"][0] > 0 and found["uar"]["clip_p_value"] < 0.01
    # Single subjects lack classes: the pairs are seeds, all folds pooled.
    assert found["members"]["pairs"] == "seeds" and np.shape(found["members"]["matrix"]) == (1, 3)
    assert found["members"]["difference"] == pytest.approx(found["macro_f1"]["pooled"]["difference"])
    assert compare_held_out(good, bad.take_clips(rng.permutation(442))) == found
    table = format_comparison({"a": "ours", "b": "theirs", "settings_that_differ": {}, **found})
    assert "UF1, pooled" in table and "UAR, pooled" in table and "UF1 samm, pooled" in table
    assert "3 seeds, all folds of a seed pooled" in table and "macro-F1" not in table


def test_studies_of_other_tasks_labels_or_databases_are_refused(rng, labels):
    one = composite()
    with pytest.raises(UserError, match=r"^A predicts one of negative, positive, surprise, B any of Negative, .*task"):
        compare_held_out(one, study(rng, labels))
    renamed = dataclasses.replace(one, labels=("a", "b", "c"))
    with pytest.raises(
        UserError, match=r"ours predicts one of negative, .*, other one of a, b, c; only studies of the"
    ):
        compare_held_out(one, renamed, names=("ours", "other"))
    moved = dataclasses.replace(one, database=np.roll(one.database, 1))
    with pytest.raises(UserError, match="not the same database in A and B"):
        compare_held_out(one, moved)
