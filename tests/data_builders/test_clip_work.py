"""Clips one by one: what is finished is found again, what is damaged is done again, what fails is told together."""

import dataclasses
import json
import os

import numpy as np
import pytest

from data_builders.clip_work import ClipTask, files_fingerprint, finish_clips, work_folder
from mer_jax.errors import UserError
from mer_jax.files import atomic_savez


@dataclasses.dataclass(frozen=True)
class Task(ClipTask):
    value: int


def finish(task):
    """What a builder's worker does: a bad clip is a UserError, a good one is a file."""
    if task.value < 0:
        raise UserError(f"has the value {task.value}; give another")
    with open(task.path.parent.parent / "calls", "a") as stream:
        stream.write(f"{task.name}\n")
    told = {"fingerprint": task.fingerprint}
    atomic_savez(task.path, told=np.array(json.dumps(told)), value=np.array(task.value))


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()

    def run(values, print_="a"):
        tasks = [Task(f"clip_{n}", folder / f"clip_{n}.npz", f"{print_}{n}", value) for n, value in enumerate(values)]
        return finish_clips(finish, tasks, workers=1, desc="testing")

    return run


@pytest.fixture
def calls(tmp_path):
    """Names of the clips that were worked on since the last call."""

    def taken():
        path = tmp_path / "calls"
        names = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return sorted(names)

    return taken


def test_finished_clips_are_found_again(work, calls, tmp_path):
    paths = work([4, 5, 6])
    assert list(paths) == ["clip_0", "clip_1", "clip_2"] and calls() == ["clip_0", "clip_1", "clip_2"]
    assert work([4, 5, 6]) == paths and calls() == []
    work([4, 5, 6], print_="b")
    assert calls() == ["clip_0", "clip_1", "clip_2"]
    assert finish_clips(finish, [], desc="testing") == {}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and then nothing", b"text", None], ids=repr)
def test_a_damaged_file_is_done_again(work, calls, tmp_path, content):
    paths = work([4, 5])
    calls()
    if content is None:
        np.savez(paths["clip_1"], value=np.array(5))  # says nothing of itself
    else:
        paths["clip_1"].write_bytes(content)
    (tmp_path / "work" / ".clip_0.npz.123.tmp").write_bytes(b"what a kill left")
    work([4, 5])
    assert calls() == ["clip_1"] and not list((tmp_path / "work").glob(".*"))
    with np.load(paths["clip_1"]) as stored:
        assert stored["value"] == 5


def test_bad_clips_are_told_together_after_the_good_ones(work, calls):
    with pytest.raises(UserError) as caught:
        work([-1, 4, -2, -3, 5, -4, -5])
    told = str(caught.value)
    assert told.startswith(
        "5 of 7 clips cannot be prepared (clip clip_0: has the value -1; give another; clip clip_2: "
    )
    assert "clip_3" in told and "clip_5" not in told and "; and 2 more)" in told and "\n" not in told
    assert "repair or remove these and run the same command again" in told
    assert calls() == ["clip_1", "clip_4"]
    work([1, 4, 2, 3, 5, 6, 7])
    assert calls() == ["clip_0", "clip_2", "clip_3", "clip_5", "clip_6"]


def test_fingerprints_change_with_files_and_facts(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    os.utime(path, ns=(5, 5))
    first = files_fingerprint([path], 3, "x")
    assert first == files_fingerprint([path], 3, "x")
    assert (
        len({first, files_fingerprint([path], 4, "x"), files_fingerprint([path]), files_fingerprint([], 3, "x")}) == 4
    )
    os.utime(path, ns=(6, 6))
    assert files_fingerprint([path], 3, "x") != first
    path.unlink()
    with pytest.raises(UserError, match=r"a\.png: cannot be read \(No such file or directory\); restore the file"):
        files_fingerprint([path])


def test_other_settings_have_another_folder(tmp_path):
    assert work_folder(tmp_path, {"a": 1, "b": [2]}) == work_folder(tmp_path, {"b": [2], "a": 1})
    assert work_folder(tmp_path, {"a": 1}) != work_folder(tmp_path, {"a": 2})
    assert work_folder(tmp_path, {"a": 1}).parent == tmp_path
