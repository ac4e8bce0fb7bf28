"""Videos through studies of all kinds: what is measured, what members say of it, and what is refused."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from configs.fusion import get_config as fusion_config
from configs.megc2019 import get_config as megc_config
from configs.micro_attnet import get_config as micro_attnet_config
from mer_jax.clips.apex import ApexConfig
from mer_jax.clips.crops import CropConfig, crop_clip, face_box
from mer_jax.clips.faces import FaceDetector
from mer_jax.clips.flow import FlowConfig, dense_flow, flow_channels, resize_flow, to_grey
from mer_jax.clips.video import read_video
from mer_jax.errors import UserError
from mer_jax.models.registry import build_learner
from mer_jax.study.checkpoints import load_tree, save_tree
from mer_jax.study.data import StudyData
from mer_jax.study.imported import _write
from mer_jax.study.predict import predict
from mer_jax.study.results import FILENAME, StudyResults
from mer_jax.study.summary import read_evaluation
from mer_jax.study.train import _save_maps, make_plan
from mer_jax.study.validation import input_channels
from mer_jax.study.video import look_at_video, predict_video, read_config, run_study
from mer_jax.study.workdir import start_workdir

_spec = importlib.util.spec_from_file_location("face_videos", Path(__file__).parents[1] / "face_videos.py")
face_videos = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(face_videos)
LABELS = ("Negative", "Positive", "Repression", "Surprise", "Others")
CROP, FLOW, APEX = CropConfig(rule="largest", size=224), FlowConfig(), ApexConfig()
NUM_FRAMES, MIDDLE = 13, 6


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Half a second in which a mouth is raised and comes back, without loss."""
    path = tmp_path_factory.mktemp("video") / "face.avi"
    return face_videos.face_video(path, NUM_FRAMES, lambda t: {"raise_mouth": 4 * face_videos.bump(t, MIDDLE, 6)})


def flow_data(classes=False, side=12, channels=3):
    """12 training and 2 test clips of noise."""
    rng = np.random.default_rng(3)
    phases = ("onset_apex",) if classes else ("onset_apex", "apex_offset")
    views = ("c",) if classes else ("l", "r")
    clips, names = 14, ("negative", "positive", "surprise") if classes else LABELS
    split = np.array(["train"] * 12 + ["test"] * 2)
    samples = [(clip, view, phase) for clip in range(clips) for view in views for phase in phases]
    labels = np.eye(3, dtype=np.int8)[np.arange(clips) % 3] if classes else rng.integers(0, 2, (clips, 5), np.int8)
    labels[split == "test"] = -1
    return StudyData(
        clip_name=np.array([f"clip_{number}" for number in range(clips)]),
        clip_id=np.arange(1, clips + 1),
        clip_subject=np.array([f"s{number % 4}" for number in range(clips)]),
        clip_split=split,
        clip_database=np.full(clips, "smic" if classes else ""),
        clip_labels=labels,
        sample_clip=np.array([sample[0] for sample in samples], np.int32),
        sample_view=np.array([sample[1] for sample in samples]),
        sample_phase=np.array([sample[2] for sample in samples]),
        face_found=np.ones(len(samples), bool),
        features={"flow": (rng.normal(size=(len(samples), side, side, channels)) * 9).astype(np.float32)},
        frame_mask=None,
        label_names=names,
        task="multi_class" if classes else "multi_label",
    )


def feature_data():
    """12 training and 2 test clips with features as wide as those of the extractors."""
    rng = np.random.default_rng(4)
    from mer_jax.extractors.base import get_extractor

    data = flow_data()
    whole = np.flatnonzero(data.sample_phase == "onset_apex")
    features = {
        modality: rng.normal(size=(len(whole), 4, get_extractor(name).dim)).astype(np.float32) * 0.1
        for modality, name in (("appearance", "hog"), ("geometry", "facemesh"))
    }
    return dataclasses.replace(
        data,
        sample_clip=data.sample_clip[whole],
        sample_view=data.sample_view[whole],
        sample_phase=np.full(len(whole), ""),
        face_found=data.face_found[whole],
        features=features,
        frame_mask=np.ones((len(whole), 4), bool),
    )


