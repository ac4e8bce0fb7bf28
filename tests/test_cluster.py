"""Tasks on a cluster: the same results as here, whatever becomes of workers, scheduler and the one who asks."""

import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import mer_jax
from mer_jax import cluster as clusters
from mer_jax.cluster import connect
from mer_jax.errors import UserError, WorkerDied
from mer_jax.extractors.feature_files import read_feature_file
from mer_jax.parallel import run_tasks

ROOT = Path(mer_jax.__file__).resolve().parents[1]

# Workers import what they run by name, so the tasks here are functions of the library and of Python.


@pytest.fixture
def impatient(monkeypatch):
    """Waits for nothing for long."""
    monkeypatch.setattr(clusters, "CONNECT_SECONDS", 1)
    monkeypatch.setattr(clusters, "_TICK_SECONDS", 0.1)
    monkeypatch.setattr(clusters, "WAIT_SECONDS", 1.0)


@pytest.fixture
def new_cluster(make_cluster):
    """Starts a scheduler and workers without nannies, each with its own options or environment."""
    started = []

    def start(*workers):
        started.append(make_cluster())
        for options, environment in workers:
            started[-1].start_worker("--no-nanny", *options, **environment)
        if workers:
            started[-1].await_workers(len(workers))
        return started[-1]

    yield start
    for each in started:
        each.close()


def nowhere(tmp_path):
    """A folder that this process has and no other sees."""
    (tmp_path / "own").mkdir()
    return Path("/proc/self/fd") / str(os.open(tmp_path / "own", os.O_RDONLY))


@pytest.fixture
def own_folder(tmp_path):
    folder = nowhere(tmp_path)
    yield folder
    os.close(int(folder.name))


def work(cluster, function, tasks, **others):
    return run_tasks(function, tasks, workers=cluster, desc="working", unit="task", **others)


