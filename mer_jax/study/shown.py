"""The few clips that a report shows: which they are, and what of their frames is kept in the run's folder for it."""

import dataclasses
import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mer_jax.clips.resample import resample_indices
from mer_jax.errors import UserError
from mer_jax.files import atomic_savez
from mer_jax.study.results import NO_FOLD, StudyResults, is_stream

FILENAME = "shown.npz"
RULE = (
    "for each label, of the held-out clips that have it, the one whose probability of it is their median (the lower of "
    "two middle ones; mean over views and over all finished members that held the clip out)"
)
_MOST_FRAMES = 9
_SIDE = 160  # of a crop, in pixels


@dataclasses.dataclass(frozen=True)
class ShownClip:
    """Frames of one view of a clip.

    K frames, T positions of a study, S pixels a side.

    Attributes:
        clip: Name of the clip.
        view: Name of the view.
        phases: ``onset``, ``apex`` and ``offset``, those that are known, to their frames.
        sampled: ``(T,)`` int, the clip's frames at the study's positions.
        places: ``(K,)`` int, the positions whose frames are shown.
        crops: ``(K, S, S, 3)`` uint8 RGB, the face in these frames.
        networks: Modality to the name of the network whose attention is known.
        maps: Modality to the shares of its patches, ``(K, h', w')`` float16 of sum 1 at most.
        areas: Modality to the part of a crop that the patches cover: top, left, bottom, right as shares of its sides.
    """

    clip: str
    view: str
    phases: dict[str, int]
    sampled: np.ndarray
    places: np.ndarray
    crops: np.ndarray
    networks: dict[str, str]
    maps: dict[str, np.ndarray]
    areas: dict[str, tuple[float, ...]]

    @property
    def name(self) -> str:
        """The sample's name: the clip's, and the view's where there are several."""
        return self.clip if self.view == "c" else f"{self.clip}_{self.view}"


