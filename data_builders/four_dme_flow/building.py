"""Builds the data set: clips, then flow (resumable), then TFDS records, moved into place when whole."""

import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_builders.clip_work import say_waiting
from data_builders.flow_records import FlowFormat, statistics, version_dir, write_flow_dataset
from data_builders.four_dme.building import CONFIGS, DEMO_CLIPS, find_clips
from data_builders.four_dme.preparation import fingerprint, sample_name, views_of
from data_builders.four_dme_flow.preparation import PreparedFlow, load_prepared, prepare, settings_of
from data_builders.tfds_files import is_whole, read_metadata
from mer_jax.clips.apex import ApexConfig
from mer_jax.clips.crops import CropConfig
from mer_jax.clips.demo import VERSION as DEMO_VERSION
from mer_jax.clips.flow import FlowConfig
from mer_jax.clips.layouts import LABELS, Clip
from mer_jax.errors import UserError
from mer_jax.files import exclusive
from mer_jax.parallel import Workers

FAMILY = "four_dme_flow"
DEFAULT_CROP = CropConfig(rule="largest", size=224)
_MAX_NAMED = 10
_USED = {
    "demo": (),
    "challenge": ("source", "test_source", "labels", "columns"),
    "release": ("source", "workbook"),
}
_DESCRIPTION = """\
Micro-expression clips as optical flow: one record per clip and view, with the flow from onset to apex and from apex to
offset, u and v in px of the face crop. Several labels may be 1, and -1 stands for a label that is not known.
"""
_CITATION = """\
@article{li2022fourdme,
  title = {4DME: A Spontaneous 4D Micro-Expression Dataset With Multimodalities},
  author = {Li, Xiaobai and Cheng, Shiyang and Li, Yante and Behzad, Muzammil and Shen, Jie and Zafeiriou,
  Stefanos
            and Pantic, Maja and Zhao, Guoying},
  journal = {IEEE Transactions on Affective Computing},
  volume = {14}, pages = {3031--3047}, doi = {10.1109/TAFFC.2022.3182342}
}
"""
_ORIGINS = {
    "demo": "Demo clips, rendered by this library from one public-domain photograph. Results on them are no benchmark.",
    "challenge": "Two-view frames in the layout of the 4DMR challenge; 4DME needs a signed licence.",
    "release": "Grey frames of the 4DME release; 4DME needs a signed licence.",
}


def build(
    config_name: str,
    *,
    data_dir: str | os.PathLike = "data",
    source: str | os.PathLike | None = None,
    test_source: str | os.PathLike | None = None,
    labels: str | os.PathLike | None = None,
    columns: Mapping[str, str] | None = None,
    workbook: str | os.PathLike | None = None,
    crop: CropConfig = DEFAULT_CROP,
    apex: ApexConfig | None = None,
    flow: FlowConfig | None = None,
    workers: Workers = None,
    seed: int = 0,
    demo_clips: tuple[int, int] = DEMO_CLIPS,
) -> Path:
    """Builds ``four_dme_flow/<config_name>``, or finds it built.

    Every combination of settings has its own folder, so that none is in the way of another. Flow is kept clip by clip
    under ``data_dir/work``; a build that was killed, or stopped by a bad clip, goes on from there.

    Args:
        config_name: ``'demo'``, ``'challenge'`` or ``'release'``, as in :func:`data_builders.four_dme.build`.
        data_dir: Where everything is kept.
        source: Challenge: the folder of the sequences; release: the folder of the frames. May be left out where the
            data set is built.
        test_source: Challenge: the folder of the test sequences, ``source/test`` unless given.
        labels: Challenge: the CSV of training labels, ``source/train.csv`` unless given.
        columns: Challenge: names of the CSV's columns, {ours: theirs}.
        workbook: Release: the labelling workbook.
        crop: How faces are cut out.
        apex: How the apex is found.
        flow: How flow is computed.
        workers: Number of processes, one per available processor unless given; or a cluster.
        seed: Demo: seed of the clips.
        demo_clips: Demo: number of training and test clips.

    Returns:
        The folder of the built version, for ``tfds.builder_from_directory``.

    Raises:
        UserError: Something is missing, bad or has changed since it was built; the message names it and the remedy.
        KeyboardInterrupt: Ctrl-C, or SIGTERM while flow is computed; finished clips are kept.
    """
    _check(
        config_name,
        demo_clips,
        source=source,
        test_source=test_source,
        labels=labels,
        columns=columns,
        workbook=workbook,
    )
    apex, flow = apex or ApexConfig(), flow or FlowConfig()
    settings = settings_of(crop, apex, flow)
    if config_name == "demo":
        settings |= {"seed": seed, "demo_clips": list(demo_clips), "demo_version": DEMO_VERSION}
    target = version_dir(data_dir, FAMILY, config_name, settings)
    find = functools.partial(
        find_clips,
        config_name,
        source=source,
        test_source=test_source,
        labels=labels,
        columns=columns,
        workbook=workbook,
        data_dir=data_dir,
        seed=seed,
        demo_clips=demo_clips,
        workers=workers,
    )
    # What is built needs no lock, so that it may lie on a read-only disk. Clips are only compared where they are said.
    if _is_built(target, find() if source is not None else None):
        return target
    if source is None and config_name != "demo":
        raise UserError(
            f"{FAMILY}/{config_name} is not built yet with these settings: say with --source where its frames are "
            f"(4DME needs a signed licence; {FAMILY}/demo needs nothing)"
        )
    work = Path(data_dir) / "work" / FAMILY / config_name
    with exclusive(work, functools.partial(say_waiting, work)):
        if not _is_built(target, None):
            clips = find()
            paths = prepare(clips, crop, apex, flow, work, workers=workers)
            _write(target, work, config_name, clips, paths, settings, crop)
    return target


