import os

import numpy as np
import pytest

from mer_jax.errors import UserError
from mer_jax.files import atomic_savez, atomic_write_bytes, atomic_write_text, read_arrays, read_json


def test_an_interrupt_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    atomic_write_bytes(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic_write_bytes(tmp_path / "file", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'"text"'])
def test_json_that_is_none_is_one_line_with_the_remedy(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"^[^\n]*a\.json: cannot be read \([^\n]+\); delete it$"):
        read_json(tmp_path / "a.json", "delete it")


def test_arrays_that_are_damaged_are_one_line_with_the_remedy(tmp_path):
    path = tmp_path / "a.npz"
    atomic_savez(path, x=np.arange(1000.0))
    assert read_arrays(path, "").keys() == {"x"}
    whole, single = path.read_bytes(), tmp_path / "single.npy"
    np.save(single, np.arange(3))
    flags = whole.index(b"PK\x01\x02") + 8  # in the list of entries
    locked, packed = bytearray(whole), bytearray(whole)
    locked[flags], locked[6], packed[flags + 2] = 1, 1, 99
    for content in (b"", whole[:-100], whole[:40], b"garbage" * 20, single.read_bytes(), locked, packed):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.npz: cannot be read \(no whole \.npz archive\); delete it$"):
            read_arrays(path, "delete it")
    path.unlink()
    with pytest.raises(UserError, match=r"a\.npz: cannot be read \(No such file or directory\); delete it$"):
        read_arrays(path, "delete it")


def test_names_that_are_not_utf8_are_escaped(tmp_path):
    atomic_write_text(tmp_path / "card.md", f"not read: ä, {os.fsdecode(bytes([0xD0, 0xC2]))}")
    assert (tmp_path / "card.md").read_bytes() == "not read: ä, \\udcd0\\udcc2".encode()
