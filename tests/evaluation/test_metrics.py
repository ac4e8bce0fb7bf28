import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer_jax.evaluation import metrics

N_CLASSES = 5


@st.composite
def decisions(draw, max_rows=12):
    """Truth and prediction ``(N, C)``: rows few enough that absent classes and constant answers are common."""
    n = draw(st.integers(1, max_rows))
    bits = st.lists(st.booleans(), min_size=n * N_CLASSES, max_size=n * N_CLASSES)
    return tuple(np.array(draw(bits)).reshape(n, N_CLASSES) for _ in range(2))


def sklearn():
    from sklearn import metrics as reference

    return reference


ZERO_DIVISION = {"zero": 0, "one": 1, "skip": np.nan}


@pytest.mark.parametrize("absent", ZERO_DIVISION)
def test_f1_and_recall_equal_scikit_learn_with_every_rule(rng, absent):
    reference, rule = sklearn(), ZERO_DIVISION[absent]
    for rate_truth, rate_prediction in ((0.5, 0.5), (0.1, 0.3), (0.3, 0.05), (0.0, 0.2), (0.2, 0.0), (0.0, 0.0)):
        truth = rng.random((7, N_CLASSES)) < rate_truth
        prediction = rng.random((7, N_CLASSES)) < rate_prediction
        counts = metrics.confusion_counts(truth, prediction)
        args = {"average": None, "zero_division": rule}
        f1 = reference.f1_score(truth, prediction, **args)
        recall = reference.recall_score(truth, prediction, **args)
        np.testing.assert_allclose(metrics.binary_f1(counts, absent), f1, rtol=0, atol=1e-15)
        np.testing.assert_allclose(metrics.recall(counts, absent), recall, rtol=0, atol=1e-15)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing
            np.testing.assert_allclose(metrics.macro_f1(counts, absent), np.nanmean(f1), atol=1e-15)
            np.testing.assert_allclose(metrics.multilabel_uar(counts, absent), np.nanmean(recall), atol=1e-15)


def test_counts_equal_scikit_learn(rng):
    truth, prediction = rng.random((2, 30, N_CLASSES)) < 0.3
    counts = metrics.confusion_counts(truth, prediction)
    reference = sklearn().multilabel_confusion_matrix(truth, prediction)
    np.testing.assert_array_equal(np.stack([counts.tn, counts.fp], -1), reference[:, 0])
    np.testing.assert_array_equal(np.stack([counts.fn, counts.tp], -1), reference[:, 1])


def test_present_absent_and_balanced_accuracy_equal_scikit_learn(rng):
    reference = sklearn()
    for rate in (0.5, 0.1, 0.0):
        truth, prediction = rng.random((2, 9, N_CLASSES)) < rate
        counts = metrics.confusion_counts(truth, prediction)
        args = {"labels": [0, 1], "average": "macro", "zero_division": 0}
        columns = list(zip(truth.T, prediction.T, strict=True))
        f1 = np.mean([reference.f1_score(t, p, **args) for t, p in columns])
        recall = np.mean([reference.recall_score(t, p, **args) for t, p in columns])
        assert metrics.present_absent_macro_f1(counts) == pytest.approx(f1, abs=1e-15)
        assert metrics.balanced_accuracy(counts) == pytest.approx(recall, abs=1e-15)


def test_by_hand():
    #                 class 0         class 1: never true   class 2: neither true nor predicted
    truth = np.array([[1, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0]])
    prediction = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0]])
    counts = metrics.confusion_counts(truth, prediction)
    assert [c.tolist() for c in counts] == [[2, 0, 0], [1, 1, 0], [1, 0, 0], [0, 3, 4]]
    np.testing.assert_allclose(metrics.binary_f1(counts), [2 / 3, 0, 0])
    assert metrics.macro_f1(counts) == pytest.approx(2 / 9)
    assert metrics.macro_f1(counts, "one") == pytest.approx((2 / 3 + 1) / 3)
    assert metrics.macro_f1(counts, "skip") == pytest.approx(1 / 3)
    assert metrics.multilabel_uar(counts) == pytest.approx(2 / 9)
    # F1(absent): 0, 6 / 7, 1
    assert metrics.present_absent_macro_f1(counts) == pytest.approx((1 / 3 + 3 / 7 + 1 / 2) / 3)


def test_pooled_and_fold_mean_differ_by_hand():
    truth = np.array([[1], [0], [1], [1]])
    prediction = np.array([[1], [1], [0], [1]])
    parts = [metrics.confusion_counts(truth[r], prediction[r]) for r in (slice(0, 2), slice(2, 4))]
    pooled = metrics.Counts(*(a + b for a, b in zip(*parts, strict=True)))
    assert metrics.macro_f1(pooled) == pytest.approx(4 / 6)
    np.testing.assert_array_equal(pooled, metrics.confusion_counts(truth, prediction))
    assert [float(metrics.macro_f1(p)) for p in parts] == pytest.approx([2 / 3, 2 / 3])


