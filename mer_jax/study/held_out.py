"""What may be scored, and the choices made for it without looking at it.

For held-out fold k, thresholds (of a multi-label study) and, with several hyper-parameter settings, the setting
come from the inner-split predictions of the members that hold fold k out, pooled over their seeds. These members
never saw fold k, and its labels take no part in the choice.
"""

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mer_jax.errors import UserError
from mer_jax.evaluation import metrics, thresholds
from mer_jax.evaluation.released import NEGATIVE, POSITIVE, exclude_positive
from mer_jax.evaluation.views import PHASE_RULES, VIEW_RULES, combine_samples
from mer_jax.fields import MANY
from mer_jax.study.results import UNKNOWN_LABEL, StudyResults

DEFAULTS: dict[str, Any] = {
    "phases": "mean",
    "views": "mean",
    "thresholds": "per_class",
    "fixed_threshold": 0.5,
    "negative_excludes_positive": False,
    "selection": "average_precision",
    "bootstrap": 2000,
    "confidence": 0.95,
}

# What may choose among hyper-parameter settings, and whether more of it is better.
SELECTIONS = {"average_precision": True, "loss": False, "macro_f1": True}


def resolve_evaluation(
    settings: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
    multi_class: bool | None = None,
) -> dict[str, Any]:
    """Fills in defaults and checks the evaluation settings.

    Args:
        settings: Any of ``phases`` ('mean', 'max', 'onset_apex'), ``views`` ('mean', 'max', 'or'), ``thresholds``
            ('fixed', 'global', 'per_class'; 'argmax' in a multi-class study, its default there),
            ``fixed_threshold`` (a number or one a label), ``negative_excludes_positive``, ``selection`` (one of
            ``SELECTIONS``, see :meth:`StudyMembers.inner_score`), ``bootstrap`` (replicates and permutations),
            ``confidence`` in (0, 1).
        labels: Names of the study's labels; None while they are not known: then what depends on them goes
            unchecked.
        multi_class: Whether exactly one of them is present; None while that is not known.

    Returns:
        All of them, as plain Python values.

    Raises:
        UserError: Names the field, its value, and what it may be.
    """
    resolved = {**DEFAULTS, **({"thresholds": thresholds.ARGMAX} if multi_class else {}), **(settings or {})}
    unknown = sorted(set(resolved) - set(DEFAULTS))
    if unknown:
        raise UserError(f"evaluation.{unknown[0]}: unknown field; choose from {', '.join(DEFAULTS)}")

    def require(condition, field, allowed):
        if not condition:
            raise UserError(f"evaluation.{field}={resolved[field]!r}: must be {allowed}")

    require(resolved["phases"] in PHASE_RULES, "phases", f"one of {', '.join(PHASE_RULES)}")
    require(resolved["views"] in VIEW_RULES, "views", f"one of {', '.join(VIEW_RULES)}")
    modes, of = thresholds.THRESHOLD_MODES, ""
    if multi_class is not None:
        modes = (thresholds.ARGMAX,) if multi_class else modes[:-1]
        of = f" in a study of {'one class' if multi_class else 'any labels'} a clip"
    require(resolved["thresholds"] in modes, "thresholds", f"{'one of ' * (len(modes) > 1)}{', '.join(modes)}{of}")
    fixed = resolved["fixed_threshold"]
    values = list(fixed) if isinstance(fixed, list | tuple) else [fixed]
    several = "one a label" if labels is None else f"{len(labels)} of them in the order {', '.join(labels)}"
    require(
        len(values) > 0
        and (labels is None or len(values) in (1, len(labels)))
        and all(isinstance(v, numbers.Real) and 0 <= v <= 1 for v in values),
        "fixed_threshold",
        f"a number in [0, 1], or {several}",
    )
    resolved["fixed_threshold"] = float(values[0]) if len(values) == 1 else [float(v) for v in values]
    require(
        isinstance(resolved["negative_excludes_positive"], bool),
        "negative_excludes_positive",
        "true or false",
    )
    if resolved["negative_excludes_positive"] and labels is not None:
        pair = not multi_class and {NEGATIVE, POSITIVE} <= set(labels)
        require(pair, "negative_excludes_positive", f"false where {NEGATIVE} and {POSITIVE} are not two labels")
    require(resolved["selection"] in tuple(SELECTIONS), "selection", f"one of {', '.join(SELECTIONS)}")
    replicates = resolved["bootstrap"]
    require(
        isinstance(replicates, numbers.Integral) and 100 <= replicates <= MANY,
        "bootstrap",
        f"an integer from 100 to {MANY}",
    )
    confidence = resolved["confidence"]
    require(isinstance(confidence, numbers.Real) and 0 < confidence < 1, "confidence", "a number between 0 and 1")
    return resolved


