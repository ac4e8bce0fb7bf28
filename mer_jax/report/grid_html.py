"""One self-contained page for a grid of studies: the fusion paper's Tables 2 and 3, with error bars."""

import os
from html import escape
from pathlib import Path
from urllib.parse import quote

from mer_jax.errors import UserError
from mer_jax.files import atomic_write_text
from mer_jax.report import plots
from mer_jax.report.grid_tables import (
    best_table,
    cross_table,
    fusion_table,
    fusion_words,
    ranked,
    row_label,
    score_table,
    single_table,
)
from mer_jax.report.html import FILENAME, _figure, _flatten, _read_json, _row, _table, _values
from mer_jax.report.plots import format_number
from mer_jax.report.style import STYLE
from mer_jax.report.tables import format_interval
from mer_jax.study.grid_summary import GRID_SCHEMA
from mer_jax.study.summary import SUMMARY_FILENAME

_NAMES = {"pooled": "pooled", "fold_mean": "mean of folds"}


def write_grid_report(workdir: str | os.PathLike) -> Path:
    """Writes ``report.html`` from the files of a finished grid; the same files give the same bytes.

    Args:
        workdir: The grid's folder, with ``summary.json``; ``config.json``, ``overrides.json`` and ``versions.json``
            are shown where they are there.

    Returns:
        Path of the page.

    Raises:
        UserError: The grid is not finished, or a file cannot be read or written.
    """
    workdir = Path(workdir)
    summary = _read_json(workdir / SUMMARY_FILENAME)
    if summary is None or summary.get("schema") != GRID_SCHEMA or "rows" not in summary:
        raise UserError(
            f"{workdir / SUMMARY_FILENAME}: not the summary of a grid; evaluate it again "
            f"(scripts/evaluate.py report {workdir})"
        )
    records = {
        title: _read_json(workdir / name) or {}
        for title, name in (
            ("Changed on the command line", "overrides.json"),
            ("All settings", "config.json"),
            ("Versions", "versions.json"),
        )
    }
    path = workdir / FILENAME
    atomic_write_text(path, _Page(workdir.resolve().name, summary, records).render())
    return path


