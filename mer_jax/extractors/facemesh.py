"""Geometry without a morphable model: how MediaPipe's face mesh deforms from the onset on.

The mesh of every frame is brought into the pose of the clip's first frame by the similarity (rotation,
translation and scale in 3D) that fits best at points which facial muscles hardly move. What is left is
displacement of the face's own surface; it is told along the face's own axes and in units of its own size, so
that neither the pose nor the size of a face, nor the camera's side, changes what a feature means.
"""

import contextlib
from collections.abc import Iterator

import numpy as np

from mer_jax.clips import faces
from mer_jax.extractors.base import Extractor, Session

# Points over bone with little muscle in between: bridge and tip of the nose, eye corners, temples, upper
# forehead.
RIGID = (
    *(168, 6, 197, 195, 5, 4),
    *(33, 133, 362, 263),
    *(127, 162, 21, 356, 389, 251),
    *(10, 109, 67, 103, 54, 338, 297, 332, 284),
)
RIGHT_EYE, LEFT_EYE = 33, 263  # outer corners
FOREHEAD, CHIN = 10, 152


def displacements(landmarks: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Removes the pose from landmarks of a clip.

    Invariant to a similarity transform applied to all frames (a differently placed camera), and to one
    applied to any single frame (a moving head).

    Args:
        landmarks: (T, N, 3), N = 468 face mesh points, any unit; frames without a face as NaN.
        weights: (N,) how much each point counts in finding the pose, 0 to ignore it; 1 at :data:`RIGID` and 0
            elsewhere unless given.

    Returns:
        (T, N, 3), displacement of each point from the first frame with a face, along the axes (towards the
        left eye, towards the chin, into the head) of that frame's face, in units of the distance of its outer
        eye corners. NaN where the landmarks are.
    """
    landmarks = np.asarray(landmarks, np.float64)
    if weights is None:
        weights = np.zeros(landmarks.shape[1])
        weights[list(RIGID)] = 1
    found = ~np.isnan(landmarks).any(axis=(1, 2))  # (T,)
    result = np.full_like(landmarks, np.nan)
    if not found.any():
        return result
    onset = landmarks[found.argmax()]  # (N, 3)
    moved = align(landmarks[found], onset, weights)

    right, left = onset[RIGHT_EYE], onset[LEFT_EYE]
    across = (left - right) / np.linalg.norm(left - right)
    down = onset[CHIN] - onset[FOREHEAD]
    down = down - (down @ across) * across
    down = down / np.linalg.norm(down)
    axes = np.stack([across, down, np.cross(across, down)])  # (3, 3), one axis per row
    result[found] = np.einsum("tnj,ij->tni", moved - onset, axes) / np.linalg.norm(left - right)
    return result


def align(shapes: np.ndarray, target: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Moves each shape onto a target by the similarity of least weighted squares, without reflection.

    Umeyama, "Least-Squares Estimation of Transformation Parameters Between Two Point Patterns", PAMI 1991.

    Args:
        shapes: (T, N, 3) points.
        target: (N, 3) points.
        weights: (N,) non-negative weights of the points.

    Returns:
        (T, N, 3), the shapes in the target's pose and scale.
    """
    weights = weights / weights.sum()
    centre = np.einsum("n,tni->ti", weights, shapes)[:, None]  # (T, 1, 3)
    target_centre = np.einsum("n,ni->i", weights, target)
    shapes, target = shapes - centre, target - target_centre
    covariance = np.einsum("n,ni,tnj->tij", weights, target, shapes)  # (T, 3, 3)
    left, values, right = np.linalg.svd(covariance)
    signs = np.ones_like(values)
    signs[:, -1] = np.sign(np.linalg.det(left) * np.linalg.det(right))
    rotation = np.einsum("tik,tk,tkj->tij", left, signs, right)  # (T, 3, 3)
    scale = (values * signs).sum(axis=1) / np.einsum("n,tni,tni->t", weights, shapes, shapes)
    return scale[:, None, None] * np.einsum("tij,tnj->tni", rotation, shapes) + target_centre


@contextlib.contextmanager
def _open() -> Iterator[Session]:
    # Every frame by itself. With tracking the points are calmer (a fifth less jitter), but what is smoothed
    # away is the expression: on the demo clips, labels are told from the apex with an AUROC of 0.66 instead
    # of 0.79.
    with faces.FaceMesh(tracking=False) as mesh:

        def session(frames: np.ndarray) -> np.ndarray:
            landmarks = np.full((len(frames), faces.NUM_LANDMARKS, 3), np.nan, np.float32)
            for index, frame in enumerate(frames):
                points = mesh.landmarks(frame)
                if points is not None:
                    landmarks[index] = points
            # (T, 468, 3) -> (T, 1404)
            return displacements(landmarks).reshape(len(frames), -1).astype(np.float32)

        yield session


EXTRACTOR = Extractor(
    name="facemesh",
    modality="geometry",
    dim=faces.NUM_LANDMARKS * 3,
    licence=f"{faces.LICENCE} (MediaPipe face mesh)",
    preprocessing=(
        f"468 MediaPipe landmarks per crop, each frame by itself; Procrustes to the first over {len(RIGID)} "
        "rigid points; displacement from it along the face's axes (left eye, chin, inwards), in distances of "
        "the outer eye corners"
    ),
    open=_open,
)
