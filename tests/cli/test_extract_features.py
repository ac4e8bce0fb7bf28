"""``scripts/extract_features.py`` as a user opens it: killed, gone on with, and told what is wrong."""

import importlib.util
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import torch
from PIL import Image

from data_builders import four_dme
from mer_jax.clips.crops import CropConfig
from mer_jax.clips.demo import make_demo_clips
from mer_jax.extractors import networks

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
_spec = importlib.util.spec_from_file_location("tiny_networks", TESTS / "tiny_networks.py")
tiny_networks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_networks)

# The door, with small networks among the others; worker processes import this file, too.
PROGRAM = f"""
import runpy, sys
sys.path[:0] = [{str(ROOT)!r}, {str(TESTS)!r}]
from mer_jax.extractors import networks
networks.NETWORKS.update(dict.fromkeys({list(tiny_networks.NETWORKS)!r}, "tiny_networks:NETWORKS"))
if __name__ == "__main__":
    runpy.run_path({str(ROOT / "scripts" / "extract_features.py")!r}, run_name="__main__")
"""


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("program") / "extract_features.py"
    path.write_text(PROGRAM)
    return path


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """A checkpoint of the tiny networks, as their authors would write it."""
    path = tmp_path_factory.mktemp("weights") / "official.pt"
    torch.save({name: torch.from_numpy(value) for name, value in tiny_networks.random_state().items()}, path)
    return path


@pytest.fixture(scope="session")
def small(new_challenge, tmp_path_factory):
    """A data directory with a data set of 14 clips and features from files, which cost little."""
    made = new_challenge(tmp_path_factory.mktemp("small"), 12, 2)
    four_dme.build("challenge", data_dir=made.root / "data", source=made.source, extractors=(),
                   features={"look": made.features / "look"}, crop=CropConfig(size=24), workers=1)  # fmt: skip
    return made.root / "data"


@pytest.fixture
def copy_of(small, tmp_path):
    """Copies it: ``copy_of(name)`` is another data directory of the same clips."""
    return lambda name: shutil.copytree(small, tmp_path / name)


@pytest.fixture
def extract(door, program, weights):
    """Opens the door: what is not said is as the data set was built."""

    def open_extract(data_dir, *others, extractor="tiny_slow", **environment):
        return door(program, "--extractor", extractor, "--weights", weights, "--dataset", "four_dme/challenge",
                    "--data_dir", data_dir, "--workers", 2, *others, **environment)  # fmt: skip

    return open_extract


def finished(data_dir):
    """Clips that are finished."""
    return {path.name: path for path in Path(data_dir).glob("features/four_dme/*/*/*.npz")}


def content(*folders):
    return {
        path.name: path.read_bytes() for folder in folders for path in sorted(folder.iterdir()) if path.name != "lock"
    }


def features_folder(data_dir):
    (folder,) = Path(data_dir).glob("features/four_dme/*/*")
    return folder


