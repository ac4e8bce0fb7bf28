"""Extracts the features of a network for a data set: crops in parallel, one program on the devices, a file per clip."""

import contextlib
import functools
import importlib.metadata
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from data_builders.clip_work import say_waiting
from data_builders.four_dme.attention_maps import maps_folder
from data_builders.four_dme.building import DEMO_CLIPS, build, built_settings, check_fits, default_crop, find_clips
from data_builders.four_dme.bundle import Bundle, read_bundle
from data_builders.four_dme.feature_store import (
    ClipFeatures,
    Recipe,
    Record,
    features_root,
    load_clip,
    read_record,
    save_clip,
    write_record,
)
from data_builders.four_dme.frame_images import Chunk, prepare_chunk, spans
from data_builders.four_dme.preparation import fingerprint, sample_name, views_of
from mer_jax import __version__
from mer_jax.clips.crops import CropConfig
from mer_jax.clips.layouts import Clip
from mer_jax.errors import UserError
from mer_jax.extractors.base import EMBEDDED, fill_missing
from mer_jax.extractors.networks import NETWORKS, Network, get_network
from mer_jax.files import TEMPORARY_SUFFIX, exclusive
from mer_jax.parallel import stream_tasks
from mer_jax.progress import progress

if TYPE_CHECKING:
    import jax

DTYPES = ("float32", "bfloat16")
STORES = ("float32", "float16")
_LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "pillow", "opencv-contrib-python", "mediapipe")
_MAX_NAMED = 3


def extract_features(
    extractor: str,
    config_name: str,
    *,
    weights: str | os.PathLike | None = None,
    bundle: str | os.PathLike | None = None,
    data_dir: str | os.PathLike = "data",
    source: str | os.PathLike | None = None,
    test_source: str | os.PathLike | None = None,
    labels: str | os.PathLike | None = None,
    columns: Mapping[str, str] | None = None,
    workbook: str | os.PathLike | None = None,
    crop: CropConfig | None = None,
    batch_size: int | None = None,
    dtype: str = "float32",
    store: str = "float32",
    workers: int | None = None,
    seed: int | None = None,
    demo_clips: tuple[int, int] | None = None,
    attention: bool = False,
) -> Path:
    """Extracts the features of a network for ``four_dme/<config_name>`` and adds them to the data set.

    Features are kept clip by clip under ``data_dir/features``, in a folder of their own for other weights, crops,
    preprocessing or precision; what was killed, or stopped by a bad clip, goes on from there, to the same bits. The
    data set is then built with them beside the features that it holds; a new one gets the embedded extractors', too.

    Args:
        extractor: Name of a network, of :data:`mer_jax.extractors.networks.NETWORKS`.
        config_name: As in :func:`data_builders.four_dme.build`. What is not said of clips and crops here is as it was
            when the data set, if there is one, was built.
        weights: The official checkpoint as a local file, or its id on the Hugging Face hub; None for the network's
            own place there.
        bundle: Published features to import and continue, see :mod:`data_builders.four_dme.bundle`; their crops are
            used where they are there.
        data_dir: As in ``build``, as are ``source``, ``test_source``, ``labels``, ``columns``, ``workbook``, ``crop``,
            ``seed`` and ``demo_clips``.
        source: See there.
        test_source: See there.
        labels: See there.
        columns: See there.
        workbook: See there.
        crop: See there.
        batch_size: Images per device in one batch; None for as many as its memory allows, within reason.
        dtype: ``'float32'`` or ``'bfloat16'``, in which the network computes.
        store: ``'float32'`` or ``'float16'``, in which features are kept.
        workers: Number of processes that read and align frames, one per available processor unless given.
        seed: See there.
        demo_clips: See there.
        attention: Whether to keep, beside the features, what the network attends to in each frame, see
            :mod:`data_builders.four_dme.attention_maps`. This takes as long again; features are the same without.

    Returns:
        The folder of the built version, for ``tfds.builder_from_directory``.

    Raises:
        UserError: Something is missing, bad or contradicts what is built; the message names it and the remedy.
        KeyboardInterrupt: Ctrl-C or SIGTERM; finished clips are kept.
    """
    network = get_network(extractor)
    attentive = _attentive(network, bundle) if attention else None
    for flag, value, choices in (("--dtype", dtype, DTYPES), ("--store", store, STORES)):
        if value not in choices:
            raise UserError(f"{flag} {value}: choose {' or '.join(choices)}")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: at least 1 image is needed")
    clips_told = dict(source=source, test_source=test_source, labels=labels, columns=columns, workbook=workbook,
                      seed=seed, demo_clips=demo_clips)  # fmt: skip
    check_fits(config_name, data_dir, crop=crop, **clips_told)
    built = built_settings(config_name, data_dir)
    if built is not None:
        clips_told = {name: built[name] if value is None else value for name, value in clips_told.items()}
        crop = crop or CropConfig(**built["crop"])
    crop = crop or default_crop(config_name)
    clips_told["seed"] = clips_told["seed"] or 0
    clips_told["demo_clips"] = tuple(clips_told["demo_clips"] or DEMO_CLIPS)
    clips = find_clips(config_name, data_dir=data_dir, workers=workers, **clips_told)

    taken = read_bundle(bundle, network, clips) if bundle is not None else Bundle()
    checkpoint, sha256 = _find_weights(weights, bundle, taken, network, clips)
    recipe = Recipe(network.name, network.preprocessing, sha256, crop.settings(), dtype, store, taken.told)
    record = Record(recipe, network.modality, network.dim, network.licence, checkpoint.name if checkpoint else "")
    check_fits(config_name, data_dir, crop=crop, facts={network.name: record.facts()}, **clips_told)

    folder = recipe.folder(features_root(config_name, data_dir))

    def load() -> Any:
        return _load_variables(network, checkpoint, sha256, Path(data_dir) / "weights")

    with exclusive(folder, functools.partial(say_waiting, folder)):
        _Job(network, record, clips, taken, folder, batch_size, workers).run(load)
    target = build(
        config_name,
        data_dir=data_dir,
        extractors=(network.name,) if built is not None else (*EMBEDDED, network.name),
        extracted={network.name: folder},
        crop=crop,
        workers=workers,
        **clips_told,
    )
    if attentive is not None:
        maps = maps_folder(folder)
        record = replace(record, recipe=replace(recipe, store="float16"), dim=attentive.dim)
        with exclusive(maps, functools.partial(say_waiting, maps)):
            _Job(attentive, record, clips, Bundle(), maps, batch_size, workers, ", attention").run(load)
    return target


