"""Extracts the features of a network for a data set: crops in parallel, one program on the devices, a file per clip.

On a cluster each worker does all of that for shares of the clips, on the devices of its own machine.
"""

import contextlib
import functools
import importlib.metadata
import itertools
import math
import multiprocessing
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from mer_jax.cluster import Cluster, abandoned
from mer_jax.errors import UserError, WorkerDied
from mer_jax.extractors.base import EMBEDDED, fill_missing
from mer_jax.extractors.networks import NETWORKS, Network, get_network, network_at
from mer_jax.files import TEMPORARY_SUFFIX, exclusive
from mer_jax.parallel import Workers, available_processors, guarded, interruptible, stream_tasks
from mer_jax.progress import Silent, progress

if TYPE_CHECKING:
    import jax

    from mer_jax.extractors.pipeline import Program

DTYPES = ("float32", "bfloat16")
STORES = ("float32", "float16")
_LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "pillow", "opencv-contrib-python", "mediapipe")
_MAX_NAMED = 3
_SHARE_BATCHES = 16  # that a worker of a cluster is given at least: it starts processes that read frames for each share


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
    workers: Workers = None,
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
        workers: Number of processes that read and align frames, one per available processor unless given; or a
            cluster, on whose machines the network then runs, too.
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
    module = NETWORKS[network.name]
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
    weights = _Weights(checkpoint, sha256, Path(data_dir) / "weights")
    with exclusive(folder, functools.partial(say_waiting, folder)):
        _Job(network, weights, record, clips, _places(clips), taken, folder, batch_size, workers, module=module).run()
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
            _Job(
                attentive, weights, record, clips, _places(clips), Bundle(), maps, batch_size, workers, True, module
            ).run()
    return target


def _attentive(network: Network, bundle: str | os.PathLike | None = None) -> Network:
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


@dataclass(frozen=True)
class _Weights:
    """A checkpoint, None where nothing is to be extracted, and the folder where it is kept converted."""

    checkpoint: Path | None
    sha256: str
    folder: Path

    def load(self, network: Network) -> Any:
        from mer_jax.extractors.weights import load_variables

        return load_variables(network, self.checkpoint, self.sha256, self.folder)


