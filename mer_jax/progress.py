"""Progress with an ETA: a bar on a terminal, a line now and then in a log file."""

import contextlib
import sys
import time
from collections.abc import Iterable

from tqdm import tqdm

LOG_INTERVAL_SECONDS = 10.0


def progress(iterable: Iterable | None = None, *, total: int | None = None, desc: str = "", unit: str = "it") -> tqdm:
    """A ``tqdm`` that suits where it is printed.

    Args:
        iterable: What to count while iterating, or None to call ``update(n)`` by hand.
        total: Number of units, where ``iterable`` has no length.
        desc: What is being done, in a few words.
        unit: Name of one unit.

    Returns:
        A ``tqdm``: iterable, a context manager, with ``update`` and ``set_postfix_str``.
    """
    return (tqdm if sys.stderr.isatty() else _LineProgress)(
        iterable, total=total, desc=desc, unit=unit, dynamic_ncols=True, file=sys.stderr
    )


def skip(shown: "tqdm | Silent", count: int) -> None:
    """Counts units that were done before and say nothing about the speed."""
    shown.n += count
    shown.initial += count
    if isinstance(shown, tqdm):
        shown.last_print_n += count  # what came since is taken for speed
        shown.refresh()


class _LineProgress(tqdm):
    """A ``tqdm`` that prints whole lines, at most one every ten seconds and one at the end."""

    monitor_interval = 0

    def __init__(self, *args, **kwargs):
        self._last_line = time.monotonic()
        self._last_count = -1
        super().__init__(*args, **{**kwargs, "mininterval": LOG_INTERVAL_SECONDS, "miniters": 1})

    def display(self, msg=None, pos=None):
        del pos
        finished = self.total is not None and self.n >= self.total
        now = time.monotonic()
        if self.n == self._last_count or (not finished and now - self._last_line < LOG_INTERVAL_SECONDS):
            return
        self._last_line, self._last_count = now, self.n
        line = msg or self.format_meter(**{**self.format_dict, "ncols": None, "bar_format": _LINE})
        with contextlib.suppress(OSError):  # a log file on a full disk must not end the work
            self.fp.write(line + "\n")
            self.fp.flush()

    def close(self):
        if not self.disable:
            self.disable = True
            self.display()
            self._decr_instances(self)


_LINE = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed} elapsed, {remaining} to go, {rate_fmt}] {postfix}"


class Silent:
    """Counts as a progress does and prints nothing: for a process whose work another one shows.

    Attributes:
        n: Units done.
        initial: Those of them that were done before.
    """

    def __init__(self, **ignored):
        self.n = self.initial = 0

    def update(self, count: int) -> None:
        """Adds ``count`` units."""
        self.n += count

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *ignored) -> None:
        pass
