"""The figures of a study, from its predictions alone: what ``summary.json`` holds and the report shows.

Two kinds of figures are kept apart. The honest ones choose nothing on the held-out fold (see
:mod:`mer_jax.study.held_out`). The ones under ``leaky`` choose the epoch, the thresholds or both on the
held-out fold, as many published scores do, and exist only so that the difference can be read.

A multi-class study decides by the likeliest class, so thresholds have no part in it; there ``macro_f1`` is the UF1 and
``uar`` the UAR of MEGC2019.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mer_jax.errors import UserError
from mer_jax.evaluation import metrics, statistics, thresholds
from mer_jax.files import atomic_write_text, read_json
from mer_jax.study.held_out import HeldOut, StudyMembers, clip_probabilities, decide, resolve_evaluation
from mer_jax.study.results import TEST, StudyResults
from mer_jax.study.scorer import Scorer, sd_over_seeds
from mer_jax.study.search_summary import SELECTION_WORDS, search_figures

SUMMARY_FILENAME = "summary.json"
CONFIG_FILENAME = "config.json"
SCHEMA = 3
HALF_WIDTHS = (0.05, 0.03, 0.02, 0.01, 0.005)
CURVE_THRESHOLDS = np.round(np.arange(0.01, 1.0, 0.01), 2)
RARE = 10
FEW_SUBJECTS = 10

_MULTI_LABEL_DEFINITIONS = {
    "macro_f1": "Binary macro-F1: F1 of 'present' for each label, 0 where a label is neither in "
    "the truth nor predicted, averaged over the labels.",
    "present_absent_macro_f1": "For each label the mean of F1(present) and F1(absent), averaged over the "
    "labels; far higher than macro-F1 on the same decisions.",
    "uar": "Unweighted average recall of 'present' over the labels; does not punish false alarms.",
    "balanced_accuracy": "Mean over labels of the mean recall of 'present' and 'absent'; 0.5 for a constant answer.",
    "fold_mean": "Each held-out fold is scored by itself, then the folds are averaged (the fusion paper's figure).",
    "honest": "Nothing chosen on the held-out fold: tuned thresholds come from inner-split predictions of "
    "the members that hold the fold out, pooled over seeds. With early stopping the same inner clips chose "
    "the epoch, so inner figures are a little too high; held-out figures are not.",
    "untuned": "The same probabilities, present at 0.5 or more.",
    "fixed": "The same probabilities, present at evaluation.fixed_threshold or more.",
    "leaky": "Epoch or thresholds chosen on the held-out fold itself: too high by construction, to compare only.",
}
_MULTI_CLASS_DEFINITIONS = {
    "macro_f1": "UF1: F1 of each class against the rest, 0 where a class is neither in the truth nor predicted, "
    "averaged over the classes; the likeliest class is predicted, the first of equals.",
    "uar": "UAR: recall of each class, 0 where a class is not in the truth, averaged over the classes.",
    "accuracy": "Share of the clips whose class is predicted.",
    "fold_mean": "Each held-out fold is scored by itself, then the folds are averaged. It is not the figure that "
    "MEGC2019 reports: a subject lacks classes, which count 0, so it is far lower than the pooled one.",
    "honest": "Nothing chosen on the held-out fold: the epoch is the last, or that of the least loss on an inner "
    "split of the training clips.",
    "leaky": "Per held-out fold and seed the epoch of the highest accuracy on that very fold, the first of equals, "
    "then pooled, as the field often does: too high by construction, to compare only.",
}
_DEFINITIONS = {
    "auroc": "Area under the ROC curve per label; labels without positives or negatives are left out, and counted.",
    "average_precision": "Average precision per label; labels without positives are left out, and counted.",
    "pooled": "The held-out decisions of all folds are put together and scored once per seed, as MEGC2019 does.",
    "databases": "The pooled decisions of the clips of one database, scored by themselves. A class that a database "
    "lacks keeps its rule: it counts 0.",
    "values": "One score per seed; the mean is the expected score of one training run, not of an ensemble, at "
    "thresholds that all seeds of a fold share.",
    "seed_ci": "Student's t interval over seeds: training noise only, for these clips, and without the noise of tuning "
    "thresholds, which seeds share. Two or three seeds tell little of their spread, so that it is wide. Beside it the "
    "bootstrap (BCa), which is too narrow with few seeds.",
    "clip_ci": "Bootstrap over held-out clips (subjects where known) and seeds together: what to trust for "
    "new clips. Trained models and thresholds are kept, so the effect of other training clips is not in it. With two "
    "or three seeds and strong training noise it is too narrow.",
    "ensemble": "Probabilities averaged over the seeds of a fold before anything is decided. Thresholds are "
    "those of single members; a mean varies less, so they are not the best for it.",
    "chance": "The same decisions against labels permuted within each held-out fold; within each database where the "
    "task is multi-class or each fold is one subject. Clips change labels one by one: where those of a subject are "
    "alike the interval is too narrow and the p-value too small.",
    "variance": "Two-way random effects on the (fold, seed) matrix of macro_f1 by the method of moments, cut off at 0. "
    "Left out where each fold is one subject: the score of a few clips says mostly which classes the subject has.",
    "search": "Where several hyper-parameter settings were tried, each fold's is chosen on inner splits of its "
    "training clips alone, by evaluation.selection over all its seeds, so the honest figures are nested: they score "
    "the choosing, too. Beside them: the config's own values in every fold, and (leaky) the settings that score best "
    "on the held-out clips themselves. The p-value of a gain takes the trained members as they are; its interval also "
    "draws seeds.",
    "seeds_needed": "Seeds for a t interval of the pooled macro_f1 of at most this half width; training noise only.",
}


def definitions(multi_class: bool) -> dict[str, str]:
    """What each figure of a summary means, in words."""
    return (_MULTI_CLASS_DEFINITIONS if multi_class else _MULTI_LABEL_DEFINITIONS) | _DEFINITIONS


def summarise(results: StudyResults, evaluation: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All figures of a study.

    Args:
        results: All predictions.
        evaluation: Settings, see :func:`resolve_evaluation`.

    Returns:
        A dict of plain Python values, ready for JSON; undefined figures are None. Its keys:

        * ``labels``, ``task``, ``definitions``, ``evaluation`` (resolved), ``notes`` (sentences to print with
          the figures);
        * ``study``: what was scored: clips, folds, seeds, members, those that diverged;
        * ``honest``, ``untuned``, ``fixed``: blocks of figures, each ``pooled`` and ``fold_mean`` with mean, sd,
          intervals and one value per seed; F1 and confusion per label, in a multi-class study the
          ``confusion_matrix`` (true, then predicted), too. ``untuned`` is None in a multi-class study; ``fixed``
          is there where thresholds are tuned and ``evaluation.fixed_threshold`` is not 0.5;
        * ``databases``: the full set, then each database: pooled ``honest``, ``ensemble`` and ``leaky`` figures;
          empty where there is one database;
        * ``ensemble``, ``auroc``, ``average_precision``, ``chance``, ``baselines``, ``variance``,
          ``seeds_needed``;
        * ``folds``: scores of all finished members and the thresholds, fold by fold;
        * ``threshold_curve``: macro-F1 against one global threshold, on inner splits and (leaky) on held-out
          clips; None in a multi-class study;
        * ``leaky``: the inflated figures, blocks with ``inflation`` over the honest ones, None where what they
          need was not kept; and ``global_threshold``, the best point of the held-out curve;
        * ``settings``: one entry per hyper-parameter setting, in the order of the study: its values, members, inner
          scores and losses fold by fold, held-out macro-F1 and the folds that it was chosen for;
        * ``search``: what choosing among several settings gained, see
          :func:`mer_jax.study.search_summary.search_figures`; None with one setting.

    Raises:
        UserError: A setting is wrong, nothing can be scored, or thresholds cannot be tuned for want of inner
            splits.
    """
    evaluation = resolve_evaluation(evaluation, results.labels, results.multi_class)
    study = StudyMembers(results, evaluation)
    chosen = study.choose_settings()
    held = study.held_out(chosen)
    scorer = Scorer(held)
    honest, honest_replicates = scorer.block(held.decisions)
    untuned = untuned_replicates = fixed = None
    if not held.multi_class:
        untuned, untuned_replicates = scorer.block(held.decide(held.probabilities, thresholds.UNTUNED))
    if study.tuned and evaluation["fixed_threshold"] != thresholds.UNTUNED:
        fixed, _ = scorer.block(held.decide(held.probabilities, np.asarray(evaluation["fixed_threshold"])))
    mean, members = _seed_means(study, chosen, held)
    curve = _threshold_curve(study, chosen, held)
    leaky = _leaky_decisions(study, held)
    everyone = np.unique(results.member_seed)
    incomplete = sorted(set(everyone.tolist()) - set(held.seeds.tolist()))
    people = held.people
    summary = {
        "schema": SCHEMA,
        "labels": held.labels,
        "task": results.task.item(),
        "definitions": definitions(held.multi_class),
        "evaluation": evaluation,
        "study": {
            "clips": len(held.fold),
            "test_clips": int((results.clip_split == TEST).sum()),
            "subjects": len(set(people)) if all(people) else None,
            "single_subject_folds": held.single_subject_folds,
            "folds": study.folds,
            "folds_left_out": np.setdiff1d(study.fold, study.folds).tolist(),
            "seeds": held.seeds,
            "members": len(results.member_id),
            "members_ok": int(results.ok.sum()),
            "diverged": results.member_id[~results.ok],
            "incomplete_seeds": incomplete,
            "resampled": scorer.draws.unit,
            "positives": _positives(held.labels, held.truth, held.mask),
        },
        "honest": honest,
        "untuned": untuned,
        "fixed": fixed,
        "databases": _databases(scorer, mean, leaky),
        "ensemble": scorer.values(held.decide(mean, held.cut)) | {"members": members},
        "auroc": _rank_figures(held, metrics.auroc),
        "average_precision": _rank_figures(held, metrics.average_precision),
        "chance": chance_figures(held),
        "baselines": _baselines(held),
        "variance": _variance(held),
        "seeds_needed": _seeds_needed(honest["macro_f1"]["pooled"]["sd"], evaluation["confidence"]),
        "folds": _folds(study, chosen, held),
        "threshold_curve": curve,
        "leaky": _leaky(study, scorer, leaky, honest_replicates, untuned_replicates, curve),
        "settings": _settings(study, chosen),
    }
    summary["search"] = search_figures(study, chosen, held, [s["macro_f1"]["pooled"] for s in summary["settings"]])
    summary["notes"] = _notes(summary)
    return plain(summary)


