"""A grid as a whole: its rows, their configs, and what is said of all of them together."""

import csv
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest

import data_builders
from configs.fusion import get_config as fusion_config
from configs.fusion_grid import get_config as grid_config
from mer_jax.errors import UserError
from mer_jax.study import grid
from mer_jax.study.comparison import compare_held_out
from mer_jax.study.config import flatten
from mer_jax.study.grid_rows import Row, make_rows, read_rows, write_rows
from mer_jax.study.grid_summary import grid_csv, summarise_grid, write_grid_summary
from mer_jax.study.held_out import held_out
from mer_jax.study.summary import summarise

_spec = importlib.util.spec_from_file_location("fake_study", Path(__file__).with_name("fake_study.py"))
fake_study = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_study)
FUSIONS = ("gate", "mean", "concat")
QUICK = {"bootstrap": 200}


# --- rows and their configs ---------------------------------------------------------------------------------------


def test_rows_are_every_single_and_every_pair_and_fusion_once():
    rows = make_rows(("hog", "radio_v2.5-g"), ("facemesh",), FUSIONS)
    assert [row.name for row in rows] == [
        *("hog", "radio_v2.5-g", "facemesh", "hog+facemesh-gate", "radio_v2.5-g+facemesh-gate"),
        *("hog+facemesh-mean", "radio_v2.5-g+facemesh-mean", "hog+facemesh-concat", "radio_v2.5-g+facemesh-concat"),
    ]


@pytest.mark.parametrize(
    "row, variant",
    [
        (Row("hog", "facemesh", "gate"), "fusion"),
        (Row("hog", "facemesh", "mean"), "mean"),
        (Row("hog", "facemesh", "concat"), "concat"),
        (Row("hog", "", ""), "appearance"),
        (Row("", "facemesh", ""), "geometry"),
    ],
)
def test_a_row_is_the_ordinary_study(row, variant):
    ours, theirs = (flatten(config) for config in (grid.row_config(grid_config(), row), fusion_config(variant)))
    assert ours.pop("name") == row.name and theirs.pop("name")
    assert ours == theirs


def test_a_list_of_rows_survives_its_file(tmp_path):
    rows = make_rows(("a", "b"), ("c",), FUSIONS)
    write_rows(tmp_path, rows)
    assert read_rows(tmp_path) == rows
    (tmp_path / "grid.json").write_text('{"rows": [{}]}')
    with pytest.raises(UserError, match=r"grid\.json: damaged; delete it and run"):
        read_rows(tmp_path)


@pytest.fixture
def settle(tmp_path, monkeypatch):
    """Chooses rows for a data set that holds some features, or is not built and would hold the embedded ones."""

    def settle(held, built=True, earlier=(), **cross):
        config = grid_config()
        config.cross.update(cross)
        state = {"held": held if built else None}

        def ensure(data, extractors):
            state["held"] = held
            return Path("DATA")

        monkeypatch.setattr(data_builders, "ensure_dataset", ensure)
        monkeypatch.setattr(data_builders, "held_features", lambda data: state["held"])
        grid._validate(config)
        if earlier:
            write_rows(tmp_path, earlier)
        return [row.name for row in grid._settle_rows(config, tmp_path)[0]]

    return settle


DEMO = {"hog": "appearance", "facemesh": "geometry"}


def test_a_grid_takes_what_the_data_set_holds(settle):
    demo = ["hog", "facemesh", "hog+facemesh-gate", "hog+facemesh-mean", "hog+facemesh-concat"]
    assert settle(DEMO, built=False) == settle(DEMO) == demo
    assert settle(DEMO | {"own": "appearance"}, appearance=("hog",)) == demo
    assert settle(DEMO | {"own": ""}, appearance=("own",), geometry=("facemesh",), fusions=("mean",)) == [
        *("own", "facemesh", "own+facemesh-mean")
    ]
    # It grows with the data set, and keeps the rows that it has.
    more = settle(DEMO | {"smirk": "geometry"}, earlier=make_rows(("hog", "gone"), ("facemesh",), FUSIONS))
    assert len(more) == 2 + 2 + 4 * 3 and {"gone", "hog+smirk-concat"} <= set(more)


