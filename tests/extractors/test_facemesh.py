"""Pose normalisation against SciPy, its invariances, and the extractor on a photograph."""

import cv2
import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from skimage import data

from mer_jax.clips import faces
from mer_jax.extractors.base import fill_missing, get_extractor
from mer_jax.extractors.facemesh import RIGID, align, displacements


@pytest.fixture(scope="module")
def crop():
    return np.ascontiguousarray(data.astronaut()[40:240, 120:320])


@pytest.fixture(scope="module")
def face(crop):
    with faces.FaceMesh() as mesh:
        return mesh.landmarks(crop).astype(np.float64)


def similarity(rng, points):
    rotation = Rotation.from_rotvec(rng.normal(size=3) * 0.4).as_matrix()
    return rng.uniform(0.5, 2) * points @ rotation.T + rng.normal(size=3) * 50


def test_align_equals_scipy(rng):
    shapes, target = rng.normal(size=(4, 30, 3)), rng.normal(size=(30, 3))
    weights = rng.uniform(size=30)
    moved = align(shapes, target, weights)
    for shape, found in zip(shapes, moved, strict=True):
        centre, target_centre = np.average(shape, 0, weights), np.average(target, 0, weights)
        rotation, _ = Rotation.align_vectors(target - target_centre, shape - centre, weights=weights)
        turned = rotation.apply(shape - centre)
        scale = np.average(((target - target_centre) * turned).sum(1), weights=weights) / np.average(
            (turned**2).sum(1), weights=weights
        )
        np.testing.assert_allclose(found, scale * turned + target_centre, atol=1e-10)


def test_align_does_not_reflect(rng):
    target = rng.normal(size=(10, 3))
    moved = align(target[None] * [1, 1, -1], target, np.ones(10))
    # Were a reflection allowed, the fit would be perfect.
    assert np.abs(moved[0] - target).max() > 0.1


def test_a_moving_head_is_no_displacement(rng, face):
    clip = np.stack([similarity(rng, face) for _ in range(5)])
    np.testing.assert_allclose(displacements(clip), 0, atol=1e-9)


def test_known_displacement_is_found_in_any_pose(rng, face):
    """A mouth corner pulled outwards by a tenth of the eye distance, under head motion, from any camera."""
    corner, unit = 291, np.linalg.norm(face[263] - face[33])
    smile = face.copy()
    smile[corner] += 0.1 * (face[263] - face[33])
    expected = np.zeros((2, 468, 3))
    expected[1, corner, 0] = 0.1
    clip = np.stack([face, similarity(rng, smile)])
    np.testing.assert_allclose(displacements(clip), expected, atol=1e-9)
    assert unit > 10
    camera = Rotation.from_rotvec(rng.normal(size=3)).as_matrix()
    np.testing.assert_allclose(displacements(3 * clip @ camera.T + 7), expected, atol=1e-9)


def test_axes_of_the_face(face):
    moved = face.copy()
    moved[13] = face[13] + 0.2 * (face[152] - face[10])
    across, down, inwards = displacements(np.stack([face, moved]))[1, 13]
    assert down > 0.1 and abs(across) < 0.1 * down and abs(inwards) < 0.1 * down


def test_missing_frames_stay_missing_and_do_not_disturb(rng, face):
    clip = np.stack([similarity(rng, face + rng.normal(size=face.shape)) for _ in range(4)])
    gone = np.full_like(clip[:1], np.nan)
    found = displacements(np.concatenate([gone, clip[:2], gone, clip[2:]]))
    assert np.isnan(found[[0, 3]]).all()
    np.testing.assert_allclose(found[[1, 2, 4, 5]], displacements(clip), atol=1e-12)
    filled, missing = fill_missing(found.reshape(6, -1).astype(np.float32))
    assert missing == 2 and np.abs(filled[0]).max() < 1e-9
    assert np.isnan(displacements(np.full((2, 468, 3), np.nan))).all()


def test_rigid_points_are_distinct_and_symmetric(face):
    assert len(set(RIGID)) == len(RIGID)
    # Half on each side of the nose, so that the pose does not lean.
    side = (face[list(RIGID)] - face[168]) @ (face[263] - face[33])
    assert abs(np.sum(side > 0) - np.sum(side < 0)) <= 7


def test_extractor_sees_no_motion_in_a_still_and_counts_lost_faces(crop):
    extractor = get_extractor("facemesh")
    nothing = np.zeros_like(crop)
    warmer = cv2.convertScaleAbs(crop, alpha=1.02)
    with extractor.open() as session:
        features = session(np.stack([crop, crop, nothing, warmer]))
        alone = session(np.stack([crop, warmer]))
    assert features.shape == (4, extractor.dim) == (4, 1404) and features.dtype == np.float32
    assert np.abs(features[:2]).max() < 1e-9 and np.isnan(features[2]).all()
    assert 0 < np.abs(features[3]).mean() < 0.02
    # A frame's features depend on no frame but the first.
    np.testing.assert_array_equal(features[3], alone[1])
