"""Faces cut out as the regressors of face models want them, from MediaPipe's landmarks.

Each network was trained on faces brought to one place and size by its authors' own rule; these are those rules, number
by number. The authors' detectors come with weights of their own and are replaced by the face mesh that everything else
here uses: SMIRK and FaceVerse take the same points from a newer MediaPipe, 3DDFA-V3 takes five points of a RetinaFace.
Every frame is aligned by itself.
"""

from collections.abc import Callable

import numpy as np

from mer_jax.clips.faces import NUM_LANDMARKS, FaceMesh
from mer_jax.extractors.networks import checked_frames

Crop = Callable[[np.ndarray, np.ndarray], np.ndarray | None]

# Deep3DFaceRecon's standard face (Deng et al. 2019, ``similarity_Lm3D_all.mat``): eyes, tip of the nose and corners of
# the mouth as they come from left to right in the image, x to the right, y up, z towards the camera, in units of about
# 10 cm. The file holds 68 points, of which the authors' code takes these five, an eye being the mean of its corners;
# they are printed in many public ports of the code.
STANDARD_FACE = np.array(
    [
        [-0.31148657, 0.29036078, 0.13377953],
        [0.30979887, 0.28972036, 0.13179526],
        [0.0032535, -0.04617932, 0.55244243],
        [-0.25216928, -0.38133916, 0.22405732],
        [0.2484662, -0.38128236, 0.22235769],
    ]
)
# The same five among the points of the face mesh: corners of either eye, tip of the nose, corners of the mouth.
FIVE_POINTS = ((33, 133), (362, 263), (1,), (61,), (291,))
MIN_CONFIDENCE = 0.5  # of the face detector; it merges all boxes above this, so that it moves the points
DEEP3D_SCALE = 102.0  # pixels of the crop to a unit of the standard face
# More than this, and five points of a tiny face are no measure; the resized frame would fill the memory, too.
_MOST_ENLARGED = 16.0

SQUARE_SCALE = 1.4
FACEVERSE_SIDES = (0.65, 0.7, 0.65, 0.6)  # left, up, right, down of the centre, in sides of the landmarks' square


def describe(min_confidence: float = MIN_CONFIDENCE) -> str:
    """What :func:`find_landmarks` does, in words for :attr:`mer_jax.extractors.networks.Network.preprocessing`."""
    return f"MediaPipe face mesh, each frame by itself, faces from confidence {min_confidence:g}"


def find_landmarks(frames: np.ndarray, min_confidence: float = MIN_CONFIDENCE) -> np.ndarray:
    """Finds the face mesh in each frame by itself.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
        min_confidence: Lowest score in [0, 1] of the face detector.

    Returns:
        (T, 468, 2) float64, x to the right and y down in pixels from the upper left corner; NaN without a face.

    Raises:
        UserError: The frames are not RGB.
    """
    frames = checked_frames(frames)
    landmarks = np.full((len(frames), NUM_LANDMARKS, 2), np.nan)
    with FaceMesh(tracking=False, min_confidence=min_confidence) as mesh:
        for frame, place in zip(frames, landmarks, strict=True):
            points = mesh.landmarks(np.ascontiguousarray(frame))
            if points is not None:
                place[...] = points[:, :2]
    return landmarks


