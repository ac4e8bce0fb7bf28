"""What is computed from clips one by one: in parallel, each finished clip kept at once, so that nothing is lost."""

import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mer_jax.cluster import Cluster
from mer_jax.errors import UserError
from mer_jax.parallel import Workers, run_tasks

_MAX_NAMED = 3


@dataclass(frozen=True)
class ClipTask:
    """One clip to work on; subclasses add what the work needs.

    Attributes:
        name: Of the clip.
        path: The ``.npz`` file that is finished, whose array ``told`` is JSON with the ``fingerprint``.
        fingerprint: Changes with the clip.
    """

    name: str
    path: Path
    fingerprint: str


Task = TypeVar("Task", bound=ClipTask)


def work_folder(folder: Path, settings: Any) -> Path:
    """Where clips are kept that were finished with the same settings, anything JSON-able."""
    text = json.dumps(settings, sort_keys=True)
    return folder / hashlib.sha256(text.encode()).hexdigest()[:12]


def files_fingerprint(paths: Sequence[Path], *facts: Any) -> str:
    """Changes when files are replaced; made of names, sizes and dates, so that none is read.

    Args:
        paths: The files.
        *facts: What else it shall change with, JSON-able.

    Raises:
        UserError: A file is gone.
    """
    files = []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); restore the file") from error
        files.append((path.name, status.st_size, status.st_mtime_ns))
    return hashlib.sha256(json.dumps([*facts, files]).encode()).hexdigest()


def finish_clips(
    function: Callable[[Task], None],
    tasks: Sequence[Task],
    *,
    workers: Workers = None,
    desc: str,
    sources: Sequence[Path] = (),
) -> dict[str, Path]:
    """Works on all clips that are not finished, also after a kill.

    Args:
        function: A module's function that finishes one clip, that is, writes its file at once.
        tasks: All clips, finished or not.
        workers: Number of processes, one per available processor unless given; or a cluster.
        desc: What is being done, for the progress line.
        sources: Files that all machines of a cluster must see, such as one of each clip.

    Returns:
        Name of the clip to its file.

    Raises:
        UserError: Clips cannot be finished: their names and the first reasons, after all others were finished.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what was finished is kept.
    """
    # What a kill left of a file that was being written. A worker of a cluster that still is at work for a process that
    # was killed fails by this, unheard; here its clip is not finished and will be.
    _remove_stale_files(tasks)
    left = [task for task in tasks if not _is_finished(task)]
    if left and isinstance(workers, Cluster):
        workers.require(sources)
    results = run_tasks(function, left, workers=workers, desc=desc, unit="clip") if left else []
    errors = [(task.name, result) for task, result in zip(left, results, strict=True) if result is not None]
    if isinstance(workers, Cluster):
        workers.await_files(task.path for task, result in zip(left, results, strict=True) if result is None)
        _remove_stale_files(tasks)  # of a worker that was lost while it wrote
    if errors:
        reasons = "; ".join(f"clip {name}: {error}" for name, error in errors[:_MAX_NAMED])
        more = f"; and {len(errors) - _MAX_NAMED} more" if len(errors) > _MAX_NAMED else ""
        raise UserError(
            f"{len(errors)} of {len(tasks)} clips cannot be prepared ({reasons}{more}); the others are "
            "finished and kept: repair or remove these and run the same command again"
        )
    return {task.name: task.path for task in tasks}


def _remove_stale_files(tasks: Sequence[ClipTask]) -> None:
    for folder in {task.path.parent for task in tasks}:
        for stale in folder.glob(".*.tmp"):
            stale.unlink(missing_ok=True)


def say_waiting(work: Path) -> None:
    """Tells that another process is at work in a folder, which is waited for."""
    print(f"waiting for another process that is building in {work}", file=sys.stderr, flush=True)


def _is_finished(task: ClipTask) -> bool:
    try:
        # Opened here, because NumPy leaves a damaged file open.
        with open(task.path, "rb") as stream, np.load(stream) as stored:
            return json.loads(str(stored["told"]))["fingerprint"] == task.fingerprint
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return False