def kill_twice(start, data_dir, num_clips):
    """Kills -9 twice in the middle of the work, then lets it end; nothing that was finished may be done again."""
    kept = {}
    for wanted in (num_clips // 8, num_clips // 2, None):
        process = start()
        if wanted is not None:
            process.wait_for(lambda wanted=wanted: len(finished(data_dir)) >= wanted)
            process.stop(signal.SIGKILL)
            assert process.status == -signal.SIGKILL
            assert wanted <= len(finished(data_dir)) < num_clips
        else:
            assert process.end().status == 0, process.stderr
        now = {name: (path.stat().st_ino, path.stat().st_mtime_ns) for name, path in finished(data_dir).items()}
        assert kept.items() <= now.items(), "a finished clip was done again"
        kept = now
    assert len(kept) == num_clips
    return process


def test_killed_twice_it_ends_like_an_uninterrupted_run(copy_of, extract):
    whole, killed = copy_of("whole"), copy_of("killed")
    built = [four_dme.version_dir("challenge", data_dir) for data_dir in (whole, killed)]
    options = ("--batch_size", 3)
    done = extract(whole, *options).end()
    assert done.status == 0, done.stderr
    assert done.stdout == f"{built[0]}\n"
    assert "tiny_slow, 1 x 3 at once: 112/112 img [" in done.stderr and "img/s]" in done.stderr

    process = kill_twice(lambda: extract(killed, *options), killed, 14)
    assert process.stdout == f"{built[1]}\n"
    assert features_folder(whole).name == features_folder(killed).name
    assert content(features_folder(whole)) == content(features_folder(killed))
    assert content(built[0]) == content(built[1])
    assert not list(killed.rglob("*.tmp"))
    names = {path.name for path in (whole / "weights").iterdir()}
    assert len(names) == 2 and "lock" in names


@pytest.fixture
def extracted_here(copy_of, weights, monkeypatch):
    """Features of this process."""
    monkeypatch.setitem(sys.modules, "tiny_networks", tiny_networks)
    monkeypatch.setitem(networks.NETWORKS, "tiny_slow", "tiny_networks:NETWORKS")
    data_dir = copy_of("here")
    four_dme.extract_features("tiny_slow", "challenge", weights=weights, data_dir=data_dir, batch_size=3, workers=1)
    return data_dir


@pytest.mark.parametrize("door_is_killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_is_lost_on_a_cluster_costs_nothing(
    extracted_here, copy_of, door, program, weights, two_workers, door_is_killed
):
    data_dir = copy_of("data")

    def start():
        return door(program, "--extractor", "tiny_slow", "--weights", weights, "--dataset", "four_dme/challenge",
                    "--data_dir", "data", "--batch_size", 3, "--cluster", two_workers.file,
                    cwd=data_dir.parent)  # fmt: skip

    process = start()
    process.wait_for(lambda: len(finished(data_dir)) >= 2)
    os.kill(two_workers.pids()[0], signal.SIGKILL)
    (features_folder(data_dir) / ".clip_1.npz.0.tmp").write_bytes(b"PK")  # as of a worker that was writing
    if door_is_killed:
        process.wait_for(lambda: len(finished(data_dir)) >= 5)
        process.stop(signal.SIGKILL)
        assert 5 <= len(finished(data_dir)) < 14
        process = start()
    process.end()
    assert process.status == 0, process.stderr
    assert process.stdout == "data/four_dme/challenge/1.0.0\n"
    assert door_is_killed or process.stderr.startswith("a worker has gone (tcp://")
    assert "\ntiny_slow, 3 at once per device: 112/112 img [" in f"\n{process.stderr}" or door_is_killed
    assert "Traceback" not in process.stderr and "distributed" not in process.stderr
    assert content(features_folder(extracted_here)) == content(features_folder(data_dir))
    assert not list(data_dir.rglob("*.tmp")) and not list(data_dir.glob(".cluster*"))


def test_a_cluster_has_its_own_workers(extract, tmp_path):
    done = extract(tmp_path / "data", "--cluster", "tcp://127.0.0.1:9").end()
    assert "--workers: how many processes work on a cluster is said where they are started; leave" in done.error
    assert not (tmp_path / "data").exists()


def test_a_polite_stop_says_how_to_go_on(copy_of, extract, tmp_path):
    data_dir = copy_of("data")
    process = extract(data_dir)
    process.wait_for(lambda: len(finished(data_dir)) > 2)
    process.stop(signal.SIGTERM)
    assert process.status == 130, process.stderr
    assert process.stderr.splitlines()[-1] == "interrupted; run the same command again to go on"
    assert "Traceback" not in process.stderr
    assert not list(data_dir.rglob("*.tmp"))


@pytest.mark.parametrize(
    "kind, message",
    [
        ("pixel", r"error: 1 of 1 clips cannot be extracted (clip 1: a frame 1 pixel wide holds no two views; give"),
        ("deep", r"0.png: has more than 8 bits per pixel of grey; convert the frame to 8 bits"),
    ],
)
def test_frames_that_cannot_be_used_are_one_line(extract, tmp_path, kind, message):
    clip = tmp_path / "source" / "train" / "1"
    clip.mkdir(parents=True)
    for index in range(2):
        shape, dtype = ((1, 1), np.uint8) if kind == "pixel" else ((20, 40), np.uint16)
        Image.fromarray(np.full(shape, 7, dtype)).save(clip / f"{index}.png")
    (tmp_path / "source" / "train.csv").write_text("Id,Negative,Positive,Repression,Surprise,Others\n1,1,0,0,0,0\n")
    done = extract(tmp_path / "data", "--source", tmp_path / "source", extractor="tiny").end()
    assert message in done.error and done.error.endswith("run the same command again")


@pytest.fixture
def bad_weights(weights, tmp_path):
    """Makes files that are no weights of the network that is asked for, or not whole."""
    from safetensors.numpy import save_file

    def make(kind):
        path = tmp_path / kind
        if kind == "truncated.pt":
            path.write_bytes(weights.read_bytes()[:-500])
        elif kind == "truncated.safetensors":
            save_file({"vision_model.post_layernorm.weight": np.ones(768, np.float32)}, path)
            path.write_bytes(path.read_bytes()[:-100])
        elif kind == "text_tower.safetensors":
            save_file({"text_model.final_layer_norm.weight": np.ones(768, np.float32), "logit_scale": np.ones(1)}, path)
        elif kind == "tiny.pt":
            shutil.copy(weights, path)
        elif kind == "notes.pt":
            path.write_text("the weights are on the other disk")
        return path

    return make


@pytest.mark.parametrize(
    "extractor, kind, message",
    [
        ("tiny", "truncated.pt", "truncated.pt: "),
        ("siglip2_b16_224", "truncated.safetensors", "truncated.safetensors: "),
        ("siglip2_b16_224", "text_tower.safetensors", "text_tower.safetensors: "),
        ("siglip2_b16_224", "tiny.pt", "tiny.pt: "),
        ("smirk", "tiny.pt", "tiny.pt: "),
        ("tiny", "notes.pt", "notes.pt: not a torch.save file, or damaged"),
        ("smirk", "absent.pt", "absent.pt: no such file of weights; smirk takes its official checkpoint (licence: MIT"),
    ],
)
def test_bad_weights_are_one_line_before_anything_is_extracted(
    door, program, challenge, bad_weights, tmp_path, extractor, kind, message
):
    done = door(program, "--extractor", extractor, "--weights", bad_weights(kind), "--dataset", "four_dme/challenge",
                "--source", challenge.source, "--data_dir", tmp_path / "data").end()  # fmt: skip
    assert message in done.error, done.error
    assert not finished(tmp_path / "data") and not list((tmp_path / "data").rglob("*.npz"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--extractor", "hog", "--dataset", "four_dme/demo"],
            "extractor 'hog' is unknown; networks are siglip2_b16_224,",
        ),
        (
            ["--extractor", "smirk", "--dataset", "megc2019/demo"],
            "--dataset megc2019/demo: features are extracted for four",
        ),
        (
            ["--extractor", "smirk", "--dataset", "four_dme"],
            "--dataset four_dme: features are extracted for four_dme/demo,",
        ),
        (
            ["--extractor", "smirk", "--dataset", "four_dme/demo", "--batch_size", "many"],
            "--batch_size many: a number of",
        ),
        (["--extractor", "smirk", "--dataset", "four_dme/challenge"], "four_dme/challenge is not built yet: say with"),
    ],
)
def test_wrong_arguments_are_one_line(door, tmp_path, arguments, message):
    done = door("extract_features.py", *arguments, "--data_dir", tmp_path / "data").end()
    assert message in done.error
    assert not (tmp_path / "data").exists()


