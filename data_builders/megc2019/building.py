"""Builds the data set: clips, then flow (resumable), then TFDS records, moved into place when whole."""

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_builders.clip_work import files_fingerprint, say_waiting
from data_builders.flow_records import PHASES, VERSION, FlowFormat, statistics, version_dir, write_flow_dataset
from data_builders.megc2019.composite import CLASSES, DATABASES, count, count_notes, counted, some
from data_builders.megc2019.demo import CROP as DEMO_CROP
from data_builders.megc2019.demo import FLOW as DEMO_FLOW
from data_builders.megc2019.demo import VERSION as DEMO_IMAGES_VERSION
from data_builders.megc2019.demo import make_demo_images
from data_builders.megc2019.flow_folder import FlowImages, find_table, read_flow_folder
from data_builders.megc2019.flow_images import CHANNELS, as_image
from data_builders.megc2019.preparation import PreparedClip, fingerprint, load_prepared, prepare, settings_of
from data_builders.megc2019.raw_frames import HALF_WAY, RawClip, find_databases, read_raw
from data_builders.tfds_files import is_whole, read_metadata
from mer_jax.clips.apex import ApexConfig
from mer_jax.clips.crops import CropConfig
from mer_jax.clips.demo import VERSION as DEMO_CLIPS_VERSION
from mer_jax.clips.flow import FlowConfig
from mer_jax.errors import UserError
from mer_jax.files import exclusive
from mer_jax.parallel import Workers

FAMILY = "megc2019"
CONFIGS = ("folder", "raw", "demo")
SHEETS = ("casme2_sheet", "samm_sheet")
SOURCES = (*DATABASES, *SHEETS)  # beside 'source', what says where raw frames are
STORES = ("image", "flow")
DEMO_CLIPS = (100, 28)
SIZE = 28
# The field's images are TV-L1, as far as is known.
DEFAULT_FLOW = FlowConfig(method="tvl1")
DEFAULT_CROP = CropConfig(size=224)
# What 'raw' takes beside its sources.
RAW_DEFAULTS = {"crop": DEFAULT_CROP, "apex": "half_way", "flow": DEFAULT_FLOW, "size": SIZE, "store": "image"}

_USED = {
    "folder": ("source", "labels"),
    "raw": ("source", *SOURCES, *RAW_DEFAULTS),
    "demo": ("seed", "demo_clips"),
}
_DESCRIPTION = """\
The composite of CASME II, SAMM and SMIC of the Second Facial Micro-Expressions Grand Challenge: one record per clip,
with the optical flow between onset, apex and offset. The classes are negative, positive and surprise, one-hot; all
clips are training clips, to be scored by leaving one subject out at a time.
"""
_CITATION = """\
@inproceedings{see2019megc,
  title = {{MEGC} 2019 -- The Second Facial Micro-Expressions Grand Challenge},
  author = {See, John and Yap, Moi Hoon and Li, Jingting and Hong, Xiaopeng and Wang, Su-Jing},
  booktitle = {IEEE International Conference on Automatic Face and Gesture Recognition (FG)},
  year = {2019}
}
"""


@dataclass(frozen=True)
class _Plan:
    """What is to be built, read from its source but not computed yet.

    Attributes:
        settings: All that the data depend on, JSON-able.
        content: Changes when the source's files do.
        write: Writes the data set into a target, given a work folder.
    """

    settings: dict[str, Any]
    content: str
    write: Callable[[Path, Path], None]


