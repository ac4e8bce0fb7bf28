"""Two studies on the same folds and seeds, compared pair by pair and clip by clip."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mer_jax.errors import UserError
from mer_jax.evaluation import metrics, statistics
from mer_jax.study.data import MULTI_CLASS, MULTI_LABEL
from mer_jax.study.held_out import HeldOut, held_out
from mer_jax.study.results import StudyResults
from mer_jax.study.summary import format_p, plain, read_evaluation

_MAX_NAMED = 3
_AVERAGES = ("pooled", "fold_mean")


def compare(
    workdir_a: str | os.PathLike, workdir_b: str | os.PathLike, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Compares two runs by their honest decisions.

    Each run is evaluated under the settings of its own ``config.json``, so that e.g. two threshold rules can
    be compared; what differs is listed.

    Args:
        workdir_a: Run A.
        workdir_b: Run B.
        overrides: Evaluation settings for both.

    Returns:
        See :func:`compare_held_out`, with the names of the runs and the settings that differ.

    Raises:
        UserError: A run cannot be evaluated, or the two do not score the same clips on the same folds.
    """
    runs = [
        held_out(StudyResults.load(workdir), {**read_evaluation(workdir), **(overrides or {})})
        for workdir in (workdir_a, workdir_b)
    ]
    names = [Path(workdir).resolve().name for workdir in (workdir_a, workdir_b)]
    if names[0] == names[1]:
        names = [str(workdir_a), str(workdir_b)]
    settings = [run.evaluation for run in runs]
    differing = [key for key in settings[0] if settings[0][key] != settings[1][key]]
    return {
        "a": names[0],
        "b": names[1],
        "settings_that_differ": {key: [settings[0][key], settings[1][key]] for key in differing},
        **compare_held_out(*runs, names=tuple(names)),
    }


def compare_held_out(a: HeldOut, b: HeldOut, names: tuple[str, str] = ("A", "B")) -> dict[str, Any]:
    """Paired comparison of macro-F1 (UF1 in a multi-class study), A minus B, on the seeds that both have.

    Args:
        a: Study A.
        b: Study B.
        names: What to call them in messages.

    Returns:
        A dict of plain values: ``task``, ``clips``, ``resampled``, ``seeds`` used, ``seeds_left_out`` of each;
        ``macro_f1``: ``pooled`` and ``fold_mean``, each ``mean_a``, ``mean_b``, ``difference``, ``clip_ci``
        (clips and seeds resampled, the same for both), ``clip_p_value`` (decisions of whole clips or subjects
        swapped), ``probability_a_better`` (share of replicates); ``uar``: the same, pooled; ``per_class_f1``: the
        same, pooled; ``databases``: each database's ``macro_f1``, pooled, where there are several; ``members``:
        over the pairs of a fold and a seed (``pairs`` says so; over ``'seeds'``, all folds pooled, where each fold
        is one subject) ``difference``, ``sd``, ``seed_ci``, ``sign_flip_p_value``, ``win_rate`` and the ``matrix``
        of differences ``(F, S)`` or ``(1, S)``.

    Raises:
        UserError: Tasks, clips, folds or labels differ, or there is no common seed.
    """
    a, b = align(a, b, names)
    seeds = np.intersect1d(a.seeds, b.seeds)
    if not len(seeds):
        raise UserError(
            f"{names[0]} and {names[1]} have no seed in common ({_some(a.seeds)} against {_some(b.seeds)}); "
            "train both with the same seeds"
        )
    left_out = [len(run.seeds) - len(seeds) for run in (a, b)]
    decisions = [run.decisions[np.searchsorted(run.seeds, seeds)] for run in (a, b)]  # (S, N, L)
    confidence = a.evaluation["confidence"]
    draws = statistics.make_resampling(a.fold, a.people, len(seeds), min(run.evaluation["bootstrap"] for run in (a, b)))

    def clip_comparison(metric, groups=None, rows=slice(None)):
        truth, mask, made = a.truth[rows], a.mask[rows], [run[:, rows] for run in decisions]
        drawn = draws._replace(clips=draws.clips[:, rows], units=draws.units[:, rows])
        found = statistics.paired_clip_comparison(truth, *made, mask, drawn, metric, groups, confidence)
        everything = np.ones((1, len(truth)))
        means = [statistics.weighted_scores(truth, one, mask, everything, metric, groups).mean() for one in made]
        return {
            "mean_a": means[0],
            "mean_b": means[1],
            "difference": found.mean,
            "clip_ci": found.interval,
            "clip_p_value": found.p_value,
            "probability_a_better": found.probability_a_better,
        }

    # One subject's few clips lack classes: there, only all folds together have a score worth comparing.
    fold = np.zeros_like(a.fold) if a.single_subject_folds else a.fold
    scores = [statistics.seed_matrix(a.truth, made, a.mask, fold) for made in decisions]  # (F, S)
    databases = np.unique(a.database).tolist()
    pairs = statistics.paired_comparison(*scores, confidence)
    return plain(
        {
            "task": MULTI_CLASS if a.multi_class else MULTI_LABEL,
            "clips": len(a.fold),
            "resampled": draws.unit,
            "confidence": confidence,
            "folds": np.unique(a.fold),
            "seeds": seeds,
            "seeds_left_out": left_out,
            "macro_f1": {
                name: clip_comparison(metrics.macro_f1, groups)
                for name, groups in zip(_AVERAGES, (None, a.fold), strict=True)
            },
            "uar": clip_comparison(metrics.multilabel_uar),
            "per_class_f1": {
                label: clip_comparison(lambda counts, c=c: metrics.binary_f1(counts)[..., c])
                for c, label in enumerate(a.labels)
            },
            "databases": {
                name: clip_comparison(metrics.macro_f1, rows=np.flatnonzero(a.database == name)) for name in databases
            }
            if len(databases) > 1
            else {},
            "members": {
                "pairs": "seeds" if a.single_subject_folds else "folds and seeds",
                "difference": pairs.mean,
                "sd": pairs.sd,
                "seed_ci": pairs.interval,
                "sign_flip_p_value": pairs.p_value,
                "win_rate": pairs.win_rate,
                "matrix": pairs.difference,
            },
        }
    )


