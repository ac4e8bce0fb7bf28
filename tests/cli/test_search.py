"""A search as a user opens it: one command from ranges to the nested score, recomputed from the run's files."""

import json

import numpy as np

from mer_jax.study.results import StudyResults

SEARCH = {
    "study.num_candidates": 2,
    "search.learning_rate": ("log_uniform", 1e-4, 1e-3),
    "search.dropout": ("choice", 0.1, 0.6),
}


def test_from_ranges_to_a_nested_score(challenge, finished, train, door, tmp_path):
    done = train(challenge.overrides | SEARCH, "search").end()
    assert done.status == 0, done.stderr
    assert "candidate 0 in every fold" in done.stdout and "Choosing gains " in done.stdout
    run = tmp_path / "search"
    results, alone = StudyResults.load(run), StudyResults.load(finished)
    assert results.member_id[:4].tolist() == [f"fold0-seed{s}-candidate{n}" for n in range(2) for s in range(2)]
    # The config's own values, in the very same program: the same members as those of a study without a search.
    own = results.hyper["learning_rate"] == np.float32(1e-2)
    np.testing.assert_array_equal(results.probabilities[own], alone.probabilities)
    np.testing.assert_array_equal(results.inner[own], alone.inner)
    summary = json.loads((run / "summary.json").read_text())
    without = json.loads((finished / "summary.json").read_text())
    assert summary["search"]["default"]["macro_f1"] == without["honest"]["macro_f1"]
    assert {row.split(",")[3] for row in (run / "members.csv").read_text().split()[1:]} > {"0.01"}

    written = {name: (run / name).read_bytes() for name in ("summary.json", "report.html")}
    for arguments, same in ((["--selection=loss"], False), ([], True)):
        again = door("evaluate.py", "report", run, *arguments).end()
        assert again.status == 0, again.stderr
        assert all((run / name).read_bytes() == content for name, content in written.items()) is same


def test_a_search_without_inner_splits_is_one_line(challenge, told):
    line = told(challenge.overrides | SEARCH | {"study.num_inner": 0, "evaluation.thresholds": "fixed"})
    assert "config.search is chosen from on inner splits: set config.study.num_inner to 2 or more" in line