def test_results_and_user_errors_in_order_and_relative_paths(cluster, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    paths = [Path(f"{name}.npy") for name in ("a", "absent", "b")]
    for value, path in enumerate(paths[::2]):
        np.save(path, np.full((1, 2), value))
    with connect(cluster.address, "shared") as there:
        first, error, last = work(there, read_feature_file, paths)
    assert (first[0, 0], last[0, 0]) == (0, 1)
    assert type(error) is UserError and str(error) == "absent.npy: no such file"
    told = capfd.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1 and told.err.startswith("working: 3/3 task ["), told
    assert not list(Path("shared").iterdir())


def test_defects_keep_their_traceback(cluster):
    with pytest.raises(ValueError, match=r"math domain error|expected a nonnegative"):
        work(cluster, math.sqrt, [1, -1])
    assert work(cluster, math.sqrt, [4]) == [2] and work(cluster, math.sqrt, []) == []


def test_a_task_that_kills_every_worker_is_told_and_the_others_are_done(cluster):
    results = work(cluster, os._exit, [3])
    assert type(results[0]) is WorkerDied and "4 workers died of it, the last at tcp://" in str(results[0])
    assert work(cluster, math.sqrt, [4, 9]) == [2, 3]


@pytest.mark.slow
def test_many_tasks_that_kill_have_a_reason_in_common(cluster):
    with pytest.raises(UserError, match=r"^9 tasks killed all workers that took them, the last one: 4 worke"):
        work(cluster, os._exit, [3] * 12)
    assert work(cluster, math.sqrt, [4, 9]) == [2, 3]


def test_a_killed_worker_loses_nothing(cluster, two_workers, capfd):
    # Long enough that it looks again who is there: what came and went between two looks is not missed by anybody.
    work(cluster, time.sleep, [1.5])
    capfd.readouterr()
    pids = two_workers.pids()
    killer = threading.Timer(0.3, os.kill, (pids[0], signal.SIGKILL))
    killer.start()
    assert work(cluster, time.sleep, [0.1] * 20) == [None] * 20
    killer.join()
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 2 and told[0].startswith("a worker has gone (tcp://"), told
    assert told[0].endswith("; what was at work there is done again")


def test_what_is_closed_early_is_given_up(cluster):
    done = cluster.map(time.sleep, [0, 1], unit="task")
    assert next(done) == (0, None)
    done.close()
    assert work(cluster, math.sqrt, [4]) == [2]


def test_tokens_are_removed_but_not_those_of_others(two_workers, tmp_path):
    stale = tmp_path / ".cluster-0"
    stale.write_text(stale.name)
    with connect(two_workers.address, tmp_path), connect(two_workers.address, tmp_path) as second:
        assert not stale.exists() and len(list(tmp_path.iterdir())) == 2
        second.check()
    assert not list(tmp_path.iterdir())


def test_what_workers_do_not_see_is_told(cluster, two_workers, own_folder, tmp_path, monkeypatch):
    here = f"on {socket.gethostname()}: does not see "
    with (
        pytest.raises(UserError, match=rf"^worker tcp://[\d.:]+ {here}{own_folder}/data of the machine that asks; "),
        connect(two_workers.address, own_folder / "data"),
    ):
        raise AssertionError
    (own_folder / "frame.png").touch()
    with pytest.raises(UserError, match=rf"{here}{own_folder}/frame.png; put it on a file system that all machines sh"):
        cluster.require([tmp_path, own_folder / "frame.png"])
    monkeypatch.setattr(clusters, "_SEEN_SECONDS", 0.3)
    with pytest.raises(UserError, match=r"x.npz: written by a worker and not seen here; is its folder the same on all"):
        cluster.await_files([tmp_path / "x.npz"])


@pytest.mark.parametrize(
    "address, message",
    [
        (
            "tcp://127.0.0.1:9",
            r"no scheduler answers there \(.*\); start one with 'python -m dask scheduler', and name",
        ),
        ("foo://x:1", r"no scheduler answers there \(.*foo.*\); start one with"),
        ("absent.json", r": no such file; start the scheduler with --scheduler-file absent\.json"),
    ],
)
def test_an_address_without_scheduler_is_one_line(address, message, impatient, tmp_path):
    with pytest.raises(UserError, match=f"^--cluster {address}.*{message}") as told, connect(address, tmp_path):
        raise AssertionError
    assert "\n" not in str(told.value) and not list(tmp_path.iterdir())


def test_a_missing_dask_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(UserError, match=r"needs Dask's distributed \(.*\); install it with 'pip install -r "),
        connect("tcp://127.0.0.1:9", tmp_path),
    ):
        raise AssertionError


def test_no_worker_then_unfit_ones_are_one_line_each(new_cluster, impatient, tmp_path, monkeypatch, capfd):
    cluster = new_cluster()

    def refused():
        with pytest.raises(UserError) as told, connect(str(cluster.file), tmp_path / "data"):
            raise AssertionError
        return str(told.value)

    assert refused() == f"{cluster.file}: no worker for 1 s; start workers and run the same command again"
    assert capfd.readouterr().err == f"waiting up to 1 s for a worker at {cluster.file}\n"

    monkeypatch.setattr(clusters, "WAIT_SECONDS", 60.0)
    other = tmp_path / "other"
    for package in ("mer_jax", "data_builders"):
        shutil.copytree(ROOT / package, other / package, ignore=shutil.ignore_patterns("__pycache__"))
    (other / "mer_jax" / "__init__.py").write_text("__version__ = '0.0'\n")
    for options, environment, message in (
        ((), {"PYTHONPATH": str(other)}, "has mer_jax 0.0 instead of "),
        (
            (),
            {"PYTHONPATH": ""},
            "cannot import this mer_jax (No module named 'mer_jax'); start it where",
        ),
        (("--nthreads", "2"), {}, "has 2 threads; start workers with --nthreads 1, and as many of them as shall work"),
    ):
        worker = cluster.start_worker("--no-nanny", *options, **environment)
        told = refused()
        assert told.startswith("worker tcp://") and message in told and "\n" not in told, told
        worker.kill()
        worker.wait()


