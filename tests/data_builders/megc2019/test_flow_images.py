"""From pictures to flow images: hand-computed stretches, known displacements."""

import cv2
import numpy as np
import pytest

from data_builders.megc2019.flow_images import as_image, flow_maps
from mer_jax.clips.flow import FlowConfig


def test_each_channel_of_each_map_is_stretched_by_itself():
    maps = np.zeros((2, 2, 2, 3), np.float32)
    maps[0, ..., 0] = [[-1, 0], [1, 3]]  # 4 px from end to end
    maps[0, ..., 1] = [[5, 5], [5, 5]]
    maps[0, ..., 2] = [[0, 0.1], [0, 0]]
    maps[1, ..., 0] = [[10, 20], [10, 10]]
    image = as_image(maps)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image[0, ..., 0], [[0, 64], [128, 255]])  # 63.75 and 127.5, to the even one
    np.testing.assert_array_equal(image[0, ..., 1], 0)
    np.testing.assert_array_equal(image[0, ..., 2], [[0, 255], [0, 0]])
    np.testing.assert_array_equal(image[1, ..., 0], [[0, 255], [0, 0]])


@pytest.mark.parametrize("method", ["farneback", "tvl1"])
def test_maps_of_a_known_movement(method, rng):
    smooth = cv2.GaussianBlur(rng.uniform(0, 255, (84, 84)), (0, 0), 3)
    picture = ((smooth - smooth.min()) / np.ptp(smooth) * 255).astype(np.uint8)

    def stretched(by):
        # x -> x + by (x - 41.5): u grows by `by` px per px, which is the strain.
        move = np.array([[1 + by, 0, -by * 41.5], [0, 1, 0]])
        return cv2.warpAffine(picture, move, (84, 84), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)

    maps = flow_maps(np.stack([picture, stretched(0.04), picture]), FlowConfig(method=method), 28)
    assert maps.shape == (2, 28, 28, 3) and maps.dtype == np.float32
    inside = slice(8, 20)
    # The middle of column j of 28 lies at 3 j + 1 of 84.
    expected = 0.04 * (3 * np.arange(28) + 1 - 41.5)[inside]
    np.testing.assert_allclose(maps[0, inside, inside, 0].mean(0), expected, atol=0.08)
    np.testing.assert_allclose(maps[1, inside, inside, 0].mean(0), -expected, atol=0.08)
    assert abs(maps[:, inside, inside, 1]).max() < 0.1
    np.testing.assert_allclose(maps[:, inside, inside, 2].mean(), 0.04, atol=0.015)


def test_no_motion_is_zero_and_stays_so():
    picture = np.random.default_rng(0).integers(0, 256, (56, 56), np.uint8)
    maps = flow_maps(np.stack([picture, picture]), FlowConfig(), 28)
    assert not maps.any() and not as_image(maps).any()