def test_weights_that_the_hub_does_not_give_are_named_with_their_licence(door, challenge, tmp_path):
    hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = door("extract_features.py", "--extractor", "radio_v2.5-g", "--dataset", "four_dme/challenge", "--source",
                challenge.source, "--data_dir", tmp_path / "data", **hub).end()  # fmt: skip
    for part in (
        "nvidia/RADIO-g",
        "https://huggingface.co/nvidia/RADIO-g",
        "NVIDIA Source Code License-NC",
        "--weights",
    ):
        assert part in done.error


@pytest.mark.slow
def test_the_whole_demo_with_a_small_vision_transformer_killed_twice(door, tmp_path):
    """All 128 clips, with a network and a checkpoint as they are released, but smaller."""
    spec = importlib.util.spec_from_file_location("torch_reference", TESTS / "torch_reference.py")
    torch_reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(torch_reference)
    transformers = torch_reference.transformers

    settings = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3, image_size=64,
                    patch_size=16)  # fmt: skip
    model = torch_reference.randomised(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**settings)))
    model.save_pretrained(tmp_path / "official")
    (tmp_path / "small_siglip.py").write_text(
        "from mer_jax.extractors import siglip\n"
        "from mer_jax.extractors.vit import Architecture\n"
        "small = Architecture(16, 48, 3, 3, 96, (4, 4), 'gelu_tanh', 'fixed')\n"
        "NETWORKS = {'small_siglip': siglip.network('small_siglip', small, (64, 64))}\n"
    )
    program = tmp_path / "extract_features.py"
    program.write_text(
        PROGRAM.replace(str(TESTS), str(tmp_path))
        .replace("tiny_networks:", "small_siglip:")
        .replace(repr(list(tiny_networks.NETWORKS)), "['small_siglip']")
    )
    clips = make_demo_clips(tmp_path / "clips")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    crop = CropConfig(size=256)
    built = [four_dme.build("challenge", data_dir=data_dir, source=clips, extractors=("hog",), crop=crop)
             for data_dir in (whole, killed)]  # fmt: skip

    def start(data_dir):
        return door(program, "--extractor", "small_siglip", "--weights", tmp_path / "official", "--dataset",
                    "four_dme/challenge", "--data_dir", data_dir)  # fmt: skip

    done = start(whole).end(600)
    assert done.status == 0, done.stderr
    kill_twice(lambda: start(killed), killed, 128)
    assert content(features_folder(whole)) == content(features_folder(killed))
    assert content(built[0]) == content(built[1])

    # And they are the official network's.
    facts = json.loads((built[0] / "metadata.json").read_text())["extractors"]["small_siglip"]
    assert facts["weights"] == "model.safetensors" and facts["dim"] == 48
    records = tfds.builder_from_directory(built[0]).as_data_source()["train"]
    record = records[17]
    frames = [path for path in sorted((clips / "train" / record["clip"].decode()).iterdir())]
    left, top, width, height = record["box"]
    halves = [np.array_split(np.asarray(Image.open(path).convert("RGB")), 2, axis=1) for path in frames]
    images = []
    for views in halves:
        view = views["lr".index(record["view"].decode())][top : top + height, left : left + width]
        face = Image.fromarray(view).resize((256, 256), Image.Resampling.LANCZOS)
        images.append(np.asarray(face.resize((64, 64), Image.Resampling.BILINEAR)))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1  # (T, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixel_values=pixels).pooler_output.numpy()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(record["features"]["small_siglip"] / scale, expected / scale, atol=1e-4)