def make_run(folder, config, data, **fields):
    """The folder of a finished study, 3 folds x 2 seeds in two blocks, whose members nobody trained."""
    config.study.update(num_seeds=2, num_inner=2)
    config.train.patience = 0
    config.update_from_flattened_dict(fields)
    plan = make_plan(config, data, {})
    learner = build_learner(config.model, input_channels(config), len(data.label_names))
    one = jax.tree.map(lambda x: x[0, :1], plan.arrays.inputs)
    init = jax.jit(learner.init)
    variables = [jax.device_get(init(jax.random.key(number), one)) for number in range(len(plan.members))]
    start_workdir(config, folder, {})
    _save_maps(folder, plan.maps)
    _write(folder, plan, learner, variables, jax.devices()[0])
    results = StudyResults.load(folder)
    dataclasses.replace(results, stream_name=np.array(learner.stream_names, dtype=np.str_)).save(folder / FILENAME)
    for number, start in enumerate(range(0, len(variables), 4)):
        rows = variables[start : start + 4]
        save_tree(folder / "params" / f"block_{number:04d}", jax.tree.map(lambda *leaves: np.stack(leaves), *rows))
    (folder / "blocks.json").write_text(json.dumps({"members_together": 4, "platform": "cpu"}))
    return folder


@pytest.fixture(scope="module")
def micro_run(tmp_path_factory):
    fields = {"data.size": 12, "model.features": (2, 3), "model.pools": (2, 2), "model.hidden_dim": 4}
    return make_run(tmp_path_factory.mktemp("runs") / "micro", micro_attnet_config(), flow_data(), **fields)


@pytest.fixture(scope="module")
def class_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "classes"
    return make_run(folder, megc_config("ststnet"), flow_data(classes=True, side=28))


@pytest.fixture(scope="module")
def feature_run(tmp_path_factory):
    fields = {"data.num_frames": 4, "model.key_dim": 4, "model.hidden_dim": 4}
    fields |= {f"data.modalities.{modality}.reduce": 0 for modality in ("appearance", "geometry")}
    fields |= {f"model.num_queries.{modality}": 2 for modality in ("appearance", "geometry")}
    return make_run(tmp_path_factory.mktemp("runs") / "features", fusion_config(), feature_data(), **fields)


@pytest.fixture(scope="module")
def look(video):
    return look_at_video(video, CROP, FLOW, APEX)


def test_the_look_is_that_of_the_builders(video, look):
    frames = list(read_video(video))
    with FaceDetector() as detector:
        box = face_box(frames, CROP, detector)
    assert look.box == box and box.found
    crops = crop_clip(frames, box, 224)
    np.testing.assert_array_equal(look.grey, to_grey(crops))
    assert abs(look.apex - MIDDLE) <= 1
    shown = [frames[index] for index in (0, look.apex, NUM_FRAMES - 1)]
    side = max(224, min(box.width, 640))
    np.testing.assert_array_equal(look.shown, crop_clip(shown, box, side))
    assert look.intensity.shape == (NUM_FRAMES,) and look.intensity[0] == 0 and look.faceless == ()


