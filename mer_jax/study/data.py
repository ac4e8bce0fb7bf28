"""A built TFDS data set as plain arrays, and the constants that are fitted on training folds only."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mer_jax.clips.layouts import LABELS
from mer_jax.clips.resample import resample_indices
from mer_jax.errors import UserError
from mer_jax.progress import progress

MULTI_LABEL = "multi_label"
MULTI_CLASS = "multi_class"
NORMALISATIONS = ("none", "l2", "standard")
REFERENCES = ("none", "onset")
FLOW_NORMALISATIONS = ("none", "standard", "scale", "sample", "instance")


@dataclasses.dataclass(frozen=True)
class StudyData:
    """All clips of a data set in memory.

    Clips are ordered by split (train first), then id, then name; samples (one a clip, view and phase) by clip, then
    view, then phase. L labels.

    Attributes:
        clip_name: ``(C,)`` str.
        clip_id: ``(C,)`` int64, the number a submission names the clip by.
        clip_subject: ``(C,)`` str, '' where unknown.
        clip_split: ``(C,)`` str, 'train' or 'test'.
        clip_database: ``(C,)`` str, the database that a clip is from, '' where there is only one.
        clip_labels: ``(C, L)`` int8, 0/1; -1 where unknown. One-hot where the task is multi-class.
        sample_clip: ``(N,)`` int32, index into the clips.
        sample_view: ``(N,)`` str.
        sample_phase: ``(N,)`` str, 'onset_apex', 'apex_offset', or '' for the whole clip.
        face_found: ``(N,)`` bool, False where the crop is a fallback because no face was detected.
        features: Modality to ``(N, T, D)`` float32 (frames), or input to ``(N, H, W, C)`` float32 (flow).
        frame_mask: ``(N, T)`` bool, False for padding; None where there are no frames.
        label_names: L names of labels or classes.
        task: ``'multi_label'`` (any number of labels is present) or ``'multi_class'`` (exactly one is).
    """

    clip_name: np.ndarray
    clip_id: np.ndarray
    clip_subject: np.ndarray
    clip_split: np.ndarray
    clip_database: np.ndarray
    clip_labels: np.ndarray
    sample_clip: np.ndarray
    sample_view: np.ndarray
    sample_phase: np.ndarray
    face_found: np.ndarray
    features: Mapping[str, np.ndarray]
    frame_mask: np.ndarray | None
    label_names: tuple[str, ...]
    task: str

    @property
    def training(self) -> np.ndarray:
        """``(C,)`` bool: training clips, the ones that folds are made of."""
        return self.clip_split == "train"


def load_dataset(version_dir: Path, extractors: Mapping[str, str], *, num_frames: int, short: str) -> StudyData:
    """Reads a built data set and resamples every clip.

    Args:
        version_dir: Folder of the built version, as ``data_builders.four_dme.build`` returns it.
        extractors: Modality to the name of the extractor that stands for it.
        num_frames: T.
        short: What a clip with fewer frames gets: ``'repeat'`` its last frame, ``'mask'`` masked padding.

    Returns:
        The data.

    Raises:
        UserError: The data set lacks an extractor, a clip, a label, or holds values that are not finite.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(version_dir)
    available = sorted(builder.info.features["features"])
    for modality, extractor in extractors.items():
        if extractor not in available:
            raise UserError(
                f"config.data.modalities.{modality}.extractor={extractor!r}: the data set in {version_dir} holds "
                f"{', '.join(available)}; choose one of these or build the data set with {extractor!r}"
            )
    records = []
    for split in ("train", "test"):
        if split in builder.info.splits and builder.info.splits[split].num_examples:
            source = builder.as_data_source(split)
            records += [(split, record) for record in source.__getitems__(range(len(source)))]
    records.sort(key=lambda item: (item[0] == "test", int(item[1]["id"]), item[1]["clip"], item[1]["view"]))

    clips: dict[str, tuple] = {}
    sample_clip, sample_view, face_found, masks = [], [], [], []
    features = {modality: [] for modality in extractors}
    for split, record in records:
        name = record["clip"].decode()
        labels = np.asarray(record["labels"], np.int8)
        if split == "train" and (labels < 0).any():
            raise UserError(f"clip {name}: a training clip without labels in {version_dir}; build the data set anew")
        clips.setdefault(name, (int(record["id"]), record["subject"].decode(), split, labels))
        sample_clip.append(list(clips).index(name))
        sample_view.append(record["view"].decode())
        face_found.append(bool(record["face_found"]))
        for modality, extractor in extractors.items():
            frames = np.asarray(record["features"][extractor], np.float32)  # (T_clip, D)
            if not np.isfinite(frames).all():
                raise UserError(
                    f"clip {name}, view {sample_view[-1]}: features {extractor!r} hold values that are not finite; "
                    "extract this clip again"
                )
            features[modality].append(frames[resample_indices(len(frames), num_frames)])
        real = num_frames if short == "repeat" else min(int(record["num_frames"]), num_frames)
        masks.append(np.arange(num_frames) < real)
    if not clips:
        raise UserError(f"{version_dir}: the data set holds no clips; build it anew")
    ids, subjects, splits, labels = zip(*clips.values(), strict=True)
    return StudyData(
        clip_name=np.array(list(clips)),
        clip_id=np.array(ids, np.int64),
        clip_subject=np.array(subjects),
        clip_split=np.array(splits),
        clip_database=np.full(len(clips), ""),
        clip_labels=np.stack(labels),
        sample_clip=np.array(sample_clip, np.int32),
        sample_view=np.array(sample_view),
        sample_phase=np.full(len(sample_view), ""),
        face_found=np.array(face_found),
        features={modality: np.stack(stack) for modality, stack in features.items()},
        frame_mask=np.stack(masks),
        label_names=LABELS,
        task=MULTI_LABEL,
    )


