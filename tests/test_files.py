import os

import pytest

from mer_jax.files import atomic_write_bytes


def test_an_interrupt_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    atomic_write_bytes(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic_write_bytes(tmp_path / "file", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