def prepare(
    frames: np.ndarray, *, crop: Crop, size: int, min_confidence: float = MIN_CONFIDENCE
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the face out of each frame of a sample.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
        crop: Frame (H, W, 3) and points (468, 2) to the face (size, size, 3), or None where there is none.
        size: Side of the result.
        min_confidence: As :func:`find_landmarks`.

    Returns:
        (T, size, size, 3) uint8 RGB, black without a face, and ``found`` (T,) bool.

    Raises:
        UserError: The frames are not RGB.
    """
    landmarks = find_landmarks(frames, min_confidence)
    images = np.zeros((len(landmarks), size, size, 3), np.uint8)
    found = np.zeros(len(landmarks), bool)
    for index, points in enumerate(landmarks):
        face = None if np.isnan(points).any() else crop(frames[index], points)
        if face is not None:
            images[index], found[index] = face, True
    return images, found


def square_crop(frame: np.ndarray, points: np.ndarray, *, size: int, scale: float = SQUARE_SCALE) -> np.ndarray | None:
    """SMIRK's rule: a square about the landmarks' box, ``scale`` times the mean of its sides.

    The square's corners come to the centres of the corner pixels; in between it is interpolated linearly, black
    outside the frame. The result is cut, not rounded, to whole numbers, so that the last bits of the interpolation
    show: it is scikit-image's, as SMIRK's is, similarity from three corners included.

    Args:
        frame: (H, W, 3) uint8.
        points: (N, 2), x to the right and y down in pixels.
        size: Side of the result.
        scale: What the box grows by.

    Returns:
        (size, size, 3) uint8; None where the landmarks span less than a pixel.
    """
    from skimage.transform import estimate_transform, warp

    low, high = points.min(axis=0), points.max(axis=0)
    side = int((high - low).mean() * scale)
    if side < 1:
        return None
    centre = high - (high - low) / 2
    corners = np.array([[0, 0], [0, 1], [1, 0]])
    similarity = estimate_transform("similarity", centre + (corners - 0.5) * side, corners * (size - 1))
    return warp(frame, similarity.inverse, output_shape=(size, size), preserve_range=True).astype(np.uint8)


def five_points(points: np.ndarray) -> np.ndarray:
    """The points of :data:`STANDARD_FACE` from a face mesh: (468, 2) to (5, 2)."""
    return np.stack([points[list(group)].mean(axis=0) for group in FIVE_POINTS])


def deep3d_crop(frame: np.ndarray, points: np.ndarray, *, size: int) -> np.ndarray | None:
    """Deep3DFaceRecon's and 3DDFA-V3's rule: five points to a standard face, by least squares.

    The scaled orthographic camera that best takes the standard face to the five points gives a scale and a centre. The
    whole frame is resized so that a unit of the standard face has 102 pixels, and a square cut out about the centre;
    all lengths are cut to whole pixels on the way, as the authors' code does it.

    Args:
        frame: (H, W, 3) uint8.
        points: (468, 2), x to the right and y down in pixels.
        size: Side of the result.

    Returns:
        (size, size, 3) uint8, black outside the frame; None where the face is too small to tell.
    """
    from PIL import Image

    height, width = frame.shape[:2]
    found = five_points(points).astype(np.float32)
    found[:, 1] = height - 1 - found[:, 1]  # up
    # Each image axis by itself: (5, 4) homogeneous points of the face times (4, 2) rows of the camera.
    face = np.column_stack([STANDARD_FACE, np.ones(len(STANDARD_FACE))])
    camera = np.linalg.lstsq(face, found.astype(np.float64), rcond=None)[0]
    pixels = np.linalg.norm(camera[:3], axis=0).mean()  # of the frame to a unit of the face
    if pixels * _MOST_ENLARGED < DEEP3D_SCALE:
        return None
    scale = DEEP3D_SCALE / pixels
    across, up = camera[3]
    wide, high = int(width * scale), int(height * scale)
    if min(wide, high) < 1:
        return None
    left = int(wide / 2 - size / 2 + (across - width / 2) * scale)
    top = int(high / 2 - size / 2 + (height / 2 - up) * scale)
    image = Image.fromarray(np.ascontiguousarray(frame)).resize((wide, high), Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def faceverse_crop(frame: np.ndarray, points: np.ndarray, *, size: int) -> np.ndarray | None:
    """FaceVerse v4's rule: a box about the square of the landmarks, higher above its centre than below.

    Args:
        frame: (H, W, 3) uint8.
        points: (N, 2), x to the right and y down in pixels.
        size: Side of the result.

    Returns:
        (size, size, 3) uint8, black outside the frame; None where the landmarks span less than two pixels.
    """
    import cv2

    low, high = points.min(axis=0).astype(int), points.max(axis=0).astype(int)
    half = int((high - low).max()) // 2
    if half < 1:
        return None
    centre = (low + high) // 2
    left, top, right, bottom = (
        int(place + sign * 2 * half * share)
        for place, sign, share in zip(np.tile(centre, 2), (-1, -1, 1, 1), FACEVERSE_SIDES, strict=True)
    )
    height, width = frame.shape[:2]
    above, before = max(0, -top), max(0, -left)
    below, behind = max(0, bottom - height), max(0, right - width)
    frame = cv2.copyMakeBorder(frame, above, below, before, behind, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    return cv2.resize(frame[top + above : bottom + above, left + before : right + before], (size, size))