@dataclasses.dataclass(frozen=True)
class FeatureMap:
    """The affine map that a modality goes through after its fixed steps, fitted on training samples.

    Attributes:
        mean: ``(D,)`` subtracted first.
        projection: ``(D, D')`` applied next, or None for an element-wise map.
        scale: ``(D',)`` multiplied last.
    """

    mean: np.ndarray
    projection: np.ndarray | None
    scale: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Maps ``(..., D)`` to ``(..., D')`` float32."""
        centred = features - self.mean
        if self.projection is not None:
            centred = centred @ self.projection  # (..., D) (D, D') -> (..., D')
        return (centred * self.scale).astype(np.float32)


def fixed_steps(features: np.ndarray, frame_mask: np.ndarray, *, reference: str, normalise: str) -> np.ndarray:
    """The steps that need no fitting.

    Args:
        features: ``(N, T, D)``.
        frame_mask: ``(N, T)`` bool; padded frames become 0.
        reference: ``'onset'`` subtracts each sample's first frame, ``'none'`` nothing.
        normalise: ``'l2'`` divides every frame by its norm + 1e-8, as the released inference does.

    Returns:
        ``(N, T, D)`` float32.
    """
    if reference == "onset":
        features = features - features[:, :1]
    if normalise == "l2":
        features = features / (np.linalg.norm(features, axis=-1, keepdims=True) + 1e-8)
    return np.where(frame_mask[..., None], features, 0.0).astype(np.float32)


def fit_feature_map(
    features: np.ndarray,
    frame_mask: np.ndarray,
    train: Sequence[int] | np.ndarray,
    *,
    standardise: bool,
    reduce: int,
) -> FeatureMap | None:
    """Fits standardisation and reduction on the frames of training samples, and on nothing else.

    Args:
        features: ``(N, T, D)`` after :func:`fixed_steps`.
        frame_mask: ``(N, T)`` bool.
        train: Indices of the training samples.
        standardise: Zero mean and unit variance for every feature; constant features become 0. With ``reduce``, the
            mean variance of the kept components is made 1 and their proportions are kept.
        reduce: Number of principal components to keep; 0 for all features. At most what the data can span.

    Returns:
        The map, or None where there is nothing to do.
    """
    if not standardise and not reduce:
        return None
    frames = features[train][frame_mask[train]].astype(np.float64)  # (training frames, D)
    if reduce:
        from sklearn.decomposition import PCA

        components = min(reduce, frames.shape[1], len(frames) - 1)
        pca = PCA(components, svd_solver="covariance_eigh").fit(frames)
        power = float(pca.explained_variance_.mean())
        scale = 1.0 / np.sqrt(power) if standardise and power > 0 else 1.0
        return FeatureMap(
            pca.mean_.astype(np.float32),
            pca.components_.T.astype(np.float32),
            np.full(components, scale, np.float32),
        )
    deviation = frames.std(axis=0)
    constant = deviation <= 1e-6 * max(float(deviation.max()), 1e-30)
    scale = np.where(constant, 0.0, 1.0 / np.where(constant, 1.0, deviation))
    return FeatureMap(frames.mean(axis=0).astype(np.float32), None, scale.astype(np.float32))


def prepare_features(
    data: StudyData,
    clip_fold: np.ndarray,
    num_folds: int,
    steps: Mapping[str, Mapping],
    maps: Mapping[str, list[FeatureMap]] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, list[FeatureMap] | None]]:
    """All modalities as the model sees them, for every held-out fold.

    Args:
        data: The data set.
        clip_fold: ``(C,)`` the fold that holds a clip out, -1 for test clips.
        num_folds: F.
        steps: Modality to ``reference``, ``normalise`` and ``reduce``.
        maps: Modality to maps fitted before, which are used as they are.

    Returns:
        Modality to ``(F, N, T, D')`` float32, or ``(1, N, T, D')`` where nothing is fitted; and the fitted maps, one
        a fold.
    """
    prepared, used = {}, {}
    sample_fold = clip_fold[data.sample_clip]  # (N,)
    for modality, step in steps.items():
        features = fixed_steps(
            data.features[modality], data.frame_mask, reference=step["reference"], normalise=step["normalise"]
        )
        fitted = (maps or {}).get(modality)
        if not fitted:
            reduce = _common_rank(step["reduce"], data, sample_fold, num_folds, features.shape[-1])
            folds = range(num_folds)
            if reduce:  # takes seconds a fold
                folds = progress(folds, desc=f"principal components, {modality}", unit="folds")
            fitted = [
                fit_feature_map(
                    features,
                    data.frame_mask,
                    np.flatnonzero((sample_fold >= 0) & (sample_fold != fold)),
                    standardise=step["normalise"] == "standard",
                    reduce=reduce,
                )
                for fold in folds
            ]
        if fitted[0] is None:
            prepared[modality], used[modality] = features[None], None
            continue
        mapped = [np.where(data.frame_mask[..., None], fit(features), 0.0).astype(np.float32) for fit in fitted]
        prepared[modality], used[modality] = np.stack(mapped), fitted
    return prepared, used


