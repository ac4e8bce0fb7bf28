"""Files that are either whole or absent: every result is written beside its place and then renamed into it."""

import contextlib
import fcntl
import io
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mer_jax.errors import UserError

TEMPORARY_SUFFIX = ".tmp"
LOCK_NAME = "lock"


@contextlib.contextmanager
def exclusive(folder: str | os.PathLike, on_busy: Callable[[], None]) -> Iterator[None]:
    """Lets one process at a time work in a folder; a killed process's lock is gone with it.

    Args:
        folder: The folder; made if it is missing.
        on_busy: Called when another process is at work there. It raises to give up; where it returns, the other
            process is waited for.

    Raises:
        UserError: The folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK_NAME, os.O_WRONLY | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_busy()
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems, as they are mounted
            raise UserError(
                f"{folder}: its file system has no locks ({error.strerror}), so that two runs might spoil each other's "
                "files; mount it with locks (Lustre: -o flock), or choose another folder"
            ) from error
        yield
    finally:
        os.close(lock)


def atomic_write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes ``data`` to ``path`` so that a kill or a full disk leaves the old file or the new one, never a part.

    Args:
        path: Where the file shall be; missing parent folders are made.
        data: The whole content.

    Raises:
        UserError: The file system refuses (no space, no permission); the old file, if any, is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # a signal that asks to stop may come in the middle, too
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); free space or choose another folder, "
            "then run the same command again"
        ) from error


def atomic_write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 ``text`` to ``path`` as :func:`atomic_write_bytes` does."""
    atomic_write_bytes(path, text.encode())


def atomic_savez(path: str | os.PathLike, **arrays: np.ndarray) -> None:
    """Writes ``arrays`` as a compressed ``.npz`` to ``path`` as :func:`atomic_write_bytes` does."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    atomic_write_bytes(path, buffer.getvalue())
