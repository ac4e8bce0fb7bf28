"""What may be scored, and the choices made for it without looking at it.

For held-out fold k, thresholds and (with several hyper-parameter settings) the setting come from the
inner-split predictions of the members that hold fold k out, pooled over their seeds. These members never saw
fold k, and its labels take no part in the choice.
"""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from mer_jax.clips.layouts import LABELS
from mer_jax.errors import UserError
from mer_jax.evaluation import thresholds
from mer_jax.evaluation.released import exclude_positive
from mer_jax.evaluation.views import VIEW_RULES, combine_views
from mer_jax.study.results import UNKNOWN_LABEL, StudyResults

DEFAULTS: dict[str, Any] = {
    "views": "mean",
    "thresholds": "per_class",
    "fixed_threshold": 0.5,
    "negative_excludes_positive": False,
    "bootstrap": 2000,
    "confidence": 0.95,
}


def resolve_evaluation(settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fills in defaults and checks the evaluation settings.

    Args:
        settings: Any of ``views`` ('mean', 'max', 'or'), ``thresholds`` ('fixed', 'global', 'per_class'),
            ``fixed_threshold`` (a number or five), ``negative_excludes_positive``, ``bootstrap`` (replicates
            and permutations), ``confidence`` in (0, 1).

    Returns:
        All of them, as plain Python values.

    Raises:
        UserError: Names the field, its value, and what it may be.
    """
    resolved = {**DEFAULTS, **(settings or {})}
    unknown = sorted(set(resolved) - set(DEFAULTS))
    if unknown:
        raise UserError(f"evaluation.{unknown[0]}: unknown field; choose from {', '.join(DEFAULTS)}")

    def require(condition, field, allowed):
        if not condition:
            raise UserError(f"evaluation.{field}={resolved[field]!r}: must be {allowed}")

    require(resolved["views"] in VIEW_RULES, "views", f"one of {', '.join(VIEW_RULES)}")
    modes = thresholds.THRESHOLD_MODES
    require(resolved["thresholds"] in modes, "thresholds", f"one of {', '.join(modes)}")
    fixed = resolved["fixed_threshold"]
    values = list(fixed) if isinstance(fixed, list | tuple) else [fixed]
    require(
        len(values) in (1, len(LABELS)) and all(isinstance(v, numbers.Real) and 0 <= v <= 1 for v in values),
        "fixed_threshold",
        f"a number in [0, 1], or {len(LABELS)} of them in the order {', '.join(LABELS)}",
    )
    resolved["fixed_threshold"] = float(values[0]) if isinstance(fixed, numbers.Real) else [float(v) for v in values]
    require(
        isinstance(resolved["negative_excludes_positive"], bool),
        "negative_excludes_positive",
        "true or false",
    )
    replicates = resolved["bootstrap"]
    require(
        isinstance(replicates, numbers.Integral) and replicates >= 100,
        "bootstrap",
        "an integer of at least 100",
    )
    confidence = resolved["confidence"]
    require(isinstance(confidence, numbers.Real) and 0 < confidence < 1, "confidence", "a number between 0 and 1")
    return resolved


def decide(probabilities: np.ndarray, cut: np.ndarray | float, evaluation: Mapping[str, Any]) -> np.ndarray:
    """Decisions at thresholds, then "Negative excludes Positive" where the settings ask for it.

    Args:
        probabilities: ``(..., 5)``.
        cut: Thresholds that broadcast.
        evaluation: Resolved settings.

    Returns:
        ``(..., 5)`` bool.
    """
    decisions = thresholds.apply_thresholds(probabilities, cut)
    return exclude_positive(decisions) if evaluation["negative_excludes_positive"] else decisions


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The scored clips and the honest choices for them, ready for any figure.

    N scored clips, F folds, S complete seeds, five labels.

    Attributes:
        row: ``(N,)`` place of each clip among the study's labelled clips.
        name: ``(N,)`` clip names.
        fold: ``(N,)``.
        subject: ``(N,)``, ``''`` where unknown.
        truth: ``(N, 5)`` bool.
        mask: ``(N, 5)`` bool, False where the label is unknown.
        seeds: ``(S,)`` seeds that finished in every fold.
        member: ``(F, S)`` index of each member, folds rising.
        thresholds: ``(F, 5)`` honest thresholds.
        probabilities: ``(S, N, 5)`` of the clips, each by the members that hold it out.
        evaluation: The resolved settings.
    """

    row: np.ndarray
    name: np.ndarray
    fold: np.ndarray
    subject: np.ndarray
    truth: np.ndarray
    mask: np.ndarray
    seeds: np.ndarray
    member: np.ndarray
    thresholds: np.ndarray
    probabilities: np.ndarray
    evaluation: dict[str, Any]

    def decide(self, probabilities: np.ndarray, cut: np.ndarray | float) -> np.ndarray:
        """Decisions ``(..., 5)`` under the study's settings, see :func:`decide`."""
        return decide(probabilities, cut, self.evaluation)

    def take_clips(self, order: np.ndarray) -> "HeldOut":
        """The same study with its clips in another order ``(N,)``."""
        return dataclasses.replace(
            self,
            **{name: getattr(self, name)[order] for name in ("row", "name", "fold", "subject", "truth", "mask")},
            probabilities=self.probabilities[:, order],
        )

    @property
    def fold_index(self) -> np.ndarray:
        """``(N,)`` position of each clip's fold among the folds."""
        return np.unique(self.fold, return_inverse=True)[1]

    @property
    def decisions(self) -> np.ndarray:
        """``(S, N, 5)`` the honest decisions."""
        return self.decide(self.probabilities, self.thresholds[self.fold_index])


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
        # (M, C, 5), of which only the scored clips are kept.
        self.probabilities = combine_views(
            results.probabilities, results.sample_clip, len(results.clip_name), evaluation["views"]
        )[:, self.rows]
        self.inner = results.inner_clips()[:, self.rows]
        self.setting, self.settings = self._group_settings()
        self.tuned = evaluation["thresholds"] in thresholds.TUNED_MODES
        self._thresholds: dict[tuple[int, int], np.ndarray] = {}

    def _group_settings(self) -> tuple[np.ndarray, list[dict[str, float]]]:
        """Setting of each member, and the settings; members that differ in fold or seed alone share one."""
        results = self.results
        pairs = np.stack([results.member_fold, results.member_seed], axis=1)
        num_members = len(pairs)
        if len(np.unique(pairs, axis=0)) == num_members:
            constant = {n: float(v[0]) for n, v in results.hyper.items() if num_members and np.ptp(v) == 0}
            return np.zeros(num_members, np.int64), [constant]
        names = sorted(results.hyper)
        values = np.stack([results.hyper[n] for n in names], axis=1) if names else np.zeros((num_members, 0))
        rows, setting = np.unique(values, axis=0, return_inverse=True)
        setting = setting.reshape(-1)
        if len(np.unique(np.column_stack([pairs, setting]), axis=0)) != num_members:
            raise UserError("two members share fold, seed and hyper-parameters; give the study distinct settings")
        return setting, [dict(zip(names, map(float, row), strict=True)) for row in rows]

    def members(self, setting: int, fold: int) -> np.ndarray:
        """The members of a setting and fold that finished, by rising seed."""
        results = self.results
        found = np.flatnonzero(results.ok & (results.member_fold == fold) & (self.setting == setting))
        return found[np.argsort(results.member_seed[found])]

    def inner_rows(self, setting: int, fold: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Truth, probabilities, mask, each ``(R, 5)``, of the inner clips of a fold's members, all seeds."""
        member, clip = np.nonzero(self.inner[self.members(setting, fold)])
        member = self.members(setting, fold)[member]
        return self.truth[clip], self.probabilities[member, clip], self.mask[clip]

    def thresholds(self, setting: int, fold: int) -> np.ndarray:
        """``(5,)`` honest thresholds for a held-out fold."""
        if not self.tuned:
            fixed = np.asarray(self.evaluation["fixed_threshold"], self.probabilities.dtype)
            return np.broadcast_to(fixed, (len(LABELS),))
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

    def inner_loss(self, setting: int, fold: int) -> float | None:
        """Binary cross-entropy of the inner clips' probabilities: the honest figure to choose settings by."""
        truth, probabilities, mask = self.inner_rows(setting, fold)
        if not mask.any():
            return None
        p = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
        return float(-np.where(truth, np.log(p), np.log1p(-p))[mask].mean())

    def choose_settings(self) -> list[int]:
        """For each fold, of the settings whose members diverged least, the one of least inner loss."""
        chosen = []
        for fold in self.folds:

            def rank(setting, fold=fold):
                loss = self.inner_loss(setting, fold)
                return -len(self.members(setting, fold)), np.inf if loss is None else loss

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
        tuned = np.stack([self.thresholds(s, f) for s, f in zip(chosen, self.folds, strict=True)])
        by_seed = self.probabilities[member[index].T, row]  # (S, N, 5)
        return HeldOut(
            row=row,
            name=results.clip_name[self.rows[row]],
            fold=self.fold[row],
            subject=results.clip_subject[self.rows[row]],
            truth=self.truth[row],
            mask=self.mask[row],
            seeds=seeds,
            member=member,
            thresholds=tuned,
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
    study = StudyMembers(results, resolve_evaluation(evaluation))
    return study.held_out(study.choose_settings())
