"""The folder of a run: what is written at its start, and the refusal to mix two runs."""

import csv
import hashlib
import importlib.metadata
import io
import json
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

import mer_jax
from mer_jax.errors import UserError
from mer_jax.files import LOCK_NAME, TEMPORARY_SUFFIX, atomic_write_text, read_json
from mer_jax.study.config import NEUTRAL_FIELDS, refuse_other_config, to_json
from mer_jax.study.data import StudyData
from mer_jax.study.members import Member

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy", "mediapipe")


_STARTED_WITH = (LOCK_NAME, "overrides.json", "versions.json")


def check_workdir(config: ConfigDict, workdir: Path) -> None:
    """Makes sure that a folder may hold this run: it is new or empty, or the run in it is this one.

    Args:
        config: The resolved config.
        workdir: The folder; made if it is missing.

    Raises:
        UserError: The folder holds a run of another config, or cannot be used.
    """
    path = workdir / "config.json"
    try:
        if not path.is_file():
            workdir.mkdir(parents=True, exist_ok=True)
            strangers = [entry.name for entry in workdir.iterdir() if not _is_of_a_start(entry.name)]
            if strangers:
                raise UserError(f"{workdir} is not empty and holds no study; choose another --workdir")
            return
    except OSError as error:
        raise UserError(f"{workdir}: cannot be used ({error.strerror}); choose another --workdir") from error
    earlier = read_json(path, f"put a copy of it back, or delete {workdir} to start afresh")
    refuse_other_config(config, earlier, str(workdir))


def _is_of_a_start(name: str) -> bool:
    """Whether a file is one that :func:`start_workdir` leaves when it is killed before it wrote the config."""
    return name in _STARTED_WITH or (name.startswith(".") and name.endswith(TEMPORARY_SUFFIX))


def start_workdir(config: ConfigDict, workdir: Path, overrides: Mapping) -> None:
    """Writes what a run's folder holds from its start; a run that was started before is left as it is.

    Args:
        config: The resolved config.
        workdir: A folder that :func:`check_workdir` allows.
        overrides: Fields given on the command line.

    Raises:
        UserError: The folder cannot be written.
    """
    path = workdir / "config.json"
    if path.is_file():
        return
    # The config comes last: a folder with a config is a folder that was fully started.
    atomic_write_text(workdir / "overrides.json", json.dumps(dict(overrides), indent=2, default=str) + "\n")
    atomic_write_text(workdir / "versions.json", json.dumps(versions(), indent=2) + "\n")
    atomic_write_text(path, to_json(config))


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {
        "mer_jax": mer_jax.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def check_data(workdir: Path, data: StudyData) -> None:
    """Lets a run go on only with the data that it began with.

    Raises:
        UserError: The data set differs from the one that the folder was started with.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps([data.task, *data.label_names]).encode())
    for array in (
        data.clip_name,
        data.clip_id,
        data.clip_subject,
        data.clip_split,
        data.clip_database,
        data.clip_labels,
        data.sample_clip,
        data.sample_view,
        data.sample_phase,
        data.frame_mask,
    ):
        if array is not None:
            digest.update(np.ascontiguousarray(array))
    for modality in sorted(data.features):
        digest.update(modality.encode())
        digest.update(np.ascontiguousarray(data.features[modality]))
    found = {"sha256": digest.hexdigest(), "clips": len(data.clip_name), "samples": len(data.sample_clip)}
    path = workdir / "data.json"
    if path.is_file():
        again = "delete it if the data set is still the one that this run began with, and run the same command again"
        if read_json(path, again) == found:
            return
        raise UserError(
            f"{workdir} holds a study of other data (the data set's features, labels or clips have changed since); "
            "choose another --workdir, or delete this one to start afresh"
        )
    atomic_write_text(path, json.dumps(found, indent=2) + "\n")


def write_tables(workdir: Path, data: StudyData, clip_fold: np.ndarray, members: Sequence[Member]) -> None:
    """Writes ``folds.csv`` (a row a clip; ``face_found`` is 1 where every view had a face) and ``members.csv``."""
    rows = [("clip", "id", "database", "subject", "split", "fold", "face_found", *data.label_names)]
    for index, name in enumerate(data.clip_name):
        labels = [value if value >= 0 else "" for value in data.clip_labels[index].tolist()]
        rows.append(
            (
                name,
                data.clip_id[index],
                data.clip_database[index],
                data.clip_subject[index],
                data.clip_split[index],
                clip_fold[index],
                int(data.face_found[data.sample_clip == index].all()),
                *labels,
            )
        )
    atomic_write_text(workdir / "folds.csv", _csv(rows))
    names = [name for name, _ in members[0].hyper]
    rows = [("member", "fold", "seed", *names)]
    rows += [(member.id, member.fold, member.seed, *(value for _, value in member.hyper)) for member in members]
    atomic_write_text(workdir / "members.csv", _csv(rows))


def _csv(rows: Sequence[Sequence]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def default_workdir(config: ConfigDict, overrides: Mapping) -> Path:
    """``runs/<name>``, with the overrides in the name, so that variations of a config do not meet in one folder.

    Args:
        config: The resolved config; its ``name`` comes first.
        overrides: Fields given on the command line and their values.

    Returns:
        The folder, relative to the current one.
    """
    told = {key: value for key, value in overrides.items() if key not in NEUTRAL_FIELDS}
    suffix = "".join(f"-{key}={value}" for key, value in sorted(told.items()))
    suffix = re.sub(r"[^A-Za-z0-9.,=_-]+", "_", suffix)
    if len(suffix) > 100:  # folder names have a limit
        suffix = f"-{hashlib.sha256(suffix.encode()).hexdigest()[:12]}"
    return Path("runs") / f"{config.name}{suffix}"
