"""How doors fail."""

import subprocess
import sys
from pathlib import Path

import pytest

from mer_jax.cli import open_door
from mer_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def test_a_user_error_is_one_line_and_status_two(capsys):
    def main():
        raise UserError("clips/7: no frames; add some")

    with pytest.raises(SystemExit) as ended:
        open_door(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: clips/7: no frames; add some\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    code = "from mer_jax.cli import open_door\nopen_door(lambda: print('x\\n' * 10**6))"
    door = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert door.stdout.readline() == "x\n"
    door.stdout.close()
    assert door.stderr.read() == ""
    door.stderr.close()
    assert door.wait() == 0
