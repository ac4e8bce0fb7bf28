"""Data sets of optical flow: one format for every source of clips.

A record is one view of one clip, with the flow of its phases. Its fields: ``clip``, ``id``, ``subject``, ``database``,
``view``, ``labels``, ``num_frames``, ``box``, ``face_found``, ``onset``, ``apex``, ``offset``, ``apex_annotated`` and
``flow``, {phase: (H, W, C)}; :mod:`data_builders.flow_dataset_builder` says what each of them holds.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_builders.tfds_files import write_dataset

VERSION = "1.0.0"
PHASES = ("onset_apex", "apex_offset")


@dataclass(frozen=True)
class FlowFormat:
    """What all records of a data set have in common.

    Attributes:
        label_names: Names of the L labels or classes.
        task: ``'multi_label'``, or ``'multi_class'`` where labels are one-hot.
        shape: (H, W, C) of the flow of one phase.
        channels: What the C channels are: ``('u', 'v')``, px of the crop, for floats; ``('u', 'v', 'strain')``
            for images of 8 bits.
        dtype: ``'float32'`` or ``'uint8'``.
        phases: Which phases every record has, of :data:`PHASES`.
    """

    label_names: tuple[str, ...]
    task: Literal["multi_label", "multi_class"]
    shape: tuple[int, int, int]
    channels: tuple[str, ...] = ("u", "v")
    dtype: Literal["float32", "uint8"] = "float32"
    phases: tuple[str, ...] = PHASES

    def __post_init__(self):
        if self.task not in ("multi_label", "multi_class"):
            raise ValueError(f"task {self.task!r} is unknown")
        if self.dtype not in ("float32", "uint8"):
            raise ValueError(f"flow is kept as float32 or uint8, not as {self.dtype}")
        if len(self.channels) != self.shape[-1]:
            raise ValueError(f"{self.channels} does not name the channels of {self.shape}")
        if not self.phases or not set(self.phases) <= set(PHASES):
            raise ValueError(f"phases {self.phases} are not among {PHASES}")


def version_dir(data_dir: str | os.PathLike, family: str, config: str, settings: Mapping[str, Any]) -> Path:
    """The place of a data set: other settings have another one, so that none is in the way of another.

    Args:
        data_dir: Where everything is kept.
        family: Name of the data set, such as ``'four_dme_flow'``.
        config: Its configuration, such as ``'demo'``.
        settings: All that the flow depends on beside the source of the clips, JSON-able.
    """
    told = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return Path(data_dir) / family / f"{config}-{told}" / VERSION


def write_flow_dataset(
    target: Path,
    *,
    staging: Path,
    flow_format: FlowFormat,
    records: Mapping[str, Callable[[], Iterable[dict[str, Any]]]],
    facts: Mapping[str, Any],
    description: str,
    citation: str,
) -> None:
    """Writes a data set of flow; it appears at ``target`` only when it is whole.

    Args:
        target: ``<data_dir>/<family>/<config>/<version>``, as :func:`version_dir` gives it.
        staging: Folder on the same disk for what is not whole yet.
        flow_format: What the records hold.
        records: Split (``'train'``, ``'test'``) to a function that yields its records in order, with labels as
            (L,) int8, the box as (4,) int32 and the flow as in ``flow_format``; no split may be empty.
        facts: What the data set says about itself, JSON-able, with at least ``origin`` (a sentence), ``settings``
            (names to values), ``exceptions`` (lines) and ``statistics`` (of each split, as :func:`statistics`
            counts them). What ``flow_format`` says is added.
        description: What the data are, for people.
        citation: BibTeX.

    Raises:
        UserError: The disk refuses.
    """
    facts = {
        **facts,
        "label_names": list(flow_format.label_names),
        "task": flow_format.task,
        "channels": list(flow_format.channels),
        "phases": list(flow_format.phases),
    }
    family, config = target.parents[1].name, target.parents[0].name

    def make_builder(folder: Path):
        from data_builders.flow_dataset_builder import flow_builder

        return flow_builder(
            family,
            config,
            records=records,
            flow_format=flow_format,
            facts=facts,
            description=description,
            citation=citation,
            data_dir=folder,
        )

    card = render_card(f"{family}/{config}", flow_format, facts)
    write_dataset(make_builder, target, staging=staging, pages={"data_card.md": card})


def statistics(rows: Sequence[Mapping[str, Any]], label_names: Sequence[str]) -> dict[str, Any]:
    """Counts what is in the records of one split.

    Args:
        rows: The records, of which the flow is not looked at.
        label_names: Names of the L labels.

    Returns:
        JSON-able counts: clips, samples (clip and view), subjects, labelled clips, clips per label, per number of
        labels and per database, frames per clip where known, samples with a face and with a given apex.
    """
    clips = {row["clip"]: row for row in rows}.values()
    labelled = [row["labels"] for row in clips if min(row["labels"]) >= 0]
    labels = np.array(labelled, np.int64).reshape(-1, len(label_names))  # (clips, L)
    frames = sorted(int(row["num_frames"]) for row in clips if row["num_frames"] >= 0)
    sizes = Counter(labels.sum(axis=1).tolist())
    databases = Counter(row["database"] for row in clips if row["database"])
    return {
        "clips": len(clips),
        "samples": len(rows),
        "subjects": len({row["subject"] for row in clips} - {""}),
        "labelled_clips": len(labelled),
        "clips_per_label": dict(zip(label_names, labels.sum(axis=0).tolist(), strict=True)),
        "clips_per_number_of_labels": {str(size): sizes[size] for size in sorted(sizes)},
        "clips_per_database": {name: databases[name] for name in sorted(databases)},
        "frames": {"min": frames[0], "median": float(np.median(frames)), "max": frames[-1]} if frames else {},
        "faces_found": sum(bool(row["face_found"]) for row in rows),
        "apex_annotated": sum(bool(row["apex_annotated"]) for row in rows),
    }


def render_card(name: str, flow_format: FlowFormat, facts: Mapping[str, Any]) -> str:
    """Writes the page that tells what a data set holds, as Markdown."""
    splits = facts["statistics"]
    several = flow_format.task == "multi_label"
    lines = [f"# {name}", "", facts["origin"], ""]
    lines += [
        f"One record per clip and view with the optical flow of {' and '.join(flow_format.phases)}: "
        f"{' x '.join(map(str, flow_format.shape))} {flow_format.dtype}, channels {', '.join(flow_format.channels)}. "
        f"{'Several labels of a clip may be 1' if several else 'A clip has one class'}. Made by "
        "`scripts/build_data.py`; do not edit.",
        "",
    ]
    lines += ["## Contents", "", f"| | {' | '.join(splits)} |", f"|---|{'---:|' * len(splits)}"]
    databases = sorted({name for counts in splits.values() for name in counts["clips_per_database"]})
    rows = {
        "clips": lambda s: s["clips"],
        **{f"- of {name}": lambda s, name=name: s["clips_per_database"].get(name, 0) for name in databases},
        "samples (clip and view)": lambda s: s["samples"],
        "subjects": lambda s: s["subjects"] or "unknown",
        "frames per clip (min / median / max)": lambda s: (
            "{min} / {median:g} / {max}".format(**s["frames"]) if s["frames"] else "unknown"
        ),
        "samples with a face found": lambda s: f"{s['faces_found']} of {s['samples']}",
        "samples with a given apex": lambda s: f"{s['apex_annotated']} of {s['samples']}",
        "labelled clips": lambda s: s["labelled_clips"],
        **{f"- {label}": lambda s, label=label: s["clips_per_label"][label] for label in flow_format.label_names},
    }
    if several:
        rows["clips by number of labels"] = lambda s: (
            ", ".join(f"{size}: {count}" for size, count in s["clips_per_number_of_labels"].items()) or "-"
        )
    lines += [f"| {name} | {' | '.join(str(row(s)) for s in splits.values())} |" for name, row in rows.items()]
    lines += ["", "## Settings", ""]
    lines += [f"- {name}: {_told(value)}" for name, value in facts["settings"].items()]
    lines += ["", "## Exceptions", ""]
    lines += [f"- {line}" for line in facts["exceptions"]] or ["None."]
    return "\n".join(lines) + "\n"


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_told(inner)}" for name, inner in value.items()) or "none"
    return "none" if value is None else str(value)
