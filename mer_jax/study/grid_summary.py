"""What a grid of studies says as a whole: each row's scores, and all rows compared with each other at once.

Rows are compared on the same clips and seeds, drawn alike in every replicate. The best row is chosen by the very scores
that it is then compared by, and there are many rows, so intervals and p-values of differences are those of all pairs at
once (:func:`mer_jax.evaluation.statistics.all_pairs`); they hold for whichever pairs the reader picks.
"""

import csv
import dataclasses
import functools
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mer_jax.errors import UserError
from mer_jax.evaluation import statistics
from mer_jax.evaluation.metrics import macro_f1
from mer_jax.files import atomic_write_text
from mer_jax.study.comparison import align
from mer_jax.study.grid_rows import Row, read_rows
from mer_jax.study.held_out import HeldOut, held_out
from mer_jax.study.results import FILENAME, StudyResults
from mer_jax.study.summary import SUMMARY_FILENAME, chance_figures, plain, read_evaluation, subject_notes

GRID_SCHEMA = 1
TABLE_FILENAME = "table.csv"
AVERAGES = ("pooled", "fold_mean")
# The order of the paper's Table 3: what each step adds to the one before.
_STEPS = ("concat", "mean", "gate")
_MAX_NAMED = 3

DEFINITIONS = {
    "macro_f1": "Binary macro-F1 of the honest decisions: F1 of 'present' for each label, averaged over the labels.",
    "pooled": "The held-out decisions of all folds together, scored once per seed, then averaged over seeds.",
    "fold_mean": "Each held-out fold scored by itself, then averaged (the fusion paper's figure).",
    "sd": "Standard deviation over seeds.",
    "fold_sd": "Standard deviation over folds of the mean over seeds.",
    "clip_ci": "Of one row by itself: bootstrap over held-out clips (subjects where known) and seeds together.",
    "chance": "The same decisions against labels permuted within each held-out fold.",
    "minus_best": "The row minus the row of the highest score, on the same resampled clips and seeds.",
    "interval": "Simultaneous: all differences between any two rows lie in theirs together with the stated confidence, "
    "so it also holds for the row that turned out best. Wider than the interval of one pair by itself.",
    "p_value": "Adjusted for all pairs of rows, and thus for the choice of the best: by the distribution over "
    "replicates of the largest studentised difference between any two rows.",
    "probability_best": "Share of the replicates in which the row is ahead of all others. It describes the data and is "
    "no test.",
}


