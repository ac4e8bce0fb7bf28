"""Parallel work: results in order, errors kept apart, and nobody left behind whatever happens."""

import contextlib
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mer_jax.errors import UserError
from mer_jax.extractors.feature_files import read_feature_file
from mer_jax.parallel import available_processors, run_tasks, stream_tasks

# Worker processes import what they run by name, so the tasks here are functions of the library and of Python.


@pytest.mark.parametrize("workers", [1, 2])
def test_results_and_user_errors_in_order(tmp_path, workers):
    paths = [tmp_path / f"{name}.npy" for name in ("a", "absent", "b")]
    for value, path in enumerate(paths[::2]):
        np.save(path, np.full((1, 2), value))
    first, error, last = run_tasks(read_feature_file, paths, workers=workers, desc="reading", unit="file")
    assert (first[0, 0], last[0, 0]) == (0, 1)
    assert type(error) is UserError and str(error) == f"{paths[1]}: no such file"


@pytest.mark.parametrize("workers", [1, 2])
def test_defects_keep_their_traceback(workers):
    with pytest.raises(ValueError, match=r"math domain error|expected a nonnegative"):
        run_tasks(math.sqrt, [1, -1], workers=workers, desc="roots", unit="number")


def test_a_dying_worker_is_an_error_and_no_hang():
    with pytest.raises(UserError, match=r"a worker process died .* with fewer than 2 workers"):
        run_tasks(os._exit, [3] * 8, workers=2, desc="dying", unit="task")


@pytest.mark.parametrize("workers", [1, 2])
def test_streamed_results_in_order_and_no_further_ahead_than_allowed(tmp_path, workers):
    paths = [tmp_path / f"{number}.npy" for number in range(9)]
    for number, path in enumerate(paths):
        np.save(path, np.full((1, 2), number))
    paths[4].unlink()
    stream = stream_tasks(read_feature_file, paths, workers=workers, ahead=1, unit="file")
    with contextlib.closing(stream):
        assert next(stream)[0, 0] == 0
        # Of what lies further ahead nothing has been asked for yet.
        np.save(paths[-1], np.full((1, 2), 80))
        rest = list(stream)
    assert [int(result[0, 0]) for result in rest[:3] + rest[4:]] == [1, 2, 3, 5, 6, 7, 80]
    assert str(rest[3]) == f"{paths[4]}: no such file"


def test_a_stream_that_is_closed_early_leaves_no_process():
    stream = stream_tasks(math.sqrt, range(100), workers=2, unit="number")
    assert next(stream) == 0
    children = [child.pid for child in multiprocessing.active_children()]
    assert len(children) == 2
    stream.close()
    assert not _alive(children)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_dying_worker_ends_a_stream():
    with pytest.raises(UserError, match=r"a worker process died .* every finished clip is kept"):
        list(stream_tasks(os._exit, [3] * 8, workers=2, unit="clip"))


def test_processors():
    assert 1 <= available_processors() <= os.cpu_count()


def test_no_tasks():
    assert run_tasks(math.sqrt, [], desc="nothing", unit="task") == []


def _alive(pids):
    alive = []
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat") as stream:
                state = stream.read().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            alive.append(pid)
    return alive


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_leave_no_process_behind(tmp_path, sent):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\n"
        f"sys.path.insert(0, {os.getcwd()!r})\n"
        "from mer_jax.parallel import run_tasks\n"
        "def work(index):\n"
        f"    open(os.path.join({str(tmp_path)!r}, f'pid{{os.getpid()}}'), 'w').close()\n"
        "    time.sleep(0.3)\n"
        "if __name__ == '__main__':\n"
        "    try:\n"
        "        run_tasks(work, list(range(200)), workers=2, desc='work', unit='task')\n"
        "    except KeyboardInterrupt:\n"
        "        sys.exit(130)\n"
    )
    process = subprocess.Popen([sys.executable, program], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while len(workers := list(tmp_path.glob("pid*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(sent)
    status = process.wait(10)
    assert status == (-signal.SIGKILL if sent == signal.SIGKILL else 130)
    pids = [int(path.name.removeprefix("pid")) for path in workers]
    assert len(pids) == 2
    deadline = time.monotonic() + 5
    while _alive(pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(pids)
