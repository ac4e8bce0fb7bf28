"""A stand-in for the composite that anyone may have: flow images of the demo clips, in the published format.

Three databases are pretended: each virtual subject of the demo clips belongs to one of them and its clips are called
as that database calls them. Only training clips with exactly one of Negative, Positive and Surprise take part; both
of their views do, as two clips of one subject, so that leaving a subject out leaves out both. CASME II and SAMM have
annotated apexes, and so do the pretended ones (the renderer's); SMIC has none, and the frame half-way stands for it.

**Numbers obtained on these images are no benchmark.**
"""

import csv
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_builders.megc2019.composite import CLASSES, DATABASES, EXPECTED, padded
from data_builders.megc2019.flow_folder import TABLE
from data_builders.megc2019.flow_images import as_image, flow_maps
from mer_jax.clips.crops import CropConfig, crop_clip, face_box
from mer_jax.clips.demo import VERSION as CLIPS_VERSION
from mer_jax.clips.demo import load_ground_truth, make_demo_clips
from mer_jax.clips.faces import FaceDetector
from mer_jax.clips.flow import FlowConfig, to_grey
from mer_jax.clips.frames import read_frame
from mer_jax.clips.layouts import LABELS, Clip, read_challenge
from mer_jax.clips.views import split_views
from mer_jax.cluster import Cluster
from mer_jax.errors import UserError
from mer_jax.files import atomic_write_bytes, atomic_write_text
from mer_jax.parallel import Workers, local_workers, run_tasks

VERSION = 1  # of the images; to be raised whenever any pixel or name changes
IMAGES = "STSNet_whole_norm_u_v_os"
SIZE = 28
# A quarter of the pixels that faces have in the clips: TV-L1 is slow, and what is kept has 28 px.
CROP = CropConfig(size=112)
FLOW = FlowConfig(method="tvl1")
_MANIFEST = "demo.json"
_CODES = ("ne", "po", "sur")  # of the classes in names of SMIC clips

_NOTICE = """# Demo flow images of mer_jax

Optical flow (TV-L1, onset to apex) of clips that mer_jax renders from the public-domain photograph
`skimage.data.astronaut()` (NASA). Nothing here is from CASME II, SAMM or SMIC: **the three databases are pretended**,
only names and formats are theirs, so that everything that reads the real images runs. The subjects are smooth random
deformations of one photograph.

**Numbers obtained on these images are no benchmark** and must not be compared with results on the real composite.
"""


@dataclass(frozen=True)
class _DemoClip:
    """One demo clip on its way to two images."""

    clip: Clip
    apex: int
    paths: dict[str, Path]  # view to image


def make_demo_images(
    data_dir: Path, *, seed: int, demo_clips: tuple[int, int], workers: Workers = None
) -> tuple[Path, Path]:
    """Makes the flat folder and its table in ``data_dir/clips/megc2019_demo``; what is there already is kept.

    Args:
        data_dir: Where everything is kept; its demo clips are used, or made first.
        seed: Of the demo clips.
        demo_clips: Number of training and test clips to choose from.
        workers: Number of processes, one per available processor unless given; or a cluster.

    Returns:
        (folder of images, table).

    Raises:
        UserError: The folder holds something else, the disk refuses, or too few clips have exactly one class.
    """
    folder = data_dir / "clips" / "megc2019_demo"
    told = {"version": VERSION, "clips": CLIPS_VERSION, "seed": seed, "demo_clips": list(demo_clips)}
    _claim(folder, told)
    table = folder / TABLE
    if _is_complete(table):
        return folder / IMAGES, table

    num_train, num_test = demo_clips
    source = make_demo_clips(
        data_dir / "clips" / "four_dme_demo",
        num_train=num_train,
        num_test=num_test,
        seed=seed,
        workers=local_workers(workers),
    )
    clips = [(clip, label) for clip in read_challenge(source) if (label := _class_of(clip)) is not None]
    if len({clip.subject for clip, _ in clips}) < 2:
        raise UserError(
            f"demo_clips {demo_clips}: too few clips show exactly one of {', '.join(CLASSES)}; ask for more"
        )
    rows, tasks = _rows_and_tasks(clips, source, folder / IMAGES)
    # What a kill left of a file that was being written.
    for stale in (folder / IMAGES).glob(".*.tmp"):
        stale.unlink(missing_ok=True)
    missing = [task for task in tasks if not all(path.is_file() for path in task.paths.values())]
    for done in run_tasks(_make_images, missing, workers=workers, desc="computing flow of demo clips", unit="clip"):
        if isinstance(done, UserError):
            raise done
    if isinstance(workers, Cluster):
        workers.await_files(path for task in missing for path in task.paths.values())
    atomic_write_text(folder / "README.md", _NOTICE)
    # Last, because with it the folder counts as whole.
    atomic_write_text(table, _csv(rows))
    return folder / IMAGES, table


