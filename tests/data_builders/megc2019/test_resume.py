"""Interrupted builds from raw frames: nothing is redone, nothing is lost, nothing differs."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

PROGRAM = """
import sys
from data_builders import megc2019
from mer_jax.cli import open_door
from mer_jax.clips.flow import FlowConfig

FLOW = FlowConfig(method="tvl1", scales=2, warps=1)

def main():
    print(megc2019.build("raw", data_dir=sys.argv[2], source=sys.argv[1], crop="whole", flow=FLOW, workers=2))

if __name__ == "__main__":
    open_door(main)
"""


@pytest.fixture
def start(raw, tmp_path, repository):
    program = tmp_path / "build.py"
    program.write_text(PROGRAM)

    def call(data_dir):
        return subprocess.Popen(
            [sys.executable, str(program), str(raw.root), str(data_dir)],
            cwd=repository,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(repository)},
        )

    return call


def finished(data_dir):
    return {path.name: path for path in data_dir.glob("work/megc2019/raw/*/*.npz")}


def built(data_dir):
    (folder,) = data_dir.glob("megc2019/raw-*/1.0.0")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_builds_end_like_an_uninterrupted_one(start, tmp_path):
    process = start(tmp_path / "whole")
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 0, err
    kept: dict[str, tuple[int, int]] = {}
    # Killed as soon as a first and a fourth clip is there, then left alone.
    for enough in (1, 4, None):
        process = start(tmp_path / "killed")
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if enough is not None and len(finished(tmp_path / "killed")) >= enough:
                process.kill()
            time.sleep(0.005)
        err = process.communicate(timeout=20)[1]
        now = {
            name: (path.stat().st_ino, path.stat().st_mtime_ns) for name, path in finished(tmp_path / "killed").items()
        }
        assert kept.items() <= now.items(), "a finished clip was done again"
        kept = now
    assert process.returncode == 0, err
    assert built(tmp_path / "whole") == built(tmp_path / "killed")
    first, second = finished(tmp_path / "whole"), finished(tmp_path / "killed")
    assert len(first) == 9 and set(first) == set(second)
    for name in first:
        with np.load(first[name]) as a, np.load(second[name]) as b:
            np.testing.assert_array_equal(a["maps"], b["maps"])
    assert not list((tmp_path / "killed").glob("work/**/.*.tmp"))
    assert not (tmp_path / "killed" / "work" / "megc2019" / "raw" / "staging").exists()


def test_a_polite_stop_says_how_to_go_on(start, tmp_path):
    process = start(tmp_path / "data")
    deadline = time.monotonic() + 60
    while not finished(tmp_path / "data") and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    # The build may have been at its last step already.
    assert process.returncode in (130, 0), err
    assert "Traceback" not in err
    if process.returncode:
        assert err.strip().splitlines()[-1] == "interrupted; run the same command again to go on"
    again = start(tmp_path / "data")
    err = again.communicate(timeout=120)[1]
    assert again.returncode == 0, err
