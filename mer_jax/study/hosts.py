"""Several processes, on one machine or on many, that train one study: who they are, and whether all of them live.

Each process trains on its own devices as if it were alone: members share nothing, so no device ever talks to a device
of another process. What the processes have in common is the folder of the run, on a file system that all of them see,
and this group, in which they find each other, deal out the blocks of members and learn of each other's end.

``jax.distributed`` carries the group, in a child process beside each of them (``sentinel.py``), for two reasons. Where
a process of a JAX job is lost, JAX aborts all others on the spot, with a stack trace instead of checkpoints: like this
it aborts the sentinels, and those whom they serve save, say one line and end. And in a process that is one of several
to JAX, orbax 0.12 saves NumPy arrays in process 0 alone: elsewhere its checkpoints lack them, and it says nothing.
"""

import contextlib
import itertools
import json
import os
import queue
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from mer_jax.errors import UserError

# A machine that is silent for so long is lost; JAX's own default is 100 s.
HEARTBEAT_SECONDS = 30
JOIN_SECONDS = 300
_POLL_SECONDS = 0.1
_SENTINEL = Path(__file__).resolve().with_name("sentinel.py")
_LEAVE_SECONDS = 15


class LostProcess(UserError):
    """Another process of the group was lost, has failed or was stopped."""


