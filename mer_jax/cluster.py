"""Tasks on the machines of a cluster, whose scheduler and workers are Dask's (``distributed``).

Dask starts them by hand, by SSH, in SLURM, in Kubernetes; this only connects to a scheduler that is there. What is
asked of a cluster is that its machines share a file system, run the same versions, and give each worker one thread: a
task here is what a process does alone. A worker that is lost, however it went, costs only what it was doing: others do
that again.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.metadata
import logging
import os
import pickle
import platform
import queue
import socket
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

import mer_jax
from mer_jax.errors import UserError, WorkerDied

Task = TypeVar("Task")
Result = TypeVar("Result")

LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "scipy", "scikit-image", "pillow", "opencv-contrib-python", "mediapipe")
CONNECT_SECONDS = 10
WAIT_SECONDS = 300.0  # for a worker, where there is none
_SEEN_SECONDS = 120.0  # a network file system may show a file so much later on another machine
_TICK_SECONDS = 1.0
_TOKEN = ".cluster-"
_MOST_KILLERS = 8  # more of them have a reason in common
_MAX_NAMED = 3


class Cluster:
    """The workers of a cluster, as :func:`connect` finds them; they may come and go.

    Attributes:
        address: Of the scheduler, as the user gave it.
    """

    def __init__(self, client: Any, address: str, expected: "_Expected"):
        self.address = address
        self._client = client
        self._expected = expected
        self._present: set[str] = set()
        self._looked_at = 0.0
        self._lonely_since: float | None = None

    def map(
        self,
        function: Callable[[Task], Result],
        tasks: Sequence[Task],
        *,
        unit: str,
        watch: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[int, Result | WorkerDied]]:
        """Has each task done by a worker, in any order, one at a time in a worker.

        Close what is returned (``contextlib.closing``) where it is not read to its end: what is at work is then given
        up, and :func:`abandoned` tells the tasks so.

        Args:
            function: A module's function; it and the tasks must be picklable.
            tasks: What to do. A task may be done twice, where a worker only seemed to be lost. Relative paths are
                relative to the folder in which this process is.
            unit: Name of one task, for messages.
            watch: Called about once a second while nothing ends.

        Yields:
            Position and result; of a task that kills the workers that take it, a :class:`WorkerDied`.

        Raises:
            UserError: A worker does not see the folder or has other versions, the scheduler is gone, all workers are
                and none comes, or many tasks killed those that took them.
            Exception: Whatever a task raised.
        """
        given = killers = 0
        at_work: dict[Any, int] = {}
        finished: queue.SimpleQueue = queue.SimpleQueue()
        try:
            while given < len(tasks) or at_work:
                names = ", ".join(str(getattr(tasks[index], "name", index)) for index in at_work.values())
                remedy = (
                    f"at work was {unit} {names}; every other one that was finished is kept: start workers and run the "
                    "same command again"
                )
                self._look(remedy)
                # No more than are done at once: what waited behind a task that kills its worker would be blamed, too.
                while given < len(tasks) and len(at_work) < self.num_workers:
                    call = _call(_run_task, self._expected, function, tasks[given])
                    future = self._client.submit(*call, key=f"mer_jax-{uuid.uuid4().hex}", pure=False)
                    at_work[future] = given
                    future.add_done_callback(finished.put)
                    given += 1
                try:
                    future = finished.get(timeout=_TICK_SECONDS)
                except queue.Empty:
                    watch()
                    continue
                index, result = at_work.pop(future), self._result(future, remedy)
                killers += isinstance(result, WorkerDied)
                if killers > _MOST_KILLERS:
                    raise WorkerDied(
                        f"{killers} {unit}s killed all workers that took them, the last one: {result}; every finished "
                        f"{unit} is kept: give workers more memory, and run the same command again"
                    )
                yield index, result
        finally:
            if self._client.status == "running":
                self._client.cancel(list(at_work), force=True)

    def require(self, paths: Iterable[str | os.PathLike]) -> None:
        """Refuses a cluster in which a worker does not see files that this process sees.

        Raises:
            UserError: It names the machine and the file.
        """
        self._ask(_unseen, self._expected, tuple(map(str, paths)))

    def await_files(self, paths: Iterable[Path]) -> None:
        """Waits until this machine sees files that workers have written; network file systems take their time.

        Raises:
            UserError: It does not come to see them.
        """
        paths, deadline = list(paths), time.monotonic() + _SEEN_SECONDS
        while missing := [path for path in paths if not path.exists()]:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{missing[0]}: written by a worker and not seen here; is its folder the same on all machines? Run "
                    "the same command again"
                )
            for folder in {path.parent for path in missing}:  # which has the file system look again
                with contextlib.suppress(OSError):
                    os.listdir(folder)
            time.sleep(0.2)

    @property
    def num_workers(self) -> int:
        """How many there are now."""
        return len(self._present)

    def workers_per_machine(self) -> int:
        """The largest number of workers that share a machine now."""
        hosts = list(self._ask(_examine, self._expected).values())
        return max(map(hosts.count, hosts), default=1)

    def check(self) -> None:
        """Waits for a worker, and refuses those that cannot do what this process could.

        Raises:
            UserError: There is no worker, or one does not see the folder, has other versions or several threads.
        """
        while not self.num_workers:
            self._look("start workers and run the same command again")
            time.sleep(0 if self.num_workers else _TICK_SECONDS)
        self._ask(_examine, self._expected)

    def _look(self, remedy: str) -> None:
        """Looks who is there, about once a second; tells who has gone, and waits only for a while where all have."""
        now = time.monotonic()
        if self._present and now - self._looked_at < _TICK_SECONDS:
            return
        try:
            workers: Mapping[str, int] = self._client.nthreads()
        except (OSError, RuntimeError, AttributeError) as error:  # the last: the client has closed itself
            raise self._scheduler_gone() from error
        gone = sorted(self._present - set(workers))
        if gone:
            named = f"{', '.join(gone[:_MAX_NAMED])}{', ...' if len(gone) > _MAX_NAMED else ''}"
            which = "a worker has gone" if len(gone) == 1 else f"{len(gone)} workers have gone"
            _say(f"{which} ({named}); what was at work there is done again")
        self._present, self._looked_at = set(workers), now
        for address, threads in workers.items():
            if threads != 1:
                raise UserError(
                    f"worker {address}: has {threads} threads; start workers with --nthreads 1, and as many of them as "
                    "shall work at once with --nworkers"
                )
        if workers:
            self._lonely_since = None
        elif self._lonely_since is None:
            self._lonely_since = now
            _say(f"waiting up to {WAIT_SECONDS:.0f} s for a worker at {self.address}")
        elif now - self._lonely_since > WAIT_SECONDS:
            raise UserError(f"{self.address}: no worker for {WAIT_SECONDS:.0f} s; {remedy}")

    def _ask(self, question: Callable[..., tuple[str, str]], *arguments: Any) -> dict[str, str]:
        """Worker to its machine; refuses a worker that answers with a problem."""
        hosts = {}
        try:
            answers = self._client.run(*_call(question, *arguments), on_error="return")
        except (OSError, RuntimeError, AttributeError) as error:  # Dask forgets a scheduler that is gone for long
            raise self._scheduler_gone() from error
        for address, answer in answers.items():
            if isinstance(answer, ImportError | AttributeError):  # none, or an old one
                raise _not_installed(address, answer) from answer
            if isinstance(answer, OSError):
                continue  # gone meanwhile
            if isinstance(answer, Exception):
                raise answer
            host, problem = answer
            if problem:
                raise UserError(f"worker {address} on {host}: {problem}")
            hosts[address] = host
        return hosts

    def _result(self, future: Any, remedy: str) -> Any:
        from distributed import CancelledError, KilledWorker

        try:
            while True:
                try:
                    result, problem = future.result(timeout=_TICK_SECONDS)
                    break
                except TimeoutError:
                    if future.status == "error":
                        raise  # the task's own
                    self._look(remedy)  # the worker went before it gave the result away, and another does it again
        except KilledWorker as error:
            return WorkerDied(
                f"{error.allowed_failures + 1} workers died of it, the last at {error.last_worker.address} (often: out "
                "of memory; their logs tell)"
            )
        except CancelledError as error:
            raise self._scheduler_gone() from error
        except ImportError as error:
            if (error.name or "").partition(".")[0] in _PACKAGES:
                raise _not_installed("that came during the work", error) from error
            raise
        finally:
            # Not left to __del__: it takes its time, and an interrupt that comes there is lost.
            future.release()
        if problem:
            raise UserError(problem)
        return result

    def _scheduler_gone(self) -> UserError:
        return UserError(
            f"{self.address}: the scheduler is gone; what was finished is kept: start it and workers, and run the same "
            "command again"
        )


@contextlib.contextmanager
def connect(address: str, folder: str | os.PathLike) -> Iterator[Cluster]:
    """Connects to a running scheduler and waits for its first worker.

    Args:
        address: ``tcp://host:8786``, or the file that the scheduler wrote for its ``--scheduler-file``.
        folder: What all machines share; made if it is missing.

    Yields:
        The cluster, whose workers were found to see the folder and to have this process's versions. Those that come
        later are looked at with their first task.

    Raises:
        UserError: ``distributed`` is not installed, the scheduler is not reached, there is no worker, or there is one
            that does not see the folder or has other versions.
    """
    try:
        import dask
        import distributed
    except ImportError as error:
        raise UserError(
            f"--cluster {address}: needs Dask's distributed ({error}); install it with 'pip install -r "
            "requirements-cluster.txt', here and on the workers' machines"
        ) from error
    # A share of a large data set is a long list of files.
    no_warning = dask.config.set({"distributed.admin.large-graph-warning-threshold": "1GB"})
    with _quiet(), no_warning, _client(distributed, address) as client, _token(Path(folder)) as token:
        cluster = Cluster(client, address, _Expected(str(token), os.getcwd(), _versions()))
        cluster.check()
        yield cluster


def abandoned() -> bool:
    """Whether the task that calls this, in a worker, is no longer wanted: who asked for it has gone or given up."""
    from distributed import get_worker

    worker = get_worker()
    state = worker.state.tasks.get(worker.get_current_task())
    return state is None or state.state != "executing"


@dataclass(frozen=True)
class _Expected:
    """What a worker must find as the process that asks it finds it.

    Attributes:
        token: A file whose content is its name.
        cwd: Where relative paths begin.
        versions: Of what the results depend on.
    """

    token: str
    cwd: str
    versions: tuple[tuple[str, str], ...]


_PACKAGES = ("mer_jax", "data_builders")
_CALL = "(lambda function, arguments: function(*arguments))(*__import__('pickle').loads(packed))"


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    found = {"Python": ".".join(platform.python_version_tuple()[:2]), "mer_jax": mer_jax.__version__}
    for name in (*LIBRARIES, "distributed"):
        # Another build of the same library goes by another name.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    # A clone that was not brought up to date has the same version.
    digest = hashlib.sha256()
    root = Path(mer_jax.__file__).resolve().parent.parent
    for path in sorted(path for package in _PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return (*found.items(), ("the code of mer_jax", digest.hexdigest()[:12]))


@functools.lru_cache(maxsize=1)
def _examine(expected: _Expected) -> tuple[str, str]:
    """In a worker: the machine's name, and what is wrong with this worker, '' if nothing is."""
    host = socket.gethostname()
    with contextlib.suppress(OSError):  # the folder below tells whether it matters
        os.chdir(expected.cwd)
    token = Path(expected.token)
    try:
        seen = token.read_text() == token.name
    except OSError:
        seen = False
    if not seen:
        return host, (
            f"does not see {token.parent} of the machine that asks; put it on a file system that all machines share, "
            "or name it by the path that all of them know"
        )
    ours = dict(_versions())
    differences = [
        f"{name} {ours.get(name, 'absent')} instead of {version}"
        for name, version in expected.versions
        if ours.get(name) != version
    ]
    if differences:
        return host, f"has {', '.join(differences)}; install the same on all machines, and start the workers again"
    _keep_memory()
    return host, ""


