"""A built TFDS data set of flow as plain arrays."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mer_jax.clips.flow import flow_channels, resize_flow
from mer_jax.errors import UserError
from mer_jax.study.data import StudyData

_SPLITS = ("train", "test")


def load_flow_dataset(
    version_dir: Path,
    *,
    channels: Sequence[str] = ("u", "v", "m"),
    phases: Sequence[str] = ("onset_apex", "apex_offset"),
    size: int | None = None,
) -> StudyData:
    """Reads a built data set of flow: every view and phase of a clip is a sample.

    Samples are ordered by split (train first), the clip's id and name, view, then phase as in ``phases``.

    Args:
        version_dir: Folder of the built version, as the builders of flow return it.
        channels: Which channels, in order. Where u and v are stored in px, ``'m'`` and ``'strain'`` are derived, at the
            stored size; flow images of 8 bits hold what they hold.
        phases: Which phases, of ``'onset_apex'`` and ``'apex_offset'``.
        size: Side in pixels to which flow is averaged down; None for the size that is stored. Displacements stay px of
            the crop in which they were measured.

    Returns:
        The data, with ``features['flow']`` ``(N, H, W, C)`` float32 and no frame mask.

    Raises:
        UserError: The data set lacks a channel, a phase or a label, or holds values that are not finite.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(version_dir)
    facts = builder.info.metadata
    stored = tuple(facts["channels"])
    available = tuple(dict.fromkeys((*stored, "m", "strain"))) if stored == ("u", "v") else stored
    for field, wanted, found in (("channels", channels, available), ("phases", phases, tuple(facts["phases"]))):
        lacking = [name for name in wanted if name not in found]
        if lacking:
            raise UserError(
                f"config.data.{field}: the data set in {version_dir} has no {lacking[0]!r}; it has {', '.join(found)}"
            )
    records = []
    for split in _SPLITS:
        if split in builder.info.splits and builder.info.splits[split].num_examples:
            source = builder.as_data_source(split)
            records += [(split, record) for record in source.__getitems__(range(len(source)))]
    if not records:
        raise UserError(f"{version_dir}: the data set holds no clips; build it anew")
    records.sort(key=lambda item: (item[0] == "test", int(item[1]["id"]), item[1]["clip"], item[1]["view"]))

    clips: dict[str, tuple] = {}
    sample_clip, sample_view, sample_phase, face_found, flows = [], [], [], [], []
    for split, record in records:
        name, view = record["clip"].decode(), record["view"].decode()
        labels = np.asarray(record["labels"], np.int8)
        if split == "train" and (labels < 0).any():
            raise UserError(f"clip {name}: a training clip without labels in {version_dir}; build the data set anew")
        told = (int(record["id"]), record["subject"].decode(), record["database"].decode(), split, labels)
        clips.setdefault(name, told)
        for phase in phases:
            flow = np.asarray(record["flow"][phase], np.float32)  # (H, W, stored channels)
            if not np.isfinite(flow).all():
                raise UserError(
                    f"clip {name}, view {view}: its flow holds values that are not finite; build the data set anew"
                )
            flows.append(_sample(flow, stored, channels, size))
            sample_clip.append(len(clips) - 1)
            sample_view.append(view)
            sample_phase.append(phase)
            face_found.append(bool(record["face_found"]))
    ids, subjects, databases, splits, labels = zip(*clips.values(), strict=True)
    return StudyData(
        label_names=tuple(facts["label_names"]),
        task=facts["task"],
        clip_name=np.array(list(clips)),
        clip_id=np.array(ids, np.int64),
        clip_subject=np.array(subjects),
        clip_database=np.array(databases),
        clip_split=np.array(splits),
        clip_labels=np.stack(labels),
        sample_clip=np.array(sample_clip, np.int32),
        sample_view=np.array(sample_view),
        sample_phase=np.array(sample_phase),
        face_found=np.array(face_found),
        features={"flow": np.stack(flows)},
        frame_mask=None,
    )


def _sample(flow: np.ndarray, stored: tuple[str, ...], channels: Sequence[str], size: int | None) -> np.ndarray:
    """``(H, W, stored)`` to ``(size, size, channels)``."""
    if stored == ("u", "v"):
        flow = flow_channels(flow, tuple(channels))
    else:
        flow = flow[..., [stored.index(name) for name in channels]]
    return flow if size is None or flow.shape[:2] == (size, size) else resize_flow(flow, size)
