import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from mer_jax.errors import UserError
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
