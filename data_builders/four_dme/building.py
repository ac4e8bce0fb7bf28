"""Builds the data set: clips, then features (resumable), then TFDS records, moved into place when whole."""

import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_builders.clip_work import say_waiting
from data_builders.four_dme import data_card
from data_builders.four_dme.feature_store import ClipFeatures, features_root, find_folder, load_all, read_record
from data_builders.four_dme.preparation import (
    PreparedView,
    fingerprint,
    load_prepared,
    prepare,
    sample_name,
    views_of,
)
from data_builders.tfds_files import is_whole, read_metadata, restore_replaced, write_dataset
from mer_jax.clips.crops import CropConfig
from mer_jax.clips.demo import VERSION as DEMO_VERSION
from mer_jax.clips.demo import make_demo_clips
from mer_jax.clips.layouts import LABELS, Clip, read_challenge, read_release
from mer_jax.errors import UserError
from mer_jax.extractors.base import EMBEDDED, EXTRACTORS, get_extractor
from mer_jax.extractors.feature_files import is_feature_file, read_sample_features
from mer_jax.extractors.networks import NETWORKS, get_network
from mer_jax.files import exclusive
from mer_jax.parallel import Workers, local_workers

CONFIGS = ("demo", "challenge", "release")
VERSION = "1.0.0"
DEMO_CLIPS = (100, 28)
_MAX_NAMED = 10


@dataclass(frozen=True)
class _Options:
    """The arguments of :func:`build` that say what is in the data set; None where nothing was said."""

    config: str
    source: str | None
    test_source: str | None
    labels: str | None
    columns: dict[str, str] | None
    workbook: str | None
    extractors: tuple[str, ...]
    features: dict[str, str]
    crop: dict[str, Any] | None
    feature_frames: str
    seed: int | None
    demo_clips: tuple[int, int] | None
    demo_version: int | None


def version_dir(config_name: str, data_dir: str | os.PathLike = "data") -> Path:
    """Where :func:`build` puts a configuration: the folder for ``tfds.builder_from_directory``."""
    return Path(data_dir) / "four_dme" / config_name / VERSION


def default_crop(config_name: str) -> CropConfig:
    """How faces are cut out unless said otherwise."""
    # Faces of the demo clips are about 224 px high; a larger crop would hold no more.
    return CropConfig(size=256) if config_name == "demo" else CropConfig()