@pytest.mark.parametrize(
    "held, cross, message",
    [
        (DEMO, {"appearance": ("hogg",)}, r"config\.cross\.appearance: nothing gives features 'hogg'; choose from"),
        (DEMO, {"geometry": ("smirk",)}, r"config\.cross\.geometry: 'smirk' is not in .* DATA, which holds facemesh"),
        ({"hog": "appearance"}, {}, r"DATA holds no features of geometry \(it holds hog\); extract some with"),
        (DEMO | {"own": ""}, {}, r"does not say whether its features 'own' are of appearance or geometry; name the"),
        (DEMO | {"own": ""}, {"appearance": ("hog",)}, "'own' are of appearance or geometry"),
        (DEMO | {"my own": "geometry"}, {}, r"features 'my own': a row's folder is called after them"),
        (DEMO, {"appearance": ("hog",), "geometry": ("hog",)}, r"config\.cross names the features 'hog' twice"),
        (DEMO, {"fusions": ()}, r"config\.cross\.fusions=\(\): must be some of 'gate', 'mean', 'concat', each once"),
        (DEMO, {"fusions": ("gate", "sum")}, r"config\.cross\.fusions=\('gate', 'sum'\): must be some of"),
    ],
)
def test_what_cannot_be_crossed_is_one_line(settle, held, cross, message):
    with pytest.raises(UserError, match=message) as raised:
        settle(held, **cross)
    assert "\n" not in str(raised.value)


# --- figures ------------------------------------------------------------------------------------------------------

ROWS = make_rows(("look",), ("shape",), FUSIONS)


@pytest.fixture(scope="module")
def studies():
    """Five studies of the same clips: concat knows least, gate most; the clips of 'shape' are in another order."""
    rng = np.random.default_rng(3)
    labels = (rng.random((40, 5)) < fake_study.PREVALENCE).astype(np.int8)
    labels[36:] = -1
    signals = {"look": 0.8, "shape": 1.0, "look+shape-gate": 2.5, "look+shape-mean": 1.5, "look+shape-concat": 0.0}
    return {
        name: fake_study.make_results(
            rng, labels=labels, signal=signal, num_seeds=5, diverged=((1, 4),) if name == "shape" else ()
        )
        for name, signal in signals.items()
    }


@pytest.fixture(scope="module")
def summary(studies):
    return summarise_grid(ROWS, studies, QUICK)


def test_rows_score_as_they_do_alone(studies, summary):
    assert [row["name"] for row in summary["rows"]] == [row.name for row in ROWS]
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    # A seed that diverged in one row is left out of all, so that they are paired.
    assert summary["study"]["seeds"] == [0, 1, 2, 3] and summary["study"]["seeds_left_out"] == [4]
    shape = summary["rows"][1]
    assert shape["diverged"] == ["fold1-seed4"]
    alone = summarise(studies["shape"], QUICK)  # the row whose seeds are those of the grid
    for average in ("pooled", "fold_mean"):
        own = alone["honest"]["macro_f1"][average]
        assert shape["macro_f1"][average] == {key: own[key] for key in ("mean", "sd", "clip_ci", "values")}
        assert shape["chance"][average] == alone["chance"]["macro_f1"][average]
    folds = [np.mean(entry["macro_f1"]) for entry in alone["folds"]]
    assert shape["macro_f1"]["fold_sd"] == pytest.approx(np.std(folds, ddof=1), abs=0.03)


def test_rows_are_compared_with_the_best_in_pairs(studies, summary):
    assert summary["best"] == {"pooled": "look+shape-gate", "fold_mean": "look+shape-gate"}
    by_name = {row["name"]: row for row in summary["rows"]}
    best = by_name["look+shape-gate"]
    assert best["minus_best"] == {"pooled": None, "fold_mean": None}
    assert sum(row["probability_best"]["pooled"] for row in summary["rows"]) == pytest.approx(1)
    concat = by_name["look+shape-concat"]
    pair = compare_held_out(*(held_out(studies[name], QUICK) for name in ("look+shape-concat", "look+shape-gate")))
    for average in ("pooled", "fold_mean"):
        versus = concat["minus_best"][average]
        expected = concat["macro_f1"][average]["mean"] - best["macro_f1"][average]["mean"]
        assert versus["difference"] == pytest.approx(expected)
        low, high = versus["interval"]
        assert low < versus["difference"] < high < 0 and versus["p_value"] <= 0.02
        # Wider than the interval of one pair by itself.
        own = pair["macro_f1"][average]["clip_ci"]
        assert high - low > own[1] - own[0]


