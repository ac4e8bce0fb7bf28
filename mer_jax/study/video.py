"""A video of one's own through a trained study: from the file to probabilities and a picture."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mer_jax.clips.apex import ApexConfig, find_apex, motion_intensity
from mer_jax.clips.crops import Box, CropConfig, FaceSearch, crop_clip, face_box
from mer_jax.clips.faces import FaceDetector
from mer_jax.clips.flow import FlowConfig, dense_flow, flow_channels, resize_flow, to_grey
from mer_jax.clips.resample import resample_indices
from mer_jax.clips.video import MIN_FRAMES, Stretch, choose_stretch, read_video
from mer_jax.errors import UserError
from mer_jax.fields import SECTION, check_fields
from mer_jax.files import read_json
from mer_jax.models.registry import build_learner
from mer_jax.report.flow_picture import FlowPicture, save_picture
from mer_jax.study import engine
from mer_jax.study.checkpoints import load_tree
from mer_jax.study.data import StudyData, prepare_features, prepare_flow
from mer_jax.study.devices import current_platform
from mer_jax.study.predict import Predictions, predict
from mer_jax.study.results import APEX_OFFSET, NO_FOLD, ONSET_APEX, PHASES, TEST, UNKNOWN_LABEL, StudyResults
from mer_jax.study.summary import read_evaluation
from mer_jax.study.train import _load_maps
from mer_jax.study.validation import input_channels, uses_flow

_AGAIN = "put a copy of it back, or train the study again, in another --workdir"
_PHASE_NAMES = {ONSET_APEX: "onset to apex", APEX_OFFSET: "apex to offset"}
# Side at which the picture shows frames, where they hold so much.
_SHOWN_SIZE = 640
# At which motion is measured for a study of features, whose own crops are larger.
_MOTION_SIZE = 224
# Mean motion in px below which frames are alike: equal ones have flow in its last bits, a camera's noise has far more.
_REST = 1e-4


@dataclasses.dataclass(frozen=True)
class Look:
    """What is seen of a stretch of a video.

    Attributes:
        stretch: The stretch.
        box: Where the face is cut out of each of its frames.
        grey: ``(T, S, S)`` uint8, the cut-out face.
        shown: ``(3, S', S', 3)`` uint8 RGB, the face at onset, apex and offset, as fine as the video has it up to 640.
        intensity: ``(T,)`` summed motion against the onset.
        apex: Index of the apex, from 1 to T - 2.
        faceless: Those of onset, apex and offset in whose frame no face is found there.
    """

    stretch: Stretch
    box: Box
    grey: np.ndarray
    shown: np.ndarray
    intensity: np.ndarray
    apex: int
    faceless: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class VideoPrediction:
    """What a study says of a video.

    Attributes:
        look: What was seen.
        flow: ``(P, S, S, 2)`` px, of the phases that the study takes; P = 0 for a study of features.
        phases: Names of these phases.
        predictions: Of the one clip that the video is.
        streams: ``(R, S)`` attention to the streams, mean over members; a row for each block and phase.
        stream_rows: What each row is.
        stream_names: S names; empty for a model without such attention.
    """

    look: Look
    flow: np.ndarray
    phases: tuple[str, ...]
    predictions: Predictions
    streams: np.ndarray
    stream_rows: tuple[str, ...]
    stream_names: tuple[str, ...]


def predict_video(
    workdir: str | os.PathLike,
    video: str | os.PathLike,
    *,
    onset: str | None = None,
    offset: str | None = None,
    member: str | None = None,
    picture: str | os.PathLike | None = None,
) -> None:
    """Prints what a study says of a video, and draws it.

    Args:
        workdir: Folder of a finished run.
        video: The video, of any length.
        onset: Frame number or time (``'0.4s'``) of the first frame that belongs to the expression.
        offset: The same for the last one.
        member: A member's id, or None for the ensemble.
        picture: PNG to write; None writes none.

    Raises:
        UserError: As :func:`look_at_video` and :func:`run_study`; the message names the file and the remedy.
    """
    results, config = StudyResults.load(workdir), read_config(workdir)
    crop, flow_config, apex_config = _settings(config)
    look = look_at_video(video, crop, flow_config, apex_config, onset=onset, offset=offset)
    prediction = run_study(workdir, config, results, look, video, member=member)
    print(format_prediction(prediction, str(video)))
    for note in _notes(config, look):
        print(f"note: {note}")
    if picture:
        save_picture(picture, _picture(prediction, Path(video).name, apex_config.smooth))
        print(f"picture: {picture}")


def read_config(workdir: str | os.PathLike) -> ConfigDict:
    """The config of a run.

    Raises:
        UserError: It is missing or cannot be read.
    """
    path, remedy = Path(workdir) / "config.json", "give a folder as scripts/train.py wrote it"
    config = ConfigDict(read_json(path, remedy))
    check_fields(config, f"{path}: config", {"data": SECTION, "model": SECTION}, remedy, others=config)
    return config


def look_at_video(
    video: str | os.PathLike,
    crop: CropConfig,
    flow: FlowConfig,
    apex: ApexConfig,
    *,
    onset: str | None = None,
    offset: str | None = None,
) -> Look:
    """Chooses a stretch of a video, cuts its face out, and finds the apex.

    The video is read once to choose, once for the face and once for the crops, so that it may be of any length.

    Args:
        video: The video.
        crop: How the study cuts faces out.
        flow: How motion is measured.
        apex: How the apex is found.
        onset: As in :func:`~mer_jax.clips.video.choose_stretch`.
        offset: Likewise.

    Raises:
        UserError: The video cannot be read, is too short, shows no face, or nothing in it moves.
    """
    with FaceDetector(crop.min_confidence) as detector:
        stretch = choose_stretch(video, detector, onset=onset, offset=offset, crop=crop)
        search = FaceSearch(crop, detector)
        for frame in read_video(video, stretch.onset, stretch.offset + 1):
            search.look(frame)
        box = search.box()
        named = f"frames {stretch.onset} to {stretch.offset}"
        if not box.found:
            where = "the first of " if crop.rule == "first" else ""
            raise UserError(f"{video}: no face found in {where}{named}; choose --onset and --offset where one is seen")
        frames = read_video(video, stretch.onset, stretch.offset + 1)
        grey = np.stack([to_grey(crop_clip([frame], box, crop.size)[0]) for frame in frames])
        intensity = motion_intensity(grey, flow, apex.compensate, apex.blink)
        if intensity.max() < _REST * grey[0].size:
            raise UserError(f"{video}: nothing moves in {named}, all are alike; choose a stretch with motion")
        middle = find_apex(intensity, apex.smooth)
        moments = {"onset": 0, "apex": middle, "offset": stretch.num_frames - 1}
        frames = list(_frames_at(video, stretch, moments.values()))
        here = [face_box([frame], crop, detector) for frame in frames]
    faceless = tuple(name for name, found in zip(moments, here, strict=True) if not _same_place(found, box))
    shown = crop_clip(frames, box, max(crop.size, min(box.width, _SHOWN_SIZE)))
    return Look(stretch, box, grey, shown, intensity, middle, faceless)


def crop_frames(
    video: str | os.PathLike, stretch: Stretch, box: Box, size: int, indices: Sequence[int] | np.ndarray
) -> np.ndarray:
    """Cuts the face out of some frames of a stretch.

    Args:
        video: The video.
        stretch: The stretch.
        box: Where to cut.
        size: Side S of the result in px.
        indices: Frames of the stretch, from 0, rising.

    Returns:
        ``(len(indices), S, S, 3)`` uint8 RGB.
    """
    return crop_clip(_frames_at(video, stretch, indices), box, size)


def _frames_at(video: str | os.PathLike, stretch: Stretch, indices: Iterable[int]) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8 RGB, chosen frames of a stretch in order of time."""
    wanted = {int(index) for index in indices}
    frames = enumerate(read_video(video, stretch.onset, stretch.offset + 1))
    return (frame for index, frame in frames if index in wanted)


