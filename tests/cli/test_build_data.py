"""``scripts/build_data.py`` as a user opens it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_builders.command_line import main
from mer_jax.cli import open_door

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


def test_flow_of_the_demo_is_built_as_asked_for_and_found_again(tmp_path):
    command = (DOOR, "--dataset", "four_dme_flow/demo", "--demo_clips", 1, 1, "--workers", 1, "--crop", "size=48",
               "--apex", "blink=0", "smooth=0", "--flow", "gaussian_window=true", "winsize=9")  # fmt: skip
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (target,) = (tmp_path / "data" / "four_dme_flow").glob("demo-*/1.0.0")
    assert done.stdout == f"{target.relative_to(tmp_path)}\n"
    settings = json.loads((target / "metadata.json").read_text())["settings"]
    assert settings["crop"]["size"] == 48 and settings["crop"]["rule"] == "largest"
    assert settings["apex"] == {"use_annotated": True, "compensate": "rigid", "blink": 0, "smooth": 0.0}
    assert settings["flow"]["gaussian_window"] and settings["flow"]["winsize"] == 9 and settings["flow"]["levels"] == 3
    again = run(*command, cwd=tmp_path)
    assert (again.returncode, again.stdout, again.stderr) == (0, done.stdout, "")


def test_help_is_quick_to_load():
    loaded = run("-X", "importtime", DOOR, "--help")
    assert loaded.returncode == 0 and "--dataset" in loaded.stdout
    for dataset in ("four_dme/demo", "four_dme_flow/challenge", "megc2019/raw"):
        assert f"\n  {dataset} " in loaded.stdout
    for heavy in (
        "mediapipe",
        "tensorflow_datasets",
        "transformers",
        "matplotlib",
        "scipy",
        "sklearn",
        "jax",
        "openpyxl",
    ):
        assert f" {heavy}\n" not in loaded.stderr, heavy


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["four_dme"], "--dataset four_dme: unknown; there are four_dme/demo, four_dme/challenge"),
        (["four_dme/x"], "--dataset four_dme/x: unknown; there are four_dme/demo"),
        (["megc2019"], "four_dme_flow/release, megc2019/folder, megc2019/raw, megc2019/demo"),
        (["four_dme/challenge"], "four_dme/challenge is not built yet: say with --source"),
        (["four_dme/demo", "--crop", "sizes=3"], "--crop sizes=3: no such field; there are scale, square, size"),
        (["four_dme/demo", "--crop", "square=maybe"], "--crop square=maybe: a value like True is expected"),
        (["four_dme/demo", "--crop", "fallback=left"], "'left' is unknown"),
        (["four_dme/demo", "--crop", "size"], "--crop size: write it as NAME=VALUE"),
        (["four_dme/demo", "--crop", "size=3", "size=4"], "--crop size=4: size is given twice"),
        (["four_dme/demo", "--extractors", "hogg"], "extractor 'hogg' is unknown; there are hog, facemesh"),
        (["four_dme/demo", "--features", "radio=absent"], "absent: no such folder of features"),
        (["four_dme/demo", "--source", "x"], "--source: not used by four_dme/demo, which takes --seed --demo_clips"),
        (["four_dme/demo", "--flow", "levels=1"], "--flow: not used by four_dme/demo"),
        (["four_dme/challenge", "--demo_clips", "1", "1"], "--demo_clips: not used by four_dme/challenge"),
        (
            ["four_dme_flow/challenge"],
            "four_dme_flow/challenge is not built yet with these settings: say with --source",
        ),
        (["four_dme_flow/challenge", "--workbook", "x"], "--workbook: not used by four_dme_flow/challenge"),
        (["four_dme_flow/demo", "--extractors", "hog"], "--extractors: not used by four_dme_flow/demo"),
        (["four_dme_flow/demo", "--apex", "blink=1.5"], "--apex blink=1.5: a value like 7 is expected"),
        (["four_dme_flow/demo", "--apex", "smooth=-1"], "apex smooth -1.0: must be a number of frames of at least 0"),
        (
            ["four_dme_flow/demo", "--apex", "mean=1"],
            "no such field; there are use_annotated, compensate, blink, smooth",
        ),
        (["four_dme_flow/demo", "--flow", "method=dis"], "flow method 'dis' is unknown; choose one of farneback, tvl1"),
        (["four_dme_flow/demo", "--crop", "whole"], "--crop whole: write it as NAME=VALUE"),
        (["four_dme_flow/demo", "--store", "flow"], "--store: not used by four_dme_flow/demo"),
        (["four_dme_flow/demo", "--demo_clips", "0", "1"], "at least one training and one test clip are needed"),
        (["megc2019/folder"], "megc2019/folder is not built yet: say with --source where its images are"),
        (
            ["megc2019/folder", "--apex", "blink=0"],
            "--apex: not used by megc2019/folder, which takes --source --labels; leave",
        ),
        (["megc2019/folder", "--source", "x"], "x: no such folder of flow images"),
        (["megc2019/raw", "--apex", "middle"], "--apex middle: write it as NAME=VALUE"),
        (["megc2019/raw", "--labels", "x"], "--labels: not used by megc2019/raw"),
        (["megc2019/raw", "--crop", "whole", "size=4"], "--crop whole: write it as NAME=VALUE"),
        (["megc2019/raw", "--size", "0", "--smic", "x"], "size 0: must be at least 1"),
        (["megc2019/raw", "--smic", "x"], "x: is no folder that can be read"),
        (
            ["megc2019/demo", "--size", "14"],
            "--size: not used by megc2019/demo, which takes --seed --demo_clips; leave",
        ),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        open_door(main, ["--dataset", *arguments])
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert ended.value.code == 2 and line.startswith("error: ") and message in line and told.out == ""
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"]


def test_a_wrong_argument_ends_the_door(tmp_path):
    done = run(DOOR, "--dataset", "megc2019/demo", "--crop", "size=3", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("error: --crop: not used by megc2019/demo, which takes --seed --demo_clips; leave it out\n")
    assert not list(tmp_path.iterdir())


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
