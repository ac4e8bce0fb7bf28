"""The face of the demo clips: a public-domain photograph as a relightable surface in 3D, seen by two cameras.

The photograph is lifted onto a square *canvas* on which the face is ``FACE_HEIGHT`` px high. Every canvas
pixel is a surface point (x right, y down, z into the scene, all in canvas px) whose depth follows the
MediaPipe FaceMesh landmarks. A *subject* is that surface under a smooth random change of shape, complexion
and light; a *camera* rotates, projects and inverts the map, so that each output pixel knows which canvas
point it shows.

Everything here is a pure function of its arguments, and no BLAS takes part: results are bitwise equal however
many threads render.
"""

import functools
from dataclasses import dataclass

import cv2
import numpy as np

from mer_jax.errors import UserError

FACE_HEIGHT = 224.0  # px from the highest to the lowest landmark; the scale on which all amplitudes are given
VIEW_SIZE = 320  # px, side of one view; the head fills it
CANVAS_SIZE = 416  # px; leaves a margin around the view for turned heads
CAMERA_YAW = 11.0  # degrees left and right: enough to show depth, little enough for the detector
CAMERA_DISTANCE = 5.0 * FACE_HEIGHT  # px; a portrait lens, so that moving towards the camera shows as growing

_CENTRE = (CANVAS_SIZE - 1) / 2
_DEPTH_CENTRE = 40.0  # px behind the mean face: about where a head turns
_SUBJECT_STREAM = 1  # keeps a subject's random numbers apart from a clip's
_LAMP = 0.35  # share of the directed light; the photograph's own light stays the greater part
_SIDE_DEPTH = 35.0  # px behind the mean face at which the surface levels off
_BACKGROUND_DEPTH = 50.0  # px; at its true distance, hair and wall would tear apart

# FaceMesh landmark numbers (right, left) used by the surface itself.
_OUTER_EYE = (33, 263)
_FACE_OVAL = (
    *(10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152),
    *(148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109),
)
_CHEEKS = (50, 280, 205, 425)


@dataclass(frozen=True)
class BaseFace:
    """The photograph on the canvas, S = ``CANVAS_SIZE``.

    Attributes:
        texture: (S, S, 3) float32 RGB in [0, 255].
        landmarks: (468, 3) float32, canvas px, z into the scene.
        depth: (S, S) float32, z of the surface in px, 0 at the mean of the face.
        head: (S, S) float32 in [0, 1]: how much a point follows the head (1 on the head, 0 far from it).
        skin: (S, S) float32 in [0, 1].
    """

    texture: np.ndarray
    landmarks: np.ndarray
    depth: np.ndarray
    head: np.ndarray
    skin: np.ndarray


@dataclass(frozen=True)
class Subject:
    """One virtual person, S = ``CANVAS_SIZE``.

    Attributes:
        surface: (S, S, 3) float32, where each canvas point is in 3D (px).
        texture: (S, S, 3) float32 RGB in [0, 255], lit.
        light: (3,) direction to the light (x right, y down, z into the scene), unit length, z < 0.
        furrows: How deep this person's skin folds, 1 on average.
    """

    surface: np.ndarray
    texture: np.ndarray
    light: np.ndarray
    furrows: float


@dataclass(frozen=True)
class HeadPose:
    """Rigid motion of the head: angles in degrees, (3,) shift in px (x right, y down, z into the scene)."""

    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)


def grid(size: int) -> np.ndarray:
    """(size, size, 2) float32 pixel coordinates (x, y)."""
    axis = np.arange(size, dtype=np.float32)
    return np.stack(np.meshgrid(axis, axis), axis=-1)


def sample(image: np.ndarray, at: np.ndarray, interpolation: int = cv2.INTER_LINEAR) -> np.ndarray:
    """Values of ``image`` (H, W[, C]) at real positions ``at`` (h, w, 2) in px, edges repeated."""
    return cv2.remap(
        image,
        np.ascontiguousarray(at[..., 0]),
        np.ascontiguousarray(at[..., 1]),
        interpolation,
        borderMode=cv2.BORDER_REPLICATE,
    )


