"""``scripts/build_data.py`` as a user opens it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
DOOR = REPOSITORY / "scripts" / "build_data.py"


def run(*arguments, cwd=REPOSITORY, python=()):
    return subprocess.run(
        [sys.executable, *python, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "XLA_FLAGS": ""},
    )


def test_demo_is_built_found_again_and_read_without_tensorflow(tmp_path):
    """From a foreign folder, without installation; the door's own process never imports TensorFlow."""
    program = (
        f"import runpy, sys\nsys.argv = [{str(DOOR)!r}, '--dataset', 'four_dme/demo', '--demo_clips', '1', "
        "'1', '--workers', '1',\n            '--extractors', 'hog']\ntry:\n    "
        f"runpy.run_path({str(DOOR)!r}, run_name='__main__')\nexcept SystemExit as done:\n    assert "
        "done.code == 0, done.code\nimport tensorflow_datasets as tfds\ntrain = "
        "tfds.builder_from_directory('data/four_dme/demo/1.0.0').as_data_source()['train']\n"
        "print(len(train), sorted(train[0]['features']), 'tensorflow' in sys.modules)\n"
    )
    done = run("-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["data/four_dme/demo/1.0.0", "2 ['hog'] False"]
    assert "Traceback" not in done.stderr and "rror" not in done.stderr
    again = run(DOOR, "--dataset", "four_dme/demo", "--demo_clips", 1, 1, "--extractors", "hog", cwd=tmp_path)
    assert (again.returncode, again.stdout, again.stderr) == (0, "data/four_dme/demo/1.0.0\n", "")


def test_help_is_quick_to_load():
    loaded = run("-X", "importtime", DOOR, "--help")
    assert loaded.returncode == 0 and "--dataset" in loaded.stdout
    for heavy in ("mediapipe", "tensorflow_datasets", "transformers", "matplotlib", "sklearn", "jax"):
        assert f" {heavy}\n" not in loaded.stderr, heavy


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["four_dme"], "--dataset four_dme: unknown; there are four_dme/demo, four_dme/challenge"),
        (["four_dme/x"], "config 'four_dme/x' is unknown"),
        (["four_dme/challenge"], "four_dme/challenge is not built yet: say with --source"),
        (["four_dme/demo", "--crop", "sizes=3"], "--crop sizes=3: no such field; there are scale, square, size"),
        (["four_dme/demo", "--crop", "square=maybe"], "--crop square=maybe: a value like True is expected"),
        (["four_dme/demo", "--crop", "fallback=left"], "'left' is unknown"),
        (["four_dme/demo", "--crop", "size"], "--crop size: write it as NAME=VALUE"),
        (["four_dme/demo", "--crop", "size=3", "size=4"], "--crop size=4: size is given twice"),
        (["four_dme/demo", "--extractors", "hogg"], "extractor 'hogg' is unknown; there are hog, facemesh"),
        (["four_dme/demo", "--features", "radio=absent"], "absent: no such folder of features"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, arguments, message):
    dataset, *others = arguments
    done = run(DOOR, "--dataset", dataset, "--data_dir", tmp_path, "--demo_clips", 1, 1, *others)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last and done.stdout == ""
    assert "Traceback" not in done.stderr


def test_an_unreadable_frame_is_named_and_the_rest_is_kept(tmp_path):
    clip = tmp_path / "4dmr" / "train" / "3"
    clip.mkdir(parents=True)
    for index in range(3):
        Image.fromarray(np.full((60, 120, 3), 40 * index, np.uint8)).save(clip / f"{index}.png")
    (clip / "1.png").write_bytes(b"no image")
    (tmp_path / "4dmr" / "train.csv").write_text("Id,Negative,Positive,Repression,Surprise,Others\n3,1,0,0,0,0\n")
    command = (DOOR, "--dataset", "four_dme/challenge", "--source", tmp_path / "4dmr", "--data_dir",
               tmp_path / "data", "--crop", "size=64", "--workers", 1)  # fmt: skip
    done = run(*command)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: 1 of 1 clips cannot be prepared (clip 3: ") and "1.png" in last
    Image.fromarray(np.full((60, 120, 3), 40, np.uint8)).save(clip / "1.png")
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "note: no face was found in the first frame of 2 samples" in done.stderr
