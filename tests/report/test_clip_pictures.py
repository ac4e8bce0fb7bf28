"""Pictures of a run's clips: from its files alone, in the report and beside it, and gone when the frames are."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from mer_jax.errors import UserError
from mer_jax.report import clip_pictures
from mer_jax.report.attention_picture import draw_picture
from mer_jax.report.clip_pictures import NO_MAPS, picture_of_clip, write_pictures
from mer_jax.report.html import write_report
from mer_jax.study.predict import predict, speaking_members
from mer_jax.study.results import StudyResults
from mer_jax.study.shown import FILENAME, RULE, ShownClip, choose_clips, save_shown


def make_shown(results, clip, view="l", maps=True):
    rng = np.random.default_rng(clip)
    return ShownClip(
        clip=str(results.clip_name[clip]), view=view, phases={"apex": 13}, sampled=np.arange(0, 36, 2),
        places=np.arange(0, 18, 2), crops=rng.integers(0, 256, (9, 16, 16, 3), np.uint8),
        networks={"appearance": "vit"} if maps else {},
        maps={"appearance": np.eye(4, dtype=np.float16)[None].repeat(9, axis=0) / 5} if maps else {},
        areas={"appearance": (0.0, 0.0, 1.0, 1.0)} if maps else {},
    )  # fmt: skip


@pytest.fixture
def run(results, finish_run, tmp_path):
    finish_run(tmp_path / "run", results)
    return tmp_path / "run"


@pytest.fixture
def composed(monkeypatch):
    """The pictures that were drawn."""
    drawn = []

    def recording(picture, resolution):
        drawn.append(picture)
        return draw_picture(picture, resolution)

    monkeypatch.setattr(clip_pictures, "draw_picture", recording)
    return drawn


def test_the_report_shows_what_the_run_keeps(results, run, composed):
    clip, labels = next(iter(choose_clips(results).items()))
    save_shown(run / FILENAME, [make_shown(results, clip)])
    page = write_report(run).read_text()
    name = f"{results.clip_name[clip]}_l"
    section = page[page.index('<section id="clips">') :].partition("</section>")[0]
    assert RULE in section and "Attention is not an explanation" in section
    assert f"{name}: chosen for {', '.join(results.labels[label] for label in labels)}." in section
    (image,) = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)"', section)
    assert "vit attends most to the patch in row 1 of 4, column 1 of 4." in image[1]
    with Image.open(io.BytesIO(base64.b64decode(image[0]))) as shown:
        assert shown.size[0] == 1080
    with Image.open(run / "attention" / f"{name}.png") as printed:
        assert printed.size[0] == 2160
    first = page, (run / "attention" / f"{name}.png").read_bytes()
    assert (write_report(run).read_text(), (run / "attention" / f"{name}.png").read_bytes()) == first

    # What it says is what the run's other files say.
    picture = composed[0]
    fold = results.clip_fold[clip]
    members = np.flatnonzero(results.ok & (results.member_fold == fold))
    sample = np.flatnonzero((results.sample_clip == clip) & (results.sample_view == "l"))[0]
    for modality, values in results.attention.items():
        expected = [values[m, results.curve_sample[m].tolist().index(sample)] for m in members]
        np.testing.assert_array_equal(picture.attention[modality], expected)
    samples = results.sample_clip == clip
    own = results.probabilities[members][:, samples].mean(axis=1)  # (M', L)
    np.testing.assert_allclose(picture.mean, own.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(picture.spread, own.std(axis=0), rtol=1e-4)
    assert picture.marks == {"apex": 6.5}
    assert picture.gate == pytest.approx(
        dict(zip(("appearance", "geometry"), results.gate[members].mean(axis=0), strict=True))
    )

    # And where frames are kept no longer, nothing of them is left.
    (run / FILENAME).unlink()
    assert '<section id="clips">' not in write_report(run).read_text() and not (run / "attention").exists()


def test_without_maps_the_picture_says_how_to_get_them(results, run, composed):
    clip = next(iter(choose_clips(results)))
    save_shown(run / FILENAME, [make_shown(results, clip, view="r", maps=False)])
    evaluation = json.loads((run / "summary.json").read_text())["evaluation"]
    (picture,) = write_pictures(run, results, evaluation)
    assert picture.name == f"{results.clip_name[clip]}_r" and "--attention" in NO_MAPS
    assert composed[0].heat_maps == [] and composed[0].lacking == NO_MAPS and "right view" in composed[0].title


def test_a_study_without_frame_attention_shows_no_clips(results, run, without):
    save_shown(run / FILENAME, [make_shown(results, 0)])
    evaluation = json.loads((run / "summary.json").read_text())["evaluation"]
    assert write_pictures(run, without(results, "attention"), evaluation) == []


def test_who_speaks_is_who_predicts(results):
    evaluation = {"bootstrap": 100}
    members = speaking_members(results, evaluation)
    assert members.tolist() == np.flatnonzero(results.ok).tolist()
    predictions = predict(results, evaluation, split="train")
    fold = results.clip_fold[np.searchsorted(results.clip_name, predictions.clip_name)]
    assert predictions.members.tolist() == [(results.member_fold[members] == each).sum() for each in fold]


def test_one_clip_that_is_asked_for(results, run, monkeypatch, tmp_path, composed):
    asked = []

    def see(data, of, clips):
        asked.append((data["dataset"], clips))
        return [make_shown(of, *clips[0])]

    monkeypatch.setattr(clip_pictures, "see_clips", see)
    saved = []
    monkeypatch.setattr(clip_pictures, "save_picture", lambda path, picture: saved.append((path, picture)))
    picture_of_clip(run, "clip_004_r", tmp_path / "p.png")
    picture_of_clip(run, "clip_004", tmp_path / "p.png", member="fold1-seed1")
    assert asked == [("four_dme/challenge", [(4, "r")]), ("four_dme/challenge", [(4, "l")])]
    assert [picture.attention["geometry"].shape for _, picture in saved] == [(3, 18), (1, 18)]  # one of four diverged
    with pytest.raises(UserError, match=r"^--clip=clip_004: --member=fold0-seed1 did not hold it out; choose a member"):
        picture_of_clip(run, "clip_004", tmp_path / "p.png", member="fold0-seed1")
    blind = StudyResults.load(run)
    monkeypatch.setattr(StudyResults, "load", lambda workdir: blind)
    blind.attention.clear()
    with pytest.raises(UserError, match=r"run: this study attends to no frames; take one of configs/fusion\.py"):
        picture_of_clip(run, "clip_004", tmp_path / "p.png")