def test_members_predict_as_by_hand(video, look, micro_run):
    """Every step anew: u, v, m of both phases, each member's own scales, its own variables, the mean of phases."""
    config, results = read_config(micro_run), StudyResults.load(micro_run)
    prediction = run_study(micro_run, config, results, look, video)
    three = look.grey[[0, look.apex, -1]]
    flow = np.stack([dense_flow(three[0], three[1], FLOW), dense_flow(three[1], three[2], FLOW)])  # (2, 224, 224, 2)
    np.testing.assert_array_equal(prediction.flow, flow)
    channels = np.concatenate([flow, np.hypot(flow[..., :1], flow[..., 1:])], axis=-1)
    inputs = resize_flow(channels.astype(np.float32), 12)  # (2, 12, 12, 3)
    learner = build_learner(config.model, ("u", "v", "m"), 5)
    shapes = jax.eval_shape(learner.init, jax.random.key(0), {"flow": inputs[:1]})
    probabilities, streams = [], []
    with np.load(micro_run / "feature_maps.npz") as maps, jax.default_matmul_precision("highest"):
        for row, fold in enumerate(results.member_fold):
            size = 4 if row < 4 else 2  # six members in blocks of four
            block = jax.tree.map(lambda x, size=size: jax.ShapeDtypeStruct((size, *x.shape), x.dtype), shapes)
            variables = load_tree(micro_run / "params" / f"block_{row // 4:04d}", block)
            variables = jax.tree.map(lambda x, row=row: x[row % 4], variables)
            scaled = (inputs - maps[f"flow/{fold}/mean"]) * maps[f"flow/{fold}/scale"]
            logits, _, extras = learner.apply(variables, {"flow": scaled}, np.ones(2, bool), False, None, None)
            probabilities.append((1 / (1 + np.exp(-np.asarray(logits, np.float64)))).mean(axis=0))
            streams.append([np.asarray(extras["attention"][f"streams{block}"])[:, 0] for block in (1, 2)])
    told = prediction.predictions
    np.testing.assert_allclose(told.mean[0], np.mean(probabilities, axis=0), atol=1e-5)
    np.testing.assert_allclose(told.spread[0], np.std(probabilities, axis=0), atol=1e-5)
    assert told.members[0] == 6 and told.mean.shape == (1, 5)
    # Rows: block 1 of both phases, then block 2.
    np.testing.assert_allclose(prediction.streams, np.mean(streams, axis=0).reshape(4, 3), atol=1e-5)
    assert prediction.stream_rows[1] == "block 1, apex to offset" and prediction.stream_names == ("u", "v", "m")
    # A video is judged as test clips are.
    expected = predict(results, read_evaluation(micro_run), split="test")
    np.testing.assert_array_equal(told.thresholds[0], expected.thresholds[0])
    np.testing.assert_array_equal(told.decisions[0], told.mean[0] >= told.thresholds[0])


def test_one_member_alone(video, look, micro_run):
    results = StudyResults.load(micro_run)
    one = run_study(micro_run, read_config(micro_run), results, look, video, member="fold1-seed1").predictions
    assert one.members[0] == 1 and (one.spread == 0).all()
    with pytest.raises(UserError, match="--member=fold9-seed9: this study has no such member"):
        run_study(micro_run, read_config(micro_run), results, look, video, member="fold9-seed9")


def test_diverged_members_are_silent(video, look, micro_run):
    results = StudyResults.load(micro_run)
    everyone = run_study(micro_run, read_config(micro_run), results, look, video)
    status = np.where(np.arange(6) == 2, "diverged", results.member_status)
    probabilities = np.where(np.arange(6)[:, None, None] == 2, np.nan, results.probabilities).astype(np.float32)
    lame = dataclasses.replace(results, member_status=status, probabilities=probabilities)
    told = run_study(micro_run, read_config(micro_run), lame, look, video)
    assert told.predictions.members[0] == 5 and np.isfinite(told.predictions.mean).all()
    assert (told.predictions.mean != everyone.predictions.mean).any()
    assert np.isfinite(told.streams).all()


def test_everything_is_printed_and_drawn(video, micro_run, tmp_path, capsys):
    predict_video(micro_run, video, picture=tmp_path / "p.png")
    printed = capsys.readouterr().out
    assert "face.avi: frames 0 to 12 (0.00 to 0.48 s) of 25 a second, the whole video" in printed
    lines = printed.splitlines()
    assert lines[3].split() == ["label", "probability", "spread", "threshold"]
    assert [line.split()[0] for line in lines[4:9]] == list(LABELS)
    assert "mean and standard deviation over 6 members" in printed
    assert "note: the study was trained on rendered demo clips" in printed
    with Image.open(tmp_path / "p.png") as picture:
        image = np.asarray(picture.reduce(2)).astype(int)
    assert image.shape[1] == 1080
    # The apex is where the curve's mark is: a column of orange at 92 px and the share of the way to 1044 px.
    marked = np.flatnonzero(((image[..., 0] - image[..., 2]) > 60)[780:940].sum(axis=0) > 60)
    assert marked.size and abs((marked.mean() - 92) / 952 * 12 - MIDDLE) <= 1.1


def test_motion_that_does_not_end_is_told(tmp_path, micro_run, capsys):
    path = tmp_path / "rising.avi"
    face_videos.face_video(path, NUM_FRAMES, lambda t: {"raise_mouth": t / 3})
    predict_video(micro_run, path)
    printed = capsys.readouterr().out
    assert "apex: frame 11 " in printed and "note: the motion still grows at the end of these frames" in printed


