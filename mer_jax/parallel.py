"""Work on many independent tasks in several processes, or on a cluster, without losing any of it.

What a user may do to a run is expected here: Ctrl-C and SIGTERM let the tasks at work finish and then stop;
kill -9 leaves no process behind; a worker that dies (out of memory, a crash in native code) is an error at
once, not a hang.
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from mer_jax.cluster import Cluster
from mer_jax.errors import UserError, WorkerDied
from mer_jax.progress import progress

Task = TypeVar("Task")
Result = TypeVar("Result")
Workers = int | Cluster | None  # who does the work: so many processes, a cluster, or a process per processor


def available_processors() -> int:
    """Number of processors that this process may use."""
    # Only Linux knows what a process may use; elsewhere it is all there are.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def local_workers(workers: Workers) -> int | None:
    """The number of processes for what this machine does alone, whoever does the rest."""
    return None if isinstance(workers, Cluster) else workers


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    workers: Workers = None,
    desc: str,
    unit: str,
) -> list[Result | UserError]:
    """Maps a function over independent tasks in fresh ('spawn') processes, with progress and ETA.

    Args:
        function: A module's function; it and the tasks must be picklable. It keeps its own results on disk
            where they should survive an interruption.
        tasks: What to do.
        workers: Number of processes, one per available processor unless given; with 1 no process is started. Or the
            cluster whose workers do it, see :mod:`mer_jax.cluster`.
        desc: What is being done, for the progress line.
        unit: Name of one task, for the progress line.

    Returns:
        One result per task, in order; for a task that raised a :class:`UserError`, that error.

    Raises:
        UserError: A worker process died. A cluster's may: others do what it did, and the error of a task that kills
            all who take it stands in its place.
        KeyboardInterrupt: Ctrl-C, or SIGTERM in the main thread; tasks at work were finished before, other than on a
            cluster.
        Exception: Whatever else a task raised, after the tasks at work were finished.
    """
    results: list[Result | UserError] = [None] * len(tasks)
    with (
        interruptible(),
        progress(total=len(tasks), desc=desc, unit=unit) as bar,
        contextlib.closing(_done(function, tasks, workers, unit)) as done,
    ):
        for index, result in done:
            results[index] = result
            bar.update(1)
    return results


def stream_tasks(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    workers: int | None = None,
    ahead: int = 2,
    unit: str,
) -> Iterator[Result | UserError]:
    """Maps a function over independent tasks as :func:`run_tasks` does, for results that are too large to keep.

    Close what is returned (``contextlib.closing``) where it is not read to its end, so that no process stays behind.

    Args:
        function: A module's function; it and the tasks must be picklable.
        tasks: What to do.
        workers: Number of processes; one per available processor unless given. With 1 no process is started.
        ahead: How many tasks per process may be at work or finished beyond the result that is being used.
        unit: Name of one task, for messages.

    Yields:
        One result per task, in order; for a task that raised a :class:`UserError`, that error.

    Raises:
        UserError: A worker process died.
        KeyboardInterrupt: Ctrl-C, or SIGTERM in the main thread.
        Exception: Whatever else a task raised.
    """
    workers = max(1, min(workers or available_processors(), len(tasks)))
    with interruptible():
        if workers == 1:
            yield from (result for _, result in _here(function, tasks))
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
            left = iter(tasks)
            futures = deque(pool.submit(guarded, function, task) for task in itertools.islice(left, workers * ahead))
            try:
                while futures:
                    result = futures.popleft().result()
                    futures.extend(pool.submit(guarded, function, task) for task in itertools.islice(left, 1))
                    yield result
            except BrokenProcessPool as error:
                raise _worker_died(workers, unit) from error
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def guarded(function: Callable[[Task], Result], task: Task) -> Result | UserError:
    """The result of a task, or the :class:`UserError` that it raised."""
    try:
        return function(task)
    except UserError as error:
        # The chain behind it may hold what cannot be pickled.
        return type(error)(str(error))


def _done(function, tasks, workers: Workers, unit: str) -> Iterator[tuple[int, object]]:
    """Positions and results, as they come."""
    if isinstance(workers, Cluster):
        return workers.map(functools.partial(guarded, function), tasks, unit=unit)
    workers = max(1, min(workers or available_processors(), len(tasks)))
    return _here(function, tasks) if workers == 1 else _in_processes(function, tasks, workers, unit)


def _here(function, tasks) -> Iterator[tuple[int, object]]:
    for index, task in enumerate(tasks):
        yield index, guarded(function, task)


def _in_processes(function, tasks, workers: int, unit: str) -> Iterator[tuple[int, object]]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        futures = {pool.submit(guarded, function, task): index for index, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise _worker_died(workers, unit) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _worker_died(workers: int, unit: str) -> WorkerDied:
    return WorkerDied(
        f"a worker process died (often: out of memory); every finished {unit} is kept: run the same "
        f"command again, with fewer than {workers} workers"
    )


def _start_worker() -> None:
    # Ctrl-C reaches the whole process group; the parent alone decides what stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Lets SIGTERM end the work as Ctrl-C does; only the main thread may handle signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_unused):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