def _attentive(network: Network, bundle: str | os.PathLike | None) -> Network:
    """The network with the shares of its patches, row by row, in the place of features.

    Its features are not asked of the same program: with more to give, a compiler may make their last bits otherwise.
    """
    if network.attention is None:
        raise UserError(f"--attention: {network.name} is no transformer and has no attention to keep; leave it out")
    if bundle is not None:
        raise UserError(
            f"--attention: what was attended to is not known of the features in {bundle}; leave it out, or --bundle"
        )

    def shares(variables: Any, images: "jax.Array") -> "jax.Array":
        return network.attention(variables, images).reshape(len(images), -1)  # (B, h', w') -> (B, h' w')

    return replace(network, dim=math.prod(network.attention_grid), apply=shares)


def _find_weights(
    weights: str | os.PathLike | None,
    bundle: str | os.PathLike | None,
    taken: Bundle,
    network: Network,
    clips: Sequence[Clip],
) -> tuple[Path | None, str]:
    """The checkpoint and its SHA-256; None and '' where the bundle has the features of all samples."""
    samples = [sample_name(clip, view) for clip in clips for view in views_of(clip)]
    left = [sample for sample in samples if sample not in taken.features]
    if not left:
        return None, ""
    if weights is None and bundle is not None:
        raise UserError(
            f"{bundle}: lacks features of {_listed(left)}; say with --weights what {network.name} shall extract them "
            "with"
        )
    from mer_jax.extractors.weights import find_weights, weights_sha256

    path = find_weights(weights, network)
    return path, weights_sha256(path)


def _load_variables(network: Network, checkpoint: Path, sha256: str, folder: Path) -> Any:
    from mer_jax.extractors.weights import load_variables

    return load_variables(network, checkpoint, sha256, folder)


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} samples ({', '.join(names[:_MAX_NAMED])}{', ...' if len(names) > _MAX_NAMED else ''})"


@dataclass
class _OpenClip:
    """A clip at work.

    Attributes:
        rows: View to (T, D) float32; NaN where no features have come, or none can.
        sent: Number of images that were sent to the devices.
        come: Number of those whose features have come back.
        read: Whether all of its frames were read.
        error: Why it cannot be finished, if it cannot.
    """

    rows: dict[str, np.ndarray]
    sent: int = 0
    come: int = 0
    read: bool = False
    error: UserError | None = None


