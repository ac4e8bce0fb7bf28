import errno
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mer_jax.errors import UserError
from mer_jax.study.checkpoints import BlockCheckpoints, load_tree, save_tree


def tree(value):
    return {"state": {"weights": jnp.full((2, 3), value), "step": jnp.int32(value)}, "losses": np.full(4, value)}


def abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree(0.0))


def empty(directory):
    """Damages a checkpoint such that orbax finds out before its threads read, which would tell tales of their own."""
    for path in directory.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def _no_space(self, directory, *args, **kwargs):
    """Fails in the middle of a write: a part of the checkpoint is on the disk already."""
    unfinished = directory.with_name(f"{directory.name}.orbax-checkpoint-tmp")
    unfinished.mkdir()
    (unfinished / "part").write_bytes(b"x")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_two_newest_are_kept_and_come_back(tmp_path):
    checkpoints = BlockCheckpoints(tmp_path / "block")
    assert checkpoints.latest() is None
    for epoch in (2, 10, 9):
        checkpoints.save(epoch, tree(float(epoch)))
    assert checkpoints.latest() == 10
    assert sorted(path.name for path in (tmp_path / "block").iterdir()) == ["10", "9"]
    epoch, restored = checkpoints.restore(abstract(), pytest.fail)
    assert epoch == 10
    jax.tree.map(np.testing.assert_array_equal, restored, tree(10.0))
    assert restored["state"]["step"].dtype == jnp.int32
    checkpoints.remove()
    assert checkpoints.latest() is None and not (tmp_path / "block").exists()


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    checkpoints = BlockCheckpoints(tmp_path / "block")
    checkpoints.save(1, tree(1.0))
    checkpoints.save(2, tree(2.0))
    monkeypatch.setattr(ocp.StandardCheckpointer, "save", _no_space)
    with pytest.raises(UserError, match=r"block/3: the checkpoint could not be written \(.*No space left on device"):
        checkpoints.save(3, tree(3.0))
    assert sorted(path.name for path in (tmp_path / "block").iterdir()) == ["1", "2"]
    epoch, restored = checkpoints.restore(abstract(), pytest.fail)
    np.testing.assert_array_equal(restored["losses"], tree(2.0)["losses"])
    assert epoch == 2


def test_a_checkpoint_that_cannot_be_read_costs_what_came_after_the_one_before(tmp_path):
    checkpoints = BlockCheckpoints(tmp_path / "block")
    checkpoints.save(3, tree(3.0))
    checkpoints.save(7, tree(7.0))
    empty(tmp_path / "block" / "7")
    told = []
    epoch, restored = checkpoints.restore(abstract(), told.append)
    np.testing.assert_array_equal(restored["losses"], tree(3.0)["losses"])
    (line,) = told
    wanted = r"warning: .*block/7: the checkpoint cannot be read \(.+\); its members go on from .*, after epoch 3"
    assert epoch == 3 and re.fullmatch(wanted, line)
    empty(tmp_path / "block" / "3")
    with pytest.raises(UserError, match=r"block/3: the checkpoint cannot be read \(.*\); delete .*/block and run"):
        checkpoints.restore(abstract(), told.append)


def test_a_disk_that_is_full_already_never_meets_orbax(tmp_path, monkeypatch):
    asked = []

    def refuse(descriptor, offset, size):
        asked.append(size)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    monkeypatch.setattr(ocp.StandardCheckpointer, "save", None)
    with pytest.raises(UserError, match=r"params: the checkpoint could not be written \(.*No space left on device"):
        save_tree(tmp_path / "params", {"weights": np.zeros(10**6)})
    assert asked[0] > 8 * 10**6 and not list(tmp_path.iterdir())


def test_what_a_kill_left_is_no_checkpoint_and_is_swept(tmp_path):
    checkpoints = BlockCheckpoints(tmp_path / "block")
    checkpoints.save(4, tree(4.0))
    stale = tmp_path / "block" / "5.orbax-checkpoint-tmp-7"
    stale.mkdir()
    assert checkpoints.latest() == 4
    checkpoints.save(5, tree(5.0))
    assert checkpoints.latest() == 5 and not stale.exists()


def test_a_tree_replaces_what_is_there(tmp_path):
    save_tree(tmp_path / "params", tree(1.0))
    save_tree(tmp_path / "params", tree(2.0))
    np.testing.assert_array_equal(load_tree(tmp_path / "params", abstract())["losses"], tree(2.0)["losses"])


def test_a_damaged_or_strange_checkpoint_is_one_line(tmp_path):
    save_tree(tmp_path / "5", tree(1.0))
    other = abstract() | {"losses": jax.ShapeDtypeStruct((9,), np.float64)}
    with pytest.raises(UserError, match=r"5: the checkpoint cannot be read \(.*\); delete this folder") as told:
        load_tree(tmp_path / "5", other)
    assert "\n" not in str(told.value)
    empty(tmp_path / "5")
    with pytest.raises(UserError, match="the checkpoint cannot be read"):
        load_tree(tmp_path / "5", abstract())
