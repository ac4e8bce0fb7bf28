"""What a built data set holds, in numbers and as a page to read."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mer_jax.clips.layouts import LABELS


def statistics(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts what is in the records of one split.

    Args:
        records: The records, of which the features are not looked at; views of a clip follow one another.

    Returns:
        JSON-able counts: clips, samples, subjects, clips per label, clips per number of labels, frames per
        clip, faces found.
    """
    clips = {record["clip"]: record for record in records}.values()
    labelled = [record["labels"] for record in clips if min(record["labels"]) >= 0]
    labels = np.array(labelled, np.int64).reshape(-1, len(LABELS))
    frames = np.array([record["num_frames"] for record in clips])
    sizes, counts = np.unique(labels.sum(axis=1), return_counts=True)
    return {
        "clips": len(clips),
        "samples": len(records),
        "subjects": len({record["subject"] for record in clips} - {""}),
        "labelled_clips": len(labelled),
        "clips_per_label": dict(zip(LABELS, labels.sum(axis=0).tolist(), strict=True)),
        "clips_per_number_of_labels": {
            str(size): count for size, count in zip(sizes.tolist(), counts.tolist(), strict=True)
        },
        "frames": {
            "min": int(frames.min()),
            "median": float(np.median(frames)),
            "max": int(frames.max()),
            "total": int(frames.sum()),
        },
        "faces_found": sum(bool(record["face_found"]) for record in records),
    }


def render(config: str, facts: Mapping[str, Any]) -> str:
    """Writes the data card of one built configuration as Markdown.

    Args:
        config: Name of the configuration.
        facts: The data set's metadata, see :func:`data_builders.four_dme.build`.
    """
    splits = facts["statistics"]
    lines = [f"# four_dme/{config}", "", facts["origin"], ""]
    lines += ["One record per clip and view; several labels of a clip may be 1. Made by "
              "`scripts/build_data.py`; do not edit.", ""]  # fmt: skip

    lines += ["## Contents", "", f"| | {' | '.join(splits)} |", f"|---|{'---:|' * len(splits)}"]
    rows = {
        "clips": lambda s: s["clips"],
        "samples (clip and view)": lambda s: s["samples"],
        "subjects": lambda s: s["subjects"] or "unknown",
        "frames per clip (min / median / max)": lambda s: "{min} / {median:g} / {max}".format(**s["frames"]),
        "samples with a face found": lambda s: f"{s['faces_found']} of {s['samples']}",
        "labelled clips": lambda s: s["labelled_clips"],
        **{f"- {label}": lambda s, label=label: s["clips_per_label"][label] for label in LABELS},
        "clips by number of labels": lambda s: (
            ", ".join(f"{size}: {count}" for size, count in s["clips_per_number_of_labels"].items()) or "-"
        ),
    }
    lines += [f"| {name} | {' | '.join(str(row(s)) for s in splits.values())} |" for name, row in rows.items()]

    lines += [
        "",
        "## Features",
        "",
        "| name | modality | D | licence | preprocessing | weights (SHA-256) |",
        "|---|---|---:|---|---|---|",
    ]
    for name, told in facts["extractors"].items():
        cells = (name, told["modality"], told["dim"], told["licence"], told["preprocessing"], _weights(told))
        lines.append(f"| {' | '.join(map(str, cells))} |")

    crop = ", ".join(f"{name} {value}" for name, value in facts["settings"]["crop"].items())
    frames = "every frame" if "rule" in facts["settings"]["crop"] else "the first frame"
    lines += ["", f"Face crop, from {frames} of each view: {crop}.", "", "## Exceptions", ""]
    lines += [f"- {line}" for line in facts["exceptions"]] or ["None: a face was found in every sample and frame."]
    return "\n".join(lines) + "\n"


def _weights(told: Mapping[str, Any]) -> str:
    """Which weights made features, and where those are from that they did not make."""
    parts = []
    if told.get("weights_sha256"):
        parts.append(f"{told['weights']}, {told['weights_sha256']}, {told['dtype']}")
    if told.get("imported"):
        parts.append(f"{told['imported_samples']} of {told['samples']} samples from {told['imported']}")
    return "; ".join(parts) or "-"