def build(
    config_name: str,
    *,
    data_dir: str | os.PathLike = "data",
    source: str | os.PathLike | None = None,
    test_source: str | os.PathLike | None = None,
    labels: str | os.PathLike | None = None,
    columns: Mapping[str, str] | None = None,
    workbook: str | os.PathLike | None = None,
    extractors: Sequence[str] = EMBEDDED,
    features: Mapping[str, str | os.PathLike] | None = None,
    extracted: Mapping[str, str | os.PathLike] | None = None,
    crop: CropConfig | None = None,
    feature_frames: Literal["strict", "shortest"] = "strict",
    workers: Workers = None,
    seed: int = 0,
    demo_clips: tuple[int, int] = DEMO_CLIPS,
) -> Path:
    """Builds ``four_dme/<config_name>``, or finds it built.

    Features are kept clip by clip under ``data_dir/work``; a build that was killed, or stopped by a bad clip,
    goes on from there. The data set appears under ``data_dir/four_dme`` only when it is whole. What is built
    already is returned at once if it has what is asked for; of what is left out here (None) nothing is asked.
    Where only features are lacking, they are added to those that it holds, and the data set is replaced as a whole.

    Args:
        config_name: ``'demo'`` (rendered here, in ``data_dir/clips/four_dme_demo``), ``'challenge'`` (4DMR
            layout) or ``'release'`` (4DME workbook over single-view grey frames).
        data_dir: Where everything is kept.
        source: Challenge: the folder of the sequences; release: the folder of the frames, e.g.
            ``gray_micro``.
        test_source: Challenge: the folder of the test sequences, ``source/test`` unless given.
        labels: Challenge: the CSV of training labels, ``source/train.csv`` unless given.
        columns: Challenge: names of the CSV's columns, {ours: theirs}.
        workbook: Release: the labelling workbook.
        extractors: Names of the extractors to run on the frames, and of networks whose features
            :func:`data_builders.four_dme.extract_features` extracted before; may be empty.
        features: Features from elsewhere, {name: folder}; layouts as in
            :mod:`mer_jax.extractors.feature_files`.
        extracted: Folders of networks' features, {name: folder}; the only ones there are unless given.
        crop: How faces are cut out; 256 px for the demo, the paper's 1024 px otherwise, unless given.
        feature_frames: ``'strict'`` refuses features from elsewhere of another number of frames than their
            clip; ``'shortest'`` cuts a sample to the shortest of its features, as the released code does.
        workers: Number of processes, one per available processor unless given; or a cluster.
        seed: Demo: seed of the clips.
        demo_clips: Demo: number of training and test clips.

    Returns:
        The folder of the built version, for ``tfds.builder_from_directory``.

    Raises:
        UserError: Something is missing, bad or contradicts what is built; the message names it and the
            remedy.
        KeyboardInterrupt: Ctrl-C, or SIGTERM while features are extracted; finished clips are kept.
    """
    options = _options(
        config_name,
        source=source,
        test_source=test_source,
        labels=labels,
        columns=columns,
        workbook=workbook,
        extractors=extractors,
        features=features,
        crop=crop,
        feature_frames=feature_frames,
        seed=seed,
        demo_clips=demo_clips,
    )
    _check(options)
    place = _Place(config_name, data_dir, {name: Path(folder) for name, folder in (extracted or {}).items()}, workers)
    # What is built needs no lock, so that it may lie on a read-only disk.
    if _lacking(place, options) == ():
        return place.target
    if not options.extractors and not options.features:
        raise UserError("neither --extractors nor --features: name at least one source of features")
    with exclusive(place.work, functools.partial(say_waiting, place.work)):
        restore_replaced(place.target, staging=place.staging)
        lacking = _lacking(place, options)
        if lacking is None:
            _build(options, _clips(options, data_dir, workers), crop or default_crop(config_name), place)
        elif lacking:
            _extend(options, lacking, place)
    return place.target


def built_settings(config_name: str, data_dir: str | os.PathLike = "data") -> dict[str, Any] | None:
    """What :func:`build` was told of crops and clips when it built what is there, by its arguments' names.

    Raises:
        UserError: What is there is no data set.
    """
    built = read_metadata(version_dir(config_name, data_dir), ("settings",))
    return built["settings"] if built else None


def check_fits(
    config_name: str,
    data_dir: str | os.PathLike,
    *,
    crop: CropConfig | None,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    **clips_told: Any,
) -> None:
    """Refuses what :func:`build` would refuse, before features are extracted for it.

    Args:
        config_name: As in :func:`build`, as are ``data_dir`` and ``crop``.
        data_dir: See there.
        crop: See there.
        facts: What the data set would say of networks' features, {name: facts}.
        **clips_told: The arguments of :func:`build` that say which clips there are.

    Raises:
        UserError: The arguments make no sense, or the data set that is there holds other clips, other crops, or
            features of these names of other weights, of other preprocessing or from elsewhere.
    """
    options = _options(config_name, extractors=tuple(facts or ()), crop=crop, **clips_told)
    _check(options)
    target = version_dir(config_name, data_dir)
    built = read_metadata(target, ("settings", "extractors", "content"))
    if built is not None:
        _refuse(target, _differences(built, options, _clips(options) if options.source else None, facts or {}))


@dataclass(frozen=True)
class _Place:
    """Where a data set and all that it is made of is kept, and how to work on it."""

    config: str
    data_dir: str | os.PathLike
    extracted: dict[str, Path]
    workers: Workers

    @property
    def target(self) -> Path:
        return version_dir(self.config, self.data_dir)

    @property
    def work(self) -> Path:
        return Path(self.data_dir) / "work" / "four_dme" / self.config

    @property
    def staging(self) -> Path:
        return self.work / "staging"

    def folder_of(self, name: str, crop: CropConfig) -> Path:
        """The folder of a network's features."""
        root = features_root(self.config, self.data_dir)
        return self.extracted.get(name) or find_folder(root, name, crop.settings())