def test_steps_of_table_3_and_gains_over_single_features(summary):
    steps = [(step["a"], step["b"]) for step in summary["steps"]]
    assert steps == [("look+shape-mean", "look+shape-concat"), ("look+shape-gate", "look+shape-mean")]
    over = [(step["a"], step["b"]) for step in summary["over_single"]]
    assert over == [("look+shape-gate", "look"), ("look+shape-gate", "shape")]
    means = {row["name"]: row["macro_f1"]["pooled"]["mean"] for row in summary["rows"]}
    for step in (*summary["steps"], *summary["over_single"]):
        assert step["pooled"]["difference"] == pytest.approx(means[step["a"]] - means[step["b"]])


def test_the_order_of_rows_and_of_clips_changes_nothing(studies, summary):
    back = summarise_grid(ROWS[::-1], studies, QUICK)
    for row in summary["rows"]:
        other = next(entry for entry in back["rows"] if entry["name"] == row["name"])
        assert other["macro_f1"]["pooled"]["mean"] == row["macro_f1"]["pooled"]["mean"]
        if row["minus_best"]["pooled"]:
            np.testing.assert_allclose(
                other["minus_best"]["pooled"]["interval"], row["minus_best"]["pooled"]["interval"], atol=1e-12
            )


def test_a_row_that_cannot_be_scored_costs_no_other(studies, summary):
    rng = np.random.default_rng(3)
    lost = fake_study.make_results(rng, num_seeds=2, diverged=[(fold, seed) for fold in (0, 1) for seed in (0, 1)])
    found = summarise_grid(ROWS, studies | {"look": lost}, QUICK)
    entry = found["rows"][0]
    assert entry["name"] == "look" and "no seed finished in every fold" in entry["failed"] and "macro_f1" not in entry
    assert any(note.startswith("Row look is left out") for note in found["notes"])
    assert [step["b"] for step in found["over_single"]] == ["shape"]
    assert found["rows"][2]["macro_f1"] == summary["rows"][2]["macro_f1"]
    lines = list(csv.DictReader(io.StringIO(grid_csv(found))))
    assert lines[0]["row"] == "look" and lines[0]["pooled_mean"] == "" and lines[0]["seeds"] == "0"
    with pytest.raises(UserError, match="no row of the grid can be scored; look: no seed finished"):
        summarise_grid(ROWS, dict.fromkeys(studies, lost), QUICK)


def test_the_long_table_holds_the_figures(summary):
    lines = list(csv.DictReader(io.StringIO(grid_csv(summary))))
    assert [line["row"] for line in lines] == [row.name for row in ROWS]
    for line, row in zip(lines, summary["rows"], strict=True):
        assert float(line["fold_mean_mean"]) == row["macro_f1"]["fold_mean"]["mean"]
        versus = row["minus_best"]["pooled"]
        assert line["pooled_p_value"] == (str(versus["p_value"]) if versus else "")


def test_files_of_the_rows_are_enough(studies, summary, tmp_path):
    write_rows(tmp_path, ROWS)
    (tmp_path / "config.json").write_text(json.dumps({"evaluation": QUICK}))
    for name, results in list(studies.items())[:-1]:
        (tmp_path / name).mkdir()
        results.save(tmp_path / name / "predictions.npz")
    with pytest.raises(
        UserError, match=r"1 of the grid's 5 rows are not trained \(look\+shape-concat\); run scripts/tr"
    ):
        write_grid_summary(tmp_path)
    (tmp_path / "look+shape-concat").mkdir()
    studies["look+shape-concat"].save(tmp_path / "look+shape-concat" / "predictions.npz")
    assert write_grid_summary(tmp_path) == summary
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (tmp_path / "table.csv").read_text() == grid_csv(summary)
    assert write_grid_summary(tmp_path, {"views": "or"})["evaluation"]["views"] == "or"
