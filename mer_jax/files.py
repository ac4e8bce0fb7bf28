"""Files that are either whole or absent: every result is written beside its place and then renamed into it."""

import contextlib
import io
import os
import tempfile
from pathlib import Path

import numpy as np

from mer_jax.errors import UserError


def atomic_write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes ``data`` to ``path`` so that a kill or a full disk leaves the old file or the new one, never a part.

    Args:
        path: Where the file shall be; missing parent folders are made.
        data: The whole content.

    Raises:
        UserError: The file system refuses (no space, no permission); the old file, if any, is untouched.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files private to the user; results are as readable as any other file they make.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
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
