"""Interrupted builds, through the command line: nothing is redone, nothing is lost, nothing differs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_builders import four_dme

REPOSITORY = Path(__file__).resolve().parents[3]


def start(challenge, data_dir, *extra):
    command = [sys.executable, "scripts/build_data.py", "--dataset", "four_dme/challenge", "--source", challenge,
               "--data_dir", data_dir, "--column", "Negative=neg", "--crop", "size=96", "--workers", "2",
               "--extractors", "hog", *extra]  # fmt: skip
    return subprocess.Popen(
        list(map(str, command)),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XLA_FLAGS": ""},
    )


def finished(data_dir):
    return {path.name: path for path in data_dir.glob("work/four_dme/challenge/*/*.npz")}


def assert_same_data(one, other):
    first, second = finished(one), finished(other)
    assert set(first) == set(second) and first
    for name in first:
        with np.load(first[name]) as a, np.load(second[name]) as b:
            assert a.files == b.files
            for key in a.files:
                assert a[key].tobytes() == b[key].tobytes()
    folders = [four_dme.version_dir("challenge", data_dir) for data_dir in (one, other)]
    assert sorted(path.name for path in folders[0].iterdir()) == sorted(path.name for path in folders[1].iterdir())
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes(), path.name


def test_killed_builds_end_like_an_uninterrupted_one(challenge, tmp_path):
    whole = start(challenge, tmp_path / "whole")
    began = time.monotonic()
    out, err = whole.communicate(timeout=120)
    lasted = time.monotonic() - began
    assert whole.returncode == 0, err
    assert out.strip() == str(four_dme.version_dir("challenge", tmp_path / "whole"))

    # Any moment will do; the third one leaves most of the work done.
    moments = np.random.default_rng(time.time_ns()).uniform(0.2, 0.9, 2) * lasted
    kept: dict[str, tuple[int, int]] = {}
    for moment in [*moments, None]:
        process = start(challenge, tmp_path / "killed")
        try:
            process.communicate(timeout=moment or 120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        now = {
            name: (path.stat().st_ino, path.stat().st_mtime_ns) for name, path in finished(tmp_path / "killed").items()
        }
        assert kept.items() <= now.items(), "a finished clip was done again"
        kept = now
    assert process.returncode == 0
    assert_same_data(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed").glob("work/**/.*.tmp"))
    assert not (tmp_path / "killed" / "work" / "four_dme" / "challenge" / "staging").exists()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_stop_says_how_to_go_on(challenge, tmp_path, sent):
    process = start(challenge, tmp_path / "data")
    deadline = time.monotonic() + 60
    while not finished(tmp_path / "data") and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(sent)
    err = process.communicate(timeout=20)[1]
    # The build may have been at its last step already.
    assert process.returncode in (130, 0), err
    assert "Traceback" not in err
    if process.returncode:
        assert err.strip().splitlines()[-1] == "interrupted; run the same command again to go on"
    again = start(challenge, tmp_path / "data")
    err = again.communicate(timeout=120)[1]
    assert again.returncode == 0, err
