"""``scripts/train.py`` on a grid: one command, whatever happens to it, and rows that are ordinary studies."""

import json
import re
import shutil
import signal
import socket
from pathlib import Path

import numpy as np
import pytest

from mer_jax.study.results import StudyResults

ROOT = Path(__file__).resolve().parents[2]
ROWS = ("look", "shape", "look+shape-gate")
# The data set's features are files, which do not say of what they are.
CROSS = {"cross.appearance": ("look",), "cross.geometry": ("shape",), "cross.fusions": ("gate",)}


def fields(challenge):
    """The same study as that of the fixtures, less what the rows set."""
    return {name: value for name, value in challenge.overrides.items() if not name.endswith(".extractor")}


@pytest.fixture
def train_grid(door, challenge, finished):
    """Opens scripts/train.py on the grid of the shared data set, which ``finished`` has built."""
    del finished

    def open_grid(workdir, overrides=CROSS, flags=(), **others):
        told = fields(challenge) | overrides
        arguments = ["--config", ROOT / "configs" / "fusion_grid.py", f"--workdir={workdir}", *flags]
        return door("train.py", *arguments, *(f"--config.{name}={value}" for name, value in told.items()), **others)

    return open_grid


def epochs_seen(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory):
    """Where the grid of the first test lies, for those after it."""
    return tmp_path_factory.mktemp("grid") / "run"


def test_no_kill_and_no_signal_changes_any_row(train_grid, door, finished, disturbed):
    every_epoch = CROSS | {"study.checkpoint_seconds": 0}
    killed = train_grid(disturbed, every_epoch)
    killed.wait_for(lambda: epochs_seen(disturbed / "shape") >= 8)
    killed.stop(signal.SIGKILL)
    done_before = (disturbed / "look" / "predictions.npz").stat().st_mtime_ns
    stopped = train_grid(disturbed, every_epoch)
    stopped.wait_for(lambda: epochs_seen(disturbed / ROWS[2]) >= 8)
    assert stopped.stop(signal.SIGTERM) < 10 and stopped.status == 128 + signal.SIGTERM
    assert "row 2 of 3, 2 left: shape" in stopped.stderr and "row 1 of 3" not in stopped.stderr
    assert "stopped by SIGTERM; checkpoints are in " in stopped.stderr
    assert re.search(r"row 3 of 3, 1 left, about \d+ (s|min) to go: look\+shape-gate", stopped.stderr)
    assert not (disturbed / ROWS[2] / "predictions.npz").exists() and not (disturbed / "summary.json").exists()
    unfinished = door("evaluate.py", "report", disturbed).end()
    assert "1 of the grid's 3 rows are not trained (look+shape-gate); run scripts/train.py" in unfinished.error

    done = train_grid(disturbed).end()
    assert done.status == 0, done.stderr
    assert "row 3 of 3, 1 left: look+shape-gate" in done.stderr and "row 2 of 3" not in done.stderr
    assert (disturbed / "look" / "predictions.npz").stat().st_mtime_ns == done_before
    assert "Table 2: macro-F1" in done.stdout and "Table 3: look + shape" in done.stdout
    # A row is the study that it would have been by itself, to the last bit, whatever came between.
    with np.load(disturbed / ROWS[2] / "predictions.npz") as ours, np.load(finished / "predictions.npz") as theirs:
        assert ours.files == theirs.files
        for name in ours.files:
            assert ours[name].tobytes() == theirs[name].tobytes(), name
    studies = [StudyResults.load(disturbed / row) for row in ROWS]
    assert all(study.member_id.tolist() == studies[0].member_id.tolist() for study in studies)
    assert all(np.array_equal(study.clip_fold, studies[0].clip_fold) for study in studies)


def test_a_finished_grid_is_reported_again_without_its_data(train_grid, door, challenge, disturbed, tmp_path):
    copy = shutil.copytree(disturbed, tmp_path / "copy")
    summary = (copy / "summary.json").read_bytes()
    for name in ("summary.json", "table.csv", "report.html"):
        (copy / name).unlink()
    shutil.rmtree(copy / "shape" / "params")
    done = door("evaluate.py", "report", copy).end()
    assert done.status == 0, done.stderr
    assert (copy / "summary.json").read_bytes() == summary and (copy / "table.csv").is_file()
    assert (copy / "report.html").read_text() == (disturbed / "report.html").read_text().replace(
        disturbed.name, copy.name
    )
    assert json.loads(summary)["best"]["pooled"] in ROWS
    gone = door("predict.py", "--workdir", copy, "--split=test").end()
    assert "copy holds a grid of studies; name the folder of one of its rows" in gone.error
    again = train_grid(copy, CROSS | {"data.data_dir": str(challenge.root / "data") + "/"}).end()
    assert "data.data_dir was " in again.error and "holds a study of another config" in again.error


def test_a_row_of_another_config_is_refused(train_grid, disturbed, finished, tmp_path):
    copy = shutil.copytree(disturbed, tmp_path / "copy")
    shutil.rmtree(copy / "look")
    shutil.copytree(finished, copy / "look")
    line = train_grid(copy).end().error
    assert "copy/look holds a study of another config (" in line and 'name was "fusion", now "look"' in line
    unknown = train_grid(tmp_path / "new", {}).end().error
    assert (
        "does not say whether its features 'look' are of appearance or geometry; name the features of both" in unknown
    )
    assert not (tmp_path / "new" / "config.json").exists()


@pytest.mark.slow
def test_two_processes_train_a_grid_row_by_row_to_the_same_bits(train_grid, finished, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = ((f"--coordinator={where}", "--num_processes=2", f"--process_id={index}") for index in range(2))
    first, second = [train_grid(tmp_path / "run", flags=each, devices=2) for each in flags]
    assert first.end().status == second.end().status == 0, first.stderr + second.stderr
    assert "row 3 of 3, 1 left" in first.stderr and "row 3" not in second.stderr
    assert second.stderr.count("on 2 cpu devices of process 1 of 2") == 3 and second.stdout == ""
    ours, theirs = (StudyResults.load(folder) for folder in (tmp_path / "run" / ROWS[2], finished))
    assert ours.probabilities.tobytes() == theirs.probabilities.tobytes()
    assert "Table 2: macro-F1" in first.stdout