def _positives(labels: tuple[str, ...], truth: np.ndarray, mask: np.ndarray) -> dict[str, int]:
    """Label to the number of clips that have it."""
    return dict(zip(labels, (truth & mask).sum(axis=0), strict=True))


def _seed_means(study: StudyMembers, chosen: list[int], held: HeldOut) -> tuple[np.ndarray, list[int]]:
    """``(1, N, L)`` probabilities averaged over the finished members of each fold, and how many these are."""
    mean = np.empty((1, *held.truth.shape), study.probabilities.dtype)
    members = []
    for setting, fold in zip(chosen, study.folds, strict=True):
        found, rows = study.members(setting, fold), held.fold == fold
        mean[0, rows] = study.probabilities[found][:, held.row[rows]].mean(axis=0)
        members.append(len(found))
    return mean, members


def _databases(scorer: Scorer, mean: np.ndarray, leaky: Mapping[str, np.ndarray | None]) -> list[dict[str, Any]]:
    """The pooled figures of all clips, then of each database, where there are several."""
    held = scorer.held
    names = np.unique(held.database).tolist()
    if len(names) < 2:
        return []
    claimed = next(
        (leaky[name] for name in ("both", "best_epoch", "heldout_thresholds") if leaky[name] is not None), None
    )
    single = held.decide(mean, held.cut)
    entries = []
    for name in (None, *names):
        rows = np.arange(len(held.fold)) if name is None else np.flatnonzero(held.database == name)
        part = scorer.only(rows)
        entry: dict[str, Any] = {
            "database": "full" if name is None else name,
            "clips": len(rows),
            "subjects": len(set(part.held.people)) if all(part.held.people) else None,
            "positives": _positives(held.labels, part.held.truth, part.held.mask),
        }
        for kind, decisions in (("honest", held.decisions), ("leaky", claimed)):
            if decisions is None:
                entry[kind] = None
                continue
            values, replicates = part.replicates(decisions[:, rows], ("pooled",))["pooled"]
            entry[kind] = {
                figure: part.score(values[:, index], replicates[:, index]) for index, figure in enumerate(part.names)
            }
        figures = part.values(single[:, rows], ("pooled",))
        entry["ensemble"] = {figure: figures[figure]["pooled"] for figure in part.names}
        entries.append(entry)
    return entries


