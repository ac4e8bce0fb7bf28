"""Folds: everybody held out once, labels spread, subjects whole, inner splits that rotate."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer_jax.errors import UserError
from mer_jax.study.folds import inner_split, make_folds


def clips(rng, number=100, subjects=24):
    labels = (rng.uniform(size=(number, 5)) < [0.45, 0.2, 0.15, 0.25, 0.2]).astype(np.int8)
    return labels, np.array([f"s{index % subjects:02d}" for index in rng.permutation(number)])


def test_stratified_is_the_library_s_assignment(rng):
    from iterstrat.ml_stratifiers import MultilabelStratifiedKFold

    labels, subjects = clips(rng)
    folds = make_folds(labels, subjects, scheme="stratified", num_folds=3, seed=4)
    splitter = MultilabelStratifiedKFold(n_splits=3, shuffle=True, random_state=4)
    for number, (_, held_out) in enumerate(splitter.split(labels, labels)):
        np.testing.assert_array_equal(np.flatnonzero(folds == number), held_out)
    counts = np.stack([labels[folds == fold].sum(0) for fold in range(3)])
    assert np.ptp(counts, axis=0).max() <= 2


@pytest.mark.parametrize("scheme", ["stratified", "subject"])
def test_folds_are_deterministic_and_follow_their_seed(scheme, rng):
    labels, subjects = clips(rng)
    folds = [make_folds(labels, subjects, scheme=scheme, num_folds=3, seed=seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(folds[0], folds[1])
    assert (folds[0] != folds[2]).any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), num_folds=st.integers(2, 6), subjects=st.integers(6, 24))
def test_subject_folds_keep_subjects_whole_and_none_is_empty(seed, num_folds, subjects):
    labels, names = clips(np.random.default_rng(seed), subjects=subjects)
    folds = make_folds(labels, names, scheme="subject", num_folds=num_folds, seed=seed)
    assert set(folds.tolist()) == set(range(num_folds))
    for name in np.unique(names):
        assert len(set(folds[names == name].tolist())) == 1


def test_subject_folds_are_more_even_than_chance(rng):
    labels, subjects = clips(rng)

    def unevenness(folds):
        columns = np.concatenate([labels, np.ones((len(labels), 1))], axis=1)
        counts = np.stack([columns[folds == fold].sum(0) for fold in range(3)]) / columns.sum(0)
        return counts.std(axis=0).mean()

    names, group = np.unique(subjects, return_inverse=True)
    random = [unevenness(rng.permutation(np.arange(len(names)) % 3)[group]) for _ in range(200)]
    for seed in range(5):
        folds = make_folds(labels, subjects, scheme="subject", num_folds=3, seed=seed)
        assert unevenness(folds) < np.quantile(random, 0.1)


def test_loso_is_one_fold_a_subject(rng):
    labels, subjects = clips(rng)
    folds = make_folds(labels, subjects, scheme="loso", num_folds=3, seed=0)
    assert len(set(zip(folds.tolist(), subjects.tolist(), strict=True))) == 24 == folds.max() + 1


@pytest.mark.parametrize("scheme", ["stratified", "subject"])
def test_inner_splits_rotate_over_all_training_clips(scheme, rng):
    labels, subjects = clips(rng, 67)
    for first in (0, 5):
        parts = [
            inner_split(labels, subjects, scheme=scheme, num_inner=5, fold=1, seed=seed)
            for seed in range(first, first + 5)
        ]
        np.testing.assert_array_equal(np.sum(parts, axis=0), 1)
    other_turn = inner_split(labels, subjects, scheme=scheme, num_inner=5, fold=1, seed=0)
    assert (other_turn != parts[0]).any()
    if scheme == "subject":
        assert not set(subjects[parts[0]]) & set(subjects[~parts[0]])


def test_a_label_without_positives_is_no_obstacle():
    labels = np.zeros((12, 5), np.int8)
    labels[::2, 0] = 1
    folds = make_folds(labels, np.array([""] * 12), scheme="stratified", num_folds=3, seed=0)
    assert np.bincount(folds).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("scheme", "number", "subject", "words"),
    [
        ("stratified", 2, "a", "3 folds need at least 3 labelled clips"),
        ("subject", 9, "a", "3 subject folds need at least 3 subjects"),
        ("subject", 9, "", "9 of 9 have none"),
        ("loso", 9, "", "9 of 9 have none"),
    ],
)
def test_impossible_folds_say_why(scheme, number, subject, words):
    with pytest.raises(UserError, match=words):
        make_folds(np.ones((number, 5)), np.array([subject] * number), scheme=scheme, num_folds=3, seed=0)


def test_impossible_inner_split_says_why():
    with pytest.raises(UserError, match="num_inner: 5 inner parts need at least 5 training clips, fold 2 has 3"):
        inner_split(np.ones((3, 5)), np.array(["a"] * 3), scheme="stratified", num_inner=5, fold=2, seed=0)