def build(
    config_name: str,
    *,
    data_dir: str | os.PathLike = "data",
    source: str | os.PathLike | None = None,
    labels: str | os.PathLike | None = None,
    casme2: str | os.PathLike | None = None,
    samm: str | os.PathLike | None = None,
    smic: str | os.PathLike | None = None,
    casme2_sheet: str | os.PathLike | None = None,
    samm_sheet: str | os.PathLike | None = None,
    crop: CropConfig | Literal["whole"] | None = None,
    apex: ApexConfig | Literal["half_way"] | None = None,
    flow: FlowConfig | None = None,
    size: int | None = None,
    store: Literal["image", "flow"] | None = None,
    workers: Workers = None,
    seed: int | None = None,
    demo_clips: tuple[int, int] | None = None,
) -> Path:
    """Builds ``megc2019/<config_name>``, or finds it built.

    Every combination of settings and sources has its own folder, so that none is in the way of another. Where the
    source is left out, the one that is built with the settings asked for is returned. The data set appears only when
    it is whole; flow of raw frames is kept clip by clip under ``data_dir/work``, and a build that was killed, or
    stopped by a bad frame, goes on from there.

    Args:
        config_name: ``'folder'`` (the published flow images), ``'raw'`` (frames of the databases) or ``'demo'``
            (flow images made here from the demo clips, in ``data_dir/clips/megc2019_demo``).
        data_dir: Where everything is kept.
        source: Folder: the flat folder of images, or the tree of folds. Raw: a folder that holds the databases under
            their names; those named below win.
        labels: Folder: the table, see :func:`~data_builders.megc2019.flow_folder.read_flow_folder`.
        casme2: Raw: folder of CASME II; likewise:
        samm: of SAMM,
        smic: of SMIC (its high-speed part, HS). At least one is needed.
        casme2_sheet: Raw: coding sheet of CASME II, looked for in and above its folder unless given; likewise:
        samm_sheet: of SAMM.
        crop: Raw: how faces are cut out, :data:`DEFAULT_CROP` unless given; ``'whole'`` takes the frames as they
            are, for releases that are cropped already.
        apex: Raw: how the apex is found, by Farneback's flow, where the sheet tells none, or in all clips, as its
            ``use_annotated`` says. ``'half_way'``, the default, takes the frame half-way where the sheet tells none.
        flow: Raw: how flow is computed, :data:`DEFAULT_FLOW` unless given.
        size: Raw: side of the stored maps, 28 unless given.
        store: Raw: ``'image'`` (the default) stretches u, v and strain to 8 bits as the published images do, so that
            a model of these takes them; ``'flow'`` keeps u and v in px of the crop.
        workers: Number of processes, one per available processor unless given; or a cluster.
        seed: Demo: seed of the demo clips, 0 unless given.
        demo_clips: Demo: number of training and test clips, 100 and 28 unless given.

    Returns:
        The folder of the built version, for ``tfds.builder_from_directory``.

    Raises:
        UserError: Something is missing, bad or has changed since it was built; the message names it and the remedy.
        KeyboardInterrupt: Ctrl-C, or SIGTERM while flow is computed; finished clips are kept.
    """
    given = {
        "source": source,
        "labels": labels,
        "casme2": casme2,
        "samm": samm,
        "smic": smic,
        "casme2_sheet": casme2_sheet,
        "samm_sheet": samm_sheet,
        "crop": crop,
        "apex": apex,
        "flow": flow,
        "size": size,
        "store": store,
        "seed": seed,
        "demo_clips": demo_clips,
    }
    given = {name: value for name, value in given.items() if value is not None}
    _check(config_name, given)
    data_dir = Path(data_dir)
    if config_name == "demo":
        return _finish(data_dir, config_name, _plan_demo(data_dir, given, workers))
    if not given.keys() & {"source", *DATABASES}:
        return _built_before(data_dir, config_name, given)
    plan = _plan_folder(given) if config_name == "folder" else _plan_raw(given, workers)
    return _finish(data_dir, config_name, plan)


# --- checking and finding ----------------------------------------------------------------------------------


def _check(config: str, given: Mapping[str, Any]) -> None:
    """Refuses options that make no sense before anything is done."""
    if config not in CONFIGS:
        raise UserError(f"config '{FAMILY}/{config}' is unknown; there are {', '.join(CONFIGS)}")
    for name in given:
        if name not in _USED[config]:
            raise UserError(f"{name}: not used by {FAMILY}/{config}; leave it out")
    if given.get("store", "image") not in STORES:
        raise UserError(f"store {given['store']!r}: choose one of {', '.join(STORES)}")
    if given.get("size", SIZE) < 1:
        raise UserError(f"size {given['size']}: must be at least 1; the published images have {SIZE}")
    if isinstance(given.get("apex"), str) and given["apex"] != "half_way":
        raise UserError(f"apex {given['apex']!r}: give how it is found, or 'half_way' for the frame half-way")
    if isinstance(given.get("crop"), str) and given["crop"] != "whole":
        raise UserError(f"crop {given['crop']!r}: give a crop, or 'whole' for frames that are cropped already")
    if min(given.get("demo_clips", DEMO_CLIPS)) < 1:
        raise UserError(f"demo_clips {given['demo_clips']}: at least one training and one test clip are needed")


def _built_before(data_dir: Path, config: str, given: Mapping[str, Any]) -> Path:
    """The only built data set that has what is asked for."""
    asked = {name: _told(value) for name, value in given.items()}
    found = []
    for target in sorted((data_dir / FAMILY).glob(f"{config}-*/{VERSION}")):
        settings = read_metadata(target, ("settings",))["settings"]
        if is_whole(target) and all(settings.get(name) == value for name, value in asked.items()):
            found.append(target)
    if len(found) > 1:
        raise UserError(
            f"{FAMILY}/{config} is built {len(found)} times ({some(found)}): say with --source which is meant"
        )
    if not found:
        raise UserError(
            f"{FAMILY}/{config} is not built yet: say with --source where its "
            f"{'images are' if config == 'folder' else 'databases are'} (they need signed agreements; {FAMILY}/demo "
            "needs nothing)"
        )
    return found[0]


