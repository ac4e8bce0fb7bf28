"""The composite through ``scripts/build_data.py``, as a user builds it."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds


@pytest.fixture
def door(repository, tmp_path):
    """Opens the door in ``tmp_path`` and returns the folder of the data set and what was told, or the one error."""

    def build(dataset, *flags, status=0):
        done = subprocess.run(
            [sys.executable, str(repository / "scripts" / "build_data.py"), "--dataset", dataset, *map(str, flags)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == status, done.stderr
        (line,) = (done.stderr if status else done.stdout).splitlines()
        if status:
            return line
        return tmp_path / line, done.stderr

    return build


def test_flow_images(few, door):
    folder, told = door("megc2019/folder", "--source", few.folder, "--labels", few.table)
    assert folder.parts[-2].startswith("folder-")
    assert len(tfds.builder_from_directory(folder).as_data_source("train")) == 12
    assert all(line.startswith("note: ") for line in told.splitlines()) and "the composite has" in told
    assert door("megc2019/folder") == (folder, "")


def test_raw_frames_as_asked_for(raw, door):
    folder, told = door(
        "megc2019/raw", "--casme2", raw.casme2, "--casme2_sheet", raw.casme2_sheet, "--smic", raw.smic,
        "--crop", "whole", "--apex", "compensate=none", "blink=0", "--flow", "method=farneback", "--size", 14,
        "--store", "flow", "--workers", 1,
    )  # fmt: skip
    settings = json.loads((folder / "metadata.json").read_text())["settings"]
    assert settings["crop"] == "whole" and settings["size"] == 14 and settings["store"] == "flow"
    assert settings["flow"]["method"] == "farneback" and settings["apex"]["compensate"] == "none"
    records = tfds.builder_from_directory(folder).as_data_source("train")
    assert len(records) == 6 and records[0]["flow"]["onset_apex"].shape == (14, 14, 2)
    assert "note: smic: has no annotated apex, so that it was found by motion in all 3 clips" in told
    whole, _ = door("megc2019/raw", "--source", raw.root, "--crop", "size=40", "rule=largest", "--flow", "warps=1",
                    "--apex", "half_way")  # fmt: skip
    settings = json.loads((whole / "metadata.json").read_text())["settings"]
    assert settings["crop"]["size"] == 40 and settings["crop"]["rule"] == "largest"
    assert settings["flow"]["method"] == "tvl1" and settings["flow"]["warps"] == 1 and settings["apex"] == "half_way"


def test_demo(door, tmp_path):
    folder, told = door("megc2019/demo", "--demo_clips", 3, 1, "--seed", 3, "--workers", 1)
    assert all(line.startswith(("demo clips: ", "computing flow of demo clips: ")) for line in told.splitlines())
    records = tfds.builder_from_directory(folder).as_data_source("train")
    assert records[0]["flow"]["onset_apex"].shape == (28, 28, 3) and np.ptp(records[0]["flow"]["onset_apex"]) == 255
    manifest = json.loads((tmp_path / "data" / "clips" / "megc2019_demo" / "demo.json").read_text())
    assert manifest["seed"] == 3 and manifest["demo_clips"] == [3, 1]


def test_bad_flow_images_through_the_door(few, door, made, tmp_path):
    """A subject without images is told and left out; an image of another size ends the door."""
    for path in few.folder.glob("sub01*"):
        path.unlink()
    folder, told = door("megc2019/folder", "--source", few.folder)
    assert (
        "note: 1 whole subject missing, left out of the data and of the folds: sub01 of casme2 (2 clips)"
        in told.splitlines()
    )
    assert len(tfds.builder_from_directory(folder).as_data_source("train")) == 10
    bad = next(few.folder.glob("006*"))
    made.save(made.image_of("another", size=32), bad)
    shutil.rmtree(folder)
    error = door("megc2019/folder", "--source", few.folder, status=2)
    assert error.startswith(f"error: {bad}: is 32 x 32 pixels while 9 images are 28 x 28; all must have one size")
    assert not list((tmp_path / "data" / "megc2019").rglob("metadata.json"))
