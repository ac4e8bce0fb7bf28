"""A tiny two-view data set whose features come from files, and the doors as a user opens them."""

import contextlib
import csv
import dataclasses
import fcntl
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from mer_jax.cli import open_door
from mer_jax.study.train import train as train_study

ROOT = Path(__file__).resolve().parents[2]
LABELS = ("Negative", "Positive", "Repression", "Surprise", "Others")
NUM_TRAIN, NUM_TEST, NUM_FRAMES = 24, 4, 4
WIDTHS = {"look": 6, "shape": 4}

# One small program whatever the test: 3 folds x 2 seeds in 2 blocks of 4 members, the second filled up.
TINY = {
    "data.num_frames": NUM_FRAMES,
    "data.modalities.appearance.extractor": "look",
    "data.modalities.appearance.reduce": 0,
    "data.modalities.geometry.extractor": "shape",
    "data.modalities.geometry.reduce": 0,
    "model.num_queries.appearance": 2,
    "model.num_queries.geometry": 2,
    "model.key_dim": 8,
    "model.hidden_dim": 8,
    "train.epochs": 30,
    "train.batch_size": 8,
    "train.learning_rate": 1e-2,
    "study.num_seeds": 2,
    "study.num_inner": 2,
    "study.members_together": 4,
    "study.epochs_per_call": 1,
    "evaluation.bootstrap": 100,
}


@dataclasses.dataclass(frozen=True)
class Challenge:
    """A folder in the challenge's layout, and its features."""

    root: Path

    @property
    def source(self) -> Path:
        return self.root / "source"

    @property
    def features(self) -> Path:
        return self.root / "features"

    @property
    def overrides(self) -> dict:
        """Fields of a study on these clips, built by the study itself."""
        return TINY | {
            "data.dataset": "four_dme/challenge",
            "data.data_dir": str(self.root / "data"),
            "data.source": str(self.source),
            "data.features": tuple(f"{name}={self.features / name}" for name in WIDTHS),
            "data.workers": 1,
            "study.compile_cache": str(self.root / "compiled"),
        }