@dataclass(frozen=True)
class _Kept:
    """What a built data set holds already, of the same clips.

    Attributes:
        facts: Extractor to what the data set says of its features.
        missing: As :class:`_Notes` has it.
        num_frames: Sample to the number of frames, where it is not all of its clip's.
        records: Split to its records, in order.
    """

    facts: dict[str, dict[str, Any]]
    missing: dict[str, dict[str, list[int]]]
    num_frames: dict[str, int]
    records: Mapping[str, Sequence[dict[str, Any]]]


def _lacking(place: _Place, options: _Options) -> tuple[str, ...] | None:
    """Features that are asked for and not built; None where nothing is, or only files of the very same data are lost.

    Raises:
        UserError: Something else is there.
    """
    target = place.target
    built = read_metadata(target, ("settings", "extractors", "content"))
    if built is None:
        return None
    # Clips are only read for a comparison where the caller says where they are.
    clips = _clips(options) if options.source else None
    facts = {name: read_record(folder).facts() for name, folder in place.extracted.items()}
    _refuse(target, _differences(built, options, clips, facts))
    asked = (*options.extractors, *options.features)
    if is_whole(target):
        return tuple(name for name in asked if name not in built["extractors"])
    crop = CropConfig(**options.crop) if options.crop else default_crop(place.config)
    if set(built["extractors"]) != set(asked) or built["settings"] != _settings(options, crop):
        raise UserError(f"{target}: files of records are missing; remove this folder to build it again")
    return None


def _refuse(target: Path, differences: Sequence[str]) -> None:
    if differences:
        raise UserError(
            f"{target}: built with other settings ({'; '.join(differences)}); remove this folder to build it "
            "again, or give another --data_dir"
        )


def _extend(options: _Options, lacking: Sequence[str], place: _Place) -> None:
    """Builds the data set again, of what it holds and of what it lacks."""
    import tensorflow_datasets as tfds

    target = place.target
    built = read_metadata(target, ("settings", "extractors", "content", "missing_frames", "cut"))
    settings = built["settings"]
    # What is not said now is as it was said before.
    told = {name: value for name, value in asdict(options).items() if value is not None and name in settings}
    told = settings | told
    all_options = _Options(
        **{
            **told,
            "config": options.config,
            "extractors": tuple(name for name in lacking if name not in options.features),
            "features": settings["features"] | options.features,
            "feature_frames": options.feature_frames if options.features else settings["feature_frames"],
            "demo_clips": tuple(told["demo_clips"]) if told["demo_clips"] else None,
            "crop": None,
        }
    )
    clips = _clips(all_options, place.data_dir, place.workers)
    if built["content"] != _content(clips, replace(all_options, features=settings["features"])):
        raise UserError(
            f"{target}: labels, frames or feature files have changed since it was built; remove this folder to build "
            "it again"
        )
    source = tfds.builder_from_directory(target).as_data_source()
    kept = _Kept(
        built["extractors"],
        built["missing_frames"],
        {sample: num_frames for sample, (num_frames, _) in built["cut"].items()},
        source,
    )
    _build(all_options, clips, CropConfig(**settings["crop"]), place, kept)