def _places(clips: Sequence[Clip]) -> np.ndarray:
    """The place of each clip's first image, see :mod:`mer_jax.extractors.pipeline`.

    Places count the frames of all clips in order, finished or not; the views of a frame are neighbours.
    """
    return np.cumsum([0, *(len(clip.frames) * len(views_of(clip)) for clip in clips[:-1])])


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
    """What is to be done in one folder of features, whose lock is held, or a worker's share of it.

    Attributes:
        network: What is run.
        weights: Its weights.
        record: What is to be said of the features.
        clips: The clips, finished or not.
        places: The place of each clip's first image, ascending.
        bundle: What need not be extracted.
        folder: Where the features are.
        batch_size: Images per device, None to decide it here.
        workers: Who does it.
        attentive: Whether the network gives what it attends to, see :func:`_attentive`.
        module: Where the network is found, see :func:`mer_jax.extractors.networks.network_at`.
        per_machine: How many workers of a cluster share a machine.
    """

    network: Network
    weights: _Weights
    record: Record
    clips: Sequence[Clip]
    places: np.ndarray
    bundle: Bundle
    folder: Path
    batch_size: int | None
    workers: Workers
    attentive: bool = False
    module: str = ""
    per_machine: int = 1
    _open: dict[int, _OpenClip] = field(default_factory=dict)
    _errors: dict[str, UserError] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        # What a network is made of may have no name by which it could be sent to a worker.
        return self.__dict__ | {"network": self.network.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        network = network_at(state["module"], state["network"])
        self.__dict__.update(state, network=_attentive(network) if state["attentive"] else network)

    def run(self) -> None:
        """Finishes the clips that are not."""
        self._remove_stale_files()
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

        extracted = any(len(clip.imported) < len(clip.features) for clip in found if clip is not None)
        if isinstance(self.workers, Cluster):
            self._run_on_cluster(self.workers, to_extract, before if extracted else None)
        else:
            self._run_here(to_extract, before if extracted else None)
        if self._errors:
            reasons = [f"clip {name}: {error}" for name, error in self._errors.items()]
            more = f"; and {len(reasons) - _MAX_NAMED} more" if len(reasons) > _MAX_NAMED else ""
            raise UserError(
                f"{len(reasons)} of {len(self.clips)} clips cannot be extracted ({'; '.join(reasons[:_MAX_NAMED])}"
                f"{more}); the others are finished and kept: repair or remove these and run the same command again"
            )

    def _run_here(self, to_extract: Sequence[int], before: Record | None) -> None:
        """Extracts clips on the devices of this machine, as it was begun ``before``."""
        from mer_jax.extractors.pipeline import local_devices

        devices = local_devices()
        made_with = _made_with(devices[0])
        if before is not None:
            self._go_on_as(before, made_with, len(to_extract))
        variables = self.weights.load(self.network)
        with (
            contextlib.closing(self._prepared(to_extract)) as prepared,
            self._progress(to_extract) as bar,
        ):
            arrivals = self._arrivals(to_extract, prepared, bar)
            first = next(arrivals, None)
            if first is not None:
                program = self._compile(variables, first[1], devices)
                del variables
                self._begin(program.batch_size, made_with, f"{len(devices)} x {program.batch_size} at once", bar)
                self._receive(program, itertools.chain([first], arrivals), bar)

    def _remove_stale_files(self) -> None:
        """Removes what a kill left of files that were being written."""
        for stale in self.folder.glob(f".*{TEMPORARY_SUFFIX}"):
            stale.unlink(missing_ok=True)

    def _run_on_cluster(self, cluster: Cluster, to_extract: Sequence[int], before: Record | None) -> None:
        """Extracts clips on the cluster's devices; which worker does a clip, and with which others, changes no bit."""
        cluster.require([self.clips[index].frames[0] for index in to_extract])
        if self.weights.checkpoint is not None:
            cluster.require([self.weights.checkpoint])
        with interruptible():
            made_with, batch_size = self._decide(cluster, to_extract, before)
        to_extract = [index for index in to_extract if self.clips[index].name not in self._errors]
        if before is not None and made_with:
            self._go_on_as(before, made_with, len(to_extract))
        sizes = [self._num_images(index) for index in to_extract]
        parts = share_out(sizes, max(1, cluster.num_workers), _SHARE_BATCHES * max(1, batch_size))
        with interruptible(), self._progress(to_extract) as bar:
            if batch_size:
                self.batch_size = batch_size
                self._begin(batch_size, made_with, f"{batch_size} at once per device", bar)
            lost = self._extract_shares(cluster, [[to_extract[n] for n in part] for part in parts], bar)
            if lost:  # of the clips of such a share one is to blame
                for index, error in self._extract_shares(cluster, [[index] for index, _ in lost], bar):
                    self._errors[self.clips[index].name] = error
        names = [self.clips[index].name for index in to_extract]
        cluster.await_files(self.folder / f"{name}.npz" for name in names if name not in self._errors)
        self._remove_stale_files()  # of a worker that was lost while it wrote

    def _decide(self, cluster: Cluster, to_extract: Sequence[int], before: Record | None) -> tuple[dict[str, str], int]:
        """Asks a worker for what :func:`_decide` tells of the first clip that has anything to see."""
        made_with: dict[str, str] = {}
        for index in to_extract:
            job = replace(self._share([index]), batch_size=self.batch_size or (before and before.batch_size))
            ((_, decided),) = cluster.map(functools.partial(guarded, _decide), [job], unit="clip")
            if isinstance(decided, WorkerDied):
                name = self.clips[index].name
                if self._errors:
                    raise WorkerDied(f"clips {next(iter(self._errors))} and {name}: {decided}")
                self._errors[name] = decided
            elif isinstance(decided, UserError):
                raise decided
            else:
                made_with, batch_size = decided
                if batch_size:
                    return made_with, batch_size
        return made_with, 0

    def _extract_shares(
        self, cluster: Cluster, shares: Sequence[Sequence[int]], bar: tqdm
    ) -> list[tuple[int, WorkerDied]]:
        """Has workers extract shares of clips; what is not finished since its workers died is returned."""
        lost = []
        before = self._names()
        counted: set[int] = set()

        def count(indices: Iterable[int]) -> None:
            new = set(indices) - counted
            counted.update(new)
            bar.update(sum(map(self._num_images, new)))

        def watch() -> None:
            names = self._names() - before
            count(index for share in shares for index in share if self._path(self.clips[index]).name in names)

        per_machine = cluster.workers_per_machine()
        tasks = [replace(self._share(share), per_machine=per_machine) for share in shares]
        extracted = cluster.map(functools.partial(guarded, _extract_share), tasks, unit="clip", watch=watch)
        with contextlib.closing(extracted):
            for number, result in extracted:
                if isinstance(result, WorkerDied):
                    watch()
                    lost += [(index, result) for index in shares[number] if index not in counted]
                    continue
                if isinstance(result, UserError):
                    raise result
                self._errors |= result
                count(shares[number])
        return lost

    def _names(self) -> set[str]:
        return set(os.listdir(self.folder))

    def _share(self, indices: Sequence[int]) -> "_Job":
        """The part of the job that some clips are, for a worker."""
        clips = [self.clips[index] for index in indices]
        samples = {sample_name(clip, view) for clip in clips for view in views_of(clip)}
        bundle = Bundle(
            {sample: rows for sample, rows in self.bundle.features.items() if sample in samples},
            {sample: paths for sample, paths in self.bundle.crops.items() if sample in samples},
        )
        return replace(self, clips=clips, places=self.places[list(indices)], bundle=bundle, workers=1, _errors={})

    def _progress(self, indices: Sequence[int]) -> tqdm:
        return progress(total=sum(map(self._num_images, indices)), desc=self._title, unit="img")

    @property
    def name(self) -> str:
        """Which clips these are."""
        first, last = self.clips[0].name, self.clips[-1].name
        return first if first == last else f"{first} to {last}"

    @property
    def _title(self) -> str:
        return f"{self.network.name}{', attention' if self.attentive else ''}"

    def _begin(self, batch_size: int, made_with: Mapping[str, str], at_once: str, bar: tqdm) -> None:
        """Keeps with what it is done, now that it is known."""
        self.record = replace(self.record, batch_size=batch_size, made_with=dict(made_with))
        write_record(self.folder, self.record)
        bar.set_description_str(f"{self._title}, {at_once}", refresh=False)
        bar.unpause()  # compiling is no part of the rate

    def _go_on_as(self, before: Record, made_with: Mapping[str, str], num_left: int) -> None:
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
        crop = CropConfig(**self.record.recipe.crop)
        tasks = []
        for index in indices:
            clip, views = self.clips[index], self._views(index)
            crops = {view: self.bundle.crops.get(sample_name(clip, view)) for view in views}
            crops = {view: paths for view, paths in crops.items() if paths is not None}
            for start, stop in self._spans(index):
                tasks.append(Chunk(self.module, self.network.name, clip, crop, views, start, stop, crops))
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
                    place = int(self.places[index]) + frame * len(names) + names.index(view)
                    yield place, images[frame - start : frame - start + 1]
            at_work.read = True
            self._close(index)

    def _receive(self, program, arrivals: Iterator[tuple[int, np.ndarray]], bar: tqdm) -> None:
        """Runs the network and closes each clip when its last features have come."""
        from mer_jax.extractors.pipeline import run

        for place, rows in run(program, arrivals):
            for offset, row in enumerate(rows):
                index = int(np.searchsorted(self.places, place + offset, side="right")) - 1
                names, at_work = views_of(self.clips[index]), self._open[index]
                frame, view = divmod(place + offset - int(self.places[index]), len(names))
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

    def _num_images(self, index: int) -> int:
        return len(self.clips[index].frames) * len(self._views(index))

    def _path(self, clip: Clip) -> Path:
        return self.folder / f"{clip.name}.npz"

    def _views(self, index: int) -> tuple[str, ...]:
        """The views of a clip whose features must be extracted."""
        clip = self.clips[index]
        return tuple(view for view in views_of(clip) if sample_name(clip, view) not in self.bundle.features)

    def _spans(self, index: int) -> list[tuple[int, int]]:
        num_views, size = len(self._views(index)), self.record.recipe.crop["size"]
        return spans(len(self.clips[index].frames), num_views, size, self.network.input_shape)


def _decide(job: _Job) -> tuple[dict[str, str], int]:
    """In a worker of a cluster: with what it works, and the images that one of its devices takes, 0 if there are none.

    Raises:
        UserError: The weights are bad, or the device's memory does not suffice.
    """
    from mer_jax.extractors.pipeline import local_devices

    devices = local_devices()
    everything = range(len(job.clips))
    with contextlib.closing(job._prepared(everything)) as prepared:
        first = next(job._arrivals(everything, prepared, Silent()), None)
    return _made_with(devices[0]), _program(job, first[1], devices).batch_size if first else 0


def _extract_share(job: _Job) -> dict[str, UserError]:
    """In a worker of a cluster: finishes clips on the devices of its machine, but for those whose errors it returns.

    Raises:
        WorkerDied: A process that reads frames died.
        UserError: None of the clips could be extracted like this here.
    """
    from mer_jax.extractors.pipeline import local_devices

    devices = local_devices()
    made_with, begun = _made_with(devices[0]), job.record.made_with
    if begun and made_with != begun:
        differences = [f"{name} {made_with.get(name)} instead of {value}" for name, value in begun.items()
                       if made_with.get(name) != value]  # fmt: skip
        raise UserError(
            f"a worker on {socket.gethostname()} has {', '.join(differences)}, so that its features would not have the "
            "same bits; have all work done by machines of one kind, and run the same command again"
        )
    # Dask's worker may be a daemon, to which processes of its own are forbidden lest they outlive it; these do not.
    multiprocessing.current_process().daemon = False
    job.workers = max(1, available_processors() // job.per_machine)
    # What another worker finished before it was lost.
    left = [index for index, clip in enumerate(job.clips) if load_clip(job._path(clip), fingerprint(clip)) is None]
    try:
        with contextlib.closing(job._prepared(left)) as prepared:
            arrivals = _while_wanted(job._arrivals(left, prepared, Silent()))
            first = next(arrivals, None)
            if first is not None:
                job._receive(_program(job, first[1], devices), itertools.chain([first], arrivals), Silent())
    except WorkerDied as error:
        raise WorkerDied("a process that read its frames died (often: out of memory)") from error
    return job._errors


def _while_wanted(arrivals: Iterator[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
    for arrival in arrivals:
        if abandoned():
            raise UserError("given up")  # and nobody listens
        yield arrival


# The last one that this process needed, if any, and the batch size that it was asked for with.
_PROGRAMS: dict[tuple, tuple["Program", int | None]] = {}


def _program(job: _Job, image: np.ndarray, devices: "Sequence[jax.Device]") -> "Program":
    """The compiled network, loaded and compiled once in a process however many shares it gets."""
    key = job.module, job.network.name, job.attentive, job.weights, job.record.recipe.dtype, image.shape, image.dtype
    program, asked = _PROGRAMS.get(key, (None, None))
    # What another command asked for is not what memory allows.
    fits = asked is None if job.batch_size is None else program is not None and program.batch_size == job.batch_size
    if program is None or not fits:
        _PROGRAMS.clear()
        program = job._compile(job.weights.load(job.network), image, devices)
        _PROGRAMS[key] = program, job.batch_size
    return program


def share_out(sizes: Sequence[int], num_workers: int, least: int) -> list[range]:
    """Parts of neighbouring clips for workers that take one after the other.

    They become smaller and smaller, so that all workers end at about the same time.

    Args:
        sizes: Number of images of each clip.
        num_workers: How many workers there are.
        least: Number of images below which a part is not worth it.

    Returns:
        The clips of each part.
    """
    parts, start, left = [], 0, sum(sizes)
    while start < len(sizes):
        wanted, stop, size = max(least, left / (2 * num_workers)), start, 0
        while stop < len(sizes) and size < wanted:
            size += sizes[stop]
            stop += 1
        parts.append(range(start, stop))
        start, left = stop, left - size
    return parts


def _made_with(device: "jax.Device") -> dict[str, str]:
    """On what the last bits of features may depend."""
    versions = {"mer_jax": __version__}
    for name in _LIBRARIES:
        # Another build of the same library goes by another name.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions | {"device": device.device_kind}
