"""Orbax behind one small door: checkpoints of a block of members, and its trained variables."""

import itertools
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mer_jax.errors import UserError

# Blocks on several devices save from several threads; orbax is not made for that.
_LOCK = threading.Lock()
_KEPT = 2
_UNFINISHED = ".orbax-checkpoint-tmp"


def _is_news(record: logging.LogRecord) -> bool:
    """False for orbax's own tale of its steps and, thread by thread, of a failure that is raised anyway."""
    of_orbax = f"{os.sep}orbax{os.sep}" in record.pathname
    return not of_orbax and _UNFINISHED not in record.getMessage()


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_is_news)


class BlockCheckpoints:
    """Checkpoints of one block: the two newest, each whole or absent.

    Orbax writes a checkpoint under another name and renames it, so a kill at any moment leaves the one before.
    """

    def __init__(self, directory: Path):
        self._directory = directory.absolute()

    def latest(self) -> int | None:
        """The newest saved epoch, or None."""
        return max(self._epochs(), default=None)

    def save(self, epoch: int, tree: Any) -> None:
        """Saves ``tree`` (arrays and NumPy arrays) as the state after ``epoch``, then drops all but the newest two.

        Raises:
            UserError: The file system refuses; the checkpoints before this one are untouched.
        """
        for rest in self._directory.glob("*.orbax-checkpoint-tmp*"):  # of a run that was killed here
            shutil.rmtree(rest, ignore_errors=True)
        save_tree(self._directory / str(epoch), tree)
        for old in sorted(self._epochs())[:-_KEPT]:
            shutil.rmtree(self._directory / str(old), ignore_errors=True)

    def restore(self, abstract: Any, warn: Callable[[str], None]) -> tuple[int, Any]:
        """Loads the newest checkpoint that can be read, of one at least.

        Args:
            abstract: The shape of its tree, of ``jax.ShapeDtypeStruct``.
            warn: Told in a line of one that cannot, where there is an older one.

        Returns:
            The epoch after which it was saved, and the tree.

        Raises:
            UserError: None of them can be read.
        """
        epochs = sorted(self._epochs(), reverse=True)
        for epoch, older in itertools.pairwise(epochs):
            try:
                remedy = f"its members go on from the one before, after epoch {older}"
                return epoch, load_tree(self._directory / str(epoch), abstract, remedy)
            except UserError as error:
                warn(f"warning: {error}")
        remedy = (
            f"delete {self._directory} and run the same command again, which trains its members from the first epoch"
        )
        return epochs[-1], load_tree(self._directory / str(epochs[-1]), abstract, remedy)

    def remove(self) -> None:
        """Removes all of them."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _epochs(self) -> list[int]:
        if not self._directory.is_dir():
            return []
        return [int(entry.name) for entry in self._directory.iterdir() if entry.name.isdigit()]


def save_tree(directory: Path, tree: Any) -> None:
    """Writes a tree of arrays to ``directory``, replacing what is there.

    Args:
        directory: Where; whole or absent afterwards.
        tree: Arrays and NumPy arrays.

    Raises:
        UserError: The file system refuses; nothing is left at ``directory`` but what was there before.
    """
    directory = directory.absolute()
    with _LOCK:
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            _remove_unfinished(directory)  # of a run that was killed here
            _require_space(directory, tree)
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(directory, tree, force=True)
                checkpointer.wait_until_finished()
        except Exception as error:
            # TensorStore reports a full disk as one of several exceptions of its own; whatever it was, the
            # unfinished folder must not fill the disk further.
            _remove_unfinished(directory)
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise UserError(
                f"{directory}: the checkpoint could not be written ({reason}); free space there. Earlier checkpoints "
                "are intact"
            ) from error


def _require_space(directory: Path, tree: Any) -> None:
    """Asks the file system before orbax does, whose threads each print a traceback when they find the disk full."""
    if hasattr(os, "posix_fallocate"):
        with tempfile.TemporaryFile(dir=directory.parent) as probe:
            os.posix_fallocate(probe.fileno(), 0, 2**16 + sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))


def _remove_unfinished(directory: Path) -> None:
    for rest in directory.parent.glob(f"{directory.name}{_UNFINISHED}*"):
        shutil.rmtree(rest, ignore_errors=True)


def load_tree(directory: Path, abstract: Any, remedy: str = "delete this folder and run the same command again") -> Any:
    """Reads what :func:`save_tree` wrote.

    Args:
        directory: Where.
        abstract: Tree of ``jax.ShapeDtypeStruct`` with the expected shapes.
        remedy: What to do where it cannot be read.

    Returns:
        The tree.

    Raises:
        UserError: It cannot be read, or holds other shapes.
    """
    with _LOCK:
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                tree = checkpointer.restore(directory.absolute(), abstract)
            # Orbax does not check the shapes of NumPy arrays.
            jax.tree.map(_require_shape, abstract, tree)
            return tree
        except Exception as error:
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise UserError(f"{directory}: the checkpoint cannot be read ({reason}); {remedy}") from error


def _require_shape(expected: jax.ShapeDtypeStruct, array: Any) -> None:
    if array.shape != expected.shape:
        raise ValueError(f"shape {array.shape} instead of {expected.shape}")
