"""The vectorised HOG against scikit-image's, and what its signed form must do."""

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
    found = hog(image, orientations=orientations, cell=cell, block=block)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_equals_scikit_image_on_fractional_grey(rng):
    image = cv2.GaussianBlur(rng.normal(size=(128, 128)).astype(np.float32), (0, 0), 2)
    expected = reference_hog(image.astype(np.float64), pixels_per_cell=(32, 32), cells_per_block=(2, 2))
    np.testing.assert_allclose(hog(image), expected, atol=1e-5, rtol=0)


def test_flat_image_is_zero():
    assert not hog(np.full((64, 64), 7)).any()


def test_signed_orientations_tell_an_inverted_image_apart(face):
    inverted = 255 - face
    np.testing.assert_allclose(hog(face), hog(inverted), atol=1e-6)
    signed = hog(face, signed=True, orientations=18).reshape(-1, 18)
    turned = np.roll(hog(inverted, signed=True, orientations=18).reshape(-1, 18), 9, axis=1)
    assert np.abs(signed - hog(inverted, signed=True, orientations=18).reshape(-1, 18)).max() > 0.1
    # A gradient of exactly 180 degrees lies on a bin's edge; nothing else may differ.
    np.testing.assert_allclose(signed, turned, atol=0.02)


def test_light_does_not_matter(face):
    np.testing.assert_allclose(hog(face), hog(face * 0.5 + 20), atol=1e-3)


def test_too_small_image():
    with pytest.raises(ValueError, match="smaller than one block"):
        hog(np.zeros((63, 100)))


def test_extractor_maps_frames_one_by_one(rng):
    extractor = get_extractor("hog")
    frames = rng.integers(0, 256, (3, 256, 256, 3), dtype=np.uint8)
    with extractor.open() as session:
        features, again = session(frames), session(frames[1:])
    assert features.shape == (3, extractor.dim) == (3, 1296) and features.dtype == np.float32
    np.testing.assert_array_equal(features[1:], again)
    assert extractor.modality == "appearance"


@pytest.mark.parametrize("size", [100, 224, 500])
def test_grey_keeps_fractions_and_range(rng, size):
    frame = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    image = grey(frame)
    assert image.shape == (224, 224) and image.dtype == np.float32
    assert image.min() >= 0 and image.max() <= 255
    assert np.any(image != image.round())
