"""Resizing against torch, Pillow and OpenCV themselves."""

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from mer_jax.errors import UserError
from mer_jax.extractors.resize import resize_frames, resize_grid, seen_area, weights

SIZES = [
    (7, 7, 16, 16),
    (37, 37, 16, 16),
    (16, 16, 37, 37),
    (128, 128, 14, 9),
    (5, 9, 12, 3),
    (1, 1, 4, 4),
    (4, 6, 4, 6),
]


@pytest.mark.parametrize("kernel, mode", [("linear", "bilinear"), ("cubic", "bicubic")])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("rows, columns, height, width", SIZES)
def test_grids_resize_as_torch_does(rng, kernel, mode, antialias, rows, columns, height, width):
    grid = rng.normal(size=(rows, columns, 5)).astype(np.float32)
    ours = resize_grid(jnp.asarray(grid), height, width, kernel, antialias)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(grid.transpose(2, 0, 1)[None]), (height, width), mode=mode, antialias=antialias
    )[0]
    assert ours.shape == (height, width, 5) and ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs.numpy().transpose(1, 2, 0), rtol=0, atol=1e-5)


def test_a_crop_is_the_corner_of_the_whole(rng):
    grid = jnp.asarray(rng.normal(size=(9, 9, 3)), jnp.float32)
    whole = resize_grid(grid, 5, 5, "linear", False)
    np.testing.assert_allclose(resize_grid(grid, 5, 5, "linear", False, crop=(3, 4)), whole[:3, :4], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", ["linear", "cubic"])
@pytest.mark.parametrize("antialias", [False, True])
def test_weights_keep_constants_and_the_middle(kernel, antialias):
    for size, target in ((37, 16), (16, 37), (3, 40)):
        table = weights(size, target, kernel, antialias)
        np.testing.assert_allclose(table.sum(axis=1), 1, atol=1e-12)
        np.testing.assert_allclose(table, table[::-1, ::-1], atol=1e-5)  # no side is favoured


def test_half_a_pixel_by_hand():
    # 2 -> 4: the centres 0.25, 0.75, 1.25, 1.75 of elements with centres 0.5 and 1.5.
    np.testing.assert_allclose(weights(2, 4, "linear", False), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    # 4 -> 2, averaged by a triangle two elements wide: 7/8 of its mass lie inside at either border.
    np.testing.assert_allclose(weights(4, 2, "linear", True), np.array([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7, atol=1e-12)


@pytest.fixture
def frames(rng):
    """Smooth colours with sharp edges and noise, (2, 50, 40, 3)."""
    y, x = np.mgrid[:50, :40]
    image = np.stack([120 + 100 * np.sin(x / 7), 255 * (x > y), 5 * y], axis=-1)
    return (image + rng.normal(size=(2, *image.shape)) * 20).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("how, filter", [("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC)])
@pytest.mark.parametrize("size", [(64, 48), (20, 30), (50, 40)])
def test_frames_resize_as_pillow_does(frames, how, filter, size):
    resized, found = resize_frames(frames, size, how)
    assert resized.dtype == np.uint8 and found.dtype == bool and found.tolist() == [True, True]
    for frame, ours in zip(frames, resized, strict=True):
        np.testing.assert_array_equal(ours, np.asarray(Image.fromarray(frame).resize(size[::-1], filter)))


@pytest.mark.parametrize("size", [(64, 48), (20, 30), (50, 40)])
def test_unfiltered_frames_resize_as_torch_and_opencv_do(frames, size):
    resized, _ = resize_frames(frames, size, "bilinear_unfiltered")
    assert resized.dtype == np.float32
    scaled = torch.from_numpy(frames.transpose(0, 3, 1, 2).copy()).float() / 255
    theirs = torch.nn.functional.interpolate(scaled, size, mode="bilinear").numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(resized, theirs, rtol=0, atol=5e-6)
    other = cv2.resize(frames[1].astype(np.float32) / 255, size[::-1], interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(resized[1], other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("height, width", [(50, 40), (40, 50), (33, 33), (41, 97)])
def test_shorter_side_and_centre(rng, height, width):
    """Pillow's resize and crop, with the rounding of the processors of transformers: the longer side down."""
    frames = rng.integers(0, 256, (1, height, width, 3), np.uint8)
    short, long = sorted((height, width))
    long = int(64 * long / short)
    inner = (64, long) if height <= width else (long, 64)
    whole = Image.fromarray(frames[0]).resize(inner[::-1], Image.BICUBIC)
    top, left = (inner[0] - 56) // 2, (inner[1] - 56) // 2
    ours, _ = resize_frames(frames, (56, 56), "bicubic", shortest_edge=64)
    np.testing.assert_array_equal(ours[0], np.asarray(whole)[top : top + 56, left : left + 56])


@pytest.mark.parametrize("how", ["bilinear", "bicubic", "bilinear_unfiltered"])
def test_one_pixel_is_an_image(how):
    frames = np.array([[[[0, 51, 255]]]], np.uint8)
    resized, _ = resize_frames(frames, (4, 6), how)
    scale = 255 if how == "bilinear_unfiltered" else 1
    np.testing.assert_allclose(resized, np.broadcast_to(frames / scale, (1, 4, 6, 3)), atol=1e-6)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 8, 8), np.uint8),
        np.zeros((2, 8, 8, 1), np.uint8),
        np.zeros((2, 8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((2, 0, 8, 3), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
    ],
)
def test_frames_that_are_not_rgb_are_one_line(frames):
    with pytest.raises(UserError, match=r"frames of shape .* RGB of 8 bits, \(T, H, W, 3\), is expected") as caught:
        resize_frames(frames, (4, 4), "bilinear")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("height, width", [(50, 40), (40, 50), (33, 33), (41, 97)])
@pytest.mark.parametrize("shortest_edge", [0, 64])
def test_the_area_that_is_seen_is_where_its_pixels_come_from(height, width, shortest_edge):
    """A crop whose pixels tell their row or their column: those of the result are at the middles of equal parts."""
    rows, columns = np.mgrid[:height, :width]
    frames = np.stack([2 * rows, 2 * columns, 0 * rows], axis=-1)[None].astype(np.uint8)
    ours, _ = resize_frames(frames, (56, 48), "bilinear_unfiltered", shortest_edge=shortest_edge)
    top, left, bottom, right = seen_area((height, width), (56, 48), shortest_edge=shortest_edge)
    if not shortest_edge:
        assert (top, left, bottom, right) == (0, 0, height, width)
    for axis, (start, stop, size, count) in enumerate(((top, bottom, height, 56), (left, right, width, 48))):
        middles = start + (stop - start) * (np.arange(count) + 0.5) / count - 0.5  # pixel n has its middle at n + 0.5
        found = 255 / 2 * np.take(ours[0, ..., axis], 3, axis=1 - axis)
        inner = (middles >= 0) & (middles <= size - 1)  # beyond the outermost middles there is nothing between pixels
        assert inner.sum() > count / 2
        np.testing.assert_allclose(found[inner], middles[inner], atol=1e-3)