def decide(
    probabilities: np.ndarray, cut: np.ndarray | float | None, evaluation: Mapping[str, Any], labels: Sequence[str]
) -> np.ndarray:
    """Decisions at thresholds, then "Negative excludes Positive" where the settings ask for it.

    Args:
        probabilities: ``(..., L)``.
        cut: Thresholds that broadcast; of no meaning where the likeliest class is taken.
        evaluation: Resolved settings.
        labels: L names.

    Returns:
        ``(..., L)`` bool.
    """
    if evaluation["thresholds"] == thresholds.ARGMAX:
        return thresholds.likeliest(probabilities)
    decisions = thresholds.apply_thresholds(probabilities, cut)
    return exclude_positive(decisions, labels) if evaluation["negative_excludes_positive"] else decisions


def clip_probabilities(
    results: StudyResults, probabilities: np.ndarray, evaluation: Mapping[str, Any], samples: np.ndarray | None = None
) -> np.ndarray:
    """From samples to clips under the study's rules for phases and views.

    Args:
        results: The study.
        probabilities: ``(..., N, L)`` of all samples, or of some.
        evaluation: Resolved settings.
        samples: ``(N',)`` which samples these are, every one of each of their clips; None for all.

    Returns:
        ``(..., C, L)``, or of the clips of ``samples``, by their rising index.
    """
    samples = np.arange(len(results.sample_clip)) if samples is None else samples
    clips, clip = np.unique(results.sample_clip[samples], return_inverse=True)
    return combine_samples(
        probabilities,
        clip.reshape(-1),
        results.sample_view[samples],
        results.sample_phase[samples],
        len(clips),
        evaluation["views"],
        evaluation["phases"],
    )


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The scored clips and the honest choices for them, ready for any figure.

    N scored clips, F folds, S complete seeds, L labels.

    Attributes:
        labels: L names.
        multi_class: Whether exactly one label is present in a clip.
        row: ``(N,)`` place of each clip among the study's labelled clips.
        name: ``(N,)`` clip names.
        fold: ``(N,)``.
        subject: ``(N,)``, ``''`` where unknown.
        database: ``(N,)``, ``''`` where there is only one.
        truth: ``(N, L)`` bool.
        mask: ``(N, L)`` bool, False where the label is unknown.
        seeds: ``(S,)`` seeds that finished in every fold.
        member: ``(F, S)`` index of each member, folds rising.
        thresholds: ``(F, L)`` honest thresholds; None where the likeliest class is taken.
        probabilities: ``(S, N, L)`` of the clips, each by the members that hold it out.
        evaluation: The resolved settings.
    """

    labels: tuple[str, ...]
    multi_class: bool
    row: np.ndarray
    name: np.ndarray
    fold: np.ndarray
    subject: np.ndarray
    database: np.ndarray
    truth: np.ndarray
    mask: np.ndarray
    seeds: np.ndarray
    member: np.ndarray
    thresholds: np.ndarray | None
    probabilities: np.ndarray
    evaluation: dict[str, Any]

    def decide(self, probabilities: np.ndarray, cut: np.ndarray | float | None) -> np.ndarray:
        """Decisions ``(..., L)`` under the study's settings, see :func:`decide`."""
        return decide(probabilities, cut, self.evaluation, self.labels)

    def take_clips(self, order: np.ndarray) -> "HeldOut":
        """The same study with its clips in another order ``(N,)``."""
        by_clip = ("row", "name", "fold", "subject", "database", "truth", "mask")
        return dataclasses.replace(
            self,
            **{name: getattr(self, name)[order] for name in by_clip},
            probabilities=self.probabilities[:, order],
        )

    def take_seeds(self, seeds: np.ndarray) -> "HeldOut":
        """The same study with some of its ``seeds`` only."""
        kept = np.isin(self.seeds, seeds)
        return dataclasses.replace(
            self,
            seeds=self.seeds[kept],
            member=self.member[:, kept],
            probabilities=self.probabilities[kept],
        )

    @property
    def fold_index(self) -> np.ndarray:
        """``(N,)`` position of each clip's fold among the folds."""
        return np.unique(self.fold, return_inverse=True)[1]

    @property
    def cut(self) -> np.ndarray | None:
        """``(N, L)`` the honest threshold of each clip and label; None where the likeliest class is taken."""
        return None if self.thresholds is None else self.thresholds[self.fold_index]

    @property
    def decisions(self) -> np.ndarray:
        """``(S, N, L)`` the honest decisions."""
        return self.decide(self.probabilities, self.cut)

    @property
    def people(self) -> list[str]:
        """N subjects as no two databases share them: two data sets may both have a subject ``01``."""
        pairs = zip(self.database.tolist(), self.subject.tolist(), strict=True)
        return [f"{database}/{subject}" if subject else "" for database, subject in pairs]

    @property
    def single_subject_folds(self) -> bool:
        """Whether each fold is one subject (leave-one-subject-out), whose clips may all be of one class."""
        people, folds = self.people, self.fold.tolist()
        pairs = set(zip(people, folds, strict=True))
        return all(people) and len(pairs) == len(set(people)) == len(set(folds))