def _build(options: _Options, clips: list[Clip], crop: CropConfig, place: _Place, kept: _Kept | None = None) -> None:
    kept = kept or _Kept({}, {}, {}, {})
    # Files come first: they cost little and may be wrong.
    files = {name: folder for name, folder in options.features.items() if name not in kept.facts}
    from_files = _read_features(clips, replace(options, features=files))
    embedded = tuple(name for name in options.extractors if name not in NETWORKS)
    folders = {name: place.folder_of(name, crop) for name in options.extractors if name in NETWORKS}
    from_networks = {name: load_all(folder, clips) for name, folder in folders.items()}
    paths = prepare(clips, crop, embedded, place.work, workers=place.workers)
    views = [(clip, view, paths[clip.name]) for clip in clips for view in views_of(clip)]

    rows: dict[str, list[dict[str, Any]]] = {}
    notes = _Notes(kept.missing)
    for clip, view, path in views:
        prepared = load_prepared(path, view)
        sample = sample_name(clip, view)
        lengths = [len(from_files[name][sample]) for name in from_files]
        num_frames = min([len(clip.frames), kept.num_frames.get(sample, len(clip.frames)), *lengths])
        rows.setdefault(clip.split, []).append(_row(clip, view, prepared, num_frames))
        missing = {name: of_name[clip.name].missing[view] for name, of_name in from_networks.items()}
        notes.add(clip, sample, prepared, missing, num_frames)

    def record(row: dict[str, Any], old: Mapping[str, Any], path: Path, clip: Clip) -> dict[str, Any]:
        view = row["view"]
        values = load_prepared(path, view).features
        values |= {name: of_name[sample_name(clip, view)] for name, of_name in from_files.items()}
        values |= {name: of_name[clip.name].features[view] for name, of_name in from_networks.items()}
        values = dict(old.get("features", {})) | values
        cut = {name: value[: row["num_frames"]].astype(np.float32) for name, value in values.items()}
        return row | {"features": cut}

    def split_records(split: str) -> Iterator[dict[str, Any]]:
        of_split = [(clip, path) for clip, _, path in views if clip.split == split]
        for index, (row, (clip, path)) in enumerate(zip(rows[split], of_split, strict=True)):
            yield record(row, kept.records[split][index] if kept.records else {}, path, clip)

    told = kept.facts | {name: _embedded_facts(name) for name in embedded}
    for name, folder in folders.items():
        told[name] = _network_facts(folder, from_networks[name].values())
    for name, samples in from_files.items():
        told[name] = _file_facts(options.features[name], next(iter(samples.values())).shape[1])
    facts = {
        "origin": _origin(options),
        "content": _content(clips, options),
        "settings": _settings(options, crop),
        "extractors": told,
        "statistics": {split: data_card.statistics(split_rows) for split, split_rows in rows.items()},
        "no_face": notes.no_face,
        "missing_frames": notes.missing,
        "cut": notes.cut,
        "exceptions": notes.lines(crop),
    }
    records = {split: (lambda split=split: split_records(split)) for split in rows}
    dims = {name: facts_of["dim"] for name, facts_of in told.items()}
    _write(records, dims, facts, place)
    for line in facts["exceptions"]:
        print(f"note: {line}", file=sys.stderr)


def _options(
    config_name: str,
    *,
    source=None,
    test_source=None,
    labels=None,
    columns=None,
    workbook=None,
    extractors=(),
    features=None,
    crop=None,
    feature_frames="strict",
    seed=None,
    demo_clips=None,
) -> _Options:
    """The arguments of :func:`build` in the form in which a data set keeps them."""
    demo = config_name == "demo"
    return _Options(
        config=config_name,
        source=_told(source),
        test_source=_told(test_source),
        labels=_told(labels),
        columns=dict(columns) if columns else None,
        workbook=_told(workbook),
        extractors=tuple(extractors),
        features={name: _told(folder) for name, folder in (features or {}).items()},
        crop=asdict(crop) if crop else None,
        feature_frames=feature_frames,
        seed=seed if demo else None,
        demo_clips=tuple(demo_clips) if demo and demo_clips else None,
        demo_version=DEMO_VERSION if demo else None,
    )


# --- checking ----------------------------------------------------------------------------------------------


def _told(path: str | os.PathLike | None) -> str | None:
    return None if path is None else str(Path(path).resolve())