def gradient(field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Central differences of ``field`` (H, W) along x and y."""
    return (
        cv2.filter2D(field, -1, np.float32([[-0.5, 0, 0.5]])),
        cv2.filter2D(field, -1, np.float32([[-0.5], [0], [0.5]])),
    )


@functools.lru_cache(maxsize=1)
def base_face() -> BaseFace:
    """The photograph with its surface; made once per process (about half a second)."""
    import skimage.data

    from mer_jax.clips.faces import FaceMesh

    photograph = skimage.data.astronaut()
    with FaceMesh() as mesh:
        found = mesh.landmarks(photograph)
    if found is None:
        raise UserError(
            "skimage.data.astronaut(): MediaPipe finds no face in it; install the versions that requirements.txt names"
        )
    # A hundredth of a pixel is far below what can be seen and far above what differs between processors.
    found = np.round(found.astype(np.float64), 2)

    eyes = found[_OUTER_EYE[1], :2] - found[_OUTER_EYE[0], :2]
    roll = np.arctan2(eyes[1], eyes[0])
    turn = np.array([[np.cos(roll), np.sin(roll)], [-np.sin(roll), np.cos(roll)]])
    upright = np.sum(turn[None] * found[:, None, :2], axis=-1)
    scale = FACE_HEIGHT / np.ptp(upright[:, 1])
    middle = (upright.min(axis=0) + upright.max(axis=0)) / 2
    landmarks = np.empty_like(found)
    landmarks[:, :2] = (upright - middle) * scale + _CENTRE
    landmarks[:, 2] = (found[:, 2] - found[:, 2].mean()) * scale
    landmarks = landmarks.astype(np.float32)

    to_canvas = np.concatenate([turn * scale, (_CENTRE - middle * scale)[:, None]], axis=1)
    texture = cv2.warpAffine(
        photograph,
        to_canvas,
        (CANVAS_SIZE, CANVAS_SIZE),
        flags=cv2.INTER_LANCZOS4,
        borderMode=cv2.BORDER_REPLICATE,
    ).astype(np.float32)

    oval = np.zeros((CANVAS_SIZE, CANVAS_SIZE), np.uint8)
    cv2.fillPoly(oval, [np.round(landmarks[list(_FACE_OVAL), :2]).astype(np.int32)], 1)
    outside = cv2.distanceTransform(1 - oval, cv2.DIST_L2, 5)

    from_middle = (grid(CANVAS_SIZE) - np.float32([_CENTRE, _CENTRE - 35])) / np.float32([165, 185])
    head = 1 - _smoothstep((np.sqrt((from_middle**2).sum(axis=-1)) - 1.0) / 0.5)
    return BaseFace(
        texture=texture,
        landmarks=landmarks,
        depth=_depth(landmarks, oval, outside),
        head=head.astype(np.float32),
        skin=_skin(texture, landmarks, outside),
    )


@functools.lru_cache(maxsize=8)
def make_subject(seed: int, number: int) -> Subject:
    """Person ``number`` of the set ``seed``: a pure function of the two."""
    base = base_face()
    rng = np.random.default_rng([seed, number, _SUBJECT_STREAM])
    pixels = grid(CANVAS_SIZE)

    # Mostly symmetric, as heads are, at wavelengths from half a face on; shorter ones would fold the surface.
    bend = _smooth_noise(rng, 5, 3) * np.float32([5.0, 6.0, 5.0])
    mirrored = bend[:, ::-1] * np.float32([-1, 1, 1])
    bend = 0.85 * (bend + mirrored) / 2 + 0.15 * bend
    stretch = np.float32(1 + rng.normal(0, 0.015) + rng.normal(0, 0.025, 2))
    surface = np.empty((CANVAS_SIZE, CANVAS_SIZE, 3), np.float32)
    surface[..., :2] = pixels + bend[..., :2] + (pixels - np.float32(_CENTRE)) * (stretch - 1)
    surface[..., 2] = base.depth * np.float32(rng.uniform(0.85, 1.1)) + bend[..., 2]

    light = np.float32([rng.uniform(-0.55, 0.55), rng.uniform(-0.7, -0.1), -1.0])
    light /= np.sqrt((light**2).sum())
    texture = _complexion(rng, base) * _relight(surface[..., 2], light)[..., None]
    return Subject(
        surface=surface,
        texture=np.clip(texture, 0, 255),
        light=light,
        furrows=float(rng.uniform(0.5, 1.5)),
    )


class Camera:
    """One view of a subject at rest: which canvas point every pixel shows, and where it moves.

    H = W = ``VIEW_SIZE``.

    Args:
        subject: Who is seen.
        yaw: Degrees by which the head is turned as seen from here.
        pose: The head's own pose at rest, applied to the whole scene.

    Attributes:
        canvas_points: (H, W, 2) float32, the canvas position (x, y) shown by each pixel.
    """

    def __init__(self, subject: Subject, yaw: float, pose: HeadPose):
        pivot = np.array([_CENTRE, _CENTRE, _DEPTH_CENTRE])
        turn = rotation(yaw, 0, 0) @ rotation(pose.yaw, pose.pitch, pose.roll)
        self._to_camera = np.concatenate([turn, (np.array(pose.shift) - turn @ pivot)[:, None]], axis=1)
        self.canvas_points = self._invert(self._project(subject.surface))
        self._at_rest = sample(subject.surface, self.canvas_points)
        self._projected = self._project(self._at_rest)
        self._head = sample(base_face().head, self.canvas_points)
        self._grid = grid(VIEW_SIZE)

    def _project(self, points: np.ndarray) -> np.ndarray:
        """Surface points (..., ..., 3) to pixel positions (..., ..., 2)."""
        seen = cv2.transform(points, self._to_camera)
        scale = CAMERA_DISTANCE / (CAMERA_DISTANCE + _DEPTH_CENTRE + seen[..., 2:])
        return seen[..., :2] * scale + np.float32((VIEW_SIZE - 1) / 2)

    @staticmethod
    def _invert(projection: np.ndarray) -> np.ndarray:
        """The canvas position (H, W, 2) that ``projection`` (S, S, 2) sends to each pixel."""
        target = grid(VIEW_SIZE)
        points = target + np.float32((CANVAS_SIZE - VIEW_SIZE) / 2)
        # The projection is the identity within a factor of two, so this halves the error each time.
        for _ in range(30):
            points = np.clip(points + target - sample(projection, points), 0, CANVAS_SIZE - 1)
        return points

    def displacement(self, motion: np.ndarray, pose: HeadPose) -> np.ndarray:
        """The flow from the view at rest.

        Args:
            motion: (H, W, 3) float32, how far the surface point behind each pixel moves on the face (px, 3D).
            pose: How the head has moved since.

        Returns:
            (H, W, 2) float32 px: what pixel (y, x) at rest shows is found at (x, y) + flow.
        """
        moved = self._at_rest + motion
        turn = rotation(pose.yaw, pose.pitch, pose.roll)
        # The neck, not the middle of the head, holds still.
        neck = np.array([_CENTRE, _CENTRE + 0.6 * FACE_HEIGHT, _DEPTH_CENTRE + 20.0])
        sway = np.concatenate([turn - np.eye(3), (np.array(pose.shift) - (turn - np.eye(3)) @ neck)[:, None]], axis=1)
        moved += cv2.transform(moved, sway) * self._head[..., None]
        return self._project(moved) - self._projected

    def render(self, texture: np.ndarray, gain: np.ndarray, flow: np.ndarray) -> np.ndarray:
        """The view after ``flow``.

        Args:
            texture: (S, S, 3) float32 on the canvas.
            gain: (H, W) float32, factor of brightness of what each pixel at rest shows.
            flow: (H, W, 2) float32 px from :meth:`displacement`.

        Returns:
            (H, W, 3) float32, sampled once from the texture, so that no frame is blurred more than another.
        """
        came_from = self._grid - flow
        for _ in range(8):
            previous, came_from = came_from, self._grid - sample(flow, came_from)
            if np.abs(came_from - previous).max() < 0.01:
                break
        image = sample(texture, sample(self.canvas_points, came_from), cv2.INTER_CUBIC)
        return image * sample(gain, came_from)[..., None]


def rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """(3, 3) float64 rotation by angles in degrees about the y, x and z axis, in this order from the left."""
    (cy, cx, cz), (sy, sx, sz) = (
        np.cos(np.radians([yaw, pitch, roll])),
        np.sin(np.radians([yaw, pitch, roll])),
    )
    return np.array(
        [
            [cy * cz + sy * sx * sz, -cy * sz + sy * sx * cz, sy * cx],
            [cx * sz, cx * cz, -sx],
            [-sy * cz + cy * sx * sz, sy * sz + cy * sx * cz, cy * cx],
        ]
    )


def _smoothstep(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def _smooth_noise(rng: np.random.Generator, knots: int, channels: int) -> np.ndarray:
    """A cubic through ``knots`` x ``knots`` standard normal values: (S, S, channels) float32."""
    coarse = rng.standard_normal((knots, knots, channels)).astype(np.float32)
    return cv2.resize(coarse, (CANVAS_SIZE, CANVAS_SIZE), interpolation=cv2.INTER_CUBIC)


def _depth(landmarks: np.ndarray, oval: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Depth of the surface: a thin plate through the landmarks, falling back around the face."""
    from scipy.interpolate import RBFInterpolator

    step = 4
    axis = np.arange(0, CANVAS_SIZE, step, dtype=np.float64)
    knots = np.stack(np.meshgrid(axis, axis), axis=-1)
    # The sides of the head run almost along the line of sight; a turned view of them would fold over.
    z = np.where(landmarks[:, 2] > 0, _SIDE_DEPTH * np.tanh(landmarks[:, 2] / _SIDE_DEPTH), landmarks[:, 2])
    plate = RBFInterpolator(landmarks[:, :2], z, neighbors=60, smoothing=20.0)
    coarse = plate(knots.reshape(-1, 2)).reshape(len(axis), len(axis)).astype(np.float32)
    inside = sample(coarse, grid(CANVAS_SIZE) / step, cv2.INTER_CUBIC)

    # Beyond the oval: the depth of the nearest point of the oval, falling back as a head does.
    _, nearest = cv2.distanceTransformWithLabels(1 - oval, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    by_label = np.zeros(nearest.max() + 1, np.float32)
    by_label[nearest[oval > 0]] = inside[oval > 0]
    depth = np.where(oval > 0, inside, by_label[nearest] + 15 * (1 - np.exp(-outside / 30)))
    far = _smoothstep(outside / 120)
    depth = (depth * (1 - far) + _BACKGROUND_DEPTH * far).astype(np.float32)
    soft = _smoothstep(outside / 12 + 0.3).astype(np.float32)
    return cv2.GaussianBlur(depth, (0, 0), 4) * (1 - soft) + cv2.GaussianBlur(depth, (0, 0), 10) * soft


def _skin(texture: np.ndarray, landmarks: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """How much a point is skin: near the face and of the cheeks' colour."""
    lab = cv2.cvtColor(cv2.GaussianBlur(texture, (0, 0), 2) / 255, cv2.COLOR_RGB2LAB)
    cheek = np.mean([lab[int(y), int(x)] for x, y in landmarks[list(_CHEEKS), :2]], axis=0)
    off = (lab - cheek) / np.float32([28, 13, 13])
    alike = np.exp(-0.5 * (off**2).sum(axis=-1) ** 2).astype(np.float32)
    near = 1 - _smoothstep(outside / 50)
    return cv2.GaussianBlur(alike * near.astype(np.float32), (0, 0), 2)


def _complexion(rng: np.random.Generator, base: BaseFace) -> np.ndarray:
    """The photograph in other colours, with pores and freckles: (S, S, 3) in [0, 255]."""
    lab = cv2.cvtColor(base.texture / 255, cv2.COLOR_RGB2LAB)
    skin = base.skin[..., None]
    lighter = rng.uniform(0.62, 1.06)
    onto_skin = lab * np.float32([lighter, 1, 1]) + np.float32([0, rng.normal(0, 2.5), rng.normal(2, 3)])
    onto_rest = lab * np.float32([rng.uniform(0.6, 1.1), 1, 1]) + np.float32([0, rng.normal(0, 4), rng.normal(0, 6)])
    lab = onto_skin * skin + onto_rest * (1 - skin)

    # The photograph's face is half as large, so its pores are gone, without which skin would slide unseen.
    white = rng.standard_normal((CANVAS_SIZE, CANVAS_SIZE)).astype(np.float32)
    pores = cv2.GaussianBlur(white, (0, 0), 0.8) - cv2.GaussianBlur(white, (0, 0), 2.0)
    lab[..., 0] += base.skin * pores * np.float32(rng.uniform(1.5, 4))
    for _ in range(rng.poisson(4)):
        spot = ((grid(CANVAS_SIZE) - _CENTRE - rng.normal(0, 45, 2).astype(np.float32)) ** 2).sum(axis=-1)
        lab[..., 0] -= base.skin * rng.uniform(4, 16) * np.exp(-0.5 * spot / rng.uniform(1.0, 2.2) ** 2)
    lab[..., 0] = np.clip(lab[..., 0], 0, 100)
    return np.clip(cv2.cvtColor(lab.astype(np.float32), cv2.COLOR_LAB2RGB), 0, 1) * 255


def _relight(depth: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Factor (S, S) by which a second lamp at ``light`` changes the photograph's own, even light."""
    smooth = cv2.GaussianBlur(depth, (0, 0), 6)
    slope_x, slope_y = gradient(smooth)
    facing = (light[0] * slope_x + light[1] * slope_y - light[2]) / np.sqrt(slope_x**2 + slope_y**2 + 1)
    return np.exp(_LAMP * (facing - facing.mean()))