def _same_place(one: Box, other: Box) -> bool:
    """Whether a face was found whose box has its middle in the other box."""
    x, y = one.left + one.width / 2 - other.left, one.top + one.height / 2 - other.top
    return one.found and 0 <= x <= other.width and 0 <= y <= other.height


def _settings(config: ConfigDict) -> tuple[CropConfig, FlowConfig, ApexConfig]:
    """How a study's own clips were cut out, and how their motion and apex were found.

    A study of features knows no motion; what the picture shows of it has settings of its own.
    """
    data = config.data
    if "crop" in data:
        return CropConfig(**dict(data.crop)), FlowConfig(**dict(data.flow)), ApexConfig(**dict(data.apex))
    if uses_flow(config):
        from data_builders.megc2019 import DEFAULT_CROP

        raw = _raw_options(config)
        crop, apex = (raw[name] for name in ("crop", "apex"))
        # A video is never cropped already, and no sheet tells its apex.
        return (
            crop if isinstance(crop, CropConfig) else DEFAULT_CROP,
            FlowConfig(),
            apex if isinstance(apex, ApexConfig) else ApexConfig(),
        )
    return dataclasses.replace(CropConfig(), size=_MOTION_SIZE), FlowConfig(), ApexConfig()


def _raw_options(config: ConfigDict) -> Mapping:
    """How a study of the composite made flow of frames; those of published or demo images are taken for ours."""
    from data_builders import raw_options
    from data_builders.megc2019 import RAW_DEFAULTS

    return raw_options(config.data) if config.data.dataset == "megc2019/raw" else RAW_DEFAULTS


