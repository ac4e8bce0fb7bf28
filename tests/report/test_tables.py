import copy
import json

import pytest

from mer_jax.report.plots import format_number
from mer_jax.report.tables import format_interval, format_signed, leaky_block, score_rows, terminal_table


@pytest.fixture(scope="module")
def summary(run_folder):
    return json.loads((run_folder / "summary.json").read_text())


def test_headline_is_the_summary_s(summary):
    row = next(row for row in score_rows(summary) if row.key)
    score = summary["honest"]["macro_f1"]["pooled"]
    assert (row.mean, row.sd, row.seed_interval, row.clip_interval) == (
        score["mean"],
        score["sd"],
        score["seed_ci"],
        score["clip_ci"],
    )
    assert row.untuned == summary["untuned"]["macro_f1"]["pooled"]["mean"]
    assert row.leaky == summary["leaky"]["both"]["macro_f1"]["pooled"]["mean"]


def test_terminal_table_fits_and_holds_every_row(summary):
    text = terminal_table(summary)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert not any(line != line.rstrip() for line in lines)
    for row in score_rows(summary):
        line = next(line for line in lines if line[2:].startswith(row.name))
        for value in (row.mean, row.untuned, row.leaky):
            assert format_number(value) in line
        for interval in (row.seed_interval, row.clip_interval):
            assert format_interval(interval) in line
    assert "LEAKY" in lines[0] and "not an estimate" in text
    for note in summary["notes"]:
        assert note.split()[0] in text
    assert "nan" not in text.lower() and "None" not in text


def test_every_label_has_a_row(summary):
    names = [row.name for row in score_rows(summary)]
    assert all(f"F1 {label}" in names for label in summary["labels"])
    assert len(names) == len(set(names))


def test_without_curves_the_leaky_column_is_that_of_thresholds(summary):
    summary = copy.deepcopy(summary)
    summary["leaky"] |= {"best_epoch": None, "best_epoch_untuned": None, "both": None}
    assert leaky_block(summary) is summary["leaky"]["heldout_thresholds"]
    assert "LEAKY chooses thresholds on" in terminal_table(summary)


@pytest.mark.parametrize(("value", "text"), [(0.0213, "+0.021"), (-0.02, "−0.020"), (0.0, "+0.000"), (None, "–")])
def test_differences_carry_their_sign(value, text):
    assert format_signed(value) == text


def test_missing_intervals_are_dashes():
    assert format_interval(None) == "–"
    assert format_interval([0.1, None]) == "–"
    assert format_interval([0.1, 0.25]) == "[0.100, 0.250]"