def _some(values) -> str:
    values = [str(value) for value in values]
    return ", ".join(values[:_MAX_NAMED]) + (f" and {len(values) - _MAX_NAMED} more" if values[_MAX_NAMED:] else "")


def align(a: HeldOut, b: HeldOut, names: tuple[str, str]) -> tuple[HeldOut, HeldOut]:
    """Puts B's clips into the order of A's, and makes sure that they are the same clips, labels and folds.

    Args:
        a: Study A.
        b: Study B.
        names: What to call them in messages.

    Returns:
        A, and B in A's order.

    Raises:
        UserError: Tasks, clips, folds, labels, subjects or databases differ.
    """
    for what in ("multi_class", "labels"):
        if getattr(a, what) != getattr(b, what):
            raise UserError(
                f"{names[0]} predicts {_task(a)}, {names[1]} {_task(b)}; only studies of the same task can be compared"
            )
    for one, other, name_one, name_other in ((a, b, *names), (b, a, *names[::-1])):
        missing = np.setdiff1d(one.name, other.name)
        if len(missing):
            raise UserError(
                f"{_some(missing)}: held out in {name_one} but not in {name_other}; only studies of the "
                "same clips can be compared"
            )
    order = np.argsort(b.name)[np.searchsorted(np.sort(b.name), a.name)]
    b = b.take_clips(order)
    for field, what in (
        ("fold", "fold"),
        ("truth", "labels"),
        ("mask", "known labels"),
        ("subject", "subject"),
        ("database", "database"),
    ):
        values = [getattr(run, field) for run in (a, b)]
        same = (values[0] == values[1]).reshape(len(a.name), -1).all(axis=1)
        if not same.all():
            raise UserError(
                f"{_some(a.name[~same])}: not the same {what} in {names[0]} and {names[1]}; train both on "
                "the same data with the same folds"
            )
    return a, b


def _task(run: HeldOut) -> str:
    return f"{'one' if run.multi_class else 'any'} of {', '.join(run.labels)}"


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """The comparison as a table for the terminal."""
    a, b = comparison["a"], comparison["b"]
    level = f"{100 * comparison['confidence']:g} %"
    seeds = comparison["seeds"]
    lines = [
        f"A = {a}",
        f"B = {b}",
        f"{comparison['clips']} held-out clips, {len(comparison['folds'])} folds, {len(seeds)} common seeds "
        f"({_left_out(comparison['seeds_left_out'])}); resampled: {comparison['resampled']}, and seeds",
    ]
    for key, (one, other) in comparison["settings_that_differ"].items():
        lines.append(f"note: evaluation.{key} is {one} in A and {other} in B")
    rows = [("", "A", "B", "A - B", f"{level} interval", "p (clips)", "P(A > B)")]
    multi_class = comparison["task"] == MULTI_CLASS
    f1, uar = ("UF1", "UAR") if multi_class else ("macro-F1", "UAR of “present”")
    named = [(f"{f1}, {name.replace('_', ' ')}", row) for name, row in comparison["macro_f1"].items()]
    named += [(f"{uar}, pooled", comparison["uar"])]
    named += [(f"{f1} {name}, pooled", row) for name, row in comparison["databases"].items()]
    named += [(f"F1 {label}, pooled", row) for label, row in comparison["per_class_f1"].items()]
    for name, row in named:
        rows.append(
            (
                name,
                f"{row['mean_a']:.3f}",
                f"{row['mean_b']:.3f}",
                f"{row['difference']:+.3f}",
                _interval(row["clip_ci"]),
                format_p(row["clip_p_value"]),
                f"{row['probability_a_better']:.3f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines.append("")
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    members = comparison["members"]
    over = f"{len(comparison['folds'])} x {len(seeds)} (fold, seed) pairs"
    if members["pairs"] == "seeds":
        over = f"{len(seeds)} seeds, all folds of a seed pooled"
    interval = "" if members["seed_ci"] is None else f" {_interval(members['seed_ci'])} over seeds"
    lines += [
        "",
        "p (clips) takes the trained members as they are; the intervals beside it also draw seeds.",
        f"Training noise alone, on these clips at these thresholds, {over}:",
        f"{members['difference']:+.3f}{interval}, sign-flip p = {format_p(members['sign_flip_p_value'])}, "
        f"A ahead in {100 * members['win_rate']:.0f} % of pairs",
    ]
    return "\n".join(lines)


def _interval(values) -> str:
    return f"[{values[0]:+.3f}, {values[1]:+.3f}]"


def _left_out(counts) -> str:
    if not any(counts):
        return "none left out"
    return f"left out: {counts[0]} of A, {counts[1]} of B"