def _notes(config: ConfigDict, look: Look) -> list[str]:
    notes = []
    if look.stretch.chosen == "motion":
        notes.append(
            "the frames were chosen by motion alone, as blinks and speech would be, too; --onset and --offset choose "
            "others"
        )
    if look.faceless:
        notes.append(
            f"no face is found in the frame of {' and '.join(look.faceless)}, so that its motion may be another's; "
            "--onset and --offset choose others"
        )
    if look.stretch.num_frames > MIN_FRAMES and look.apex == look.stretch.num_frames - 2:
        notes.append(
            "the motion still grows at the end of these frames, so that its largest is hardly an apex; --onset and "
            "--offset choose others"
        )
    if config.data.dataset.endswith("/demo"):
        notes.append("the study was trained on rendered demo clips, so its probabilities say nothing about people")
    if config.data.dataset == "megc2019/folder":
        notes.append(
            "how the flow images of this study were made is not known; those of the video are TV-L1 of the face as "
            "cut out here, so trust its probabilities the less"
        )
    return notes


def run_study(
    workdir: str | os.PathLike,
    config: ConfigDict,
    results: StudyResults,
    look: Look,
    video: str | os.PathLike,
    *,
    member: str | None = None,
) -> VideoPrediction:
    """Lets all finished members of a study predict what was seen of a video.

    The video is one more test clip of the study: the same preparation with the constants of each member's fold, the
    same combination of phases, and the thresholds that test clips get.

    Args:
        workdir: Folder of the run.
        config: Its config.
        results: Its results.
        look: What was seen.
        video: The video, from which a study of features still cuts its own frames.
        member: A member's id, or None for the ensemble.

    Raises:
        UserError: The study takes features that only files hold, or its folder is not whole.
    """
    maps = _load_maps(Path(workdir), _AGAIN)
    flow, phases = np.zeros((0, *look.grey.shape[1:], 2), np.float32), ("",)
    if uses_flow(config):
        phases = tuple(config.data.phases)
        flow, inputs = _flow_of(config, look, phases)
        data = _clip_of(results, {"flow": inputs}, phases, None)
        prepared, fitted = prepare_flow(data, np.full(1, NO_FOLD), 1, config.data.normalise, _kept(maps, config))
        arrays = {"flow": prepared[None]}
        device_maps = {
            name: tuple(np.stack([getattr(one, field) for one in own]) for field in ("mean", "scale"))
            for name, own in fitted.items()
            if own
        }
    else:
        features, mask = _features_of(config, look, video)
        data = _clip_of(results, features, phases, mask)
        steps = {name: dict(step) for name, step in config.data.modalities.items()}
        prepared, _ = prepare_features(data, np.full(1, NO_FOLD), 1, steps, _kept(maps, config))
        arrays, device_maps = {"features": prepared, "frame_mask": mask[None]}, {}
    shared = engine.Arrays(
        inputs=jax.tree.map(jnp.asarray, arrays),
        labels=jnp.zeros((len(phases), len(results.labels))),
        maps=jax.tree.map(jnp.asarray, device_maps),
    )
    probabilities, attention = _members_say(Path(workdir), config, results, shared)
    name = "video"
    while name in results.clip_name:
        name += "_"
    predictions = predict(
        _with_clip(results, name, phases, probabilities), read_evaluation(workdir), split=TEST, member=member
    )
    (row,) = np.flatnonzero(predictions.clip_name == name)
    mine = dataclasses.replace(
        predictions,
        **{
            field: getattr(predictions, field)[row : row + 1]
            for field in ("clip_name", "clip_id", "mean", "spread", "decisions", "members")
        },
        thresholds=None if predictions.thresholds is None else predictions.thresholds[row : row + 1],
    )
    speakers = results.ok if member is None else results.member_id == member
    streams, rows = [], []
    for block, weights in sorted(attention.items() if len(results.stream_name) else ()):  # (M, P, S)
        for phase, mean in zip(phases, weights[speakers].mean(axis=0), strict=True):
            streams.append(mean)
            rows.append(f"block {block.removeprefix('streams')}, {_PHASE_NAMES[phase]}")
    stream_names = tuple(results.stream_name.tolist())
    return VideoPrediction(
        look=look,
        flow=flow,
        phases=phases if uses_flow(config) else (),
        predictions=mine,
        streams=np.array(streams).reshape(len(rows), len(stream_names)),
        stream_rows=tuple(rows),
        stream_names=stream_names,
    )


