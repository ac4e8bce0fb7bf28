"""Progress in a log file."""

import re
import time

from mer_jax import progress as progress_module
from mer_jax.progress import Silent, progress, skip


def test_what_was_done_before_is_not_taken_for_speed(monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "LOG_INTERVAL_SECONDS", 0.0)
    with progress(total=1_000_003, desc="training", unit="epochs") as shown:
        skip(shown, 1_000_000)
        for _ in range(3):
            time.sleep(0.05)
            shown.update(1)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "1000003/1000003" in last and 1 < float(re.search(r"([\d.]+)epochs/s", last)[1]) < 21


def test_a_silent_one_counts_the_same():
    shown = Silent()
    skip(shown, 5)
    shown.update(2)
    assert (shown.n, shown.initial) == (7, 5)