def _check(options: _Options) -> None:
    """Refuses options that make no sense before anything is done."""
    if options.config not in CONFIGS:
        raise UserError(f"config 'four_dme/{options.config}' is unknown; there are {', '.join(CONFIGS)}")
    wanted = {
        "demo": (),
        "challenge": ("source", "test_source", "labels", "columns"),
        "release": ("source", "workbook"),
    }[options.config]
    for name in ("source", "test_source", "labels", "columns", "workbook"):
        if getattr(options, name) is not None and name not in wanted:
            raise UserError(f"{name}: not used by four_dme/{options.config}; leave it out")
    if options.feature_frames not in ("strict", "shortest"):
        raise UserError(f"--feature_frames {options.feature_frames}: choose strict or shortest")
    for name in options.extractors:
        if name not in NETWORKS:
            get_extractor(name)
    if len(set(options.extractors)) < len(options.extractors):
        raise UserError(f"--extractors: {', '.join(options.extractors)} names one twice")
    if options.demo_clips is not None and min(options.demo_clips) < 1:
        raise UserError(f"--demo_clips {options.demo_clips}: at least one training and one test clip are needed")
    for name, folder in options.features.items():
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: no such folder of features")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise UserError(f"--features {name}=...: call it by small letters, digits and _ only")
        if name in EXTRACTORS:
            raise UserError(f"--features {name}=...: {name} is an extractor of this library; choose another name")