def _finish(data_dir: Path, config: str, plan: _Plan) -> Path:
    target = version_dir(data_dir, FAMILY, config, plan.settings)
    # What is built needs no lock, so that it may lie on a read-only disk.
    if _is_built(target, plan):
        return target
    work = data_dir / "work" / FAMILY / config
    with exclusive(work, functools.partial(say_waiting, work)):
        if not _is_built(target, plan):
            plan.write(target, work)
    return target


def _is_built(target: Path, plan: _Plan) -> bool:
    built = read_metadata(target, ("settings", "content"))
    if built is None:
        return False
    if built["settings"] != plan.settings or built["content"] != plan.content:
        raise UserError(f"{target}: images, frames or labels have changed since it was built; remove this folder to "
                        "build it again")  # fmt: skip
    return is_whole(target)


# --- published images --------------------------------------------------------------------------------------


def _plan_folder(given: Mapping[str, Any]) -> _Plan:
    source, labels = Path(given["source"]), given.get("labels")
    if not source.is_dir():
        raise UserError(f"{source}: no such folder of flow images; check the path")
    table = find_table(source) if labels is None else Path(labels)
    settings = {"source": _told(source), "labels": _told(table)}
    images = (path for path in source.rglob("*") if path.suffix.lower() == ".png" and not path.name.startswith("."))
    content = files_fingerprint(sorted([*images, *([table] if table else [])]))
    origin = (
        f"Flow images in the format of STSTNet, HTNet and CausalNet, read from {settings['source']}. They derive from "
        "CASME II, SAMM and SMIC, which need signed agreements; do not pass them on."
    )

    def write(target: Path, work: Path) -> None:
        _write_images(read_flow_folder(source, table), settings, content, origin, target, work)

    return _Plan(settings, content, write)


def _plan_demo(data_dir: Path, given: Mapping[str, Any], workers: Workers) -> _Plan:
    seed, demo_clips = given.get("seed", 0), tuple(given.get("demo_clips", DEMO_CLIPS))
    settings = {
        "seed": seed,
        "demo_clips": list(demo_clips),
        "versions": [DEMO_CLIPS_VERSION, DEMO_IMAGES_VERSION],
        "crop": DEMO_CROP.settings(),
        "flow": asdict(DEMO_FLOW),
        "size": SIZE,
    }
    origin = (
        "Demo flow images, made by this library from clips that it renders from one public-domain photograph. "
        "**The three databases are pretended**: nothing here is from CASME II, SAMM or SMIC. Results on them are no "
        "benchmark: they only show that software works."
    )

    def write(target: Path, work: Path) -> None:
        images, table = make_demo_images(data_dir, seed=seed, demo_clips=demo_clips, workers=workers)
        _write_images(read_flow_folder(images, table), settings, "", origin, target, work, real=False)

    # Their bytes follow from the settings; the images themselves may be gone once the data set is there.
    return _Plan(settings, "", write)


def _write_images(
    read: FlowImages,
    settings: Mapping[str, Any],
    content: str,
    origin: str,
    target: Path,
    work: Path,
    *,
    real: bool = True,
) -> None:
    phases = tuple(read.images)
    rows = [
        _row(number, row.name, row.subject, row.database, row.label) for number, row in enumerate(read.rows, start=1)
    ]

    def records() -> Iterator[dict[str, Any]]:
        for index, row in enumerate(rows):
            yield row | {"flow": {phase: read.images[phase][index] for phase in phases}}

    size = read.images[phases[0]].shape[1]
    told = FlowFormat(CLASSES, "multi_class", (size, size, 3), CHANNELS, "uint8", phases)
    _write(told, rows, records, settings, content, origin, read.notes, target, work, real=real)


# --- raw frames --------------------------------------------------------------------------------------------


