"""The vectorised HOG against scikit-image's, and what its signed form must do."""

import math

import cv2
import numpy as np
import pytest
from skimage import data
from skimage.feature import hog as reference_hog

from mer_jax.extractors.base import get_extractor
from mer_jax.extractors.hog import grey, hog


@pytest.fixture(scope="module")
def face():
    return cv2.cvtColor(data.astronaut(), cv2.COLOR_RGB2GRAY)[:230, 100:340]


@pytest.mark.parametrize("shape", [(224, 224), (96, 161), (70, 64)])
@pytest.mark.parametrize("cell, block, orientations", [(32, 2, 9), (8, 3, 9), (16, 1, 8), (20, 2, 6)])
def test_equals_scikit_image(face, shape, cell, block, orientations):
    image = face[: shape[0], : shape[1]]
    expected = reference_hog(
        image.astype(np.float64),
        orientations=orientations,
        pixels_per_cell=(cell, cell),
        cells_per_block=(block, block),
        block_norm="L2-Hys",
    )
    found = hog(image, orientations=orientations, cell=cell, block=block, interpolate=False)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_equals_scikit_image_on_fractional_grey(rng):
    image = cv2.GaussianBlur(rng.normal(size=(128, 128)).astype(np.float32), (0, 0), 2)
    expected = reference_hog(image.astype(np.float64), pixels_per_cell=(32, 32), cells_per_block=(2, 2))
    np.testing.assert_allclose(hog(image, interpolate=False), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("signed", [False, True])
def test_interpolated_votes_equal_plain_loops(rng, signed):
    """Each pixel's vote, one at a time, as Dalal and Triggs describe it."""
    cell, orientations, turn = 6, 5, 360 if signed else 180
    image = rng.normal(size=(20, 26))
    rows, columns = 3, 4
    histogram = np.zeros((rows, columns, orientations))
    for y in range(rows * cell):
        for x in range(columns * cell):
            down = image[y + 1, x] - image[y - 1, x] if 0 < y < 19 else 0.0
            right = image[y, x + 1] - image[y, x - 1] if 0 < x < 25 else 0.0
            angle = math.degrees(math.atan2(down, right)) % turn
            for r in range(rows):
                for c in range(columns):
                    near_row = 1 - abs((y + 0.5) / cell - (r + 0.5))
                    near_column = 1 - abs((x + 0.5) / cell - (c + 0.5))
                    for k in range(orientations):
                        away = abs(angle * orientations / turn - (k + 0.5))
                        near = 1 - min(away, orientations - away)
                        share = max(near_row, 0) * max(near_column, 0) * max(near, 0)
                        histogram[r, c, k] += share * math.hypot(down, right) / cell**2
    expected = []
    for r in range(rows - 1):
        for c in range(columns - 1):
            block = histogram[r : r + 2, c : c + 2].ravel()
            block = np.minimum(block / math.sqrt((block**2).sum() + 1e-10), 0.2)
            expected.append(block / math.sqrt((block**2).sum() + 1e-10))
    found = hog(image, cell=cell, orientations=orientations, signed=signed)
    np.testing.assert_allclose(found, np.concatenate(expected), atol=1e-5, rtol=0)


def test_small_motions_make_smaller_changes_when_votes_are_shared(face):
    def change(shift, interpolate):
        move = np.array([[1, 0, shift], [0, 1, 0]], np.float32)
        moved = cv2.warpAffine(face.astype(np.float32), move, face.shape[::-1], borderMode=cv2.BORDER_REFLECT)
        return np.linalg.norm(hog(moved, interpolate=interpolate) - hog(face, interpolate=interpolate))

    # From 0.25 to 1 px a smooth feature changes in proportion; a hard one changes at once.
    assert change(0.25, True) / change(1.0, True) < change(0.25, False) / change(1.0, False)


def test_flat_image_is_zero():
    assert not hog(np.full((64, 64), 7)).any()


def test_signed_orientations_tell_an_inverted_image_apart(face):
    inverted = 255 - face
    np.testing.assert_allclose(hog(face), hog(inverted), atol=1e-4)
    signed = hog(face, signed=True, orientations=18).reshape(-1, 18)
    turned = np.roll(hog(inverted, signed=True, orientations=18).reshape(-1, 18), 9, axis=1)
    assert np.abs(signed - hog(inverted, signed=True, orientations=18).reshape(-1, 18)).max() > 0.1
    np.testing.assert_allclose(signed, turned, atol=1e-4)


def test_light_does_not_matter(face):
    np.testing.assert_allclose(hog(face), hog(face * 0.5 + 20), atol=1e-3)


def test_too_small_image():
    with pytest.raises(ValueError, match="smaller than one block"):
        hog(np.zeros((63, 100)))


def test_extractor_tells_the_change_from_the_first_frame(rng):
    extractor = get_extractor("hog")
    frames = rng.integers(0, 256, (3, 256, 256, 3), dtype=np.uint8)
    with extractor.open() as session:
        features, again = session(frames), session(frames[:2])
    assert features.shape == (3, extractor.dim) == (3, 1296) and features.dtype == np.float32
    np.testing.assert_array_equal(features[:2], again)
    np.testing.assert_array_equal(features[2], hog(grey(frames[2])) - hog(grey(frames[0])))
    assert not features[0].any()
    assert extractor.modality == "appearance"


@pytest.mark.parametrize("size", [100, 224, 500])
def test_grey_keeps_fractions_and_range(rng, size):
    frame = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    image = grey(frame)
    assert image.shape == (224, 224) and image.dtype == np.float32
    assert image.min() >= 0 and image.max() <= 255
    assert np.any(image != image.round())
