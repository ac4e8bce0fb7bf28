"""The figures of a study, from its predictions alone: what ``summary.json`` holds and the report shows.

Two kinds of figures are kept apart. The honest ones choose nothing on the held-out fold (see
:mod:`mer_jax.study.held_out`). The ones under ``leaky`` choose the epoch, the thresholds or both on the
held-out fold, as many published scores do, and exist only so that the difference can be read.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mer_jax.clips.layouts import LABELS
from mer_jax.errors import UserError
from mer_jax.evaluation import metrics, statistics, thresholds
from mer_jax.evaluation.views import combine_views
from mer_jax.files import atomic_write_text
from mer_jax.study.held_out import HeldOut, StudyMembers, decide, resolve_evaluation
from mer_jax.study.results import TEST, StudyResults

SUMMARY_FILENAME = "summary.json"
CONFIG_FILENAME = "config.json"
SCHEMA = 1
HALF_WIDTHS = (0.05, 0.03, 0.02, 0.01, 0.005)
CURVE_THRESHOLDS = np.round(np.arange(0.01, 1.0, 0.01), 2)
RARE = 10

DEFINITIONS = {
    "macro_f1": "Binary macro-F1: F1 of 'present' for each of the five labels, 0 where a label is neither in "
    "the truth nor predicted, averaged over the labels.",
    "present_absent_macro_f1": "For each label the mean of F1(present) and F1(absent), averaged over the "
    "labels; far higher than macro-F1 on the same decisions.",
    "uar": "Unweighted average recall of 'present' over the labels; does not punish false alarms.",
    "balanced_accuracy": "Mean over labels of the mean recall of 'present' and 'absent'; 0.5 for a constant answer.",
    "auroc": "Area under the ROC curve per label; labels without positives or negatives are left out, and counted.",
    "average_precision": "Average precision per label; labels without positives are left out, and counted.",
    "pooled": "The held-out decisions of all folds are put together and scored once per seed. For labels "
    "this is UF1 (macro_f1) and UAR (uar) as MEGC pools them.",
    "fold_mean": "Each held-out fold is scored by itself, then the folds are averaged (the fusion paper's figure).",
    "values": "One score per seed; the mean is the expected score of one training run, not of an ensemble, at "
    "thresholds that all seeds of a fold share.",
    "seed_ci": "Bootstrap over seeds: training noise only, for these clips, and without the noise of tuning "
    "thresholds, which seeds share; percentile, and BCa beside it.",
    "clip_ci": "Bootstrap over held-out clips (subjects where known) and seeds together: what to trust for "
    "new clips. Trained models and thresholds are kept, so the effect of other training clips is not in it.",
    "honest": "Nothing chosen on the held-out fold: tuned thresholds come from inner-split predictions of "
    "the members that hold the fold out, pooled over seeds. With early stopping the same inner clips chose "
    "the epoch, so inner figures are a little too high; held-out figures are not.",
    "untuned": "The same probabilities, present at 0.5 or more.",
    "ensemble": "Probabilities averaged over the seeds of a fold before they are thresholded. The thresholds are "
    "those of single members; a mean varies less, so they are not the best for it.",
    "chance": "The same decisions against label vectors permuted within each held-out fold.",
    "variance": "Two-way random effects on the (fold, seed) macro-F1 matrix by the method of moments, cut off at 0.",
    "leaky": "Epoch or thresholds chosen on the held-out fold itself: too high by construction, to compare only.",
    "seeds_needed": "Seeds for a t interval of the pooled macro-F1 of at most this half width; training noise only.",
}

_PAIR_NAMES = ("macro_f1", "present_absent_macro_f1", "uar", "balanced_accuracy")
_NUM_PAIRS = len(_PAIR_NAMES)


def _figures(counts: metrics.Counts) -> np.ndarray:
    """All count-based figures along the last axis: ``_PAIR_NAMES``, then F1 per label."""
    single = np.stack(
        [
            metrics.macro_f1(counts),
            metrics.present_absent_macro_f1(counts),
            metrics.multilabel_uar(counts),
            metrics.balanced_accuracy(counts),
        ],
        axis=-1,
    )
    return np.concatenate([single, metrics.binary_f1(counts)], axis=-1)


class _Scorer:
    """Scores decisions for the same clips and seeds with one set of draws, so that figures are paired."""

    def __init__(self, held: HeldOut):
        self.held = held
        self.confidence = held.evaluation["confidence"]
        self.draws = statistics.make_resampling(
            held.fold, held.subject.tolist(), len(held.seeds), held.evaluation["bootstrap"]
        )

    def replicates(self, decisions: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """For pooled and fold_mean: figures of each seed ``(S, K)``, bootstrap means ``(B, K)``."""
        held, found, draws = self.held, {}, self.draws
        if len(decisions) != len(held.seeds):  # an ensemble has no seeds to draw
            draws = draws._replace(seeds=np.ones((len(draws.clips), len(decisions))))
        everything = np.ones((1, len(held.fold)))
        args = (held.truth, decisions, held.mask)
        for name, groups in (("pooled", None), ("fold_mean", held.fold)):
            values = statistics.weighted_scores(*args, everything, _figures, groups)[0]
            found[name] = values, statistics.hierarchical_replicates(*args, draws, _figures, groups)
        return found

    def score(self, values: np.ndarray, replicates: np.ndarray) -> dict[str, Any]:
        """A Score: ``(S,)`` values per seed and ``(B,)`` replicates of their mean on new clips."""
        by_seed = statistics.bootstrap_mean(values, self.draws.seeds, self.confidence)
        return {
            "mean": values.mean(),
            "sd": _sd(values),
            "seed_ci": by_seed["percentile"],
            "seed_ci_bca": by_seed["bca"],
            "clip_ci": self.clip_interval(replicates, values.mean()),
            "values": values,
        }

    def clip_interval(self, replicates: np.ndarray, estimate: float) -> tuple[float, float]:
        """The interval of a score from ``(B,)`` replicates."""
        return statistics.centred_interval(replicates, estimate, self.confidence, bounds=(0.0, 1.0))

    def block(self, decisions: np.ndarray) -> tuple[dict[str, Any], dict[str, tuple[np.ndarray, np.ndarray]]]:
        """A Block for decisions ``(S, N, 5)``, and the replicates behind it."""
        found = self.replicates(decisions)

        def pair(index):
            return {name: self.score(v[:, index], r[:, index]) for name, (v, r) in found.items()}

        counts = metrics.confusion_counts(self.held.truth, decisions, self.held.mask)
        block = {name: pair(index) for index, name in enumerate(_PAIR_NAMES)}
        block["per_class_f1"] = {label: pair(_NUM_PAIRS + index) for index, label in enumerate(LABELS)}
        block["confusion"] = {
            label: {cell: getattr(counts, cell)[:, index].mean() for cell in counts._fields}
            for index, label in enumerate(LABELS)
        }
        return block, found

    def inflation(self, leaky: dict, honest: dict) -> dict[str, Any]:
        """How much higher the leaky macro-F1 is, on the same draws."""
        inflation = {}
        for name in honest:
            (values, replicates), (reference, reference_replicates) = leaky[name], honest[name]
            mean = (values - reference)[:, 0].mean()
            inflation[name] = {
                "mean": mean,
                "clip_ci": statistics.centred_interval(
                    (replicates - reference_replicates)[:, 0], mean, self.confidence
                ),
            }
        return inflation


def summarise(results: StudyResults, evaluation: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All figures of a study.

    Args:
        results: All predictions.
        evaluation: Settings, see :func:`resolve_evaluation`.

    Returns:
        A dict of plain Python values, ready for JSON; undefined figures are None. Its keys:

        * ``labels``, ``definitions``, ``evaluation`` (resolved), ``notes`` (sentences to print with the
          figures);
        * ``study``: what was scored: clips, folds, seeds, members, those that diverged;
        * ``honest``, ``untuned``: blocks of figures, each ``pooled`` and ``fold_mean`` with mean, sd,
          intervals and one value per seed; F1 and confusion per label;
        * ``ensemble``, ``auroc``, ``average_precision``, ``chance``, ``baselines``, ``variance``,
          ``seeds_needed``;
        * ``folds``: scores of all finished members and the thresholds, fold by fold;
        * ``threshold_curve``: macro-F1 against one global threshold, on inner splits and (leaky) on held-out
          clips;
        * ``leaky``: the inflated figures, blocks with ``inflation`` over the honest ones;
        * ``settings``: one entry per hyper-parameter setting.

    Raises:
        UserError: A setting is wrong, nothing can be scored, or thresholds cannot be tuned for want of inner
            splits.
    """
    evaluation = resolve_evaluation(evaluation)
    study = StudyMembers(results, evaluation)
    chosen = study.choose_settings()
    held = study.held_out(chosen)
    scorer = _Scorer(held)
    honest, honest_replicates = scorer.block(held.decisions)
    untuned, untuned_replicates = scorer.block(held.decide(held.probabilities, thresholds.UNTUNED))
    everyone = np.unique(results.member_seed)
    incomplete = sorted(set(everyone.tolist()) - set(held.seeds.tolist()))
    subjects = held.subject.tolist()
    summary = {
        "schema": SCHEMA,
        "labels": LABELS,
        "definitions": DEFINITIONS,
        "evaluation": evaluation,
        "study": {
            "clips": len(held.fold),
            "test_clips": int((results.clip_split == TEST).sum()),
            "subjects": len(set(subjects)) if all(subjects) else None,
            "folds": study.folds,
            "folds_left_out": np.setdiff1d(study.fold, study.folds).tolist(),
            "seeds": held.seeds,
            "members": len(results.member_id),
            "members_ok": int(results.ok.sum()),
            "diverged": results.member_id[~results.ok],
            "incomplete_seeds": incomplete,
            "resampled": scorer.draws.unit,
            "positives": dict(zip(LABELS, (held.truth & held.mask).sum(axis=0), strict=True)),
        },
        "honest": honest,
        "untuned": untuned,
        "ensemble": _ensemble(study, chosen, scorer),
        "auroc": _rank_figures(held, metrics.auroc),
        "average_precision": _rank_figures(held, metrics.average_precision),
        "chance": _chance(held),
        "baselines": _baselines(held),
        "variance": _variance(held),
        "seeds_needed": _seeds_needed(honest["macro_f1"]["pooled"]["sd"], evaluation["confidence"]),
        "folds": _folds(study, chosen),
        "threshold_curve": _threshold_curve(study, chosen, held),
        "leaky": _leaky(study, held, scorer, honest_replicates, untuned_replicates),
        "settings": _settings(study, chosen),
    }
    summary["notes"] = _notes(summary)
    return plain(summary)


