"""A cluster of processes on this machine: a scheduler and workers of one thread, started as a user starts them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent


class LocalCluster:
    """A scheduler that writes into ``folder``, and workers; a killed one is replaced by its nanny, where it has one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.file = folder / "scheduler.json"
        self.processes: list[subprocess.Popen] = []
        self.scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", "0")
        wait_for(self.file.is_file)

    def start_worker(self, *options: str, **environment: str) -> subprocess.Popen:
        """A worker that imports the library and the tests from here."""
        return self._start("worker", "--nthreads", "1", "--memory-limit", "0", *options, **environment)

    @property
    def address(self) -> str:
        return json.loads(self.file.read_text())["address"]

    def await_workers(self, number: int) -> None:
        from distributed import Client

        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(number, timeout=60)

    def pids(self) -> list[int]:
        """The processes that do the work."""
        from distributed import Client

        with Client(self.address, set_as_default=False) as client:
            return sorted(client.run(os.getpid).values())

    def _start(self, what: str, *options: str, **environment: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "dask", what, "--scheduler-file", str(self.file), "--no-dashboard", *options]
        told = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS))), **environment}
        with open(self.folder / "log", "a") as log:
            # A group of its own, which ends as one.
            process = subprocess.Popen(
                command, cwd=self.folder, env=told, stdout=log, stderr=log, start_new_session=True
            )
        self.processes.append(process)
        return process

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def wait_for(condition, seconds: float = 60.0) -> None:
    """Polls until ``condition()``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
