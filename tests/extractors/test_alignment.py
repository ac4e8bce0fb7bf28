"""Alignment against scikit-image, Pillow and OpenCV, and features of the same image to the end."""

import functools
import importlib.util
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from mer_jax.errors import UserError
from mer_jax.extractors import alignment, ddfa_v3, face_regressor, faceverse
from mer_jax.extractors.networks import get_network
from mer_jax.extractors.resnet import Architecture

_spec = importlib.util.spec_from_file_location("torch_faces", Path(__file__).parents[1] / "torch_faces.py")
torch_faces = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(torch_faces)

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


def smirk_reference(frame, points):
    """The same square interpolated by hand, in double precision, before it is cut to whole numbers."""
    low, high = points.min(0), points.max(0)
    side = int(np.mean(high - low) * 1.4)
    bordered = np.pad(frame.astype(float), ((side, side), (side, side), (0, 0)))  # black, as far as it can reach
    x, y = ((low + high) / 2 - side / 2 + side)[:, None] + np.linspace(0, side, 224)
    left, upper = np.floor(x).astype(int), np.floor(y).astype(int)
    across, down = (x - left)[None, :, None], (y - upper)[:, None, None]
    above, below = (
        bordered[row][:, left] * (1 - across) + bordered[row][:, left + 1] * across for row in (upper, upper + 1)
    )
    return above * (1 - down) + below * down


def deep3d_reference(frame, points):
    """All ten equations at once, and Pillow's resize and crop."""
    eyes = (points[33] + points[133]) / 2, (points[362] + points[263]) / 2
    five = np.array([*eyes, points[1], points[61], points[291]])
    five[:, 1] = frame.shape[0] - 1 - five[:, 1]
    equations = np.zeros((5, 2, 8))
    equations[:, 0, :3] = equations[:, 1, 4:7] = alignment.STANDARD_FACE
    equations[:, 0, 3] = equations[:, 1, 7] = 1
    solution, *_ = np.linalg.lstsq(equations.reshape(10, 8), five.reshape(10), rcond=None)
    ratio = 102 / ((np.sqrt(sum(solution[:3] ** 2)) + np.sqrt(sum(solution[4:7] ** 2))) / 2)
    height, width = frame.shape[:2]
    image = Image.fromarray(frame).resize((int(width * ratio), int(height * ratio)), resample=Image.BICUBIC)
    left = int(image.width / 2 - 112 + (solution[3] - width / 2) * ratio)
    upper = int(image.height / 2 - 112 + (height / 2 - solution[7]) * ratio)
    result = np.zeros((224, 224, 3), np.uint8)  # rows and columns of the image that fall into the square
    rows, columns = np.arange(upper, upper + 224), np.arange(left, left + 224)
    inside = np.ix_((rows >= 0) & (rows < image.height), (columns >= 0) & (columns < image.width))
    result[inside] = np.asarray(image)[
        np.ix_(rows[(rows >= 0) & (rows < image.height)], columns[(columns >= 0) & (columns < image.width)])
    ]
    return result


def faceverse_reference(frame, points):
    """On a canvas so large that nothing is cut off."""
    x0, y0, x1, y1 = (int(value) for value in (*points.min(0), *points.max(0)))
    half = max(x1 - x0, y1 - y0) // 2
    x, y, length = (x0 + x1) // 2, (y0 + y1) // 2, 2 * half
    room = 2 * max(frame.shape)
    canvas = np.zeros((frame.shape[0] + 2 * room, frame.shape[1] + 2 * room, 3), np.uint8)
    canvas[room:-room, room:-room] = frame
    left, right = int(x - length * 0.65), int(x + length * 0.65)
    upper, lower = int(y - length * 0.7), int(y + length * 0.6)
    return cv2.resize(canvas[room + upper : room + lower, room + left : room + right], (256, 256))


REFERENCES = dict(zip(NAMES, (smirk_reference, deep3d_reference, faceverse_reference), strict=True))
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


@pytest.mark.parametrize("name", ["3ddfa_v3", "faceverse_v4"])
def test_features_of_a_photograph_from_end_to_end(tmp_path, name):
    """Crops to features as the authors' preprocessing and PyTorch's network make them; the backbone is shortened."""
    blocks = (1, 1, 1, 1)
    heads = {"3ddfa_v3": torch_faces.DDFA_HEADS, "faceverse_v4": torch_faces.FACEVERSE_HEADS}[name]
    torch.manual_seed(0)
    network = torch_faces.randomise(torch_faces.TorchRegressor(heads, blocks))
    module = {"3ddfa_v3": ddfa_v3, "faceverse_v4": faceverse}[name]
    torch.save({"net_recon": network.state_dict()}, tmp_path / "net.pth")
    variables = face_regressor.load(
        tmp_path / "net.pth", name=name, heads=module.HEADS, architecture=Architecture(blocks)
    )
    frame = np.ascontiguousarray(data.astronaut()[10:165, 120:341])
    extractor = get_network(name)
    images, found = extractor.prepare(frame[None])
    ours = functools.partial(face_regressor.coefficients, columns=module.EXPRESSION, architecture=Architecture(blocks))
    (features,) = np.asarray(jax.jit(ours)(variables, images))
    (points,) = alignment.find_landmarks(frame[None])
    image = torch.from_numpy(REFERENCES[name](frame, points)).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        (expected,) = network(image).numpy()[:, module.EXPRESSION]
    assert found.all() and np.abs(features - expected).max() <= 1e-3 * np.abs(expected).max()