def _check(config_name: str, demo_clips: tuple[int, int], **sources: Any) -> None:
    """Refuses options that make no sense before anything is done."""
    if config_name not in CONFIGS:
        raise UserError(f"config '{FAMILY}/{config_name}' is unknown; there are {', '.join(CONFIGS)}")
    for name, value in sources.items():
        if value is not None and name not in _USED[config_name]:
            raise UserError(f"{name}: not used by {FAMILY}/{config_name}; leave it out")
    if min(demo_clips) < 1:
        raise UserError(f"demo_clips {demo_clips}: at least one training and one test clip are needed")


def _is_built(target: Path, clips: list[Clip] | None) -> bool:
    built = read_metadata(target, ("content",))
    if built is None:
        return False
    if clips is not None and built["content"] != _content(clips):
        raise UserError(
            f"{target}: frames or labels have changed since it was built; remove this folder to build it again"
        )
    return is_whole(target)


def _content(clips: list[Clip]) -> str:
    told = [
        [
            clip.name,
            clip.id,
            clip.subject,
            clip.labels,
            clip.split,
            fingerprint(clip, clip.onset, clip.apex, clip.offset),
        ]
        for clip in clips
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _write(target, work, config_name, clips, paths, settings, crop) -> None:
    rows: dict[str, list[dict[str, Any]]] = {}
    sources: dict[str, list[tuple[Path, str]]] = {}
    faceless, still, empty = [], [], []
    for clip in clips:
        for view in views_of(clip):
            prepared = load_prepared(paths[clip.name], view)
            rows.setdefault(clip.split, []).append(_row(clip, view, prepared))
            sources.setdefault(clip.split, []).append((paths[clip.name], view))
            if not prepared.box.found:
                faceless.append(sample_name(clip, view))
            if prepared.still:
                still.append(sample_name(clip, view))
            row = rows[clip.split][-1]
            if row["apex"] in (row["onset"], row["offset"]):
                empty.append(sample_name(clip, view))

    def records(split: str) -> Iterator[dict[str, Any]]:
        for row, (path, view) in zip(rows[split], sources[split], strict=True):
            yield row | {"flow": load_prepared(path, view).flow}

    exceptions = []
    if faceless:
        exceptions.append(
            f"no face found, so the '{crop.fallback}' box was cut out; check these clips: {_some(faceless)}"
        )
    if still:
        exceptions.append(f"nothing moves, all flow is zero; check these clips: {_some(still)}")
    if empty:
        exceptions.append(f"the apex is the first or the last frame, one phase is zero flow: {_some(empty)}")
    write_flow_dataset(
        target,
        staging=work / "staging",
        flow_format=FlowFormat(LABELS, "multi_label", (crop.size, crop.size, 2)),
        records={split: functools.partial(records, split) for split in rows},
        facts={
            "origin": _ORIGINS[config_name],
            "settings": settings,
            "content": _content(clips),
            "exceptions": exceptions,
            "statistics": {split: statistics(of_split, LABELS) for split, of_split in rows.items()},
        },
        description=_DESCRIPTION,
        citation=_CITATION,
    )
    for line in exceptions:
        print(f"note: {line}", file=sys.stderr)


def _row(clip: Clip, view: str, prepared: PreparedFlow) -> dict[str, Any]:
    box = prepared.box
    return {
        "clip": clip.name,
        "id": clip.id,
        "subject": clip.subject,
        "database": "",
        "view": view,
        "labels": np.array(clip.labels if clip.labels is not None else [-1] * len(LABELS), np.int8),
        "num_frames": len(clip.frames),
        "box": np.array([box.left, box.top, box.width, box.height], np.int32),
        "face_found": box.found,
        "onset": clip.onset or 0,
        "apex": prepared.apex,
        "offset": len(clip.frames) - 1 if clip.offset is None else clip.offset,
        "apex_annotated": prepared.annotated,
    }


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"{', '.join(names[:_MAX_NAMED])}{more}"