def _plan_raw(given: Mapping[str, Any], workers: Workers) -> _Plan:
    folders = find_databases(Path(given["source"])) if "source" in given else {}
    folders |= {database: Path(given[database]) for database in DATABASES if database in given}
    sheets = {
        database: given.get(f"{database}_sheet") for database in (sheet.removesuffix("_sheet") for sheet in SHEETS)
    }
    for database, sheet in sheets.items():
        if sheet is not None and database not in folders:
            raise UserError(
                f"{database}_sheet: there are no frames of {database}; say with --{database} where they are"
            )
    crop, apex, flow, size, store = (given.get(name, default) for name, default in RAW_DEFAULTS.items())
    crop = None if crop == "whole" else crop
    apex = None if apex == "half_way" else apex
    settings = {
        **{database: _told(folders.get(database)) for database in DATABASES},
        **{f"{database}_sheet": _told(sheet) for database, sheet in sheets.items()},
        **settings_of(crop, apex, flow, size),
        "store": store,
    }
    clips, notes = read_raw(folders, sheets, unknown_apex="it was found by motion" if apex else HALF_WAY)
    content = _hash([(clip.name, clip.subject, clip.label, fingerprint(clip)) for clip in clips])
    sources = ", ".join(f"{database} in {settings[database]}" for database in folders)
    origin = (
        f"Optical flow of raw frames: {sources}. The databases need signed agreements, and so may what is derived "
        "from their images; check before passing it on."
    )

    def write(target: Path, work: Path) -> None:
        paths = prepare(clips, crop, apex, flow, size, work, workers=workers)
        rows, still, no_face = [], {phase: [] for phase in PHASES}, []
        for number, clip in enumerate(clips, start=1):
            prepared = load_prepared(paths[clip.name])
            annotated = clip.apex_annotated and (apex is None or apex.use_annotated)
            rows.append(_raw_row(number, clip, prepared, annotated))
            if not prepared.box.found:
                no_face.append(clip.name)
            for phase, maps in zip(PHASES, prepared.maps, strict=True):
                if not maps.any():
                    still[phase].append(clip.name)

        def records() -> Iterator[dict[str, Any]]:
            for row, clip in zip(rows, clips, strict=True):
                maps = load_prepared(paths[clip.name]).maps
                kept = as_image(maps) if store == "image" else maps[..., :2]
                yield row | {"flow": dict(zip(PHASES, kept, strict=True))}

        lines = list(notes)
        if no_face:
            lines.append(
                f"no face was found in {counted(len(no_face), 'clip')}, so the '{crop.fallback}' box was cut out; "
                f"check: {some(no_face)}"
            )
        for phase, names in still.items():
            if names:
                lines.append(f"no motion at all in {phase} of {counted(len(names), 'clip')}; check: {some(names)}")
        channels, dtype = (CHANNELS, "uint8") if store == "image" else (CHANNELS[:2], "float32")
        told = FlowFormat(CLASSES, "multi_class", (size, size, len(channels)), channels, dtype, PHASES)
        _write(told, rows, records, settings, content, origin, lines, target, work)

    return _Plan(settings, content, write)


# --- records -----------------------------------------------------------------------------------------------


def _row(number: int, name: str, subject: str, database: str, label: int) -> dict[str, Any]:
    """A record of which only the flow is known, without that."""
    return {
        "clip": name,
        "id": number,
        "subject": subject,
        "database": database,
        "view": "c",
        "labels": np.eye(len(CLASSES), dtype=np.int8)[label],
        "num_frames": -1,
        "box": np.full(4, -1, np.int32),
        # Whoever made the images had found the face.
        "face_found": True,
        "onset": -1,
        "apex": -1,
        "offset": -1,
        "apex_annotated": False,
    }


def _raw_row(number: int, clip: RawClip, prepared: PreparedClip, annotated: bool) -> dict[str, Any]:
    box = prepared.box
    return _row(number, clip.name, clip.subject, clip.database, clip.label) | {
        "num_frames": len(clip.frames),
        "box": np.array([box.left, box.top, box.width, box.height], np.int32),
        "face_found": box.found,
        "onset": 0,
        "apex": prepared.apex,
        "offset": len(clip.frames) - 1,
        "apex_annotated": annotated,
    }


def _write(
    flow_format: FlowFormat,
    rows: Sequence[Mapping[str, Any]],
    records: Callable[[], Iterator[dict[str, Any]]],
    settings: Mapping[str, Any],
    content: str,
    origin: str,
    notes: Sequence[str],
    target: Path,
    work: Path,
    *,
    real: bool = True,
) -> None:
    counts = count(
        [int(np.argmax(row["labels"])) for row in rows],
        [row["database"] for row in rows],
        [row["subject"] for row in rows],
    )
    if real:  # whoever pretends need not be complete
        differences = count_notes(counts)
        notes = [*notes, *differences]
        if not differences:
            total = sum(sum(told["clips"]) for told in counts.values())
            origin += f" Clips per class and subjects of each database are those of the composite ({total} clips)."
    facts = {
        "origin": origin,
        "settings": settings,
        "content": content,
        "composite": counts,
        "statistics": {"train": statistics(rows, CLASSES)},
        "exceptions": list(notes),
    }
    write_flow_dataset(
        target,
        staging=work / "staging",
        flow_format=flow_format,
        records={"train": records},
        facts=facts,
        description=_DESCRIPTION,
        citation=_CITATION,
    )
    for line in notes:
        print(f"note: {line}", file=sys.stderr)


# --- values ------------------------------------------------------------------------------------------------


def _told(value: Any) -> Any:
    """An option as the settings keep it."""
    if isinstance(value, CropConfig):
        return value.settings()
    if isinstance(value, ApexConfig | FlowConfig):
        return asdict(value)
    if value is None or isinstance(value, int) or value in (*STORES, "whole", "half_way"):
        return value
    return str(Path(value).resolve())


def _hash(facts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