def _sd(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None


def _ensemble(study: StudyMembers, chosen: list[int], scorer: _Scorer) -> dict[str, Any]:
    held = scorer.held
    mean = np.empty((1, *held.truth.shape), study.probabilities.dtype)
    members = []
    for setting, fold in zip(chosen, study.folds, strict=True):
        found, rows = study.members(setting, fold), held.fold == fold
        mean[0, rows] = study.probabilities[found][:, held.row[rows]].mean(axis=0)
        members.append(len(found))
    found = scorer.replicates(held.decide(mean, held.thresholds[held.fold_index]))

    def pair(index):
        return {
            name: {
                "value": values[0, index],
                "clip_ci": scorer.clip_interval(replicates[:, index], values[0, index]),
            }
            for name, (values, replicates) in found.items()
        }

    return {
        "macro_f1": pair(0),
        "per_class_f1": {label: pair(_NUM_PAIRS + index) for index, label in enumerate(LABELS)},
        "members": members,
    }


def _rank_figures(held: HeldOut, metric: Callable[..., np.ndarray]) -> dict[str, Any]:
    """AUROC or average precision per label and on average, pooled and per fold."""
    pooled = metric(held.truth, held.probabilities, held.mask)[None]  # (1, S, 5)
    by_fold = np.stack(
        [
            metric(held.truth[rows], held.probabilities[:, rows], held.mask[rows])
            for rows in (held.fold == fold for fold in np.unique(held.fold))
        ]
    )  # (F, S, 5)

    def score(cells):
        """From cells ``(cells, S)``, NaN where undefined."""
        values = metrics.mean_over_classes(cells.T)  # (S,)
        return {
            "mean": values.mean(),
            "sd": _sd(values),
            "values": values,
            "undefined": int(np.isnan(cells[:, 0]).sum()),
        }

    def pair(select):
        return {"pooled": score(select(pooled)), "fold_mean": score(select(by_fold))}

    return {
        "per_class": {label: pair(lambda cells, c=c: cells[..., c]) for c, label in enumerate(LABELS)},
        "mean": {
            "pooled": score(pooled[0].T),
            "fold_mean": score(np.moveaxis(by_fold, 1, 2).reshape(-1, len(held.seeds))),
        },
    }


def _chance(held: HeldOut) -> dict[str, Any]:
    permutations = held.evaluation["bootstrap"]
    pooled, fold_mean = statistics.chance_level(
        held.truth,
        held.decisions,
        held.mask,
        held.fold,
        permutations,
        confidence=held.evaluation["confidence"],
    )
    return {
        "macro_f1": {"pooled": pooled._asdict(), "fold_mean": fold_mean._asdict()},
        "permutations": permutations,
    }


def _baselines(held: HeldOut) -> dict[str, Any]:
    majority = np.zeros(held.truth.shape, bool)
    for fold in np.unique(held.fold):
        training = held.fold != fold
        present = (held.truth & held.mask)[training].sum(axis=0)
        majority[held.fold == fold] = 2 * present > held.mask[training].sum(axis=0)
    everything = np.ones((1, len(held.fold)))
    constant = {"all_positive": np.ones_like(majority), "majority": majority}
    return {
        name: {
            "macro_f1": {
                average: statistics.weighted_scores(
                    held.truth, decisions[None], held.mask, everything, groups=groups
                ).item()
                for average, groups in (("pooled", None), ("fold_mean", held.fold))
            }
        }
        for name, decisions in constant.items()
    }


def _variance(held: HeldOut) -> dict[str, Any] | None:
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


def _folds(study: StudyMembers, chosen: list[int]) -> list[dict[str, Any]]:
    entries = []
    for setting, fold in zip(chosen, study.folds, strict=True):
        rows, members = study.fold == fold, study.members(setting, fold)
        tuned = study.thresholds(setting, fold)
        scores = metrics.macro_f1(_member_counts(study, members, rows, tuned))
        entries.append(
            {
                "fold": fold,
                "clips": int(rows.sum()),
                "positives": dict(zip(LABELS, (study.truth & study.mask)[rows].sum(axis=0), strict=True)),
                "seeds": study.results.member_seed[members],
                "macro_f1": scores,
                "mean": scores.mean(),
                "sd": _sd(scores),
                "thresholds": tuned,
                "inner_clips": int(study.inner[members].any(axis=0).sum()),
            }
        )
    return entries


def _member_counts(study: StudyMembers, members: np.ndarray, rows: np.ndarray, tuned: np.ndarray) -> metrics.Counts:
    decisions = decide(study.probabilities[members][:, rows], tuned, study.evaluation)
    return metrics.confusion_counts(study.truth[rows], decisions, study.mask[rows])


def _threshold_curve(study: StudyMembers, chosen: list[int], held: HeldOut) -> dict[str, Any]:
    heldout, heldout_per_class = thresholds.threshold_curve(held.truth, held.probabilities, CURVE_THRESHOLDS, held.mask)
    pooled = [study.inner_rows(s, f) for s, f in zip(chosen, study.folds, strict=True)]
    inner = inner_per_class = None
    if all(len(truth) for truth, _, _ in pooled):
        curves = [thresholds.threshold_curve(t, p, CURVE_THRESHOLDS, m) for t, p, m in pooled]
        inner = np.mean([macro for macro, _ in curves], axis=0)  # (G,)
        inner_per_class = np.mean([per_class for _, per_class in curves], axis=0)  # (G, 5)

    def by_label(values):
        return None if values is None else dict(zip(LABELS, values.T, strict=True))

    return {
        "threshold": CURVE_THRESHOLDS,
        "inner": inner,
        "heldout_leaky": heldout.mean(axis=0),
        "per_class_inner": by_label(inner_per_class),
        "per_class_heldout_leaky": by_label(heldout_per_class.mean(axis=0)),
    }


def _leaky(study: StudyMembers, held: HeldOut, scorer: _Scorer, honest: dict, untuned: dict) -> dict[str, Any]:
    """What choosing on the held-out fold would have claimed; nothing here feeds any other figure."""
    mode = held.evaluation["thresholds"] if study.tuned else "global"
    shape = (len(held.seeds), *held.truth.shape)
    names = ("best_epoch", "best_epoch_untuned", "heldout_thresholds", "both")
    decisions = {name: np.zeros(shape, bool) for name in names}
    curves = bool(study.results.curve_probabilities.shape[1] and study.results.curve_sample.shape[1])
    for index, fold in enumerate(study.folds):
        rows = np.flatnonzero(held.fold == fold)
        truth, mask = held.truth[rows], held.mask[rows]
        for seed, member in enumerate(held.member[index]):
            last = held.probabilities[seed, rows]  # (n, 5)
            decisions["heldout_thresholds"][seed, rows] = held.decide(
                last, thresholds.oracle_thresholds(truth, last, mode, mask)
            )
            if not curves:
                continue
            epochs = _epoch_probabilities(study, member, held.row[rows])  # (E, n, 5)
            present = ~np.isnan(epochs).any(axis=(1, 2))
            if not present.any():
                curves = False
                continue
            epochs = epochs[present]
            oracle = thresholds.oracle_thresholds(truth, epochs, mode, mask)[:, None]  # (E, 1, 5)
            for name, cut in (
                ("best_epoch", held.thresholds[index]),
                ("best_epoch_untuned", thresholds.UNTUNED),
                ("both", oracle),
            ):
                made = held.decide(epochs, cut)
                best = np.argmax(metrics.macro_f1(metrics.confusion_counts(truth, made, mask)))
                decisions[name][seed, rows] = made[best]
    leaky: dict[str, Any] = {"label": "leaky", "threshold_mode": mode}
    for name in names:
        if name != "heldout_thresholds" and not curves:
            leaky[name] = None
            continue
        block, replicates = scorer.block(decisions[name])
        reference = untuned if name == "best_epoch_untuned" else honest
        leaky[name] = {**block, "inflation": scorer.inflation(replicates, reference)}
    return leaky


def _epoch_probabilities(study: StudyMembers, member: int, rows: np.ndarray) -> np.ndarray:
    """``(E, n, 5)`` probabilities of the labelled clips ``rows``, held out by ``member``, at every epoch."""
    results = study.results
    position = np.full(len(results.clip_name), -1)
    position[study.rows[rows]] = np.arange(len(rows))
    sample = results.curve_sample[member]
    local = np.where(sample >= 0, position[results.sample_clip[sample.clip(0)]], -1)
    kept = local >= 0
    if set(local[kept].tolist()) != set(range(len(rows))):
        raise UserError(f"member {results.member_id[member]}: its learning curve lacks held-out clips; train again")
    return combine_views(
        results.curve_probabilities[member][:, kept], local[kept], len(rows), study.evaluation["views"]
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
    if study["subjects"] is None:
        notes.append("Subjects are unknown: clips are resampled as if independent, so intervals may be too narrow.")
    if len(summary["settings"]) > 1:
        notes.append(
            f"{len(summary['settings'])} settings: each fold uses the one of least inner loss; "
            "picking the best score from the table of settings would be leaky."
        )
    rare = [label for label, count in study["positives"].items() if count < RARE]
    if rare:
        notes.append(f"Fewer than {RARE} positive clips: {', '.join(rare)}; one changed decision moves F1 a lot.")
    return notes


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
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give the folder that scripts/train.py wrote"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); run scripts/train.py again to rewrite it") from error
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