def test_frames_without_the_face_are_told(tmp_path, micro_run, capsys):
    blank = np.full_like(face_videos.photograph(), 90)
    faces = [face_videos.face_frame(raise_mouth=4 * face_videos.bump(t, MIDDLE, 5)) for t in range(NUM_FRAMES)]
    path = face_videos.write_video(tmp_path / "late.avi", [blank, blank, *faces[2:]])
    predict_video(micro_run, path)
    assert (
        "note: no face is found in the frame of onset, so that its motion may be another's" in capsys.readouterr().out
    )
    assert look_at_video(path, CROP, FLOW, APEX, onset="3").faceless == ()


def test_given_frames_are_taken(video, micro_run, capsys):
    predict_video(micro_run, video, onset="2", offset="0.4s")
    assert "frames 2 to 10 (0.08 to 0.40 s) of 25 a second, as asked" in capsys.readouterr().out


def test_a_study_of_classes(video, class_run, tmp_path, capsys):
    config, results = read_config(class_run), StudyResults.load(class_run)
    predict_video(class_run, video, picture=tmp_path / "p.png")
    printed = capsys.readouterr().out
    assert "threshold" not in printed and printed.count("  predicted") == 1
    assert (tmp_path / "p.png").stat().st_size > 10_000
    look = look_at_video(video, CropConfig(size=224), FLOW, APEX)
    prediction = run_study(class_run, config, results, look, video)
    assert prediction.phases == ("onset_apex",) and prediction.flow.shape == (1, 224, 224, 2)
    assert prediction.predictions.mean.sum() == pytest.approx(1.0, abs=1e-5)
    assert prediction.predictions.decisions.sum() == 1 and prediction.predictions.thresholds is None
    assert prediction.streams.size == 0


def test_flow_images_are_those_of_the_composite(video, class_run, monkeypatch):
    """The net sees (strain, v, u), each stretched to 0 .. 255, whatever the motion's size."""
    from mer_jax.study import video as module

    seen = {}
    kept = module.prepare_flow
    monkeypatch.setattr(module, "prepare_flow", lambda data, *rest: seen.update(data.features) or kept(data, *rest))
    look = look_at_video(video, CropConfig(size=224), FLOW, APEX)
    run_study(class_run, read_config(class_run), StudyResults.load(class_run), look, video)
    image = seen["flow"]
    assert image.shape == (1, 28, 28, 3) and image.dtype == np.float32
    np.testing.assert_array_equal(image.min(axis=(0, 1, 2)), [0, 0, 0])
    np.testing.assert_array_equal(image.max(axis=(0, 1, 2)), [255, 255, 255])
    three = look.grey[[0, look.apex]]
    v = resize_flow(dense_flow(three[0], three[1], FlowConfig(method="tvl1")), 28)[..., 1]
    assert np.corrcoef(image[0, ..., 1].ravel(), v.ravel())[0, 1] > 0.999


def test_flow_of_raw_frames_is_made_as_their_study_made_it(video, tmp_path, monkeypatch):
    from mer_jax.study import video as module

    fields = {
        "data.dataset": "megc2019/raw",
        "data.raw.crop.rule": "largest",
        "data.raw.crop.size": 112,
        "data.raw.apex.rule": "motion",
        "data.raw.apex.blink": 0,
        "data.raw.flow.method": "farneback",
        "data.raw.size": 56,
        "data.raw.store": "flow",
        "data.size": 28,
    }
    run = make_run(tmp_path / "raw", megc_config("ststnet"), flow_data(classes=True, side=28), **fields)
    crop, _, apex = module._settings(read_config(run))
    assert crop == CropConfig(rule="largest", size=112) and apex == ApexConfig(blink=0)
    seen = {}
    kept = module.prepare_flow
    monkeypatch.setattr(module, "prepare_flow", lambda data, *rest: seen.update(data.features) or kept(data, *rest))
    look = look_at_video(video, crop, FLOW, apex)
    prediction = run_study(run, read_config(run), StudyResults.load(run), look, video)
    flow = dense_flow(look.grey[0], look.grey[look.apex], FLOW)
    np.testing.assert_array_equal(prediction.flow[0], flow)
    channels = flow_channels(resize_flow(flow, 56), ("strain", "v", "u"))
    np.testing.assert_allclose(seen["flow"][0], resize_flow(channels, 28), atol=1e-6)


