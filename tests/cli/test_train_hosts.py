"""``scripts/train.py`` in several processes, as on several machines: the same bits, and a clear end of a lost one."""

import re
import signal
import socket

import numpy as np
import pytest

EVERY_EPOCH = {"study.checkpoint_seconds": 0}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def pair(train):
    """Opens the door twice, as two processes of two devices each."""

    def open_pair(overrides, workdir):
        port = free_port()
        return [
            train(
                overrides,
                workdir,
                (f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={index}"),
                devices=2,
            )
            for index in range(2)
        ]

    return open_pair


def told_by(run, index):
    path = run / (f"metrics.{index}.jsonl" if index else "metrics.jsonl")
    return path.read_text().count("\n") if path.is_file() else 0


def assert_same_study(run, finished):
    with np.load(run / "predictions.npz") as ours, np.load(finished / "predictions.npz") as theirs:
        assert ours.files == theirs.files
        for name in ours.files:
            assert ours[name].tobytes() == theirs[name].tobytes(), name
    for name in ("metrics.jsonl", "members.csv", "folds.csv", "summary.json"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()
    assert not list(run.glob("metrics.*.jsonl")) and not (run / "blocks").exists()
    assert not list((run / "checkpoints").glob("*"))


def assert_lost(survivor, index):
    """One line, soon, that names the process and the remedy."""
    survivor.end(60)
    assert f"process {index} of 2 (" in survivor.error and survivor.error.endswith(
        "was lost; what was saved is kept: run the same command again, with as many processes as there are"
    )
    assert len([line for line in survivor.stderr.splitlines() if not line.startswith(("fusion:", "training:"))]) == 1


def test_a_lost_process_ends_the_run_and_one_process_goes_on_to_the_same_bits(
    challenge, finished, train, pair, tmp_path
):
    run = tmp_path / "run"
    first, second = pair(challenge.overrides | EVERY_EPOCH, "run")
    for process in (first, second):
        process.wait_for(lambda: told_by(run, 0) >= 8 and told_by(run, 1) >= 4)
    second.stop(signal.SIGKILL)
    assert_lost(first, 1)
    assert "on 2 cpu devices of process 0 of 2" in first.stderr and "on 2 cpu devices of process 1" in second.stderr
    assert first.stdout == second.stdout == "" and not (run / "predictions.npz").exists()
    done = train(challenge.overrides, "run").end()
    assert done.status == 0, done.stderr
    assert_same_study(run, finished)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(challenge, finished, pair, tmp_path):
    first, second = (process.end() for process in pair(challenge.overrides, "run"))
    assert first.status == second.status == 0, first.stderr + second.stderr
    assert_same_study(tmp_path / "run", finished)
    assert "report: run/report.html" in first.stdout and second.stdout == ""
    assert re.search(r"training: 180/180", first.stderr) and "training:" not in second.stderr
    # A finished study ends at once, in all of them.
    first, second = (process.end() for process in pair(challenge.overrides, "run"))
    assert first.status == second.status == 0 and "training" not in first.stderr
    assert "report: run/report.html" in first.stdout


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_killed_and_outlive_the_loss_of_the_first(
    challenge, finished, train, pair, tmp_path
):
    run = tmp_path / "run"
    alone = train(challenge.overrides | EVERY_EPOCH, "run", devices=1)
    alone.wait_for(lambda: told_by(run, 0) >= 20)
    alone.stop(signal.SIGKILL)
    first, second = pair(challenge.overrides | EVERY_EPOCH, "run")
    first.wait_for(lambda: told_by(run, 0) >= 32 and told_by(run, 1) >= 4)
    first.stop(signal.SIGKILL)
    assert_lost(second, 0)
    first, second = (process.end() for process in pair(challenge.overrides, "run"))
    assert first.status == second.status == 0, first.stderr + second.stderr
    assert_same_study(run, finished)


@pytest.mark.slow
def test_a_signal_to_one_or_all_stops_all_with_their_checkpoints(challenge, finished, pair, tmp_path):
    run = tmp_path / "run"
    first, second = pair(challenge.overrides | EVERY_EPOCH, "run")
    first.wait_for(lambda: told_by(run, 0) >= 8 and told_by(run, 1) >= 4)
    assert second.stop(signal.SIGTERM) < 10 and second.status == 128 + signal.SIGTERM
    assert "was stopped by SIGTERM; what was saved is kept" in first.end(30).error
    before = told_by(run, 0) + told_by(run, 1)  # which process 0 brings together
    first, second = pair(challenge.overrides | EVERY_EPOCH, "run")
    first.wait_for(lambda: told_by(run, 0) > before and told_by(run, 1) >= 1)
    for process in (first, second):
        process.process.send_signal(signal.SIGTERM)
    assert {process.end(30).status for process in (first, second)} <= {128 + signal.SIGTERM, 2}
    first, second = (process.end() for process in pair(challenge.overrides, "run"))
    assert first.status == second.status == 0, first.stderr + second.stderr
    assert_same_study(run, finished)


@pytest.mark.slow
def test_what_is_wrong_in_one_process_is_told_by_all(challenge, finished, train, tmp_path):
    del finished  # has built the data set
    port = free_port()
    flags = (f"--coordinator=127.0.0.1:{port}", "--num_processes=2")
    first = train(challenge.overrides, "run", (*flags, "--process_id=0"))
    second = train(challenge.overrides | {"train.epochs": 31}, "run", (*flags, "--process_id=1"))
    assert "holds a study of another config (train.epochs was 30, now 31)" in second.end().error
    assert "process 1 of 2" in first.end().error and "train.epochs was 30, now 31" in first.error


def test_flags_that_do_not_fit_are_one_line(train, tmp_path):
    done = train({}, "run", ("--coordinator=node1:99",)).end()
    assert "--num_processes and --process_id: missing beside the other flags" in done.error
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()
