"""Small hand-made data sets in the layouts of the challenge and the release."""

import csv
import functools
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import openpyxl
import pytest
from PIL import Image
from skimage import data

from data_builders import four_dme
from mer_jax.clips.crops import CropConfig
from mer_jax.extractors import networks

TESTS = Path(__file__).resolve().parents[2]
COLUMNS = {"Negative": "neg"}
CROP = CropConfig(size=96)

LENGTHS = {"seq_2": 4, "seq_10": 3, "seq_7": 5}  # training clips
TEST_LENGTHS = {"seq_11": 3}


@functools.cache
def _photograph() -> np.ndarray:
    return data.astronaut()[40:240, 120:320]


def face_view(shift: float, size: int = 150) -> np.ndarray:
    """(size, size, 3) uint8, a photographed face moved by a few pixels."""
    view = _photograph()
    move = np.array([[1, 0, shift], [0, 1, shift / 2]], np.float32)
    return cv2.resize(cv2.warpAffine(view, move, (200, 200), borderMode=cv2.BORDER_REFLECT), (size, size))


def write_clip(folder, length, *, start=0.0, views=2, grey=False):
    folder.mkdir(parents=True)
    for index in range(length):
        frame = np.concatenate([face_view(start + index), face_view(-start - index)][:views], axis=1)
        image = Image.fromarray(frame)
        (image.convert("L") if grey else image).save(folder / f"img{index + 1}.png")


@pytest.fixture(scope="session")
def _challenge(tmp_path_factory):
    root = tmp_path_factory.mktemp("challenge")
    for position, (name, length) in enumerate(LENGTHS.items()):
        write_clip(root / "train" / name, length, start=float(position))
    for name, length in TEST_LENGTHS.items():
        write_clip(root / "test" / name, length)
    with open(root / "train.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["Id", "neg", "Positive", "Repression", "Surprise", "Others", "subject"])
        writer.writerow([2, 1, 0, 0, 1, 0, "s1"])
        writer.writerow([10, 0, 1, 0, 0, 0, "s2"])
        writer.writerow([7, 1, 0, 0, 0, 0, "s1"])
    return root


@pytest.fixture
def challenge(_challenge, tmp_path):
    """A folder in the challenge's layout: three training clips, one test clip."""
    # Dates are copied too, as a backup or an archive would.
    return shutil.copytree(_challenge, tmp_path / "4dmr")


@pytest.fixture
def release(tmp_path):
    """Workbook and frames of two single-view grey clips."""
    root = tmp_path / "gray_micro"
    write_clip(root / "01" / "a_1", 4, views=1, grey=True)
    write_clip(root / "02" / "b_1", 5, views=1, grey=True)
    book = openpyxl.Workbook()
    book.active.append(["sub_ID", "fold_name", "Emotion", "Onset", "Apex", "Offset", "AUs", "AU4"])
    book.active.append(["01", "a_1", "Surprise+Positive", 11, 13, 14, "AU4", 1])
    book.active.append(["02", "b_1", "Negative", 1, 2, 5, "AU4(k)", 1])
    book.save(tmp_path / "labels.xlsx")
    return tmp_path / "labels.xlsx", root


@pytest.fixture(scope="module")
def tiny_networks():
    """The module of small networks, by the name by which workers import it."""
    sys.path.insert(0, str(TESTS))
    import tiny_networks

    yield tiny_networks
    sys.path.remove(str(TESTS))


@pytest.fixture
def registered(tiny_networks, monkeypatch):
    """Makes the small networks known by their names."""
    for name in tiny_networks.NETWORKS:
        monkeypatch.setitem(networks.NETWORKS, name, "tiny_networks:NETWORKS")


@pytest.fixture
def weights(tiny_networks, tmp_path):
    """Makes checkpoints of the tiny network, as its authors would: ``weights(seed)``."""
    torch = pytest.importorskip("torch")

    def make(seed=0, scale=1.0):
        path = tmp_path / f"official_{seed}_{scale}.pt"
        torch.save({k: torch.from_numpy(v) for k, v in tiny_networks.random_state(seed, scale).items()}, path)
        return path

    return make


@pytest.fixture
def extract(challenge, registered, weights, tmp_path):
    """Extracts tiny features of the hand-made challenge, unless told otherwise."""

    def call(extractor="tiny", **changes):
        options = dict(weights=weights(), data_dir=tmp_path / "data", source=challenge, columns=COLUMNS, crop=CROP,
                       workers=1, batch_size=4)  # fmt: skip
        return four_dme.extract_features(extractor, "challenge", **{**options, **changes})

    return call


@pytest.fixture
def built(challenge, tmp_path):
    """A data set that holds HOG only."""
    return four_dme.build("challenge", data_dir=tmp_path / "data", source=challenge, columns=COLUMNS,
                          extractors=("hog",), crop=CROP, workers=1)  # fmt: skip