def choose_clips(results: StudyResults) -> dict[int, list[int]]:
    """Chooses clips by a rule that looks at nothing but the held-out probabilities, :data:`RULE`.

    Args:
        results: The study.

    Returns:
        Index of the clip to the labels that it was chosen for, in the labels' order.
    """
    held = results.ok[:, None] & (results.clip_fold[results.sample_clip] == results.member_fold[:, None])  # (M, N)
    held &= results.scored[results.sample_clip]
    total = np.where(held[..., None], results.probabilities, 0.0).sum(axis=0, dtype=np.float64)  # (N, L)
    sums, counts = np.zeros((len(results.clip_name), len(results.labels))), np.zeros(len(results.clip_name))
    np.add.at(sums, results.sample_clip, total)
    np.add.at(counts, results.sample_clip, held.sum(axis=0))
    mean = sums / np.maximum(counts, 1)[:, None]  # (C, L)
    chosen: dict[int, list[int]] = {}
    for label in range(len(results.labels)):
        clips = np.flatnonzero((counts > 0) & (results.clip_labels[:, label] == 1))
        if len(clips):
            order = clips[np.lexsort([results.clip_name[clips], results.clip_id[clips], mean[clips, label]])]
            chosen.setdefault(int(order[(len(order) - 1) // 2]), []).append(label)
    return chosen


def shown_places(num_positions: int) -> np.ndarray:
    """Which of a clip's positions are shown: the first and every so many after it that they are nine at most."""
    return np.arange(0, num_positions, -(-num_positions // _MOST_FRAMES))


def see_clips(data: Mapping, results: StudyResults, clips: Sequence[tuple[int, str]]) -> list[ShownClip]:
    """Reads frames of clips, and what networks attended to in them where that was kept.

    Args:
        data: ``config.data`` of a study of ``four_dme``.
        results: The study.
        clips: Indices of clips and names of their views.

    Raises:
        UserError: The study's clips are of another kind, or their frames are not where they were.
    """
    from data_builders.four_dme.attention_maps import see_frames

    family, _, name = data["dataset"].partition("/")
    if family != "four_dme":
        raise UserError(f"{data['dataset']}: only clips of four_dme can be shown")
    num_positions = data["num_frames"]

    def places_of(num_frames: int) -> np.ndarray:
        # A clip of fewer frames repeats its last one.
        return shown_places(min(num_frames, num_positions))

    wanted = [(str(results.clip_name[clip]), view) for clip, view in clips]
    extractors = {modality: step["extractor"] for modality, step in data["modalities"].items()}
    seen = see_frames(
        name,
        data["data_dir"],
        wanted,
        tuple(dict.fromkeys(extractors.values())),
        lambda num_frames: resample_indices(num_frames, num_positions)[places_of(num_frames)],
        _SIDE,
    )
    shown = []
    for key in wanted:
        frames = seen[key]
        networks = {modality: network for modality, network in extractors.items() if network in frames.maps}
        shown.append(
            ShownClip(
                clip=key[0],
                view=key[1],
                phases=frames.phases,
                sampled=resample_indices(frames.num_frames, num_positions),
                places=places_of(frames.num_frames),
                crops=frames.crops,
                networks=networks,
                maps={modality: frames.maps[network] for modality, network in networks.items()},
                areas={modality: frames.areas[network] for modality, network in networks.items()},
            )
        )
    return shown


def keep_shown(data: Mapping, results: StudyResults, workdir: str | os.PathLike) -> None:
    """Keeps what the report shows in ``shown.npz``: the first view of each chosen clip.

    Raises:
        UserError: As :func:`see_clips`.
    """
    clips = []
    for clip in choose_clips(results):
        views = results.sample_view[results.sample_clip == clip].tolist()
        clips.append((clip, min(views)))
    save_shown(Path(workdir) / FILENAME, see_clips(data, results, clips))


def save_shown(path: str | os.PathLike, shown: Sequence[ShownClip]) -> None:
    """Writes clips to a file."""
    arrays, told = {}, []
    for number, clip in enumerate(shown):
        told.append({name: getattr(clip, name) for name in ("clip", "view", "phases", "networks", "areas")})
        arrays |= {f"{number}/{name}": getattr(clip, name) for name in ("sampled", "places", "crops")}
        arrays |= {f"{number}/maps/{modality}": maps for modality, maps in clip.maps.items()}
    atomic_savez(path, told=np.array(json.dumps(told)), **arrays)


def load_shown(workdir: str | os.PathLike) -> list[ShownClip]:
    """Reads the clips that a run's report shows; none where none are kept.

    Raises:
        UserError: The file is damaged.
    """
    path = Path(workdir) / FILENAME
    if not path.is_file():
        return []
    try:
        with path.open("rb") as stream, np.load(stream) as archive:
            return [
                ShownClip(
                    **{**facts, "areas": {modality: tuple(area) for modality, area in facts["areas"].items()}},
                    **{name: archive[f"{number}/{name}"] for name in ("sampled", "places", "crops")},
                    maps={modality: archive[f"{number}/maps/{modality}"] for modality in facts["networks"]},
                )
                for number, facts in enumerate(json.loads(str(archive["told"])))
            ]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged; delete it and run scripts/train.py again") from error


def find_sample(results: StudyResults, name: str) -> tuple[int, str]:
    """Finds a held-out clip by its name, or by its name and view as in ``clip_003_r``.

    Args:
        results: The study.
        name: What to look for.

    Returns:
        Index of the clip, and the view, the clip's first where none is named.

    Raises:
        UserError: The study has no such clip, or has not held it out.
    """
    for clip, view in zip(results.sample_clip.tolist(), results.sample_view.tolist(), strict=True):
        if name in (str(results.clip_name[clip]), f"{results.clip_name[clip]}_{view}"):
            if results.clip_fold[clip] == NO_FOLD:
                raise UserError(
                    f"--clip={name}: a test clip; which frames were attended to is kept of held-out training clips only"
                )
            return clip, view
    near = ", ".join(results.clip_name[:3].tolist())
    raise UserError(f"--clip={name}: this study has no such clip; it has {near}, ...")


def frame_attention(results: StudyResults, clip: int, view: str, members: np.ndarray) -> dict[str, np.ndarray]:
    """Which frames the members that held a clip out attended to.

    Args:
        results: The study.
        clip: Index of the clip.
        view: Name of its view.
        members: ``(M',)`` the members that count.

    Returns:
        Modality to ``(M'', T)`` shares of the frames, one row for each of these members that held the clip out.
    """
    (sample,) = np.flatnonzero((results.sample_clip == clip) & (results.sample_view == view))
    rows, columns = np.nonzero(results.curve_sample[members] == sample)
    return {name: values[members[rows], columns] for name, values in results.attention.items() if not is_stream(name)}