def _keep_memory() -> None:
    """Lets glibc keep the memory of arrays for the next ones, as it does by itself.

    Dask's nanny starts workers so that it gives all back at once, and clips then take 1.6 times as long.
    """
    trim_threshold, mmap_threshold = -1, -3  # as <malloc.h> numbers them
    with contextlib.suppress(AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 2**25)
        libc.mallopt(trim_threshold, 2**26)


def _unseen(expected: _Expected, paths: Sequence[str]) -> tuple[str, str]:
    """In a worker: the machine's name, and which files it does not see, '' if all are there."""
    host, problem = _examine(expected)  # which also takes a worker that has just come to the right folder
    if problem:
        return host, problem
    unseen = [path for path in paths if not os.path.exists(path)]
    problem = f"does not see {unseen[0]}; put it on a file system that all machines share" if unseen else ""
    return host, problem


def _run_task(expected: _Expected, function: Callable[[Task], Result], task: Task) -> tuple[Result | None, str]:
    """In a worker: the result of a task, or what is wrong with the worker."""
    host, problem = _examine(expected)
    if problem:
        return None, f"worker process {os.getpid()} on {host}: {problem}"
    return function(task), ""


def _call(function: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
    """A function and its arguments that any worker can read, which call what may not be there, or not the same.

    Dask's own way to send a function ends a worker that cannot import it.
    """
    return eval, _CALL, {"packed": pickle.dumps((function, arguments))}


def _not_installed(worker: str, error: Exception) -> UserError:
    return UserError(
        f"worker {worker}: cannot import this mer_jax ({error}); start it where mer_jax is installed, "
        "or with 'python -m dask worker' in the folder of the clone"
    )


def _say(line: str) -> None:
    if sys.stderr.isatty():
        tqdm.write(line, file=sys.stderr)  # above a progress bar, where there is one
    else:
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _client(distributed: Any, address: str) -> Iterator[Any]:
    where = {"address": address}
    if not address.startswith(("tcp://", "tls://")) and (address.endswith(".json") or os.path.exists(address)):
        if not os.path.isfile(address):
            raise UserError(f"--cluster {address}: no such file; start the scheduler with --scheduler-file {address}")
        where = {"scheduler_file": address}
    try:
        # Which versions must agree is looked at here, and told in one line.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", distributed.versions.VersionMismatchWarning)
            client = distributed.Client(**where, timeout=CONNECT_SECONDS, set_as_default=False, name="mer_jax")
    except (OSError, ImportError, ValueError, TypeError, RuntimeError, AssertionError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"--cluster {address}: no scheduler answers there ({reason}); start one with 'python -m dask scheduler', "
            "and name the address that it tells"
        ) from error
    try:
        yield client
    finally:
        # Nobody is interested any more in what does not close in time.
        with contextlib.suppress(OSError, RuntimeError):
            client.close(timeout=CONNECT_SECONDS)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences Dask's own words about this process: what a user must know is told here, in one line each."""
    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith("distrib")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _token(folder: Path) -> Iterator[Path]:
    """A file that is there while this process lives, by which workers can show that they see the folder."""
    token = folder / f"{_TOKEN}{uuid.uuid4().hex}"
    made = folder / f"{token.name}.tmp"
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_stale_tokens(folder)
            stream = stack.enter_context(open(made, "x"))
            stream.write(token.name)
            stream.flush()
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(stream, fcntl.LOCK_EX)
            os.rename(made, token)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
        stack.callback(token.unlink, missing_ok=True)
        yield token


def _remove_stale_tokens(folder: Path) -> None:
    """Removes the tokens of processes that were killed, which hold no lock any more."""
    for path in folder.glob(f"{_TOKEN}*"):
        with contextlib.suppress(OSError), open(path, "r+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
