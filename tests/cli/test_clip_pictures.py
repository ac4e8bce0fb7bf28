"""Pictures of clips through the doors: asked for, taken away again, drawn one by one, and refused in one line."""

import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import mer_jax.study.train as train_module
from mer_jax.errors import UserError
from mer_jax.report.clip_pictures import picture_of_clip
from mer_jax.report.html import write_report
from mer_jax.study.results import StudyResults
from mer_jax.study.shown import FILENAME, choose_clips, load_shown


def config_of(challenge, pictures, data_dir=None):
    """As much of the study's config as its pictures need."""
    data = {
        "dataset": "four_dme/challenge", "data_dir": str(data_dir or challenge.root / "data"), "num_frames": 4,
        "modalities": {"appearance": {"extractor": "look"}, "geometry": {"extractor": "shape"}},
    }  # fmt: skip
    return ConfigDict({"data": data, "report": {"pictures": pictures}})


def test_a_finished_study_gets_pictures_and_loses_them(challenge, copy, train, capsys):
    assert not (copy / FILENAME).exists() and "attention" not in {path.name for path in copy.iterdir()}
    before = (copy / "predictions.npz").read_bytes()
    done = train(challenge.overrides | {"report.pictures": "always"}, str(copy)).end()
    assert done.status == 0, done.stderr
    assert "warning" not in done.stderr and (copy / "predictions.npz").read_bytes() == before
    results = StudyResults.load(copy)
    chosen = [str(results.clip_name[clip]) for clip in choose_clips(results)]
    shown = load_shown(copy)
    assert [clip.clip for clip in shown] == chosen and {clip.view for clip in shown} == {"l"}
    assert shown[0].crops.shape == (4, 160, 160, 3) and shown[0].sampled.tolist() == [0, 1, 2, 3]
    assert {path.stem for path in (copy / "attention").iterdir()} == {f"{name}_l" for name in chosen}
    page = (copy / "report.html").read_text()
    assert page.count("data:image/png") == len(chosen) and "chosen for Negative" in page

    train_module._show_clips(config_of(challenge, "demo"), copy)  # these clips are no demo
    assert not (copy / FILENAME).exists()
    assert "data:image/png" not in write_report(copy).read_text() and not (copy / "attention").exists()


def test_without_the_frames_the_study_ends_all_the_same(challenge, finished, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished / "predictions.npz", run)
    train_module._show_clips(config_of(challenge, "always", tmp_path / "elsewhere"), run)
    told = capsys.readouterr().err
    assert told.startswith("warning: no pictures of clips could be made, there are none in the report: ")
    assert "the data set is not there; say with config.data.data_dir where it is" in told and told.count("\n") == 1
    train_module._show_clips(config_of(challenge, "always"), run)
    kept = (run / FILENAME).read_bytes()
    assert capsys.readouterr().err == ""
    train_module._show_clips(config_of(challenge, "always", tmp_path / "elsewhere"), run)
    assert "those of before are kept" in capsys.readouterr().err and (run / FILENAME).read_bytes() == kept
    train_module._show_clips(config_of(challenge, "always"), run)
    assert (run / FILENAME).read_bytes() == kept


def test_one_clip_is_drawn(finished, door, tmp_path):
    arguments = ("--clip", "clip_3_r", "--member", "fold0-seed0", "--picture", "out/clip.png")
    results = StudyResults.load(finished)
    fold = int(results.clip_fold[results.clip_name == "clip_3"][0])
    arguments = [each.replace("fold0", f"fold{fold}") for each in arguments]
    done = door("predict.py", "--workdir", finished, *arguments).end()
    assert done.status == 0, done.stderr
    assert done.stdout == "picture: out/clip.png\n"
    with Image.open(tmp_path / "out" / "clip.png") as image:
        assert image.size[0] == 2160 and np.ptp(np.asarray(image)) == 255
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"p\.png: cannot be written"):
        picture_of_clip(finished, "clip_3", tmp_path / "file" / "p.png")


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--clip", "clip_1"], "--clip goes with --picture and --member alone: say with --picture what to write"),
        (["--clip", "clip_1", "--video", "v.mp4", "--picture", "p.png"], "--clip does not go with --video"),
        (["--picture", "p.png"], "--picture needs --video or --clip"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(tmp_path, monkeypatch, capsys, arguments, told):
    script = Path(__file__).resolve().parents[2] / "scripts" / "predict.py"
    monkeypatch.setattr(sys, "argv", ["predict.py", "--workdir", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {told}\n"