def _rank_figures(held: HeldOut, metric: Callable[..., np.ndarray]) -> dict[str, Any]:
    """AUROC or average precision per label and on average, pooled and per fold."""
    pooled = metric(held.truth, held.probabilities, held.mask)[None]  # (1, S, L)
    by_fold = np.stack(
        [
            metric(held.truth[rows], held.probabilities[:, rows], held.mask[rows])
            for rows in (held.fold == fold for fold in np.unique(held.fold))
        ]
    )  # (F, S, L)

    def score(cells):
        """From cells ``(cells, S)``, NaN where undefined."""
        values = metrics.mean_over_classes(cells.T)  # (S,)
        return {
            "mean": values.mean(),
            "sd": sd_over_seeds(values),
            "values": values,
            "undefined": int(np.isnan(cells[:, 0]).sum()),
        }

    def pair(select):
        return {"pooled": score(select(pooled)), "fold_mean": score(select(by_fold))}

    return {
        "per_class": {label: pair(lambda cells, c=c: cells[..., c]) for c, label in enumerate(held.labels)},
        "mean": {
            "pooled": score(pooled[0].T),
            "fold_mean": score(np.moveaxis(by_fold, 1, 2).reshape(-1, len(held.seeds))),
        },
    }


def chance_figures(held: HeldOut) -> dict[str, Any]:
    """What the decisions would score if they had nothing to do with the labels: ``chance`` of a summary."""
    permutations = held.evaluation["bootstrap"]
    # The few clips of one subject are too alike to trade labels, and multi-class scores are those of databases.
    across_folds = held.multi_class or held.single_subject_folds
    pooled, by_group = statistics.chance_level(
        held.truth,
        held.decisions,
        held.mask,
        held.database if across_folds else held.fold,
        permutations,
        confidence=held.evaluation["confidence"],
    )
    return {
        "macro_f1": {"pooled": pooled._asdict(), "fold_mean": None if across_folds else by_group._asdict()},
        "within": "databases" if across_folds else "folds",
        "permutations": permutations,
    }


