"""Data sets of TFDS on disk: written whole or not at all, looked at without TFDS."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mer_jax.errors import UserError
from mer_jax.files import atomic_write_text

_REPLACED = "replaced"  # where the old version waits, in the staging folder, until the new one is in its place


def write_dataset(
    make_builder: Callable[[Path], Any], target: Path, *, staging: Path, pages: Mapping[str, str] | None = None
) -> None:
    """Writes a data set beside its place and moves it there when all of it is whole.

    Args:
        make_builder: Makes the ``tfds.core.GeneratorBasedBuilder`` that writes below a folder; called with ``staging``.
        target: Where the version shall be; what is there, an incomplete copy of the same data, is replaced.
        staging: Folder for what is not whole yet, on the disk of ``target``; emptied before and removed after.
        pages: Texts to put beside the records, {file name: text}.

    Raises:
        UserError: The disk refuses.
    """
    try:
        shutil.rmtree(staging, ignore_errors=True)
        # TFDS announces itself on stdout and draws its own bars.
        with contextlib.redirect_stdout(io.StringIO()):
            import tensorflow_datasets as tfds

            tfds.disable_progress_bar()
            builder = make_builder(staging)
            builder.download_and_prepare(file_format="array_record")
        finished = Path(builder.data_dir)
        for name, text in (pages or {}).items():
            atomic_write_text(finished / name, text)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rename(staging / _REPLACED)
        finished.rename(target)
        shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror or error}); free space or give another "
            "--data_dir, then run the same command again (finished clips are kept)"
        ) from error


def restore_replaced(target: Path, *, staging: Path) -> None:
    """Puts back what :func:`write_dataset` was replacing when it was killed between the two moves."""
    if not target.exists() and (staging / _REPLACED).exists():
        (staging / _REPLACED).rename(target)


def is_whole(target: Path) -> bool:
    """Whether all files of records of a written version are there."""
    try:
        info = json.loads((target / "dataset_info.json").read_text())
        splits, name = info["splits"], info["name"]
    except (OSError, ValueError, KeyError):
        return False
    return all(
        len(list(target.glob(f"{name}-{split['name']}.array_record-*"))) == len(split["shardLengths"])
        for split in splits
    )


def read_metadata(target: Path, keys: tuple[str, ...]) -> dict[str, Any] | None:
    """What a built data set says about itself under ``keys``; None if there is none.

    Raises:
        UserError: What is there is no data set, or lacks a key.
    """
    if not target.exists():
        return None
    try:
        facts = json.loads((target / "metadata.json").read_text())
        return {key: facts[key] for key in keys}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{target}: not a data set of this library, or damaged; remove this folder or give another --data_dir"
        ) from error