class _Page:
    """The sections of the page, each of them HTML, empty where a grid has nothing to show."""

    def __init__(self, name, summary, records):
        self.name, self.summary, self.records = name, summary, records
        self.level = f"{100 * summary['evaluation']['confidence']:g} %"
        self.ranked = ranked(summary)

    def render(self) -> str:
        """The whole page."""
        sections = {
            "table2": ("Table 2: features and their pairs", self.cross),
            "rows": ("Every row", self.rows),
            "best": ("Each row against the best", self.best),
            "table3": ("Table 3: ways to fuse", self.fusions),
            "single": ("What a pair adds to one feature alone", self.over_single),
            "config": ("Configuration and versions", self.configuration),
        }
        built = {key: (title, body) for key, (title, make) in sections.items() if (body := make())}
        links = " ".join(f'<a href="#{key}">{escape(title)}</a>' for key, (title, _) in built.items())
        body = "".join(
            f'<section id="{key}"><h2>{escape(title)}</h2>{html}</section>' for key, (title, html) in built.items()
        )
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{escape(self.name)} – grid report</title><style>{STYLE}</style></head><body><main>"
            f'{self.head()}<nav aria-label="Sections">{links}</nav>{body}</main></body></html>\n'
        )

    def head(self) -> str:
        """Title, banner, the answer, and the grid's size."""
        banner = ""
        if str(self.records["All settings"].get("data", {}).get("dataset", "")).endswith("/demo"):
            banner = (
                '<p class="banner" role="note"><strong>Demo data.</strong> These clips are rendered from one '
                "public-domain photograph. Numbers on the demo show that the machinery works. They are not a "
                "benchmark and say nothing about real faces.</p>"
            )
        best, study = self.ranked[0], self.summary["study"]
        score = best["macro_f1"]["pooled"]
        alpha = 1 - self.summary["evaluation"]["confidence"]
        behind = [row for row in self.ranked[1:] if row["minus_best"]["pooled"]["p_value"] <= alpha]
        answer = (
            f"<b>{escape(row_label(best))}</b> has the highest macro-F1, "
            f"<b>{format_number(score['mean'])}</b> ({self.level} CI "
            f'<span class="interval">{format_interval(score["clip_ci"])}</span>, by itself); these clips and seeds '
            f"tell {len(behind)} of the {len(self.ranked) - 1} other rows from it. In "
            f"{100 * best['probability_best']['pooled']:.0f} % of the replicates it is the best."
        )
        facts = {
            "rows": len(self.summary["rows"]),
            "clips scored": study["clips"],
            "subjects": "unknown" if study["subjects"] is None else study["subjects"],
            "folds": len(study["folds"]),
            "seeds": len(study["seeds"]),
        }
        cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
        return (
            f'{banner}<p class="eyebrow">Grid of micro-expression studies</p><h1>{escape(self.name)}</h1>'
            f'<p class="answer">{answer}</p><dl class="facts">{cells}</dl>'
        )

    def cross(self) -> str:
        """Table 2 as a grid, at both averages."""
        parts = []
        for average, words in _NAMES.items():
            head, *lines = cross_table(self.summary, average)
            parts.append(
                f'<p class="note first">macro-F1, {words}, ± sd over seeds</p>'
                + _table([escape(cell) for cell in head], [_row([escape(cell) for cell in line]) for line in lines])
            )
        main = self.summary["fusions"]
        fused = f" Pairs are fused by {fusion_words(main[0])}." if main else ""
        return (
            f"<p>Rows are geometry (3D), columns appearance (2D), single features at the margins.{fused}</p>"
            + "".join(parts)
        )

    def rows(self) -> str:
        """The long table and its picture."""
        columns = ["row"]
        for words in _NAMES.values():
            columns += [f"{words}<br>mean ± sd over seeds", f"{self.level} CI<br>over clips and seeds"]
        columns += ["chance<br>pooled"]
        lines = [
            _row([self._link(row), *map(escape, cells[1:])], css="" if index else "key")
            for index, (row, cells) in enumerate(score_table(self.summary))
        ]
        forest = plots.score_forest(
            [(row_label(row), *self._drawn(row)) for row in self.ranked],
            axis="macro-F1, pooled",
            chance=self.ranked[0]["chance"]["pooled"]["mean"],
        )
        terms = "".join(
            f"<div><dt><code>{escape(name)}</code></dt><dd>{escape(text)}</dd></div>"
            for name, text in self.summary["definitions"].items()
        )
        return (
            "<p>Each row is a study of its own on the same folds and seeds; its name leads to its report. Thresholds "
            "are honest: nothing is chosen on the clips that are scored.</p>"
            + _table(columns, lines)
            + _figure(
                forest,
                f"Diamond and line: mean over seeds and {self.level} interval of the row by itself. Rings: single "
                "seeds. Rows share clips and seeds, so whether two of them differ cannot be read from these intervals.",
            )
            + "<details><summary>What each figure means, by its name in summary.json</summary>"
            f'<dl class="terms">{terms}</dl></details>'
        )

    def _link(self, row) -> str:
        return f'<a href="{quote(row["name"])}/{FILENAME}">{escape(row_label(row))}</a>'

    @staticmethod
    def _drawn(row):
        score = row["macro_f1"]["pooled"]
        return score["mean"], score["clip_ci"], score["values"]

    def best(self) -> str:
        """All rows against the best."""
        notes = "".join(f'<p class="note first">{escape(note)}</p>' for note in self.summary["notes"])
        parts = []
        for average, words in _NAMES.items():
            if average == "fold_mean" and self.summary["study"]["single_subject_folds"]:
                continue
            columns = [f"{words}", "minus best", f"{self.level} interval<br>all pairs at once", "adjusted p", "P(best)"]
            lines = [
                _row([*map(escape, cells)], css="" if index else "key")
                for index, (_, cells) in enumerate(best_table(self.summary, average))
            ]
            parts.append(_table(columns, lines))
        return (
            "<p>Row minus best row, on the same resampled clips and seeds. P(best): share of replicates in which the "
            "row is ahead of all others.</p>" + "".join(parts) + notes
        )

    def fusions(self) -> str:
        """Table 3, pair by pair."""
        columns = [
            *("", "pooled<br>mean ± sd over seeds", "mean of folds<br>mean ± sd over seeds", "minus the above"),
            *(f"{self.level} interval<br>all pairs at once", "adjusted p"),
        ]
        tables = fusion_table(self.summary)
        return "".join(
            _table([escape(pair), *columns[1:]], [_row([*map(escape, line)]) for line in lines])
            for pair, lines in tables
        )

    def over_single(self) -> str:
        """Each pair of Table 2 against its single features."""
        lines = single_table(self.summary)
        columns = ["pooled", "difference", f"{self.level} interval<br>all pairs at once", "adjusted p"]
        return _table(columns, [_row([*map(escape, line)]) for line in lines]) if lines else ""

    def configuration(self) -> str:
        """Settings and versions."""
        return "".join(
            f"<details><summary>{title}</summary>{_values(_flatten(tree))}</details>"
            for title, tree in self.records.items()
            if tree
        )