@dataclass
class _Job:
    """What is to be done in one folder of features, whose lock is held.

    The places of images (see :mod:`mer_jax.extractors.pipeline`) count the frames of all clips in order, finished or
    not; the views of a frame are neighbours.
    """

    network: Network
    record: Record
    clips: Sequence[Clip]
    bundle: Bundle
    folder: Path
    batch_size: int | None
    workers: int | None
    what: str = ""  # beside the network's name
    _open: dict[int, _OpenClip] = field(default_factory=dict)
    _errors: dict[str, UserError] = field(default_factory=dict)

    def run(self, load_variables: Callable[[], Any]) -> None:
        """Finishes the clips that are not; ``load_variables`` is called where the network must see any of them."""
        for stale in self.folder.glob(f".*{TEMPORARY_SUFFIX}"):
            stale.unlink(missing_ok=True)
        found = [load_clip(self._path(clip), fingerprint(clip)) for clip in self.clips]
        left = [index for index, clip in enumerate(found) if clip is None]
        to_extract = [index for index in left if self._views(index)]
        before = read_record(self.folder)
        if before is None:
            if len(left) < len(self.clips):
                raise UserError(f"{self.folder}: lacks its record.json; remove this folder to extract all clips again")
            write_record(self.folder, self.record)
        for index in set(left) - set(to_extract):
            self._save(index, {})
        if not to_extract:
            return

        from mer_jax.extractors.pipeline import local_devices

        devices = local_devices()
        made_with = _made_with(devices[0])
        if any(len(clip.imported) < len(clip.features) for clip in found if clip is not None):
            self._check_same(before, made_with, len(left))
        variables = load_variables()
        total = sum(len(self.clips[index].frames) * len(self._views(index)) for index in to_extract)
        with (
            contextlib.closing(self._prepared(to_extract)) as prepared,
            progress(total=total, desc=f"{self.network.name}{self.what}", unit="img") as bar,
        ):
            arrivals = self._arrivals(to_extract, prepared, bar)
            first = next(arrivals, None)
            if first is not None:
                program = self._compile(variables, first[1], devices)
                del variables
                at_once = f"{len(devices)} x {program.batch_size} at once"
                bar.set_description_str(f"{self.network.name}{self.what}, {at_once}", refresh=False)
                bar.unpause()  # compiling is no part of the rate
                write_record(self.folder, replace(self.record, batch_size=program.batch_size, made_with=made_with))
                self._receive(program, itertools.chain([first], arrivals), bar)
        if self._errors:
            reasons = [f"clip {name}: {error}" for name, error in self._errors.items()]
            more = f"; and {len(reasons) - _MAX_NAMED} more" if len(reasons) > _MAX_NAMED else ""
            raise UserError(
                f"{len(reasons)} of {len(self.clips)} clips cannot be extracted ({'; '.join(reasons[:_MAX_NAMED])}"
                f"{more}); the others are finished and kept: repair or remove these and run the same command again"
            )

    @functools.cached_property
    def _offsets(self) -> np.ndarray:
        """The place of each clip's first image, and the place after the last."""
        return np.cumsum([0, *(len(clip.frames) * len(views_of(clip)) for clip in self.clips)])

    def _check_same(self, before: Record, made_with: Mapping[str, str], num_left: int) -> None:
        """Refuses to go on otherwise than it began, so that no feature depends on the interruption."""
        old = {**before.made_with, "--batch_size": before.batch_size}
        new = {**made_with, "--batch_size": self.batch_size or before.batch_size}
        differences = [
            f"{name} {old.get(name, 'absent')}, now {new.get(name, 'absent')}"
            for name in {**old, **new}
            if old.get(name) != new.get(name)
        ]
        if differences:
            raise UserError(
                f"{self.folder}: begun with {'; '.join(differences)}, and {num_left} of {len(self.clips)} clips are "
                "left; go on with what it was begun with, or remove this folder to extract all clips again"
            )
        self.batch_size = before.batch_size

    def _compile(self, variables: Any, image: np.ndarray, devices: "Sequence[jax.Device]"):
        import jax

        from mer_jax.extractors.pipeline import compile_network

        shape = jax.ShapeDtypeStruct(image.shape[1:], image.dtype)
        dtype = self.record.recipe.dtype
        return compile_network(self.network, variables, shape, devices, batch_size=self.batch_size, dtype=dtype)

    def _prepared(self, indices: Sequence[int]) -> Iterator[dict[str, tuple[np.ndarray, np.ndarray]] | UserError]:
        """What the workers make of the clips, part by part in order."""
        place, crop = NETWORKS[self.network.name], CropConfig(**self.record.recipe.crop)
        tasks = []
        for index in indices:
            clip, views = self.clips[index], self._views(index)
            crops = {view: self.bundle.crops.get(sample_name(clip, view)) for view in views}
            crops = {view: paths for view, paths in crops.items() if paths is not None}
            for start, stop in self._spans(index):
                tasks.append(Chunk(place, self.network.name, clip, crop, views, start, stop, crops))
        return stream_tasks(prepare_chunk, tasks, workers=self.workers, unit="clip")

    def _arrivals(self, indices: Sequence[int], prepared: Iterator, bar: tqdm) -> Iterator[tuple[int, np.ndarray]]:
        """Places and images of what can be read; clips are opened as they come."""
        for index in indices:
            clip, names, views = self.clips[index], views_of(self.clips[index]), self._views(index)
            rows = np.full((len(clip.frames), self.network.dim), np.nan, np.float32)
            at_work = self._open[index] = _OpenClip({view: rows.copy() for view in views})
            for start, stop in self._spans(index):
                result = next(prepared)
                if isinstance(result, UserError):
                    at_work.error = at_work.error or result
                if at_work.error:
                    bar.update(len(views) * (stop - start))
                    continue
                for frame, view in itertools.product(range(start, stop), views):
                    images, found = result[view]
                    if not found[frame - start]:
                        bar.update(1)
                        continue
                    at_work.sent += 1
                    place = int(self._offsets[index]) + frame * len(names) + names.index(view)
                    yield place, images[frame - start : frame - start + 1]
            at_work.read = True
            self._close(index)

    def _receive(self, program, arrivals: Iterator[tuple[int, np.ndarray]], bar: tqdm) -> None:
        """Runs the network and closes each clip when its last features have come."""
        from mer_jax.extractors.pipeline import run

        for place, rows in run(program, arrivals):
            for offset, row in enumerate(rows):
                index = int(np.searchsorted(self._offsets, place + offset, side="right")) - 1
                names, at_work = views_of(self.clips[index]), self._open[index]
                frame, view = divmod(place + offset - int(self._offsets[index]), len(names))
                at_work.rows[names[view]][frame] = row
                at_work.come += 1
                self._close(index)
            bar.update(len(rows))

    def _close(self, index: int) -> None:
        """Keeps a clip whose features are all there, or notes why it has none."""
        at_work = self._open[index]
        if not at_work.read or at_work.come < at_work.sent:
            return
        clip = self.clips[index]
        del self._open[index]
        if at_work.error:
            self._errors[clip.name] = at_work.error
            return
        found = sum(int(np.isfinite(rows).all(axis=1).sum()) for rows in at_work.rows.values())
        if found < at_work.sent:
            raise UserError(
                f"clip {clip.name}: {self.network.name} gives NaN or Inf; the weights are damaged or not its own, or "
                "--dtype float32 is needed"
            )
        self._save(index, {view: fill_missing(rows) for view, rows in at_work.rows.items()})

    def _save(self, index: int, extracted: Mapping[str, tuple[np.ndarray, int]]) -> None:
        """Keeps a clip: views to features and the number of missing frames, what is not there from the bundle."""
        clip = self.clips[index]
        features, missing, store = {}, {}, self.record.recipe.store
        for view in views_of(clip):
            values, missing[view] = extracted.get(view) or (self.bundle.features[sample_name(clip, view)], 0)
            # Overflow to Inf is told just below.
            with np.errstate(over="ignore"):
                features[view] = values.astype(store)
            if not np.isfinite(features[view]).all():
                raise UserError(
                    f"clip {clip.name}: features of {self.network.name} up to {np.abs(values).max():.3g} do not fit "
                    f"into {store}; give --store float32"
                )
        imported = tuple(view for view in views_of(clip) if view not in extracted)
        save_clip(self._path(clip), fingerprint(clip), ClipFeatures(features, missing, imported))

    def _path(self, clip: Clip) -> Path:
        return self.folder / f"{clip.name}.npz"

    def _views(self, index: int) -> tuple[str, ...]:
        """The views of a clip whose features must be extracted."""
        clip = self.clips[index]
        return tuple(view for view in views_of(clip) if sample_name(clip, view) not in self.bundle.features)

    def _spans(self, index: int) -> list[tuple[int, int]]:
        num_views, size = len(self._views(index)), self.record.recipe.crop["size"]
        return spans(len(self.clips[index].frames), num_views, size, self.network.input_shape)


def _made_with(device: "jax.Device") -> dict[str, str]:
    """On what the last bits of features may depend."""
    versions = {"mer_jax": __version__}
    for name in _LIBRARIES:
        # Another build of the same library goes by another name.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions | {"device": device.device_kind}
