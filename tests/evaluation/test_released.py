import csv

import numpy as np
import pytest

from mer_jax.clips.layouts import LABELS
from mer_jax.errors import UserError
from mer_jax.evaluation.released import exclude_positive, released_postprocess, sequence_id, write_submission


def plain_loops(probabilities, names, negative_excludes_positive):
    """The released rules, written once more without arrays."""
    thresholds = {"Negative": 0.60, "Positive": 0.08, "Repression": 0.08, "Surprise": 0.53, "Others": 0.33}
    by_sequence = {}
    for row, name in zip(probabilities, names, strict=True):
        sequence = name.rsplit("_", 1)[0]
        label = by_sequence.setdefault(sequence, dict.fromkeys(LABELS, 0))
        for value, key in zip(row, LABELS, strict=True):
            if value >= np.float32(thresholds[key]):
                label[key] = 1
    rows = []
    for sequence, label in by_sequence.items():
        if negative_excludes_positive and label["Negative"] == 1:
            label["Positive"] = 0
        digits = ""
        for character in sequence:
            if character.isdigit():
                digits += character
            elif digits:
                break
        rows.append([int(digits)] + [label[key] for key in LABELS])
    return sorted(rows)


@pytest.mark.parametrize("rule", [True, False])
def test_equals_plain_loops_on_random_probabilities(rng, rule):
    names = [f"seq{i}_take2_{view}" for i in rng.permutation(200) for view in "lr"]
    order = rng.permutation(len(names))
    names = [names[i] for i in order]
    # Two digits: many values lie exactly on a threshold.
    probabilities = rng.random((len(names), 5)).astype(np.float32).round(2)
    probabilities[:20] = np.float32([0.60, 0.08, 0.08, 0.53, 0.33])
    ids, predictions = released_postprocess(probabilities, names, negative_excludes_positive=rule)
    assert np.column_stack([ids, predictions]).tolist() == plain_loops(probabilities, names, rule)


def test_thresholds_are_reached_by_equality_in_single_and_double_precision():
    for dtype in (np.float32, np.float64):
        row = np.array([[0.60, 0.08, 0.08, 0.53, 0.33]], dtype)
        _, predictions = released_postprocess(row, ["4_l"], negative_excludes_positive=False)
        assert predictions.tolist() == [[1, 1, 1, 1, 1]]
        _, predictions = released_postprocess(np.nextafter(row, dtype(0)), ["4_l"])
        assert predictions.tolist() == [[0, 0, 0, 0, 0]]


def test_negative_excludes_positive_elsewhere_nothing():
    decisions = np.array([[1, 1, 1, 0, 0], [0, 1, 0, 0, 1], [1, 0, 0, 0, 0]], bool)
    expected = [[1, 0, 1, 0, 0], [0, 1, 0, 0, 1], [1, 0, 0, 0, 0]]
    np.testing.assert_array_equal(exclude_positive(decisions), np.array(expected, bool))
    assert decisions[0, 1]  # the input is left alone


def test_single_views_and_bare_names():
    ids, predictions = released_postprocess(np.array([[1.0] * 5, [0.0] * 5]), ["b7_r", "a3"])
    assert ids.tolist() == [3, 7]
    assert predictions.tolist() == [[0] * 5, [1, 0, 1, 1, 1]]


def test_names_without_or_with_the_same_integer():
    with pytest.raises(UserError, match=r"'clip'.*rename"):
        sequence_id("clip")
    with pytest.raises(UserError, match=r"Id 7: given to both 'a7' and 'b7'"):
        released_postprocess(np.zeros((2, 5)), ["a7_l", "b7_l"])


def test_submission_file(tmp_path):
    path = tmp_path / "out" / "submission.csv"
    write_submission(path, [10, 9, 100], np.array([[1, 0, 0, 0, 1], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0]], bool))
    assert path.read_bytes() == (
        b"Id,Negative,Positive,Repression,Surprise,Others\n9,0,1,0,0,0\n10,1,0,0,0,1\n100,0,0,0,1,0\n"
    )
    with path.open() as stream:
        assert [row["Id"] for row in csv.DictReader(stream)] == ["9", "10", "100"]


def test_submission_refuses_duplicates_and_other_values(tmp_path):
    path = tmp_path / "submission.csv"
    with pytest.raises(UserError, match=r"Id 3.*one row per Id"):
        write_submission(path, [3, 3], np.zeros((2, 5), int))
    with pytest.raises(ValueError, match="0 and 1"):
        write_submission(path, [3], np.full((1, 5), 0.5))
    assert not path.exists()