class StudyMembers:
    """The members of a study, grouped by fold, seed and hyper-parameter setting, with clip probabilities."""

    def __init__(self, results: StudyResults, evaluation: dict[str, Any]):
        self.results, self.evaluation = results, evaluation
        self.rows = np.flatnonzero(results.scored)
        if not len(self.rows):
            raise UserError("the study holds out no labelled clip: nothing to score; train on labelled clips")
        self.fold = results.clip_fold[self.rows]
        labels = results.clip_labels[self.rows]
        self.truth, self.mask = labels == 1, labels != UNKNOWN_LABEL
        # A study may train some of its folds only; the other clips are not scored, but serve as inner clips.
        self.folds = np.unique(results.member_fold)
        # (M, C, L), of which only the scored clips are kept.
        self.probabilities = clip_probabilities(results, results.probabilities, evaluation)[:, self.rows]
        self.inner = results.inner_clips()[:, self.rows]
        self.setting, self.settings = self._group_settings()
        self.tuned = evaluation["thresholds"] in thresholds.TUNED_MODES
        self._thresholds: dict[tuple[int, int], np.ndarray] = {}
        self._inner_scores: dict[tuple[int, int], float | None] = {}

    def _group_settings(self) -> tuple[np.ndarray, list[dict[str, float]]]:
        """Setting of each member, and the settings in the order of their first members.

        Members that differ in fold or seed alone share a setting.
        """
        results = self.results
        pairs = np.stack([results.member_fold, results.member_seed], axis=1)
        num_members = len(pairs)
        if len(np.unique(pairs, axis=0)) == num_members:
            constant = {n: float(v[0]) for n, v in results.hyper.items() if num_members and np.ptp(v) == 0}
            return np.zeros(num_members, np.int64), [constant]
        names = sorted(results.hyper)
        values = np.stack([results.hyper[n] for n in names], axis=1) if names else np.zeros((num_members, 0))
        rows, first, setting = np.unique(values, axis=0, return_index=True, return_inverse=True)
        order = np.argsort(first)
        rows, setting = rows[order], np.argsort(order)[setting.reshape(-1)]
        if len(np.unique(np.column_stack([pairs, setting]), axis=0)) != num_members:
            raise UserError("two members share fold, seed and hyper-parameters; give the study distinct settings")
        return setting, [dict(zip(names, map(float, row), strict=True)) for row in rows]

    def members(self, setting: int, fold: int) -> np.ndarray:
        """The members of a setting and fold that finished, by rising seed."""
        results = self.results
        found = np.flatnonzero(results.ok & (results.member_fold == fold) & (self.setting == setting))
        return found[np.argsort(results.member_seed[found])]

    def inner_rows(self, setting: int, fold: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Truth, probabilities, mask, each ``(R, L)``, of the inner clips of a fold's members, all seeds."""
        member, clip = np.nonzero(self.inner[self.members(setting, fold)])
        member = self.members(setting, fold)[member]
        return self.truth[clip], self.probabilities[member, clip], self.mask[clip]

    def thresholds(self, setting: int, fold: int) -> np.ndarray | None:
        """``(L,)`` honest thresholds for a held-out fold; None where the likeliest class is taken."""
        if self.evaluation["thresholds"] == thresholds.ARGMAX:
            return None
        if not self.tuned:
            fixed = np.asarray(self.evaluation["fixed_threshold"], self.probabilities.dtype)
            return np.broadcast_to(fixed, (len(self.results.labels),))
        key = (setting, int(fold))
        if key not in self._thresholds:
            truth, probabilities, mask = self.inner_rows(setting, fold)
            if not len(truth):
                raise UserError(
                    f"fold {fold}: no inner-split predictions to tune thresholds on; set "
                    "evaluation.thresholds to 'fixed', or train with an inner split"
                )
            self._thresholds[key] = thresholds.tune_thresholds(
                truth, probabilities, self.evaluation["thresholds"], mask
            )
        return self._thresholds[key]

    def inner_score(self, setting: int, fold: int) -> float | None:
        """What ``evaluation.selection`` chooses by: a figure of the inner clips of a fold's members.

        Inner splits are tiny, a few clips in which rare labels may be missing, so the predictions of all seeds of the
        fold are pooled before they are scored; the splits rotate over the training clips with the seeds.

        * ``'average_precision'``, its mean over the labels (each class against the rest). What is scored in the end
          are decisions at tuned thresholds or of the likeliest class, and like these it asks only for the right order:
          a setting neither wins nor loses by how sure of itself it is, which ``focal_gamma``, ``dropout`` and longer
          training change at will.
        * ``'loss'``, see :meth:`inner_loss`: of less variance, but it takes over-confidence for error.
        * ``'macro_f1'`` of the decisions, at thresholds tuned on these very clips: too high, for all settings alike.

        Returns:
            The figure, or None where no inner clip, or none with any of the labels, has a prediction.
        """
        key = (setting, int(fold))
        if key not in self._inner_scores:
            self._inner_scores[key] = self._inner_score(setting, fold)
        return self._inner_scores[key]

    def _inner_score(self, setting: int, fold: int) -> float | None:
        selection = self.evaluation["selection"]
        if selection == "loss":
            return self.inner_loss(setting, fold)
        truth, probabilities, mask = self.inner_rows(setting, fold)
        if not mask.any():
            return None
        if selection == "average_precision":
            score = metrics.mean_over_classes(metrics.average_precision(truth, probabilities, mask))
        else:
            made = decide(probabilities, self.thresholds(setting, fold), self.evaluation, self.results.labels)
            score = metrics.macro_f1(metrics.confusion_counts(truth, made, mask))
        return None if np.isnan(score) else float(score)

    def inner_loss(self, setting: int, fold: int) -> float | None:
        """Cross-entropy of the inner clips' probabilities, over all seeds of the fold.

        Binary and averaged over labels in a multi-label study, that of the true class in a multi-class one.
        """
        truth, probabilities, mask = self.inner_rows(setting, fold)
        if not mask.any():
            return None
        p = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
        if self.results.multi_class:
            return float(-np.log(p[truth]).mean())
        return float(-np.where(truth, np.log(p), np.log1p(-p))[mask].mean())

    def choose_settings(self) -> list[int]:
        """For each fold, of the settings whose members diverged least, the one of the best inner score.

        Of equals it is the first: the config's own values, if they are among them. Neither the labels nor the
        predictions of the clips that the fold holds out take part.
        """
        if len(self.settings) == 1:
            return [0] * len(self.folds)
        sign = -1 if SELECTIONS[self.evaluation["selection"]] else 1
        chosen = []
        for fold in self.folds:

            def rank(setting, fold=fold):
                score = self.inner_score(setting, fold)
                return -len(self.members(setting, fold)), np.inf if score is None else sign * score

            chosen.append(min(range(len(self.settings)), key=rank))
        return chosen

    def complete_seeds(self, chosen: list[int]) -> np.ndarray:
        """``(S,)`` the seeds that finished in every fold under the setting chosen for it."""
        seeds = [
            set(self.results.member_seed[self.members(setting, fold)].tolist())
            for setting, fold in zip(chosen, self.folds, strict=True)
        ]
        return np.array(sorted(set.intersection(*seeds)), np.int64)

    def held_out(self, chosen: list[int]) -> HeldOut:
        """The scored clips under the chosen setting of each fold.

        Raises:
            UserError: No seed finished in every fold.
        """
        seeds = self.complete_seeds(chosen)
        results = self.results
        if not len(seeds):
            diverged = ", ".join(results.member_id[~results.ok].tolist()) or "none diverged, some were never trained"
            raise UserError(
                f"no seed finished in every fold ({diverged}): nothing to score; lower the learning rate or add seeds"
            )
        member = np.stack(
            [
                found[np.isin(results.member_seed[found], seeds)]
                for found in (self.members(s, f) for s, f in zip(chosen, self.folds, strict=True))
            ]
        )  # (F, S)
        row = np.flatnonzero(np.isin(self.fold, self.folds))
        index = np.searchsorted(self.folds, self.fold[row])
        tuned = [self.thresholds(s, f) for s, f in zip(chosen, self.folds, strict=True)]
        by_seed = self.probabilities[member[index].T, row]  # (S, N, L)
        return HeldOut(
            labels=results.labels,
            multi_class=results.multi_class,
            row=row,
            name=results.clip_name[self.rows[row]],
            fold=self.fold[row],
            subject=results.clip_subject[self.rows[row]],
            database=results.clip_database[self.rows[row]],
            truth=self.truth[row],
            mask=self.mask[row],
            seeds=seeds,
            member=member,
            thresholds=None if results.multi_class else np.stack(tuned),
            probabilities=by_seed,
            evaluation=self.evaluation,
        )


def held_out(results: StudyResults, evaluation: Mapping[str, Any] | None = None) -> HeldOut:
    """The held-out probabilities and honest thresholds of a study.

    Args:
        results: All predictions.
        evaluation: Settings, see :func:`resolve_evaluation`.

    Raises:
        UserError: Nothing to score, or no inner-split predictions although thresholds shall be tuned.
    """
    study = StudyMembers(results, resolve_evaluation(evaluation, results.labels, results.multi_class))
    return study.held_out(study.choose_settings())