def _baselines(held: HeldOut) -> dict[str, Any]:
    """Constant answers: every label, and what most of the other folds' clips have."""
    majority = np.zeros(held.truth.shape, bool)
    for fold in np.unique(held.fold):
        training = held.fold != fold
        present = (held.truth & held.mask)[training].sum(axis=0)
        if held.multi_class:
            majority[held.fold == fold] = thresholds.likeliest(present.astype(np.float64))
        else:
            majority[held.fold == fold] = 2 * present > held.mask[training].sum(axis=0)
    constant = {"majority": majority}
    if not held.multi_class:
        constant["all_positive"] = np.ones_like(majority)
    everything = np.ones((1, len(held.fold)))

    def score(decisions, metric, groups):
        return statistics.weighted_scores(held.truth, decisions[None], held.mask, everything, metric, groups).item()

    return {
        name: {
            figure: {
                average: score(decisions, metric, groups)
                for average, groups in (("pooled", None), ("fold_mean", held.fold))
            }
            for figure, metric in (("macro_f1", metrics.macro_f1), ("uar", metrics.multilabel_uar))
        }
        for name, decisions in constant.items()
    }


def _variance(held: HeldOut) -> dict[str, Any] | None:
    if held.single_subject_folds:
        return None
    scores = statistics.seed_matrix(held.truth, held.decisions, held.mask, held.fold)  # (F, S)
    parts = statistics.variance_components(scores)
    if parts is None:
        return None
    total = parts.fold + parts.seed + parts.rest
    named = {
        name: {
            "variance": value,
            "sd": value**0.5,
            "share": value / total if total else 0.0,
            "truncated": name in parts.truncated,
        }
        for name, value in (("fold", parts.fold), ("seed", parts.seed), ("rest", parts.rest))
    }
    return {**named, "total": total, "seed_sd_within_fold": float(scores.var(axis=1, ddof=1).mean() ** 0.5)}