def test_single_label_uf1_and_uar_equal_scikit_learn(rng):
    reference = sklearn()
    for classes_present in (3, 2, 1):
        truth = rng.integers(0, classes_present, 20)
        prediction = rng.integers(0, 3, 20)
        args = {"labels": [0, 1, 2], "average": "macro", "zero_division": 0}
        assert metrics.uf1(truth, prediction, 3) == pytest.approx(reference.f1_score(truth, prediction, **args))
        assert metrics.uar(truth, prediction, 3) == pytest.approx(reference.recall_score(truth, prediction, **args))
    truth = rng.integers(0, 2, 20)
    prediction = rng.integers(0, 2, 20)
    expected = reference.balanced_accuracy_score(truth, prediction)
    assert metrics.uar(truth, prediction, 3, absent="skip") == pytest.approx(expected)


def test_majority_class_on_the_megc_composite():
    truth = np.repeat([0, 1, 2], [250, 109, 83])
    constant = np.zeros_like(truth)
    assert metrics.uf1(truth, constant, 3) == pytest.approx(0.2408, abs=5e-5)
    assert metrics.uar(truth, constant, 3) == pytest.approx(0.3333, abs=5e-5)


@pytest.mark.parametrize("digits", [1, 6])  # one digit: most scores are tied
def test_auroc_and_average_precision_equal_scikit_learn(rng, digits):
    reference = sklearn()
    truth = rng.random((40, 25, N_CLASSES)) < 0.3
    truth[0, :, 0] = False  # no positive
    truth[1, :, 1] = True  # no negative
    score = rng.random(truth.shape).round(digits)
    area, precision = metrics.auroc(truth, score), metrics.average_precision(truth, score)
    assert np.isnan(area[0, 0]) and np.isnan(precision[0, 0]) and np.isnan(area[1, 1])
    assert precision[1, 1] == 1
    for member in range(2, 40):
        for c in range(N_CLASSES):
            t, s = truth[member, :, c], score[member, :, c]
            if not t.any() or t.all():
                assert np.isnan(area[member, c])
                continue
            assert area[member, c] == pytest.approx(reference.roc_auc_score(t, s), abs=1e-12)
            assert precision[member, c] == pytest.approx(reference.average_precision_score(t, s), abs=1e-12)


def test_auroc_and_average_precision_by_hand():
    truth, score = np.array([[1], [0], [1], [0]]), np.array([[0.9], [0.5], [0.5], [0.1]])
    assert metrics.auroc(truth, score) == pytest.approx([(1 + 1 + 0.5 + 1) / 4])
    assert metrics.average_precision(truth, score) == pytest.approx([0.5 * 1 + 0.5 * 2 / 3])


def ratios(truth, prediction, score, mask=None):
    counts = metrics.confusion_counts(truth, prediction, mask)
    return [
        metrics.macro_f1(counts),
        metrics.present_absent_macro_f1(counts),
        metrics.multilabel_uar(counts),
        metrics.balanced_accuracy(counts),
        metrics.auroc(truth, score, mask),
        metrics.average_precision(truth, score, mask),
    ]


def assert_same(ones, others):
    for one, other in zip(ones, others, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(decisions(), st.integers(0, 2**32 - 1))
def test_order_of_clips_does_not_matter(pair, seed):
    truth, prediction = pair
    generator = np.random.default_rng(seed)
    score = generator.random(truth.shape).round(1)
    order = generator.permutation(len(truth))
    assert_same(ratios(truth, prediction, score), ratios(truth[order], prediction[order], score[order]))


@settings(max_examples=60, deadline=None)
@given(decisions(), st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_padding_changes_nothing(pair, seed, padding):
    truth, prediction = pair
    generator = np.random.default_rng(seed)
    score = generator.random(truth.shape).round(1)
    position = np.sort(generator.choice(len(truth) + padding, len(truth), replace=False))
    mask = np.zeros((len(truth) + padding, 1), bool)
    mask[position] = True

    def padded(values, filler):
        full = filler((len(mask), N_CLASSES))
        full[position] = values
        return full

    def noise(shape):
        return generator.random(shape) < 0.5

    assert_same(
        ratios(truth, prediction, score),
        ratios(padded(truth, noise), padded(prediction, noise), padded(score, generator.random), mask),
    )


def test_unknown_labels_are_left_out_cell_by_cell(rng):
    truth, prediction = rng.random((2, 20, N_CLASSES)) < 0.4
    score = rng.random((20, N_CLASSES))
    mask = rng.random((20, N_CLASSES)) < 0.7
    counts = metrics.confusion_counts(truth, prediction, mask)
    area = metrics.auroc(truth, score, mask)
    for c in range(N_CLASSES):
        rows = mask[:, c]
        alone = metrics.confusion_counts(truth[rows, c : c + 1], prediction[rows, c : c + 1])
        assert [cell[c] for cell in counts] == [cell[0] for cell in alone]
        expected = metrics.auroc(truth[rows, c : c + 1], score[rows, c : c + 1])[0]
        assert area[c] == pytest.approx(expected, nan_ok=True)


def test_leading_axes_are_members_by_themselves(rng):
    truth = rng.random((15, N_CLASSES)) < 0.4
    prediction = rng.random((3, 2, 15, N_CLASSES)) < 0.4
    score = rng.random((3, 2, 15, N_CLASSES))
    together = ratios(truth, prediction, score)
    for index in np.ndindex(3, 2):
        assert_same([value[index] for value in together], ratios(truth, prediction[index], score[index]))


def test_unknown_rule_for_absent_classes():
    counts = metrics.confusion_counts(np.ones((1, 1)), np.ones((1, 1)))
    with pytest.raises(ValueError, match="zero, one, skip"):
        metrics.macro_f1(counts, "drop")
