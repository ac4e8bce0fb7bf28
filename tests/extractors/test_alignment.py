"""Alignment against interpolation by hand, Pillow and OpenCV."""

import functools
import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest
from skimage import data

from mer_jax.errors import UserError
from mer_jax.extractors import alignment
from mer_jax.extractors.networks import get_network

_spec = importlib.util.spec_from_file_location("face_crops", Path(__file__).parents[1] / "face_crops.py")
face_crops = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(face_crops)

# Windows of the photograph, (top, left, height, width): the face with room around it; cut at the chin, and at the
# left. Heights and widths differ, none is even everywhere.
WINDOWS = {"whole": (0, 60, 341, 320), "chin": (10, 120, 155, 221), "side": (20, 176, 240, 190)}
SIZES = {"small": 1.0, "large": 2.6}
NAMES = ("smirk", "3ddfa_v3", "faceverse_v4")


@pytest.fixture(scope="module", params=[(window, size) for window in WINDOWS for size in SIZES], ids=" ".join)
def face(request):
    """A frame and its landmarks, (468, 2)."""
    window, size = request.param
    top, left, height, width = WINDOWS[window]
    frame = data.astronaut()[top : top + height, left : left + width]
    frame = cv2.resize(frame, None, fx=SIZES[size], fy=SIZES[size], interpolation=cv2.INTER_CUBIC)
    (points,) = alignment.find_landmarks(frame[None])
    assert np.isfinite(points).all()
    return frame, points


REFERENCES = dict(zip(NAMES, (face_crops.smirk, face_crops.deep3d, face_crops.faceverse), strict=True))
CROPS = dict(
    zip(
        NAMES,
        (
            functools.partial(alignment.square_crop, size=224),
            functools.partial(alignment.deep3d_crop, size=224),
            functools.partial(alignment.faceverse_crop, size=256),
        ),
        strict=True,
    )
)


@pytest.mark.parametrize("name", NAMES)
def test_crop_equals_an_independent_one(face, name):
    frame, points = face
    found, expected = CROPS[name](frame, points), REFERENCES[name](frame, points)
    assert found.dtype == np.uint8 and found.shape == expected.shape
    if name != "smirk":
        np.testing.assert_array_equal(found, expected)
    # Where all neighbours agree, or nearly, the last bit decides what is cut to whole numbers; and along the frame's
    # border nothing becomes darker than the frame.
    elif frame.min() == 0:
        cut = (np.floor(expected + margin) for margin in (-1e-6, 1e-6))
        assert np.all([found >= next(cut), found <= next(cut)])
    else:
        assert np.abs(found - np.floor(expected)).max() <= max(1, frame.min())


def test_the_windows_reach_beyond_the_frame():
    """Two of the three photographs need black at a border; were they whole, it would stay untested."""
    black = {}
    for window, (top, left, height, width) in WINDOWS.items():
        frame = np.ascontiguousarray(data.astronaut()[top : top + height, left : left + width])
        frame = np.maximum(frame, 60)  # no black of its own, nor by a cubic filter
        (points,) = alignment.find_landmarks(frame[None])
        black[window] = [(CROPS[name](frame, points) == 0).all(axis=-1).any() for name in NAMES]
    assert all(black["chin"]) and any(black["side"]) and not any(black["whole"])


def test_square_crop_by_hand():
    """Landmarks of 10 x 20 make a square of int(15 * 1.4) = 21; three pixels a side are its edges and its centre."""
    frame = np.zeros((60, 60, 3), np.uint8)
    frame[..., 0] = np.arange(60)
    frame[..., 1] = np.arange(60)[:, None]
    points = np.array([[20.0, 10.0], [30.0, 30.0]])
    found = alignment.square_crop(frame, points, size=3)
    # Columns from 25 - 10.5 to 25 + 10.5, rows from 20 - 10.5 to 20 + 10.5.
    np.testing.assert_allclose(found[1, :, 0], [14, 25, 35], atol=1)
    np.testing.assert_array_equal(found[:, 0, 1], [9, 20, 30])


def test_standard_face_fits_itself():
    """A standard face of 50 pixels a unit is found where it is, and brought to 102 pixels a unit."""
    points = np.zeros((468, 2))
    shown = alignment.STANDARD_FACE[:, :2] * [1, -1] * 50 + [130, 90]  # y down
    for group, place in zip(alignment.FIVE_POINTS, shown, strict=True):
        points[list(group)] = place
    frame = np.zeros((201, 261, 3), np.uint8)
    frame[80:101, 120:141] = 255  # 21 pixels about the face's origin, which comes to the centre
    found = alignment.deep3d_crop(frame, points, size=224)
    rows, columns = np.nonzero(found[..., 0] > 127)
    # Cutting lengths to whole pixels moves it by up to two.
    assert abs(rows.mean() - 111.5) <= 2 and abs(columns.mean() - 111.5) <= 2
    assert abs(np.ptp(rows) + 1 - 21 * 102 / 50) <= 1 and abs(np.ptp(columns) + 1 - 21 * 102 / 50) <= 1


def test_faces_too_small_to_tell_are_none():
    frame = np.zeros((64, 64, 3), np.uint8)
    points = 32 + np.random.default_rng(0).uniform(0, 0.5, (468, 2))
    assert all(crop(frame, points) is None for crop in CROPS.values())


@pytest.mark.parametrize("name", NAMES)
def test_frames_by_themselves_and_frames_without_a_face(name):
    network = get_network(name)
    frame = np.ascontiguousarray(data.astronaut()[0:301, 80:360])
    moved = np.ascontiguousarray(np.roll(frame, 9, axis=1))
    nothing = np.zeros_like(frame)
    images, found = network.prepare(np.stack([frame, nothing, moved]))
    assert images.shape == (3, *network.input_shape, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(found, [True, False, True])
    assert not images[1].any()
    np.testing.assert_array_equal(network.prepare(moved[None])[0][0], images[2])
    # Aligned frame by frame, a face that moves stays where it is.
    assert np.abs(images[0].astype(int) - images[2]).mean() < 0.5 * np.abs(frame.astype(int) - moved).mean()


@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (2, 2)])
def test_images_of_few_pixels_hold_no_face(shape):
    images, found = get_network("smirk").prepare(np.full((2, *shape, 3), 128, np.uint8))
    assert images.shape == (2, 224, 224, 3) and not found.any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(2, 64, 64), (2, 64, 64, 1), (2, 64, 64, 4), (64, 64, 3), (0, 64, 64, 3)])
def test_frames_that_are_not_rgb_are_refused(name, shape):
    with pytest.raises(UserError, match=r"RGB of 8 bits, \(T, H, W, 3\), is expected; convert grey and transparent"):
        get_network(name).prepare(np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match=r"type float32: RGB of 8 bits"):
        get_network(name).prepare(np.zeros((1, 64, 64, 3), np.float32))