def test_a_study_of_features(video, feature_run, tmp_path, capsys):
    predict_video(feature_run, video, picture=tmp_path / "p.png")
    assert "mean and standard deviation over 6 members" in capsys.readouterr().out
    look = look_at_video(video, CropConfig(size=224), FLOW, APEX)
    results = StudyResults.load(feature_run)
    prediction = run_study(feature_run, read_config(feature_run), results, look, video)
    assert prediction.flow.shape[0] == 0 and prediction.phases == () and prediction.streams.size == 0
    assert ((prediction.predictions.mean > 0) & (prediction.predictions.mean < 1)).all()


def test_features_are_those_of_the_builder(video, feature_run, monkeypatch):
    from mer_jax.extractors.base import fill_missing, get_extractor
    from mer_jax.study import video as module

    seen = {}
    kept = module.prepare_features
    monkeypatch.setattr(module, "prepare_features", lambda data, *rest: seen.update(data.features) or kept(data, *rest))
    look = look_at_video(video, CropConfig(), FLOW, APEX)
    run_study(feature_run, read_config(feature_run), StudyResults.load(feature_run), look, video)
    frames = list(read_video(video))
    with FaceDetector() as detector:
        box = face_box(frames, CropConfig(), detector)  # the fusion system's: of the first frame, 1024 px
    crops = crop_clip([frames[index] for index in (0, 4, 8, 12)], box, 1024)
    for modality, name in (("appearance", "hog"), ("geometry", "facemesh")):
        with get_extractor(name).open() as session:
            expected, _ = fill_missing(session(crops))
        np.testing.assert_array_equal(seen[modality][0], expected)


def copied(run, folder, **fields):
    """A run with another config."""
    import shutil

    shutil.copytree(run, folder)
    told = json.loads((folder / "config.json").read_text())
    for name, value in fields.items():
        place = told
        *path, last = name.split(".")
        for part in path:
            place = place[part]
        place[last] = value
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def test_features_from_files_are_one_line(video, feature_run, tmp_path):
    run = copied(feature_run, tmp_path / "run", **{"data.modalities.appearance.extractor": "radio"})
    with pytest.raises(UserError, match=r"appearance\.extractor='radio' reads features from files, which a video has"):
        predict_video(run, video)


@pytest.mark.parametrize("name", ["feature_maps.npz", "blocks.json", "config.json"])
def test_a_run_that_is_not_whole_is_one_line(video, micro_run, tmp_path, name):
    run = copied(micro_run, tmp_path / "run")
    (run / name).unlink()
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
        predict_video(run, video)
    assert "\n" not in str(caught.value)


def test_damaged_files_of_a_finished_run_are_not_said_to_come_back(video, micro_run, tmp_path):
    """The same training command would only report a finished run again."""
    for name in ("params/block_0000", "feature_maps.npz"):
        run = copied(micro_run, tmp_path / f"without {Path(name).stem}")
        if (run / name).is_dir():
            shutil.rmtree(run / name)
        else:
            (run / name).write_bytes(b"")
        with pytest.raises(UserError, match=rf"{name}: .*; put a copy of it back, or train the study again") as caught:
            predict_video(run, video)
        assert "\n" not in str(caught.value)


def still(path, num_frames):
    return face_videos.face_video(path, num_frames, lambda t: {})


def nobody(path, num_frames):
    return face_videos.write_video(path, [np.full((120, 160, 3), 30 + 3 * t, np.uint8) for t in range(num_frames)])


@pytest.mark.parametrize(
    "make, num_frames, told",
    [
        (still, 10, r"v\.avi: nothing moves in frames 0 to 9, all are alike; choose a stretch with motion"),
        (still, 40, r"v\.avi: nothing moves in frames 0 to 11, all are alike"),
        (still, 2, r"v\.avi: has 2 frames; an onset, an apex and an offset need at least 3"),
        (nobody, 10, r"v\.avi: no face found in frames 0 to 9; choose --onset and --offset where one is seen"),
        (nobody, 40, r"v\.avi: no face found in 14 frames looked at; choose a video of a face"),
    ],
)
def test_bad_videos_are_one_line(tmp_path, micro_run, make, num_frames, told):
    with pytest.raises(UserError, match=told) as caught:
        predict_video(micro_run, make(tmp_path / "v.avi", num_frames), picture=tmp_path / "p.png")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "p.png").exists()
