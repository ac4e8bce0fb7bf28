"""Predictions of a trained study for clips of its data set, and the challenge's submission file."""

import dataclasses
import difflib
import os

import numpy as np

from mer_jax.clips.layouts import LABELS
from mer_jax.errors import UserError
from mer_jax.evaluation.released import write_submission
from mer_jax.evaluation.thresholds import tune_thresholds
from mer_jax.study.held_out import StudyMembers, clip_probabilities, decide, resolve_evaluation
from mer_jax.study.results import StudyResults
from mer_jax.study.summary import read_evaluation


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a study says of some clips.

    Attributes:
        labels: L names of labels or classes.
        clip_name: ``(K,)`` str.
        clip_id: ``(K,)`` int64.
        mean: ``(K, L)`` probability, mean over members; NaN where no member may speak.
        spread: ``(K, L)`` standard deviation over members; 0 for one member.
        thresholds: ``(K, L)`` those that decide; None in a multi-class study, where the likeliest class is taken.
        decisions: ``(K, L)`` bool.
        members: ``(K,)`` number of members behind each clip.
    """

    labels: tuple[str, ...]
    clip_name: np.ndarray
    clip_id: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    thresholds: np.ndarray | None
    decisions: np.ndarray
    members: np.ndarray


def predict(results: StudyResults, evaluation: dict, *, split: str, member: str | None = None) -> Predictions:
    """Predicts the clips of a split with the ensemble of all members or with one.

    Test clips are predicted by every member; their thresholds are tuned on the inner-split predictions of all of
    them together. A training clip is predicted only by the members that held it out, with their fold's thresholds.

    Args:
        results: The study's predictions.
        evaluation: Evaluation settings, as in a config.
        split: ``'test'`` or ``'train'``.
        member: A member's id, or None for the ensemble.

    Returns:
        The predictions, clips by rising id.

    Raises:
        UserError: No such clips or member, or the member diverged.
    """
    study = StudyMembers(results, resolve_evaluation(evaluation, results.labels, results.multi_class))
    clips = np.flatnonzero(results.clip_split == split)
    if not len(clips):
        raise UserError(f"the data set of this study has no {split} clips; build it with them and train again")
    clips = clips[np.argsort(results.clip_id[clips], kind="stable")]
    chosen, everyone = _speakers(study, member)
    if not len(everyone):
        raise UserError("every member of this study diverged; lower config.train.learning_rate and train again")
    probabilities = clip_probabilities(results, results.probabilities[everyone], study.evaluation)[
        :, clips
    ]  # (members, K, L)

    # A training clip may be predicted only by those that held it out: (members, K).
    allowed = np.ones(probabilities.shape[:2], bool)
    if split == "train":
        allowed = results.clip_fold[clips] == results.member_fold[everyone][:, None]
    thresholds = None
    if not results.multi_class and split == "train":
        thresholds = np.full((len(clips), len(results.labels)), np.nan)
        for fold, setting in chosen.items():
            thresholds[results.clip_fold[clips] == fold] = study.thresholds(setting, fold)
    elif not results.multi_class:
        thresholds = np.broadcast_to(_pooled_thresholds(study, chosen), (len(clips), len(results.labels)))
    members = allowed.sum(axis=0)
    weight = (allowed / np.maximum(members, 1))[..., None]  # (members, K, 1)
    mean = np.where(members[:, None] > 0, (weight * probabilities).sum(axis=0), np.nan)
    spread = np.sqrt((weight * (probabilities - mean) ** 2).sum(axis=0))
    return Predictions(
        labels=results.labels,
        clip_name=results.clip_name[clips],
        clip_id=results.clip_id[clips],
        mean=mean,
        spread=spread,
        thresholds=thresholds,
        decisions=decide(mean.astype(np.float32), thresholds, study.evaluation, results.labels),
        members=members,
    )


def speaking_members(results: StudyResults, evaluation: dict, member: str | None = None) -> np.ndarray:
    """``(M',)`` the members behind :func:`predict`, of which those that held a training clip out predict it."""
    study = StudyMembers(results, resolve_evaluation(evaluation, results.labels, results.multi_class))
    return _speakers(study, member)[1]


def _speakers(study: StudyMembers, member: str | None) -> tuple[dict[int, int], np.ndarray]:
    """The setting of each fold that has a say, and the members, all finished ones of these settings or the one."""
    if member is not None:
        row = _find_member(study.results, member)
        return {int(study.results.member_fold[row]): int(study.setting[row])}, np.array([row])
    chosen = dict(zip(study.folds.tolist(), study.choose_settings(), strict=True))
    return chosen, np.concatenate([study.members(setting, fold) for fold, setting in chosen.items()])


def _find_member(results: StudyResults, member: str) -> int:
    ids = results.member_id.tolist()
    if member not in ids:
        near = difflib.get_close_matches(member, ids, 3, 0.0)
        raise UserError(f"--member={member}: this study has no such member; near are {', '.join(near)}")
    row = ids.index(member)
    if not results.ok[row]:
        raise UserError(f"--member={member}: this member diverged in training; choose another")
    return row


def _pooled_thresholds(study: StudyMembers, chosen: dict[int, int]) -> np.ndarray:
    """``(L,)`` thresholds from the inner predictions of all folds: none of the test clips is among them."""
    if not study.tuned or len(chosen) == 1:
        fold, setting = next(iter(chosen.items()))
        return study.thresholds(setting, fold)
    parts = [study.inner_rows(setting, fold) for fold, setting in chosen.items()]
    truth, probabilities, mask = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    if not len(truth):
        raise UserError(
            "no inner-split predictions to tune thresholds on; set config.evaluation.thresholds to 'fixed', or train "
            "with an inner split"
        )
    return tune_thresholds(truth, probabilities, study.evaluation["thresholds"], mask)


def predict_run(
    workdir: str | os.PathLike, *, split: str = "test", member: str | None = None, submission: str | None = None
) -> None:
    """Prints the predictions of a run and writes its submission file.

    Args:
        workdir: The run folder.
        split: ``'test'`` or ``'train'``.
        member: A member's id, or None for the ensemble.
        submission: Where to write ``Id,Negative,Positive,Repression,Surprise,Others``, the challenge's file for its
            five labels; None writes nothing.

    Raises:
        UserError: As :func:`predict`, or the file cannot be written.
    """
    results = StudyResults.load(workdir)
    if submission and results.labels != LABELS:
        raise UserError(
            f"--submission={submission}: the challenge's file is for {', '.join(LABELS)}; this study's labels are "
            f"{', '.join(results.labels)}: leave the flag out"
        )
    predictions = predict(results, read_evaluation(workdir), split=split, member=member)
    print(format_predictions(predictions))
    if submission:
        if not predictions.members.all():
            if member is None:
                raise UserError(f"only some folds of this study were trained; a submission needs all {split} clips")
            raise UserError(
                f"--member={member} held out only a part of the {split} clips; a submission needs all of them: use "
                "the ensemble"
            )
        write_submission(submission, predictions.clip_id, predictions.decisions)
        print(f"submission: {submission}")


def format_predictions(predictions: Predictions) -> str:
    """A table for the terminal: probability ± spread over members, ``*`` where the label is predicted."""
    column = max(15, *(len(label) + 2 for label in predictions.labels))
    width = max(len("clip"), *(len(name) for name in predictions.clip_name))
    several = predictions.members.max() > 1
    lines = [f"{'clip':<{width}}" + "".join(f"{label:>{column}}" for label in predictions.labels)]
    for row, name in enumerate(predictions.clip_name):
        cells = [
            f"{mean:.2f}{f' ± {spread:.2f}' if several else ''} {'*' if present else ' '}"
            if np.isfinite(mean)
            else "-  "
            for mean, spread, present in zip(
                predictions.mean[row], predictions.spread[row], predictions.decisions[row], strict=True
            )
        ]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>{column}}" for cell in cells))
    members = f"; ± standard deviation over {predictions.members.max()} members" if several else ""
    lines.append(f"* predicted{members}")
    return "\n".join(lines)
