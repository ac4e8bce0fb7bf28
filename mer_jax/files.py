"""Files that are either whole or absent: every result is written beside its place and then renamed into it.

What a user or a disk has damaged all the same is told in one line by those that read them.
"""

import contextlib
import fcntl
import io
import json
import os
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


def is_utf8(name: str) -> bool:
    """Whether the name of a file is UTF-8; archives of other systems bring others along."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def atomic_write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 ``text`` to ``path`` as :func:`atomic_write_bytes` does, escaping names that are not UTF-8."""
    atomic_write_bytes(path, text.encode(errors="backslashreplace"))


def atomic_savez(path: str | os.PathLike, **arrays: np.ndarray) -> None:
    """Writes ``arrays`` as a compressed ``.npz`` to ``path`` as :func:`atomic_write_bytes` does."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    atomic_write_bytes(path, buffer.getvalue())


def read_json(path: str | os.PathLike, remedy: str) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Args:
        path: The file.
        remedy: What to do where it cannot be read.

    Raises:
        UserError: It cannot be read, or holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        return content
    except (OSError, ValueError) as error:
        raise _unreadable(path, error, remedy) from error


def read_arrays(path: str | os.PathLike, remedy: str) -> dict[str, np.ndarray]:
    """Reads all arrays of an ``.npz``; errors as of :func:`read_json`."""
    try:
        # NumPy leaves a file that it opened itself open when it is no archive.
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, EOFError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        # NumPy takes what is no archive for a pickle, and tells how to load that; zipfile takes damaged flags at their
        # word, and asks for a password or a method of compression that it does not have.
        raise UserError(f"{path}: cannot be read (no whole .npz archive); {remedy}") from error
    except OSError as error:
        raise _unreadable(path, error, remedy) from error


def _unreadable(path: str | os.PathLike, error: Exception, remedy: str) -> UserError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
    return UserError(f"{path}: cannot be read ({reason}); {remedy}")