def make_challenge(root: Path, num_train: int = NUM_TRAIN, num_test: int = NUM_TEST) -> Challenge:
    """Clips of grey noise, whose features tell their labels through much noise."""
    rng = np.random.default_rng(7)
    made = Challenge(root)
    rows = []
    mixing = {name: rng.normal(size=(len(LABELS), width)) for name, width in WIDTHS.items()}
    for number in range(1, num_train + num_test + 1):
        train = number <= num_train
        folder = made.source / ("train" if train else "test") / f"clip_{number}"
        folder.mkdir(parents=True)
        for frame in range(NUM_FRAMES):
            Image.fromarray(rng.integers(0, 255, (24, 48, 3), np.uint8)).save(folder / f"{frame}.jpg")
        labels = np.zeros(len(LABELS), int)
        labels[[number % len(LABELS), number * number % 3]] = 1
        if train:
            rows.append([number, *labels, f"s{number % 6}"])
        for name, width in WIDTHS.items():
            (made.features / name).mkdir(parents=True, exist_ok=True)
            for view in "lr":
                values = labels @ mixing[name] + rng.normal(size=(NUM_FRAMES, width))  # (T, D)
                np.save(made.features / name / f"clip_{number}_{view}.npy", values.astype(np.float32))
    with open(made.source / "train.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([["Id", *LABELS, "subject"], *rows])
    return made


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Runs what makes a folder that all processes of this test run share, in the first that asks for it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make_once(name: str, make) -> Path:
        folder, made = base / name, base / f"{name}.made"
        with open(base / f"{name}.lock", "w") as lock, contextlib.closing(lock):
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                make(folder)
                made.touch()
        return folder

    return make_once


@pytest.fixture(scope="session")
def challenge(once) -> Challenge:
    """24 training and 4 test clips; read-only, as all tests share them."""
    return Challenge(once("challenge", make_challenge))


class Door:
    """A script in its own process."""

    def __init__(
        self, script: str, *arguments, cwd: Path, devices: int = 1, optimised: bool = False, **environment: str
    ):
        kept = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
        # Unoptimised programs compile three times as fast, and what is asked of them here is the same.
        flags = f"--xla_force_host_platform_device_count={devices}"
        flags += "" if optimised else f" {os.environ['HURRIED_XLA']}"
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=kept | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | environment,
        )

        # Not files: these doors are closed on full disks, too.
        self._told: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._readers = [threading.Thread(target=self._read, args=(name,), daemon=True) for name in self._told]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str) -> None:
        with getattr(self.process, name) as stream:
            for line in stream:
                self._told[name].append(line)

    @property
    def stdout(self) -> str:
        return "".join(self._told["stdout"])

    @property
    def stderr(self) -> str:
        return "".join(self._told["stderr"])

    def wait_for(self, condition, seconds: float = 240.0) -> None:
        """Polls until ``condition()``; fails if the process ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.stderr}"
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.01)

    def stop(self, signum: int) -> float:
        """Sends a signal and returns the seconds until the end."""
        assert self.process.poll() is None, f"ended before the signal: {self.stderr}"
        began = time.monotonic()
        self.process.send_signal(signum)
        self.process.wait(30)
        seconds = time.monotonic() - began
        self._join()
        return seconds

    def end(self, seconds: float = 240.0) -> "Door":
        self.process.wait(seconds)
        self._join()
        return self

    def _join(self) -> None:
        for reader in self._readers:
            reader.join(10)

    @property
    def status(self) -> int:
        return self.process.returncode

    @property
    def error(self) -> str:
        """The one line that a user is told; fails if there is a traceback or another status."""
        told = self.stderr
        assert self.status == 2 and "Traceback" not in told, told
        last = told.strip().splitlines()[-1]
        assert last.startswith("error: "), told
        assert told.count("error: ") == 1, told
        return last

    def close(self) -> None:
        if self.process.poll() is None:
            self.stop(signal.SIGKILL)


@pytest.fixture
def door(tmp_path):
    """Opens doors and sees to it that none stays open."""
    opened: list[Door] = []

    def open_door(script: str, *arguments, cwd: Path = tmp_path, **others) -> Door:
        opened.append(Door(script, *arguments, cwd=cwd, **others))
        return opened[-1]

    yield open_door
    for one in opened:
        one.close()


@pytest.fixture
def train(door):
    """Opens scripts/train.py with fields of the config."""

    def open_train(overrides: dict, workdir: str | None = None, flags: tuple[str, ...] = (), **others) -> Door:
        return door("train.py", *train_arguments(overrides, workdir), *flags, **others)

    return open_train


def train_arguments(overrides: dict, workdir: str | None) -> list[str]:
    """The command line of scripts/train.py."""
    arguments = ["--config", f"{ROOT / 'configs' / 'fusion.py'}"]
    arguments += [f"--config.{name}={value}" for name, value in overrides.items()]
    return arguments + ([f"--workdir={workdir}"] if workdir else [])


@pytest.fixture(scope="session")
def finished(challenge, once) -> Path:
    """The workdir of a study that nothing disturbed, on one device; read-only. It also builds the data set."""

    def make(workdir: Path) -> None:
        done = Door("train.py", *train_arguments(challenge.overrides, workdir.name), cwd=workdir.parent).end()
        done.close()
        assert done.status == 0, done.stderr
        workdir.with_suffix(".txt").write_text(done.stdout)

    return once("challenge/finished", make)


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of the finished study that a test may change."""
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture(scope="session")
def new_challenge():
    """Makes further, smaller data sets: ``new_challenge(root, num_train, num_test)``."""
    return make_challenge


@pytest.fixture
def told(tmp_path, capsys):
    """Opens the door behind the flags in this process and returns the error that ends it."""

    def open_told(overrides: dict, workdir: str = "run") -> str:
        names = ("jax_default_matmul_precision", "jax_compilation_cache_dir", "jax_default_device")
        kept = {name: getattr(jax.config, name) for name in names}
        config = runpy.run_path(str(ROOT / "configs" / "fusion.py"))["get_config"]()
        config.update_from_flattened_dict({k: v for k, v in overrides.items() if k != "study.compile_cache"})
        try:
            with pytest.raises(SystemExit) as ended:
                open_door(train_study, config, tmp_path / workdir)
        finally:
            for name, value in kept.items():
                jax.config.update(name, value)
        assert ended.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert printed.err.endswith(line + "\n")
        return line

    return open_told