def _seeds_needed(sd: float | None, confidence: float) -> list[dict[str, Any]]:
    return [
        {
            "half_width": width,
            "seeds": None if sd is None else statistics.seeds_needed(sd, width, confidence),
        }
        for width in HALF_WIDTHS
    ]


def _folds(study: StudyMembers, chosen: list[int], held: HeldOut) -> list[dict[str, Any]]:
    entries = []
    for setting, fold in zip(chosen, study.folds, strict=True):
        rows, members = study.fold == fold, study.members(setting, fold)
        tuned = study.thresholds(setting, fold)
        decisions = decide(study.probabilities[members][:, rows], tuned, study.evaluation, held.labels)
        counts = metrics.confusion_counts(study.truth[rows], decisions, study.mask[rows])
        scores = metrics.macro_f1(counts)
        here = held.fold == fold
        entry = {
            "fold": fold,
            "subject": held.subject[here][0] if held.single_subject_folds else None,
            "database": held.database[here][0] if len(set(held.database[here])) == 1 else "",
            "clips": int(rows.sum()),
            "positives": _positives(held.labels, study.truth[rows], study.mask[rows]),
            "seeds": study.results.member_seed[members],
            "macro_f1": scores,
            "mean": scores.mean(),
            "sd": sd_over_seeds(scores),
            "thresholds": tuned,
            "inner_clips": int(study.inner[members].any(axis=0).sum()),
        }
        if held.multi_class:
            accuracy = metrics.accuracy(counts)
            entry |= {"accuracy": accuracy, "mean_accuracy": accuracy.mean()}
        entries.append(entry)
    return entries


def _threshold_curve(study: StudyMembers, chosen: list[int], held: HeldOut) -> dict[str, Any] | None:
    if held.multi_class:
        return None
    heldout, heldout_per_class = thresholds.threshold_curve(held.truth, held.probabilities, CURVE_THRESHOLDS, held.mask)
    pooled = [study.inner_rows(s, f) for s, f in zip(chosen, study.folds, strict=True)]
    inner = inner_per_class = None
    if all(len(truth) for truth, _, _ in pooled):
        curves = [thresholds.threshold_curve(t, p, CURVE_THRESHOLDS, m) for t, p, m in pooled]
        inner = np.mean([macro for macro, _ in curves], axis=0)  # (G,)
        inner_per_class = np.mean([per_class for _, per_class in curves], axis=0)  # (G, L)

    def by_label(values):
        return None if values is None else dict(zip(held.labels, values.T, strict=True))

    return {
        "threshold": CURVE_THRESHOLDS,
        "inner": inner,
        "heldout_leaky": heldout.mean(axis=0),
        "per_class_inner": by_label(inner_per_class),
        "per_class_heldout_leaky": by_label(heldout_per_class.mean(axis=0)),
    }


def _leaky_decisions(study: StudyMembers, held: HeldOut) -> dict[str, np.ndarray | None]:
    """What choosing on the held-out fold would have decided, each ``(S, N, L)`` or None for want of curves.

    Nothing here feeds any figure that is not labelled leaky.
    """
    shape = (len(held.seeds), *held.truth.shape)
    names = ("best_epoch",) if held.multi_class else ("best_epoch", "best_epoch_untuned", "heldout_thresholds", "both")
    decisions: dict[str, np.ndarray | None] = {name: np.zeros(shape, bool) for name in names}
    curves = bool(study.results.curve_probabilities.shape[1] and study.results.curve_sample.shape[1])
    mode = _leaky_mode(study)
    for index, fold in enumerate(study.folds):
        rows = np.flatnonzero(held.fold == fold)
        truth, mask = held.truth[rows], held.mask[rows]
        for seed, member in enumerate(held.member[index]):
            if not held.multi_class:
                last = held.probabilities[seed, rows]  # (n, L)
                cut = thresholds.oracle_thresholds(truth, last, mode, mask)
                decisions["heldout_thresholds"][seed, rows] = held.decide(last, cut)
            if not curves:
                continue
            epochs = _epoch_probabilities(study, member, held.row[rows])  # (E, n, L)
            present = ~np.isnan(epochs).any(axis=(1, 2))
            if not present.any():
                curves = False
                continue
            epochs = epochs[present]
            if held.multi_class:
                made = held.decide(epochs, None)
                # The first of the epochs that have the most clips right.
                decisions["best_epoch"][seed, rows] = made[np.argmax((made & truth).sum(axis=(1, 2)))]
                continue
            oracle = thresholds.oracle_thresholds(truth, epochs, mode, mask)[:, None]  # (E, 1, L)
            for name, cut in (
                ("best_epoch", held.thresholds[index]),
                ("best_epoch_untuned", thresholds.UNTUNED),
                ("both", oracle),
            ):
                made = held.decide(epochs, cut)
                best = np.argmax(metrics.macro_f1(metrics.confusion_counts(truth, made, mask)))
                decisions[name][seed, rows] = made[best]
    if not curves:
        decisions |= {name: None for name in names if name != "heldout_thresholds"}
    return {"both": None, "heldout_thresholds": None} | decisions