def test_a_worker_that_comes_later_is_looked_at_too(new_cluster, tmp_path):
    cluster = new_cluster(((), {}))
    with connect(cluster.address, tmp_path / "data") as connected:
        done = connected.map(time.sleep, [0.05] * 200, unit="task")
        next(done)
        cluster.start_worker("--no-nanny", PYTHONPATH="")
        with pytest.raises(UserError, match=r"^worker that came during the work: cannot import this mer_jax"):
            list(done)


def test_all_workers_gone_and_the_scheduler_gone(new_cluster, impatient, tmp_path, capfd):
    cluster = new_cluster(((), {}))
    with connect(cluster.address, tmp_path) as connected:
        cluster.processes[1].kill()
        message = rf"^{cluster.address}: no worker for 1 s; at work was clip 0; every other one that was fin"
        with pytest.raises(UserError, match=message):
            list(connected.map(time.sleep, [30], unit="clip"))
        told = capfd.readouterr().err.splitlines()
        assert [line.partition(" ")[0] for line in told] == ["a", "waiting"], told
    cluster.start_worker("--no-nanny")
    clusters.WAIT_SECONDS = 60.0  # restored by the fixture
    with connect(cluster.address, tmp_path) as connected:
        capfd.readouterr()
        killer = threading.Timer(0.5, cluster.scheduler.kill)
        killer.start()
        with pytest.raises(UserError, match=rf"^{cluster.address}: the scheduler is gone; what was finished is kept"):
            list(connected.map(time.sleep, [30], unit="clip"))
        killer.join()
    told = capfd.readouterr()
    assert told.out == told.err == ""


def test_a_result_that_went_with_its_worker_is_not_waited_for_without_end(new_cluster, impatient, tmp_path):
    cluster = new_cluster(((), {}))

    class Lost:
        status = "pending"

        def result(self, timeout):
            time.sleep(timeout)
            raise TimeoutError

        def release(self):
            self.released = True

    with connect(cluster.address, tmp_path) as connected:
        cluster.processes[1].kill()
        cluster.processes[1].wait()
        lost = Lost()
        with pytest.raises(UserError, match=rf"^{cluster.address}: no worker for 1 s; start one"):
            connected._result(lost, "start one")
        assert lost.released


def test_a_task_s_own_timeout_is_a_defect_as_any_other(cluster):
    with pytest.raises(TimeoutError, match="the task's own"):
        work(cluster, exec, ['raise TimeoutError("the task\'s own")'])


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_who_asks_may_be_stopped_at_any_time(two_workers, tmp_path, sent):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from mer_jax.cluster import connect\n"
        "from mer_jax.parallel import run_tasks\n"
        "if __name__ == '__main__':\n"
        "    try:\n"
        f"        with connect({two_workers.address!r}, {str(tmp_path / 'data')!r}) as cluster:\n"
        "            print('connected', flush=True)\n"
        "            run_tasks(time.sleep, [0.2] * 500, workers=cluster, desc='work', unit='task')\n"
        "    except KeyboardInterrupt:\n"
        "        sys.exit(130)\n"
    )
    process = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "connected\n"
    time.sleep(0.5)
    process.send_signal(sent)
    _, told = process.communicate(timeout=20)
    assert process.returncode == (-signal.SIGKILL if sent == signal.SIGKILL else 130), told
    assert "Traceback" not in told and len(told.splitlines()) <= 1, told
    # The workers are free again at once, and what a kill left is removed.
    began = time.monotonic()
    with connect(two_workers.address, tmp_path / "data") as cluster:
        assert work(cluster, math.sqrt, [4, 9]) == [2, 3]
    assert time.monotonic() - began < 60 and not list((tmp_path / "data").iterdir())
