"""Pictures of single held-out clips: from a run's files for its report, and of any clip that is asked for."""

import io
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mer_jax.errors import UserError
from mer_jax.files import read_json
from mer_jax.report.attention_picture import AttentionPicture, HeatMap, draw_picture, save_picture
from mer_jax.report.canvas import PRINT, save_png
from mer_jax.study.predict import Predictions, predict, speaking_members
from mer_jax.study.results import StudyResults, is_stream
from mer_jax.study.shown import ShownClip, choose_clips, find_sample, frame_attention, load_shown, see_clips

FOLDER = "attention"
NO_MAPS = (
    "What a network attends to within a frame is shown where features are a vision transformer's, extracted with "
    "scripts/extract_features.py --attention."
)


@dataclass(frozen=True)
class ReportPicture:
    """One clip in the report.

    Attributes:
        name: Of the clip and view.
        chosen_for: Labels that it was chosen for.
        text: What it shows, in words.
        png: The file, a pixel to a unit.
    """

    name: str
    chosen_for: tuple[str, ...]
    text: str
    png: bytes


def write_pictures(
    workdir: str | os.PathLike, results: StudyResults, evaluation: Mapping[str, Any]
) -> list[ReportPicture]:
    """Draws the clips that a run keeps for it, into its folder ``attention/`` and for its report.

    Args:
        workdir: The run folder, of which only files are read.
        results: Its results.
        evaluation: Settings, under which clips are predicted.

    Returns:
        The pictures in the order of the labels; none where the run keeps no frames.

    Raises:
        UserError: The run keeps damaged frames, or the folder cannot be written.
    """
    folder = Path(workdir) / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    kept = load_shown(workdir)
    if not kept or not _frame_wise(results):
        return []
    members = speaking_members(results, dict(evaluation))
    predictions = predict(results, dict(evaluation), split="train")
    chosen_for = {str(results.clip_name[clip]): labels for clip, labels in choose_clips(results).items()}
    pictures = []
    for shown in kept:
        picture = _compose(results, predictions, members, shown)
        image = draw_picture(picture, PRINT)
        save_png(folder / f"{shown.name}.png", image)
        stream = io.BytesIO()
        image.reduce(PRINT).save(stream, "PNG")
        labels = tuple(results.labels[label] for label in chosen_for.get(shown.clip, ()))
        pictures.append(ReportPicture(shown.name, labels, _words(picture), stream.getvalue()))
    return pictures


def picture_of_clip(
    workdir: str | os.PathLike, clip: str, picture: str | os.PathLike, *, member: str | None = None
) -> None:
    """Draws one held-out clip of a study and writes the picture.

    Args:
        workdir: The run folder.
        clip: Name of the clip, or of clip and view as in ``clip_003_r``.
        picture: PNG to write.
        member: A member's id, or None for all that held the clip out.

    Raises:
        UserError: There is no such clip or member, no member held it out, the study attends to no frames, or the
            frames are not where they were.
    """
    from mer_jax.study.summary import read_evaluation

    results = StudyResults.load(workdir)
    found, view = find_sample(results, clip)
    if not _frame_wise(results):
        raise UserError(f"{workdir}: this study attends to no frames; take one of configs/fusion.py")
    evaluation = read_evaluation(workdir)
    members = speaking_members(results, evaluation, member)
    if not (results.member_fold[members] == results.clip_fold[found]).any():
        told = f"--member={member} did not hold it out" if member else "no finished member held it out"
        raise UserError(f"--clip={clip}: {told}; choose a member of fold {results.clip_fold[found]}")
    data = read_json(Path(workdir) / "config.json", "give a folder as scripts/train.py wrote it")["data"]
    (shown,) = see_clips(data, results, [(found, view)])
    predictions = predict(results, evaluation, split="train", member=member)
    save_picture(picture, _compose(results, predictions, members, shown))


def _frame_wise(results: StudyResults) -> bool:
    return any(not is_stream(name) for name in results.attention)


def _compose(
    results: StudyResults, predictions: Predictions, members: np.ndarray, shown: ShownClip
) -> AttentionPicture:
    (clip,) = np.flatnonzero(results.clip_name == shown.clip)
    (row,) = np.flatnonzero(predictions.clip_name == shown.clip)
    attention = frame_attention(results, clip, shown.view, members)
    speaking = members[results.member_fold[members] == results.clip_fold[clip]]
    truth = results.clip_labels[clip]
    labels = ", ".join(label for label, true in zip(results.labels, truth, strict=True) if true == 1) or "none"
    count = len(speaking)
    by = f"mean over the {count} members that held it out" if count > 1 else "one member that held it out"
    view = {"l": ", left view", "r": ", right view"}.get(shown.view, "")
    gate = results.gate[speaking].astype(float).mean(axis=0) if len(results.gate_name) else []
    last = {int(frame): place for place, frame in reversed(list(enumerate(shown.sampled)))}
    known = sorted(last)
    return AttentionPicture(
        title=f"{shown.clip}{view}",
        note=f"Labels: {labels}. Attention and probabilities (of the clip, all views): {by}, ± standard deviation.",
        crops=shown.crops,
        crop_names=[str(frame) for frame in shown.sampled[shown.places]],
        places=shown.places,
        heat_maps=[
            HeatMap(network, shown.maps[modality], shown.areas[modality]) for modality, network in _once(shown.networks)
        ],
        lacking=NO_MAPS,
        attention=attention,
        marks={
            word: float(np.interp(frame, known, [last[each] for each in known])) for word, frame in shown.phases.items()
        },
        label_names=results.labels,
        truth=truth,
        mean=predictions.mean[row],
        spread=predictions.spread[row],
        thresholds=None if predictions.thresholds is None else predictions.thresholds[row],
        decisions=predictions.decisions[row],
        gate=dict(zip(results.gate_name.tolist(), gate, strict=True)),
    )


def _once(networks: Mapping[str, str]) -> Sequence[tuple[str, str]]:
    """Modalities and networks, each network at its first modality."""
    return [(modality, network) for modality, network in networks.items()
            if modality == next(first for first, name in networks.items() if name == network)]  # fmt: skip


def _words(picture: AttentionPicture) -> str:
    """The picture for those who do not see it."""
    told = [f"{picture.title}. {picture.note}"]
    for heat_map in picture.heat_maps:
        row, column = np.unravel_index(heat_map.shares.astype(float).mean(axis=0).argmax(), heat_map.shares.shape[1:])
        rows, columns = heat_map.shares.shape[1:]
        told.append(
            f"{heat_map.name} attends most to the patch in row {row + 1} of {rows}, column {column + 1} of {columns}."
        )
    for name, values in picture.attention.items():
        mean = values.mean(axis=0)
        told.append(
            f"The {name} pool attends most to position {mean.argmax() + 1} of {len(mean)}: {100 * mean.max():.1f} %."
        )
    probabilities = ", ".join(
        f"{label} {value:.2f}" for label, value in zip(picture.label_names, picture.mean, strict=True)
    )
    return " ".join([*told, f"Probabilities: {probabilities}."])