def _leaky_mode(study: StudyMembers) -> str:
    """How thresholds are tuned on the held-out fold: as the study tunes its own, else one for all labels."""
    return study.evaluation["thresholds"] if study.tuned else "global"


def _leaky(
    study: StudyMembers,
    scorer: Scorer,
    decisions: Mapping[str, np.ndarray | None],
    honest: dict,
    untuned: dict | None,
    curve: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What choosing on the held-out fold would have claimed; nothing here feeds any other figure."""
    leaky: dict[str, Any] = {"label": "leaky", "threshold_mode": None, "global_threshold": None}
    if curve is not None:
        best = int(np.argmax(curve["heldout_leaky"]))
        leaky["threshold_mode"] = _leaky_mode(study)
        leaky["global_threshold"] = {
            "threshold": curve["threshold"][best],
            "macro_f1": curve["heldout_leaky"][best],
        }
    for name in ("best_epoch", "best_epoch_untuned", "heldout_thresholds", "both"):
        if decisions.get(name) is None:
            leaky[name] = None
            continue
        block, replicates = scorer.block(decisions[name])
        reference = untuned if name == "best_epoch_untuned" else honest
        leaky[name] = {**block, "inflation": scorer.inflation(replicates, reference)}
    return leaky


def _epoch_probabilities(study: StudyMembers, member: int, rows: np.ndarray) -> np.ndarray:
    """``(E, n, L)`` probabilities of the labelled clips ``rows``, rising, held out by ``member``, at every epoch."""
    results = study.results
    sample = results.curve_sample[member]
    kept = np.flatnonzero((sample >= 0) & np.isin(results.sample_clip[sample.clip(0)], study.rows[rows]))
    if not np.array_equal(np.sort(sample[kept]), np.flatnonzero(np.isin(results.sample_clip, study.rows[rows]))):
        raise UserError(f"member {results.member_id[member]}: its learning curve lacks held-out clips; train again")
    return clip_probabilities(
        results, results.curve_probabilities[member][:, kept], study.evaluation, samples=sample[kept]
    )


def _settings(study: StudyMembers, chosen: list[int]) -> list[dict[str, Any]]:
    entries = []
    for setting, hyper in enumerate(study.settings):
        every = [setting] * len(study.folds)
        losses = [study.inner_loss(setting, fold) for fold in study.folds]
        figures = {"pooled": None, "fold_mean": None}
        if len(study.complete_seeds(every)):
            own = study.held_out(every)
            everything = np.ones((1, len(own.fold)))
            for name, groups in (("pooled", None), ("fold_mean", own.fold)):
                figures[name] = statistics.weighted_scores(
                    own.truth, own.decisions, own.mask, everything, groups=groups
                ).mean()
        entries.append(
            {
                "hyper": hyper,
                "members": int((study.setting == setting).sum()),
                "members_ok": int(study.results.ok[study.setting == setting].sum()),
                "inner": [study.inner_score(setting, fold) for fold in study.folds],
                "inner_loss": None if None in losses else losses,
                "macro_f1": figures,
                "chosen_for_folds": [f for f, c in zip(study.folds, chosen, strict=True) if c == setting],
            }
        )
    return entries


def _notes(summary: dict[str, Any]) -> list[str]:
    study, notes = summary["study"], []
    if study["folds_left_out"]:
        notes.append(f"Not all folds were trained; left out: {', '.join(map(str, study['folds_left_out']))}.")
    if len(study["diverged"]):
        notes.append(
            f"{len(study['diverged'])} of {study['members']} members diverged and are left out: "
            f"{', '.join(study['diverged'])}."
        )
    if study["incomplete_seeds"]:
        notes.append(
            "Figures over all folds use the seeds that finished in every fold; left out: "
            f"{', '.join(map(str, study['incomplete_seeds']))}."
        )
    if len(study["seeds"]) == 1:
        notes.append("One seed only: training noise is unknown, and the intervals hold none of it.")
    notes += subject_notes(study["subjects"])
    if len(summary["settings"]) > 1:
        notes.append(
            f"{len(summary['settings'])} settings: each fold uses the one of the best inner "
            f"{SELECTION_WORDS[summary['evaluation']['selection']]}; picking the best score from the table of settings "
            "would be leaky."
        )
        if default := summary["search"]["default"]:
            gain = default["nested_minus_default"]["pooled"]
            low, high = gain["clip_ci"]
            notes.append(
                f"Choosing gains {gain['mean']:+.3f} [{low:+.3f}, {high:+.3f}] pooled macro_f1 over candidate 0 in "
                f"every fold, p = {format_p(gain['p_value'])}."
            )
    if study["single_subject_folds"]:
        notes.append(
            "Each fold is one subject: read the pooled figures. The mean of folds is not what the field reports, since "
            "a subject's few clips lack classes."
        )
    if summary["leaky"]["best_epoch"] is None:
        notes.append("No learning curves were kept, so what choosing the best test epoch would claim is unknown.")
    rare = [label for label, count in study["positives"].items() if count < RARE]
    if rare:
        notes.append(f"Fewer than {RARE} clips: {', '.join(rare)}; one changed decision moves F1 a lot.")
    return notes


def format_p(value: float) -> str:
    """A p-value with four decimals, or with one digit where these would be zeros: no p-value is 0."""
    return f"{value:.4f}" if value >= 1e-4 else f"{value:.0e}"


def subject_notes(subjects: int | None) -> list[str]:
    """What the number of subjects, None where they are unknown, means for intervals over clips; empty if nothing."""
    if subjects is None:
        return ["Subjects are unknown: clips are resampled as if independent, so intervals may be too narrow."]
    if subjects == 1:
        return ["One subject only: clips are resampled as if independent, and no interval speaks of other people."]
    if subjects < FEW_SUBJECTS:
        return [
            f"Only {subjects} subjects: resampling so few makes intervals too narrow (in simulations those of 95 % "
            "covered 78, 86 and 90 % with 2, 3 and 6 subjects)."
        ]
    return []


def plain(value: Any) -> Any:
    """JSON-able copy: arrays to lists, NumPy scalars to Python's, what is not finite to None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def read_evaluation(workdir: str | os.PathLike) -> dict[str, Any]:
    """The evaluation settings in a run's ``config.json``; empty when the run has none.

    Raises:
        UserError: The file is missing or not JSON.
    """
    path = Path(workdir) / CONFIG_FILENAME
    config = read_json(path, "give a folder as scripts/train.py wrote it, or put a copy of this file back")
    return dict(config.get("evaluation") or {})


def write_summary(
    workdir: str | os.PathLike,
    overrides: Mapping[str, Any] | None = None,
    results: StudyResults | None = None,
) -> dict[str, Any]:
    """Evaluates a run and writes ``summary.json`` into it.

    Args:
        workdir: The run folder, with ``config.json`` and ``predictions.npz``.
        overrides: Evaluation settings that replace those of ``config.json``.
        results: The run's predictions where they are in memory already.

    Returns:
        The summary.
    """
    results = StudyResults.load(workdir) if results is None else results
    summary = summarise(results, {**read_evaluation(workdir), **(overrides or {})})
    atomic_write_text(Path(workdir) / SUMMARY_FILENAME, json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return summary