def _common_rank(reduce: int, data: StudyData, sample_fold: np.ndarray, num_folds: int, width: int) -> int:
    """The number of components that every fold's training frames can span: all members share one shape."""
    if not reduce:
        return 0
    frames = [int(data.frame_mask[(sample_fold >= 0) & (sample_fold != fold)].sum()) for fold in range(num_folds)]
    return min(reduce, width, min(frames) - 1)


def prepare_flow(
    data: StudyData,
    clip_fold: np.ndarray,
    num_folds: int,
    normalise: str,
    maps: Mapping[str, list[FeatureMap]] | None = None,
) -> tuple[np.ndarray, dict[str, list[FeatureMap] | None]]:
    """Flow as the model sees it, and what is left to be done fold by fold.

    Args:
        data: The data set, ``features['flow']`` ``(N, H, W, C)``.
        clip_fold: ``(C,)`` the fold that holds a clip out, -1 for test clips.
        num_folds: F.
        normalise: ``'none'``; ``'standard'``: zero mean and unit variance of every channel over the training folds;
            ``'scale'``: unit root mean square of every channel over the training folds, so that no motion stays 0;
            ``'sample'``: every sample to a unit root mean square of all its channels together, which says nothing of
            its strength and needs no fitting; ``'instance'``: every channel of every sample to zero mean and unit
            variance, for images that were stretched one by one, whose grey of no motion differs from one to the next.
        maps: Maps fitted before, which are used as they are.

    Returns:
        ``(N, H, W, C)`` float32 after what needs no fitting; and the fitted maps of the channels, one a fold, None
        where there are none. They are applied on the device, so that the data are there once, not once a fold.
    """
    flow = data.features["flow"].astype(np.float32)
    if normalise == "sample":
        power = np.sqrt(np.mean(flow.astype(np.float64) ** 2, axis=(1, 2, 3), keepdims=True))
        flow = (flow / np.maximum(power, 1e-6)).astype(np.float32)
    if normalise == "instance":
        mean = flow.mean(axis=(1, 2), keepdims=True, dtype=np.float64)
        deviation = np.sqrt(np.mean((flow - mean) ** 2, axis=(1, 2), keepdims=True))
        flow = ((flow - mean) / np.maximum(deviation, 1e-6)).astype(np.float32)
    if normalise in ("none", "sample", "instance"):
        return flow, {"flow": None}
    if maps and maps.get("flow"):
        return flow, {"flow": maps["flow"]}
    sample_fold = clip_fold[data.sample_clip]  # (N,)
    count = flow[0, ..., 0].size
    sums = flow.sum(axis=(1, 2), dtype=np.float64) / count  # (N, C)
    squares = np.stack([np.mean(sample.astype(np.float64) ** 2, axis=(0, 1)) for sample in flow])  # (N, C)
    fitted = []
    for fold in range(num_folds):
        train = (sample_fold >= 0) & (sample_fold != fold)
        mean = sums[train].mean(axis=0) if normalise == "standard" else np.zeros(flow.shape[-1])
        power = squares[train].mean(axis=0) - mean**2
        scale = np.where(power > 1e-12, 1.0 / np.sqrt(np.maximum(power, 1e-12)), 0.0)
        fitted.append(FeatureMap(mean.astype(np.float32), None, scale.astype(np.float32)))
    return flow, {"flow": fitted}