def _flow_of(config: ConfigDict, look: Look, phases: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Flow ``(P, S, S, 2)`` in px of the crop, and what the study makes of it, ``(P, H, W, C)`` float32."""
    pictures = look.grey[[0, look.apex, len(look.grey) - 1]]
    rows = [PHASES.index(phase) for phase in phases]
    channels, size = tuple(config.data.channels), config.data.size
    if "flow" in config.data:
        flow = dense_flow(pictures[:-1], pictures[1:], FlowConfig(**dict(config.data.flow)))[rows]
        stored = flow_channels(flow, channels)
    else:
        from data_builders.megc2019.flow_images import CHANNELS, as_image, flow_maps

        raw = _raw_options(config)
        flow = dense_flow(pictures[:-1], pictures[1:], raw["flow"])[rows]
        maps = flow_maps(pictures, raw["flow"], raw["size"])[rows]  # (P, S, S, 3)
        if raw["store"] == "image":
            stored = as_image(maps).astype(np.float32)[..., [CHANNELS.index(name) for name in channels]]
        else:
            stored = flow_channels(maps[..., :2], channels)
    return flow, stored if size in (0, stored.shape[1]) else resize_flow(stored, size)


def _features_of(config: ConfigDict, look: Look, video: str | os.PathLike) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Modality to ``(1, T, D)`` float32 of resampled frames, and their mask ``(1, T)``."""
    from mer_jax.extractors.base import EXTRACTORS, fill_missing, get_extractor

    steps = config.data.modalities
    own = {text.partition("=")[0] for text in config.data.features}
    for modality, step in steps.items():
        if step.extractor not in EXTRACTORS or step.extractor in own:
            raise UserError(
                f"config.data.modalities.{modality}.extractor={step.extractor!r} reads features from files, which a "
                f"video has none of; choose a study of {', '.join(EXTRACTORS)}"
            )
    count, num_frames = look.stretch.num_frames, config.data.num_frames
    # Only what is used is cut out: crops for features are large.
    used, places = np.unique(resample_indices(count, num_frames), return_inverse=True)
    crops = crop_frames(video, look.stretch, look.box, CropConfig().size, used)
    features = {}
    for name in {step.extractor for step in steps.values()}:
        with get_extractor(name).open() as session:
            features[name], missing = fill_missing(session(crops))
        if missing == len(crops):
            raise UserError(f"{video}: {name} finds no face; choose --onset and --offset where it is seen better")
    real = num_frames if config.data.short == "repeat" else min(count, num_frames)
    return (
        {modality: features[step.extractor][places][None] for modality, step in steps.items()},
        np.arange(num_frames)[None] < real,
    )


def _kept(maps: Mapping, config: ConfigDict) -> Mapping:
    """The maps that were fitted in training; nothing may be fitted to a video."""
    if uses_flow(config):
        needed = ["flow"] if config.data.normalise in ("standard", "scale") else []
    else:
        needed = [name for name, step in config.data.modalities.items() if step.normalise == "standard" or step.reduce]
    if not set(needed) <= set(maps):
        raise UserError("the run's folder lacks feature_maps.npz, which was fitted in training; train the study again")
    return maps


def _clip_of(results: StudyResults, features: Mapping, phases: Sequence[str], mask: np.ndarray | None) -> StudyData:
    """The video as a data set of one clip."""
    return StudyData(
        clip_name=np.array(["video"]),
        clip_id=np.zeros(1, np.int64),
        clip_subject=np.array([""]),
        clip_split=np.array([TEST]),
        clip_database=np.array([""]),
        clip_labels=np.full((1, len(results.labels)), UNKNOWN_LABEL, np.int8),
        sample_clip=np.zeros(len(phases), np.int32),
        sample_view=np.full(len(phases), "c"),
        sample_phase=np.array(phases),
        face_found=np.ones(len(phases), bool),
        features=features,
        frame_mask=mask,
        label_names=results.labels,
        task=str(results.task),
    )


def _members_say(
    workdir: Path, config: ConfigDict, results: StudyResults, arrays: engine.Arrays
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """``(M, P, L)`` probabilities of all members and their attention, name to ``(M, P, ...)``."""
    jax.config.update("jax_default_matmul_precision", "highest")
    learner = build_learner(config.model, input_channels(config), len(results.labels), current_platform())
    one = jax.tree.map(lambda x: x[0, :1], arrays.inputs)
    abstract = jax.eval_shape(learner.init, jax.random.key(0), one)
    count = len(results.member_id)
    index = jnp.arange(arrays.labels.shape[0], dtype=jnp.int32)

    @jax.jit
    def say(variables, fold):
        logits, attention = engine.predict_samples(learner, variables, arrays, fold, index, len(index))
        return jax.nn.softmax(logits) if results.multi_class else jax.nn.sigmoid(logits), attention

    said = []
    for number, rows in enumerate(_blocks(workdir, count)):
        size = len(rows)
        block = jax.tree.map(lambda x, size=size: jax.ShapeDtypeStruct((size, *x.shape), x.dtype), abstract)
        variables = load_tree(workdir / "params" / f"block_{number:04d}", block, _AGAIN)
        for place, row in enumerate(rows):
            own = jax.tree.map(lambda x, place=place: x[place], variables)
            said.append(jax.device_get(say(own, jnp.int32(results.member_fold[row]))))
    probabilities = np.stack([each for each, _ in said])
    probabilities[~results.ok] = np.nan
    return probabilities, {name: np.stack([attention[name] for _, attention in said]) for name in said[0][1]}


def _blocks(workdir: Path, count: int) -> list[range]:
    """Which members each block of parameters holds."""
    path = workdir / "blocks.json"
    size = read_json(path, "train the study again").get("members_together")
    if not isinstance(size, int) or size < 1:
        raise UserError(f"{path}: members_together is {size!r}, no number; train the study again")
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _with_clip(results: StudyResults, name: str, phases: Sequence[str], probabilities: np.ndarray) -> StudyResults:
    """The results with one more test clip, predicted as told."""
    more = len(phases)

    def longer(values: np.ndarray, *new) -> np.ndarray:
        return np.concatenate([values, np.array(new, values.dtype if values.dtype.kind != "U" else np.str_)])

    return dataclasses.replace(
        results,
        clip_name=longer(results.clip_name, name),
        clip_id=longer(results.clip_id, int(results.clip_id.max()) + 1),
        clip_subject=longer(results.clip_subject, ""),
        clip_split=longer(results.clip_split, TEST),
        clip_database=longer(results.clip_database, ""),
        clip_labels=longer(results.clip_labels, np.full(len(results.labels), UNKNOWN_LABEL)),
        clip_fold=longer(results.clip_fold, NO_FOLD),
        sample_clip=longer(results.sample_clip, *[len(results.clip_name)] * more),
        sample_view=longer(results.sample_view, *["c"] * more),
        sample_phase=longer(results.sample_phase, *phases),
        probabilities=np.concatenate([results.probabilities, probabilities.astype(np.float32)], axis=1),
        inner=np.concatenate([results.inner, np.zeros((len(results.member_id), more), bool)], axis=1),
    )


def format_prediction(prediction: VideoPrediction, name: str) -> str:
    """A table for the terminal: one row a label."""
    told, look = prediction.predictions, prediction.look
    several = told.members[0] > 1
    width = max(len("label"), *(len(label) for label in told.labels))
    lines = [
        f"{name}: {_frames_told(look.stretch)}",
        f"apex: frame {look.stretch.onset + look.apex} ({_seconds(look.stretch, look.apex)})",
        "",
        f"{'label':<{width}}  probability" + ("  spread" if several else "")
        + ("" if told.thresholds is None else "  threshold"),
    ]  # fmt: skip
    for column, label in enumerate(told.labels):
        cells = [f"{label:<{width}}  {told.mean[0, column]:>11.2f}"]
        cells += [f"{told.spread[0, column]:>6.2f}"] if several else []
        cells += [] if told.thresholds is None else [f"{told.thresholds[0, column]:>9.2f}"]
        cells += ["predicted"] if told.decisions[0, column] else []
        lines.append("  ".join(cells))
    lines.append("")
    lines.append(f"mean and standard deviation over {told.members[0]} members" if several else "one member")
    return "\n".join(lines)


def _frames_told(stretch: Stretch) -> str:
    how = {"given": "as asked", "whole": "the whole video", "motion": "chosen by motion"}[stretch.chosen]
    when = f"{stretch.times[0]:.2f} to {stretch.times[-1]:.2f} s"
    return f"frames {stretch.onset} to {stretch.offset} ({when}) of {stretch.rate:g} a second, {how}"


def _seconds(stretch: Stretch, index: int) -> str:
    return f"{stretch.times[index]:.2f} s"


def _picture(prediction: VideoPrediction, name: str, smooth: float) -> FlowPicture:
    look, told = prediction.look, prediction.predictions
    stretch = look.stretch
    moments = {"onset": 0, "apex": look.apex, "offset": stretch.num_frames - 1}
    members = f"ensemble of {told.members[0]} members" if told.members[0] > 1 else "one member"
    return FlowPicture(
        title=name,
        note=f"{_frames_told(stretch)}; {members}",
        frames=list(look.shown),
        frame_names=[f"{word}, frame {stretch.onset + t}, {_seconds(stretch, t)}" for word, t in moments.items()],
        flows=prediction.flow,
        flow_names=[f"flow from {_PHASE_NAMES[phase]}" for phase in prediction.phases],
        intensity=look.intensity / look.grey[0].size,
        apex=look.apex,
        smooth=smooth,
        times=np.array(stretch.times),
        label_names=told.labels,
        mean=told.mean[0],
        spread=told.spread[0],
        thresholds=None if told.thresholds is None else told.thresholds[0],
        decisions=told.decisions[0],
        stream_names=prediction.stream_names,
        streams=prediction.streams,
        stream_rows=prediction.stream_rows,
    )