def _crop_differences(settings: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    # What a data set does not say is as it was before there was a choice.
    stored = asdict(CropConfig()) | settings["crop"]
    return [f"crop {name} {stored[name]}, asked {value}" for name, value in asked.items() if stored[name] != value]


def _is_current(name: str, facts: Mapping[str, Any]) -> bool:
    """Whether features were made as the extractor makes them now; of what came from files nothing is known."""
    if name not in NETWORKS:
        return facts == _embedded_facts(name)
    return "weights_sha256" not in facts or facts["preprocessing"] == get_network(name).preprocessing


def _network_differences(name: str, built: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """In what a network's features are not those that are asked for, in words."""
    if "weights_sha256" not in built:
        return [f"features {name} {built['preprocessing']}"]
    hashes = [facts["weights_sha256"][:12] or "none" for facts in (built, asked)]
    differences = [f"features {name} of weights {hashes[0]}, asked {hashes[1]}"] if hashes[0] != hashes[1] else []
    if built["preprocessing"] != asked["preprocessing"]:
        differences.append(f"features {name} of another version")
    for field in ("dtype", "store", "imported"):
        if built[field] != asked[field]:
            differences.append(f"features {name} {field} {built[field] or 'no'}, asked {asked[field] or 'no'}")
    return differences


def _differences(
    built: Mapping[str, Any],
    options: _Options,
    clips: Sequence[Clip] | None,
    facts: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """In what a built data set is not what is asked for, in words; what it lacks altogether is no difference."""
    settings, extractors = built["settings"], built["extractors"]
    differences = _crop_differences(settings, options.crop or {})
    for name in ("source", "test_source", "labels", "columns", "workbook", "seed", "demo_clips", "demo_version"):
        asked = json.loads(json.dumps(getattr(options, name)))
        if asked is not None and settings.get(name) != asked:
            differences.append(f"{name} {settings.get(name)}, asked {asked}")
    if options.features and settings["features"] and settings["feature_frames"] != options.feature_frames:
        differences.append(f"feature_frames {settings['feature_frames']}, asked {options.feature_frames}")
    for name in set(options.extractors) & set(extractors):
        if name in facts:
            differences += _network_differences(name, extractors[name], facts[name])
        elif not _is_current(name, extractors[name]):
            differences.append(f"features {name} of another version")
    for name, folder in options.features.items():
        if name in extractors and settings["features"].get(name) != folder:
            differences.append(f"features {name} from {settings['features'].get(name)}, asked {folder}")
    comparable = clips is not None and options.features == settings["features"]
    # The folders in the order in which they were built, which the user need not remember.
    before = replace(options, features=settings["features"])
    if not differences and comparable and built["content"] != _content(clips, before):
        differences.append("labels, frames or feature files have changed since")
    return differences


def _content(clips: Sequence[Clip], options: _Options) -> str:
    """Changes when labels, frames or features from elsewhere are replaced."""
    facts: list[Any] = [
        (clip.name, clip.id, clip.subject, clip.labels, clip.split, clip.onset, clip.apex, clip.offset)
        for clip in clips
    ]
    facts += [fingerprint(clip) for clip in clips]
    for folder in options.features.values():
        for path in sorted(filter(is_feature_file, Path(folder).rglob("*"))):
            status = path.stat()
            facts.append((str(path.relative_to(folder)), status.st_size, status.st_mtime_ns))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


# --- reading -----------------------------------------------------------------------------------------------


def _clips(options: _Options, data_dir: str | os.PathLike = "", workers: Workers = None) -> list[Clip]:
    return find_clips(
        options.config,
        source=options.source,
        test_source=options.test_source,
        labels=options.labels,
        columns=options.columns,
        workbook=options.workbook,
        data_dir=data_dir,
        seed=options.seed or 0,
        demo_clips=options.demo_clips or DEMO_CLIPS,
        workers=workers,
    )


def find_clips(
    config_name: str,
    *,
    source: str | os.PathLike | None,
    test_source: str | os.PathLike | None,
    labels: str | os.PathLike | None,
    columns: Mapping[str, str] | None,
    workbook: str | os.PathLike | None,
    data_dir: str | os.PathLike,
    seed: int,
    demo_clips: tuple[int, int],
    workers: Workers,
) -> list[Clip]:
    """Finds the clips of a configuration, rendering demo clips first; the arguments are those of :func:`build`.

    Raises:
        UserError: A source is needed and not said, or wrong.
    """
    if config_name == "demo":
        folder = Path(data_dir) / "clips" / "four_dme_demo"
        num_train, num_test = demo_clips
        return read_challenge(
            make_demo_clips(folder, num_train=num_train, num_test=num_test, seed=seed, workers=local_workers(workers))
        )
    if source is None:
        raise UserError(
            f"four_dme/{config_name} is not built yet: say with --source where its frames are (4DME needs "
            "a signed licence; four_dme/demo needs nothing)"
        )
    if config_name == "challenge":
        return read_challenge(source, labels, columns, test_source)
    if workbook is None:
        raise UserError("four_dme/release: say with --workbook where the labelling workbook is")
    return read_release(workbook, source)


def _read_features(clips: Sequence[Clip], options: _Options) -> dict[str, dict[str, np.ndarray]]:
    """{name: {sample: (T, D)}} of the features from elsewhere, of one D per name."""
    result: dict[str, dict[str, np.ndarray]] = {}
    for name, folder in options.features.items():
        samples: dict[str, np.ndarray] = {}
        dim = None
        for clip in clips:
            for view in views_of(clip):
                sample = sample_name(clip, view)
                read = read_sample_features(folder, sample, dim=dim)
                if options.feature_frames == "strict" and len(read) != len(clip.frames):
                    raise UserError(
                        f"{folder}: features of {len(read)} frames for '{sample}', whose clip has "
                        f"{len(clip.frames)}; compute them again, or cut to the shortest with "
                        "--feature_frames shortest"
                    )
                samples[sample], dim = read, read.shape[1]
        result[name] = samples
    return result


# --- telling -----------------------------------------------------------------------------------------------


def _row(clip: Clip, view: str, prepared: PreparedView, num_frames: int) -> dict[str, Any]:
    """A record without its features."""
    box = prepared.box
    phases = {}
    for name in ("onset", "apex", "offset"):
        index = getattr(clip, name)
        phases[name] = -1 if index is None or index >= num_frames else index
    return {
        "clip": clip.name,
        "id": clip.id,
        "subject": clip.subject,
        "view": view,
        "labels": np.array(clip.labels if clip.labels is not None else [-1] * len(LABELS), np.int8),
        "num_frames": num_frames,
        "box": np.array([box.left, box.top, box.width, box.height], np.int32),
        "face_found": box.found,
        **phases,
    }


class _Notes:
    """What was out of the ordinary, collected sample by sample, beside what ``missing`` tells of already."""

    def __init__(self, missing: Mapping[str, Mapping[str, list[int]]]):
        self.no_face: list[str] = []
        self.missing: dict[str, dict[str, list[int]]] = {name: dict(samples) for name, samples in missing.items()}
        self.cut: dict[str, list[int]] = {}

    def add(self, clip: Clip, sample: str, prepared: PreparedView, missing: Mapping[str, int], num_frames: int) -> None:
        if not prepared.box.found:
            self.no_face.append(sample)
        for name, count in (prepared.missing | missing).items():
            if count:
                self.missing.setdefault(name, {})[sample] = [count, len(clip.frames)]
        if num_frames < len(clip.frames):
            self.cut[sample] = [num_frames, len(clip.frames)]

    def lines(self, crop: CropConfig) -> list[str]:
        lines = []
        if self.no_face:
            frames = "the first frame" if crop.rule == "first" else "any frame"
            lines.append(
                f"no face was found in {frames} of {_count(self.no_face, 'sample')}, so the "
                f"'{crop.fallback}' box was cut out: {_listed(self.no_face)}"
            )
        for name, samples in self.missing.items():
            some = [f"{s} ({n} of {total})" for s, (n, total) in samples.items() if n < total]
            every = [s for s, (n, total) in samples.items() if n == total]
            if some:
                lines.append(
                    f"{name} found nothing in some frames of {_count(some, 'sample')}, which were filled "
                    f"from their neighbours in time: {_listed(some)}"
                )
            if every:
                lines.append(
                    f"{name} found nothing in any frame of {_count(every, 'sample')}, whose features are 0: "
                    f"{_listed(every)}"
                )
        if self.cut:
            cut = [f"{s} ({n} of {total})" for s, (n, total) in self.cut.items()]
            lines.append(f"{_count(cut, 'sample')} cut to the shortest of their features: {_listed(cut)}")
        return lines


def _count(items: Sequence[str], unit: str) -> str:
    return f"{len(items)} {unit}{'s' if len(items) > 1 else ''}"


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _MAX_NAMED} more" if len(items) > _MAX_NAMED else ""
    return ", ".join(items[:_MAX_NAMED]) + more


def _embedded_facts(name: str) -> dict[str, Any]:
    extractor = get_extractor(name)
    return {key: getattr(extractor, key) for key in ("modality", "dim", "licence", "preprocessing")}


def _network_facts(folder: Path, clips: Iterable[ClipFeatures]) -> dict[str, Any]:
    facts = read_record(folder).facts()
    samples = [view in clip.imported for clip in clips for view in clip.features]
    return facts | {"imported_samples": sum(samples), "samples": len(samples)}


def _file_facts(folder: str, dim: int) -> dict[str, Any]:
    return {
        "modality": "not known here",
        "dim": dim,
        "licence": "not known here",
        "preprocessing": f"read from files in {folder}",
    }


def _settings(options: _Options, crop: CropConfig) -> dict[str, Any]:
    settings = asdict(options)
    del settings["config"], settings["extractors"]
    return json.loads(json.dumps(settings | {"crop": crop.settings()}))


def _origin(options: _Options) -> str:
    if options.config == "demo":
        return (
            f"Demo clips rendered by this library (seed {options.seed}) from the public-domain photograph "
            "`skimage.data.astronaut()`. Results on them are no benchmark: they only show that software "
            "works. The labels of the test split are withheld, as in the challenge."
        )
    if options.config == "challenge":
        return (
            f"4DMR challenge, read from {options.source}. Its images are under the 4DME licence, and so may "
            "be what is derived from them; check before passing it on. Test labels are never read."
        )
    return (
        f"4DME release, single-view frames in {options.source}, workbook {options.workbook}. Its images are "
        "under the 4DME licence, and so may be what is derived from them; check before passing it on."
    )


# --- writing -----------------------------------------------------------------------------------------------


def _write(records, dims: Mapping[str, int], facts: Mapping[str, Any], place: _Place) -> None:
    def make_builder(folder: Path):
        from data_builders.four_dme.four_dme_dataset_builder import Builder

        return Builder(records=records, dims=dims, facts=facts, config=place.config, data_dir=folder)

    card = data_card.render(place.config, facts)
    write_dataset(make_builder, place.target, staging=place.staging, pages={"data_card.md": card})