def summarise_grid(
    rows: Sequence[Row], studies: Mapping[str, StudyResults], evaluation: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """All figures of a grid.

    Args:
        rows: The grid's rows.
        studies: Name of each row to its predictions.
        evaluation: Settings, see :func:`mer_jax.study.held_out.resolve_evaluation`.

    Returns:
        A dict of plain Python values, ready for JSON: ``labels``, ``evaluation`` (resolved), ``definitions``, ``notes``
        and

        * ``study``: clips, subjects, folds, the seeds that all rows finished, what was resampled;
        * ``fusions``: those of the rows, the one of Table 2 first;
        * ``rows``: for each its ``name``, ``appearance``, ``geometry``, ``fusion``, ``diverged`` members, ``failed``
          (why it could not be scored, or None) and, where it was scored, ``macro_f1`` (``pooled`` and ``fold_mean``,
          each ``mean``, ``sd``, ``clip_ci``, ``values`` per seed; ``fold_sd``), ``chance``, ``minus_best`` and
          ``probability_best`` per average;
        * ``best``: name of the best row per average;
        * ``steps``: Table 3's differences within each pair (mean minus concat, gate minus mean) and ``over_single``:
          each pair minus each of its single features; all with simultaneous intervals and adjusted p-values.

    Raises:
        UserError: A setting is wrong, no row can be scored, or rows do not score the same clips.
    """
    runs, failed = {}, {}
    for row in rows:
        try:
            runs[row.name] = held_out(studies[row.name], evaluation)
        except UserError as error:
            failed[row.name] = str(error)
    if not runs:
        raise UserError(f"no row of the grid can be scored; {rows[0].name}: {failed[rows[0].name]}")
    names = list(runs)
    first = runs[names[0]]
    for name in names[1:]:
        runs[name] = align(first, runs[name], (names[0], name))[1]
    seeds = functools.reduce(np.intersect1d, [run.seeds for run in runs.values()])
    if not len(seeds):
        raise UserError("no seed finished in all rows of the grid; train more seeds, or lower the learning rate")
    runs = {name: _with_seeds(run, seeds) for name, run in runs.items()}
    first = runs[names[0]]
    draws = statistics.make_resampling(first.fold, first.people, len(seeds), first.evaluation["bootstrap"])
    figures = {average: _Figures(runs, draws, first.fold if average == "fold_mean" else None) for average in AVERAGES}

    entries = []
    for row in rows:
        entry = {"name": row.name, **dataclasses.asdict(row), "failed": failed.get(row.name)}
        entry["diverged"] = studies[row.name].member_id[~studies[row.name].ok]
        if row.name in runs:
            entry |= _row_figures(row.name, runs[row.name], figures)
        entries.append(entry)
    people = first.people
    summary = {
        "schema": GRID_SCHEMA,
        "labels": first.labels,
        "definitions": DEFINITIONS,
        "evaluation": first.evaluation,
        "study": {
            "clips": len(first.fold),
            "subjects": len(set(people)) if all(people) else None,
            "single_subject_folds": first.single_subject_folds,
            "folds": np.unique(first.fold),
            "seeds": seeds,
            "seeds_left_out": sorted({int(s) for row in rows for s in studies[row.name].member_seed} - set(seeds)),
            "resampled": draws.unit,
        },
        "fusions": list(dict.fromkeys(row.fusion for row in rows if row.fusion)),
        "rows": entries,
        "best": {average: figure.best for average, figure in figures.items()},
        "steps": _differences(_steps(rows), figures),
        "over_single": _differences(_over_single(rows), figures),
    }
    summary["notes"] = _notes(summary)
    return plain(summary)


def _with_seeds(run: HeldOut, seeds: np.ndarray) -> HeldOut:
    """A study with some of its seeds only."""
    kept = np.searchsorted(run.seeds, seeds)
    return dataclasses.replace(run, seeds=seeds, member=run.member[:, kept], probabilities=run.probabilities[kept])


class _Figures:
    """The scores of all rows at one average, their replicates on the same draws, and all pairs compared."""

    def __init__(self, runs: Mapping[str, HeldOut], draws: statistics.Resampling, groups: np.ndarray | None):
        self.place = {name: index for index, name in enumerate(runs)}
        values, replicates = [], []
        for run in runs.values():
            args = (run.truth, run.decisions, run.mask)
            everything = np.ones((1, len(run.fold)))
            values.append(statistics.weighted_scores(*args, everything, macro_f1, groups)[0])
            replicates.append(statistics.hierarchical_replicates(*args, draws, macro_f1, groups))
        self.confidence = next(iter(runs.values())).evaluation["confidence"]
        self.values = np.stack(values)  # (R, S)
        self.replicates = np.stack(replicates)  # (R, B)
        self.pairs = statistics.all_pairs(self.values.mean(axis=1), self.replicates, self.confidence)
        self.best = list(runs)[int(np.argmax(self.values.mean(axis=1)))]

    def score(self, name: str) -> dict[str, Any]:
        values = self.values[self.place[name]]
        replicates = self.replicates[self.place[name]]
        return {
            "mean": values.mean(),
            "sd": values.std(ddof=1) if len(values) > 1 else None,
            "clip_ci": statistics.centred_interval(replicates, values.mean(), self.confidence, bounds=(0.0, 1.0)),
            "values": values,
        }

    def difference(self, a: str, b: str) -> dict[str, Any]:
        """Row A minus row B."""
        at = self.place[a], self.place[b]
        difference, half = self.pairs.difference[at], self.pairs.half_width[at]
        return {
            "difference": difference,
            "interval": (difference - half, difference + half),
            "p_value": self.pairs.p_value[at],
        }


def _row_figures(name: str, run: HeldOut, figures: Mapping[str, _Figures]) -> dict[str, Any]:
    by_fold = statistics.seed_matrix(run.truth, run.decisions, run.mask, run.fold).mean(axis=1)  # (F,)
    scores = {average: figure.score(name) for average, figure in figures.items()}
    return {
        "macro_f1": {**scores, "fold_sd": by_fold.std(ddof=1) if len(by_fold) > 1 else None},
        "chance": chance_figures(run)["macro_f1"],
        "minus_best": {
            average: None if figure.best == name else figure.difference(name, figure.best)
            for average, figure in figures.items()
        },
        "probability_best": {
            average: figure.pairs.probability_best[figure.place[name]] for average, figure in figures.items()
        },
    }


def _steps(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Of each pair of features, every fusion against the one before it."""
    pairs = dict.fromkeys((row.appearance, row.geometry) for row in rows if row.fusion)
    found = []
    for pair in pairs:
        of_pair = {row.fusion: row for row in rows if row.fusion and (row.appearance, row.geometry) == pair}
        ladder = [of_pair[fusion] for fusion in _STEPS if fusion in of_pair]
        found += list(zip(ladder[1:], ladder, strict=False))
    return found


def _over_single(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Each pair of Table 2 against each of its two features alone."""
    singles = {row.name: row for row in rows if not row.fusion}
    pairs = [row for row in rows if row.fusion]
    return [
        (row, singles[name])
        for row in pairs
        if row.fusion == pairs[0].fusion
        for name in (row.appearance, row.geometry)
    ]


def _differences(pairs: Sequence[tuple[Row, Row]], figures: Mapping[str, _Figures]) -> list[dict[str, Any]]:
    scored = next(iter(figures.values())).place
    return [
        {"a": a.name, "b": b.name} | {average: figure.difference(a.name, b.name) for average, figure in figures.items()}
        for a, b in pairs
        if a.name in scored and b.name in scored
    ]


def _notes(summary: Mapping[str, Any]) -> list[str]:
    study, rows = summary["study"], summary["rows"]
    level = f"{100 * summary['evaluation']['confidence']:g} %"
    notes = [
        f"{len(rows)} rows are compared, and the best is chosen by the scores that it is compared by; a pair's own "
        f"interval would be too narrow for that. Intervals of differences hold for all pairs together at {level}, and "
        "p-values are adjusted for all pairs."
    ]
    notes += [f"Row {row['name']} is left out: {row['failed']}." for row in rows if row["failed"]]
    diverged = [f"{len(row['diverged'])} of {row['name']}" for row in rows if len(row["diverged"])]
    if diverged:
        notes.append(f"Members diverged: {', '.join(diverged)}.")
    if study["seeds_left_out"]:
        left = ", ".join(map(str, study["seeds_left_out"]))
        notes.append(f"All figures use the seeds that finished in every fold of every row; left out: {left}.")
    if len(study["seeds"]) == 1:
        notes.append("One seed only: training noise is unknown, and the intervals hold none of it.")
    notes += subject_notes(study["subjects"])
    if study["single_subject_folds"]:
        notes.append("Each fold is one subject: read the pooled figures; a subject's few clips lack classes.")
    return notes


def write_grid_summary(workdir: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Evaluates a grid from its rows' predictions and writes ``summary.json`` and ``table.csv`` into its folder.

    Args:
        workdir: The grid's folder.
        overrides: Evaluation settings that replace those of its ``config.json``.

    Returns:
        The summary, see :func:`summarise_grid`.

    Raises:
        UserError: The grid is not finished, cannot be evaluated, or a file cannot be read or written.
    """
    workdir = Path(workdir)
    rows = read_rows(workdir)
    left = [row.name for row in rows if not (workdir / row.name / FILENAME).is_file()]
    if left:
        named = ", ".join(left[:_MAX_NAMED]) + (f" and {len(left) - _MAX_NAMED} more" if left[_MAX_NAMED:] else "")
        raise UserError(
            f"{workdir}: {len(left)} of the grid's {len(rows)} rows are not trained ({named}); run scripts/train.py "
            "with the grid's config and folder again"
        )
    studies = {row.name: StudyResults.load(workdir / row.name) for row in rows}
    summary = summarise_grid(rows, studies, {**read_evaluation(workdir), **(overrides or {})})
    atomic_write_text(workdir / SUMMARY_FILENAME, json.dumps(summary, indent=1, allow_nan=False) + "\n")
    atomic_write_text(workdir / TABLE_FILENAME, grid_csv(summary))
    return summary


def grid_csv(summary: Mapping[str, Any]) -> str:
    """The long table as CSV, a line a row of the grid; empty cells where a figure is undefined."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    figures = ("mean", "sd", "ci_low", "ci_high", "chance")
    figures += ("minus_best", "minus_best_low", "minus_best_high", "p_value", "probability_best")
    head = ["row", "appearance", "geometry", "fusion", "seeds"]
    writer.writerow([*head, *(f"{average}_{name}" for average in AVERAGES for name in figures), "fold_sd"])
    for row in summary["rows"]:
        cells: list[Any] = [row["name"], row["appearance"], row["geometry"], row["fusion"]]
        if row["failed"]:
            writer.writerow([*cells, 0, *[""] * (len(AVERAGES) * len(figures) + 1)])
            continue
        cells.append(len(summary["study"]["seeds"]))
        for average in AVERAGES:
            score, chance, versus = (row[key][average] for key in ("macro_f1", "chance", "minus_best"))
            cells += [score["mean"], score["sd"], *score["clip_ci"], chance and chance["mean"]]
            best = [0.0, None, None, None]  # against itself there is nothing to test
            cells += [versus["difference"], *versus["interval"], versus["p_value"]] if versus else best
            cells.append(row["probability_best"][average])
        cells.append(row["macro_f1"]["fold_sd"])
        writer.writerow(["" if cell is None else cell for cell in cells])
    return text.getvalue()
