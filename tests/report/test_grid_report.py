"""The tables and the page of a grid."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from mer_jax.errors import UserError
from mer_jax.report.grid_html import write_grid_report
from mer_jax.report.grid_tables import cross_table, terminal_tables
from mer_jax.study.grid_rows import make_rows
from mer_jax.study.grid_summary import summarise_grid

_spec = importlib.util.spec_from_file_location(
    "fake_study", Path(__file__).resolve().parents[1] / "study" / "fake_study.py"
)
fake_study = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_study)


@pytest.fixture(scope="module")
def summary():
    rng = np.random.default_rng(0)
    labels = (rng.random((40, 5)) < 0.3).astype(np.int8)
    labels[36:] = -1
    rows = make_rows(("hog", "siglip<b16>"), ("smirk",), ("gate", "mean", "concat"))
    lost = [(fold, seed) for fold in range(3) for seed in range(3)]
    studies = {
        row.name: fake_study.make_results(
            rng, labels=labels, signal=1.5 if row.fusion == "mean" else 0.7, num_seeds=3, num_epochs=0,
            diverged=lost if row.name == "siglip<b16>+smirk-concat" else (),
        )
        for row in rows
    }  # fmt: skip
    return summarise_grid(rows, studies, {"bootstrap": 100})


def test_table_2_is_a_grid_with_single_features_at_its_margins(summary):
    table = cross_table(summary)
    assert table[0] == ["3D \\ 2D", "hog", "siglip<b16>", "3D alone"]
    assert [line[0] for line in table[1:]] == ["smirk", "2D alone"] and table[2][3] == "–"
    scores = {row["name"]: row["macro_f1"]["pooled"] for row in summary["rows"] if not row["failed"]}
    for cell, name in ((table[1][1], "hog+smirk-gate"), (table[1][3], "smirk"), (table[2][2], "siglip<b16>")):
        assert cell == f"{scores[name]['mean']:.3f} ± {scores[name]['sd']:.3f}"


def test_the_terminal_shows_all_tables(summary):
    text = terminal_tables(summary)
    for words in ("Table 2: macro-F1", "Table 3: hog + smirk", "Against the best row", "adjusted p", "P(best)"):
        assert words in text
    assert text.count("two pools, softmax gate") == 3 and text.count("concat, one encoder") == 1
    assert re.search(r"\n  (hog|siglip<b16>) \+ smirk, mean +best +– +– +0\.\d{3}\n", text)
    assert "the best is chosen by the scores that it is compared by" in text
    assert "Row siglip<b16>+smirk-concat is left out" in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_page_stands_alone_and_leads_to_the_rows(summary, tmp_path):
    with pytest.raises(UserError, match=r"summary\.json: not the summary of a grid; evaluate it again"):
        write_grid_report(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "config.json").write_text(json.dumps({"data": {"dataset": "four_dme/demo"}}))
    page = write_grid_report(tmp_path).read_text()
    assert "<b16>" not in page and "siglip&lt;b16&gt; + smirk" in page
    assert 'href="hog%2Bsmirk-gate/report.html"' in page and "Demo data." in page
    assert "http" not in page.replace("http://www.w3.org", "") and "<script" not in page
    for section in ("table2", "rows", "best", "table3", "single", "config"):
        assert f'href="#{section}"' in page and f'<section id="{section}">' in page
    assert page.count('class="whisker"') == 8  # the rows that were scored
    assert write_grid_report(tmp_path).read_text() == page