def _claim(folder: Path, told: dict) -> None:
    manifest = folder / _MANIFEST
    if manifest.is_file():
        try:
            there = json.loads(manifest.read_text())
        except ValueError:
            there = None
        if there != told:
            raise UserError(f"{folder}: holds demo images of other settings; remove it or give another --data_dir")
    else:
        atomic_write_text(manifest, json.dumps(told, indent=2) + "\n")


def _is_complete(table: Path) -> bool:
    if not table.is_file():
        return False
    with open(table, newline="", encoding="utf-8") as stream:
        names = [line["imagename"].removesuffix(".jpg") for line in csv.DictReader(stream)]
    return all((table.parent / IMAGES / _file_name(name)).is_file() for name in names)


def _class_of(clip: Clip) -> int | None:
    """Its class if it has exactly one of the three."""
    if clip.labels is None:
        return None
    of_class = [clip.labels[LABELS.index(name.capitalize())] for name in CLASSES]
    return of_class.index(1) if sum(of_class) == 1 else None


def _rows_and_tasks(clips: list[tuple[Clip, int]], source: Path, images: Path):
    databases = _databases(clips)
    rows: list[dict[str, str]] = []
    tasks = []
    seen: Counter = Counter()
    for clip, label in clips:
        database, number = databases[clip.subject]
        paths = {}
        for view in ("l", "r"):
            seen[clip.subject, view] += 1
            seen[clip.subject, label] += 1
            if database == "casme2":
                subject = f"sub{number:02d}"
                name = f"EP{seen[clip.subject, view]:02d}_{'lr'.index(view) + 1:02d}f"
            elif database == "samm":
                subject = f"{number + 5:03d}"
                name = f"{subject}_{seen[clip.subject, view]}_{'lr'.index(view) + 1}"
            else:
                # As published: the table has one zero less than the files.
                subject = f"s{number:02d}"
                name = f"s{number}_{_CODES[label]}_{seen[clip.subject, label]:02d}"
            image = f"{subject}_{name}"
            paths[view] = images / _file_name(image)
            rows.append(
                {
                    "dataset": database,
                    "sub": subject,
                    "filename_o": name,
                    "label": str(label),
                    "apex": "",
                    "imagename": f"{image}.jpg",
                    "sub_filename": "",
                }
            )
        half_way = max(1, (len(clip.frames) - 1) // 2)
        apex = half_way if database == "smic" else load_ground_truth(source, clip.name).apex
        tasks.append(_DemoClip(clip, apex, paths))
    order = {database: position for position, database in enumerate(DATABASES)}
    return sorted(rows, key=lambda row: (order[row["dataset"]], row["imagename"])), tasks


def _databases(clips: list[tuple[Clip, int]]) -> dict[str, tuple[str, int]]:
    """Subject to (pretended database, number in it), in about the composite's proportions of subjects."""
    labels: dict[str, Counter] = {}
    for clip, label in clips:
        labels.setdefault(clip.subject, Counter())[label] += 1
    # Subjects with the rarer classes are dealt out first, so that no database goes without a class.
    subjects = sorted(labels, key=lambda subject: (-labels[subject][2], -labels[subject][1], subject))
    result: dict[str, tuple[str, int]] = {}
    dealt: Counter[str] = Counter()
    for subject in subjects:
        database = min(DATABASES, key=lambda name: dealt[name] / EXPECTED[name]["subjects"])
        dealt[database] += 1
        result[subject] = (database, dealt[database])
    return result


def _file_name(image: str) -> str:
    # The published stems end in a blank.
    return f"{padded(image)} .png"


def _make_images(task: _DemoClip) -> None:
    """Worker: the images of both views of one clip."""
    import cv2

    cv2.setNumThreads(1)
    views = [split_views(read_frame(task.clip.frames[index])) for index in (0, task.apex)]
    with FaceDetector(CROP.min_confidence) as detector:
        for view, path in task.paths.items():
            frames = [of_frame[view] for of_frame in views]
            crops = crop_clip(frames, face_box(frames, CROP, detector), CROP.size)
            image = as_image(flow_maps(to_grey(crops), FLOW, SIZE))[0]
            buffer = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(image)).save(buffer, "PNG")
            atomic_write_bytes(path, buffer.getvalue())


def _csv(rows: list[dict[str, str]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