class Group:
    """The processes that train a study together; made without arguments, a process that is alone.

    Use as a context manager: how its body ends is told to the others.

    Attributes:
        index: This process's number.
        count: Number of processes.
    """

    def __init__(self, sentinel: "_Sentinel | None" = None):
        self._sentinel = sentinel
        self.index = sentinel.index if sentinel else 0
        self.count = sentinel.count if sentinel else 1
        self._study = 0
        self._said: dict = {"host": socket.gethostname(), "stages": {}, "done": 0}
        self._claims: itertools.count = itertools.count()
        self._lock = threading.Lock()
        self._told_at = 0.0
        if sentinel:
            sentinel.tell(self._said)

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes what belongs to no block."""
        return self.index == 0

    def begin(self) -> None:
        """Starts the next study; all processes of a group take their studies in the same order."""
        with self._lock:
            self._study += 1
            self._said["done"] = 0
            self._claims = itertools.count()

    def claim(self) -> int:
        """The next piece of work of the study, from 0 on; each is given to one process only, and once.

        Raises:
            LostProcess: The group is gone.
        """
        if self._sentinel is None:
            return next(self._claims)
        return self._sentinel.claim(f"study{self._study}", self.trouble)

    def tell(self, stage: str, **facts) -> None:
        """Lets the others know that this process has come to ``stage`` of the study, and ``facts`` (JSON values)."""
        with self._lock:
            self._said["stages"][self._stage(stage)] = facts
            if self._sentinel:
                self._sentinel.tell(self._said)

    def told(self, stage: str, of: Iterable[int] | None = None) -> list[dict] | None:
        """The facts of processes ``of`` (all) at ``stage``, in their order; None until all of them have come to it."""
        stages = [self._states()[index].get("stages", {}) for index in (range(self.count) if of is None else of)]
        name = self._stage(stage)
        return [each[name] for each in stages] if all(name in each for each in stages) else None

    def wait(self, stage: str, of: Iterable[int] | None = None) -> list[dict]:
        """Waits until processes ``of`` (all) have come to ``stage``.

        Returns:
            Their facts, in their order.

        Raises:
            LostProcess: One of the group was lost, has failed or was stopped.
        """
        of = None if of is None else list(of)
        while (facts := self.told(stage, of)) is None:
            self.check()
            time.sleep(_POLL_SECONDS)
        return facts

    def tell_done(self, done: int, every: float = 2.0) -> None:
        """Lets the others know how much of the study this process has done, now and then."""
        with self._lock:
            self._said["done"] = done
            if self._sentinel and time.monotonic() - self._told_at >= every:
                self._told_at = time.monotonic()
                self._sentinel.tell(self._said)

    def done_by_others(self) -> int:
        """What the others last told by :meth:`tell_done`."""
        return sum(state.get("done", 0) for index, state in enumerate(self._states()) if index != self.index)

    def trouble(self) -> str | None:
        """What has happened to another process, or None while all is well."""
        if self._sentinel is None:
            return None
        failures = [
            (
                bool(state.get("follows")),
                f"process {index} of {self.count} ({state.get('host', 'unknown host')}) {what}",
            )
            for index, state in enumerate(self._states())
            if index != self.index and (what := state.get("failure"))
        ]
        # A process that ended because of another is not the one to name.
        return min(failures)[1] if failures else self._sentinel.trouble()

    def check(self) -> None:
        """Raises what :meth:`trouble` tells.

        Raises:
            LostProcess: Naming the process.
        """
        trouble = self.trouble()
        if trouble:
            raise LostProcess(
                f"{trouble}; what was saved is kept: run the same command again, with as many processes as there are"
            )

    def fail(self, what: str, follows: bool = False) -> None:
        """Tells the others that this process ends before the study does.

        Args:
            what: Completes "process 1 of 2 ...".
            follows: Whether it ends because of another process.
        """
        with self._lock:
            if "failure" not in self._said:  # the first word counts
                self._said |= {"failure": what, "follows": follows}
                if self._sentinel:
                    self._sentinel.tell(self._said)

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, LostProcess):
            self.fail("ended with the others", follows=True)
        elif isinstance(error, UserError):
            self.fail(f"failed ({error})")
        elif error is not None:
            self.fail("was stopped" if isinstance(error, KeyboardInterrupt) else f"failed ({kind.__name__})")
        if self._sentinel:
            self._sentinel.close(peacefully="failure" not in self._said)

    def _stage(self, name: str) -> str:
        return f"{self._study}/{name}"

    def _states(self) -> list[dict]:
        if self._sentinel is None:
            return [self._said]
        states = list(self._sentinel.states)
        states[self.index] = self._said
        return states


def open_group(
    distributed: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Group:
    """The group that the flags of a door ask for: this process alone without any.

    Args:
        distributed: Whether JAX shall find out what the others do not say.
        coordinator: As in :func:`join`, with the other two.
        num_processes: As in :func:`join`.
        process_id: As in :func:`join`.

    Raises:
        UserError: The flags do not fit each other, or the processes do not find each other.
    """
    told = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in told.items() if value is None]
    if not distributed and len(missing) == len(told):
        return Group()
    if not distributed and missing:
        raise UserError(
            f"{' and '.join(missing)}: missing beside the other flags of several processes; say it, or --distributed "
            "where JAX finds it (SLURM, Open MPI, Kubernetes, Cloud TPU)"
        )
    return join(**told)


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = JOIN_SECONDS,
) -> Group:
    """Finds the other processes of the run and waits for them.

    Args:
        coordinator: ``host:port`` of process 0, which opens that port; None where JAX finds it (SLURM, Open MPI,
            Kubernetes, Cloud TPU).
        num_processes: Number of processes; None as before.
        process_id: This process's number, from 0; None as before.
        timeout: Longest time to wait for the others, in seconds.

    Returns:
        The group; a process that is alone in it gets a group of one.

    Raises:
        UserError: The processes do not find each other.
    """
    told = f"--coordinator={coordinator}" if coordinator else "--distributed"
    if coordinator and not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"--coordinator={coordinator}: must be host:port, such as node1:1234")
    if process_id is not None and not 0 <= process_id < (num_processes or process_id + 1):
        raise UserError(f"--process_id={process_id}: must be from 0 to --num_processes - 1 ({num_processes - 1})")
    sentinel = _Sentinel(
        {
            "coordinator_address": coordinator,
            "num_processes": num_processes,
            "process_id": process_id,
            "initialization_timeout": max(1, int(timeout)),
            "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
            "shutdown_timeout_seconds": _LEAVE_SECONDS,
        }
    )
    try:
        sentinel.join(told, timeout + 30)
    except BaseException:
        sentinel.close(peacefully=False)
        raise
    return Group(sentinel)


class _Sentinel:
    """The child process that holds this process's place in the group; talks in lines of JSON."""

    def __init__(self, options: dict):
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_SENTINEL), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
            text=True,
        )
        self.index, self.count = 0, 1
        self.states: list[dict] = []
        self._joined, self._ended = threading.Event(), threading.Event()
        self._claims: queue.SimpleQueue = queue.SimpleQueue()
        self._writing, self._claiming = threading.Lock(), threading.Lock()
        self._errors: list[str] = []
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        with self._process.stdout as lines:
            for line in lines:
                told = json.loads(line)
                if "joined" in told:
                    self.index, self.count = told["joined"]
                    self.states = [{} for _ in range(self.count)]
                    self._joined.set()
                elif "claimed" in told:
                    self._claims.put(told["claimed"])
                else:
                    self.states = told["states"]
        self._readers[1].join(5)  # its last words are complete when its end is seen
        self._ended.set()

    def _read_errors(self) -> None:
        with self._process.stderr as lines:
            self._errors.extend(lines)

    def join(self, told: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not self._joined.wait(0.05):
            if self._ended.is_set() or time.monotonic() > deadline:
                reason = self._reason()
                if "coordinator_address should be defined" in reason or "must be defined" in reason:
                    raise UserError(
                        f"{told}: JAX finds no cluster here (SLURM, Open MPI, Kubernetes, Cloud TPU) to tell it the "
                        "rest; say --coordinator=host:port, --num_processes and --process_id"
                    )
                raise UserError(
                    f"{told}: the processes did not find each other ({reason}); start all of them with the same "
                    "--coordinator and --num_processes and a --process_id each, and see that the port is free and open"
                )

    def tell(self, state: dict) -> None:
        self._write({"state": state})

    def claim(self, name: str, trouble: Callable[[], str | None]) -> int:
        with self._claiming:
            self._write({"claim": name})
            while True:
                with contextlib.suppress(queue.Empty):
                    return self._claims.get(timeout=_POLL_SECONDS)
                if told := trouble():
                    raise LostProcess(told)

    def _write(self, line: dict) -> None:
        with self._writing, contextlib.suppress(OSError, ValueError):  # its end is noticed elsewhere
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()

    def trouble(self) -> str | None:
        if not self._ended.is_set():
            return None
        silent = re.search(r"stopped sending heartbeats\):\s*((?:\S*?\d+\s*,?\s*\n?)+)", "".join(self._errors))
        if silent:
            numbers = ", ".join(re.findall(r"(\d+)(?=\s|,|$)", silent[1]))
            return f"process {numbers} of {self.count} has been silent for {HEARTBEAT_SECONDS} s"
        host = self.states[0].get("host", "its host")
        return f"process 0 of {self.count} ({host}), at which the others meet, cannot be reached"

    def close(self, peacefully: bool) -> None:
        if peacefully:
            self._write({"leave": True})
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_LEAVE_SECONDS + 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for reader in self._readers:
            reader.join(5)

    def _reason(self) -> str:
        """What JAX said last, on one line."""
        lines = [line.strip() for line in self._errors if line.strip()]
        told = [line for line in lines if re.search(r"Error|DEADLINE|UNAVAILABLE|ADDRESS|rror:", line)]
        return (told or lines or ["no answer"])[-1][:300]


def _environment() -> dict[str, str]:
    # The sentinel computes nothing; what is told to XLA is not for it.
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
