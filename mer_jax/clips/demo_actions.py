"""Action units of the demo clips: what moves, how the skin folds, which emotion it tells, when it happens.

An action is two smooth motions of the surface, one per side of the face, given by pushes at FaceMesh
landmarks, and two height fields of furrows too fine to move any landmark. Both are defined once on the
canvas. Furrows and bulges show as shading under the light of the subject; motion in depth shows differently
in the two views.

Which action units tell which label follows FACS (Ekman, Friesen, Hager 2002) and EMFACS where they name a
prototype; ``Repression`` and ``Others`` are no basic emotions and follow the usage of CASME II and 4DME:

| label      | action units: any one of these                                                    |
|------------|-----------------------------------------------------------------------------------|
| Negative   | AU4 brow lowerer; AU9 nose wrinkler; AU15 lip corner depressor; AU4 + AU15        |
| Positive   | AU12 lip corner puller; AU6 cheek raiser + AU12                                   |
| Repression | AU14 dimpler; AU17 chin raiser; AU24 lip pressor                                  |
| Surprise   | AU1 inner + AU2 outer brow raiser; AU1 + AU2 + AU5 upper lid raiser               |
| Others     | AU7 lid tightener; AU18 lip pucker; AU20 lip stretcher                            |

Movements that mean nothing here, and occur under every label: blinks, gaze shifts, drifts of the mouth
corners and of the jaw.
"""

import functools
from dataclasses import dataclass

import cv2
import numpy as np

from mer_jax.clips.demo_face import CANVAS_SIZE, base_face, gradient, grid

# Label -> its prototypes with their weights.
PROTOTYPES: dict[str, tuple[tuple[tuple[str, ...], float], ...]] = {
    "Negative": ((("AU4",), 0.45), (("AU9",), 0.2), (("AU15",), 0.2), (("AU4", "AU15"), 0.15)),
    "Positive": ((("AU12",), 0.4), (("AU6", "AU12"), 0.6)),
    "Repression": ((("AU14",), 0.35), (("AU17",), 0.35), (("AU24",), 0.3)),
    "Surprise": ((("AU1", "AU2"), 0.65), (("AU1", "AU2", "AU5"), 0.35)),
    "Others": ((("AU7",), 0.4), (("AU18",), 0.3), (("AU20",), 0.3)),
}
# Opposite pulls at one place: shown together, both would vanish from the picture while their labels stayed.
CLASHES = (frozenset({"AU1", "AU4"}), frozenset({"AU18", "AU14"}))

_OCCLUSION = 0.3  # darkening (natural log of brightness) per px of a furrow's depth: less sky is seen from inside
_SHADING = 0.8  # of slope times light direction, as for a matt surface


@dataclass(frozen=True)
class _At:
    """A place on both sides: landmarks (right, left), moved by px away from the midline and down."""

    right: int
    left: int
    outward: float = 0.0
    down: float = 0.0

    def on(self, side: int) -> np.ndarray:
        x, y, _ = base_face().landmarks[(self.right, self.left)[side]]
        return np.float32([x + _OUTWARD[side] * self.outward, y + self.down])


@dataclass(frozen=True)
class _Push:
    """Motion (outward, down, forward) around ``at``, fading as a Gaussian of ``reach`` (x, y) px."""

    at: _At
    motion: tuple[float, float, float]
    reach: tuple[float, float]


@dataclass(frozen=True)
class _Furrow:
    """A groove along a line: px of depth per px of motion, and half width in px."""

    line: tuple[_At, ...]
    depth: float
    width: float


@dataclass(frozen=True)
class Action:
    """An action unit or a meaningless movement, on the canvas, S = ``CANVAS_SIZE``.

    Attributes:
        motion: (2, S, S, 3) float32, displacement (x, y, z) per side; the sum of both sides has peak length
            1.
        height: (2, S, S) float32 px towards the camera per px of motion; furrows are negative.
    """

    motion: np.ndarray
    height: np.ndarray

    def mixed(self, sides: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
        """Motion (S, S, 3) and height (S, S) with each side taken at its own strength."""
        return (
            self.motion[0] * np.float32(sides[0]) + self.motion[1] * np.float32(sides[1]),
            self.height[0] * np.float32(sides[0]) + self.height[1] * np.float32(sides[1]),
        )


def shading(motion: np.ndarray, height: np.ndarray, light: np.ndarray, furrows: float) -> np.ndarray:
    """Change of brightness (natural log) per px of motion.

    Args:
        motion: (S, S, 3), its z gives the coarse relief.
        height: (S, S), its furrows give the fine relief.
        light: (3,) unit direction to the light.
        furrows: How deep this subject's skin folds.

    Returns:
        (S, S) float32.
    """
    grooves = height * np.float32(furrows)
    slope_x, slope_y = gradient(grooves - motion[..., 2])
    facing = (light[0] * slope_x + light[1] * slope_y) / light[2]
    return np.float32(_SHADING) * facing + np.float32(_OCCLUSION) * np.minimum(grooves, 0)


@functools.cache
def action(name: str) -> Action:
    """The action called ``name``, e.g. ``'AU12'`` or ``'blink'``; made once per process."""
    pushes, furrows = _ACTIONS[name]
    pixels = grid(CANVAS_SIZE)
    motion = np.zeros((2, CANVAS_SIZE, CANVAS_SIZE, 3), np.float32)
    height = np.zeros((2, CANVAS_SIZE, CANVAS_SIZE), np.float32)
    for side in (0, 1):
        for push in pushes:
            away = (pixels - push.at.on(side)) / np.float32(push.reach)
            outward, down, forward = push.motion
            share = 0.5 if push.at.right == push.at.left else 1.0
            direction = np.float32([_OUTWARD[side] * outward, down, -forward]) * np.float32(share)
            motion[side] += np.exp(-0.5 * (away**2).sum(axis=-1))[..., None] * direction
        for furrow in furrows:
            line = np.zeros((CANVAS_SIZE, CANVAS_SIZE), np.float32)
            points = np.round(np.stack([at.on(side) for at in furrow.line]) * 16).astype(np.int32)
            cv2.polylines(line, [points], False, 1.0, 1, cv2.LINE_8, 4)
            line = cv2.GaussianBlur(line, (0, 0), furrow.width)
            height[side] -= line * np.float32(furrow.depth / line.max())
    motion /= np.sqrt((motion.sum(axis=0) ** 2).sum(axis=-1)).max()
    return Action(motion, height)


def envelope(num_frames: int, onset: float, apex: int, offset: float, residual: float) -> np.ndarray:
    """Course of an action in time.

    Args:
        num_frames: T.
        onset: Frame at which it starts to rise, below ``apex``.
        apex: Frame of its maximum, 1.
        offset: Frame at which it has fallen to ``residual``, above ``apex``.
        residual: In [0, 1), what is left of it afterwards.

    Returns:
        (T,) float64 in [0, 1]; 0 up to the onset, and 1 at the apex only.
    """
    frame = np.arange(num_frames)
    rise = np.clip((frame - onset) / (apex - onset), 0, 1)
    fall = np.clip((frame - apex) / (offset - apex), 0, 1)
    smooth = rise**2 * (3 - 2 * rise)
    return smooth * (1 - (1 - residual) * fall**2 * (3 - 2 * fall))


_OUTWARD = (-1.0, 1.0)  # x direction away from the midline: the subject's right is the picture's left

_INNER_BROW = _At(107, 336)
_MIDDLE_BROW = _At(66, 296)
_OUTER_BROW = _At(63, 293)
_BROW_TAIL = _At(70, 300)
_UPPER_LID = _At(159, 386)
_LOWER_LID = _At(145, 374)
_CHEEKBONE = _At(50, 280)
_CHEEK = _At(205, 425)
_NOSE_WING = _At(129, 358)
_NOSE_SIDE = _At(198, 420)
_MOUTH_CORNER = _At(61, 291)
_UPPER_LIP = _At(0, 0)
_LOWER_LIP = _At(17, 17)
_LOWER_LIP_SIDE = _At(84, 314)
_CHIN_BOSS = _At(199, 199)
_NASOLABIAL = (_At(129, 358, 3, -2), _At(203, 423), _At(206, 426), _At(216, 436))


def _near(place: _At, outward: float, down: float) -> _At:
    return _At(place.right, place.left, place.outward + outward, place.down + down)


# Name -> (pushes, furrows). Sizes are px at a face height of 224.
_ACTIONS: dict[str, tuple[tuple[_Push, ...], tuple[_Furrow, ...]]] = {
    "AU1": (
        (
            _Push(_INNER_BROW, (-0.1, -1.0, 0.0), (15, 13)),
            _Push(_MIDDLE_BROW, (0.0, -0.6, 0.0), (13, 12)),
            _Push(_At(108, 337), (0.0, -0.4, 0.0), (20, 14)),
        ),
        (_Furrow((_At(151, 151, 0, 2), _At(108, 337, 0, 2)), 0.25, 1.8),),
    ),
    "AU2": (
        (
            _Push(_OUTER_BROW, (0.0, -1.0, 0.0), (14, 13)),
            _Push(_BROW_TAIL, (0.0, -0.7, 0.0), (13, 13)),
            _Push(_At(105, 334), (0.0, -0.5, 0.0), (13, 12)),
        ),
        (_Furrow((_At(69, 299, 0, 8), _At(104, 333, 0, 8), _At(68, 298, 0, 8)), 0.2, 1.8),),
    ),
    "AU4": (
        (
            _Push(_INNER_BROW, (-0.5, 0.9, 0.15), (14, 13)),
            _Push(_MIDDLE_BROW, (-0.3, 0.7, 0.0), (13, 12)),
            _Push(_At(9, 9), (0.0, 0.4, 0.15), (11, 13)),
        ),
        (
            _Furrow((_At(9, 9, 6, -8), _At(8, 8, 6, 4)), 0.35, 1.6),
            _Furrow((_At(6, 6, 0, -5), _At(6, 6, 8, -6)), 0.15, 1.5),
        ),
    ),
    "AU5": ((_Push(_UPPER_LID, (0.0, -1.0, 0.0), (12, 5)),), ()),
    "AU6": (
        (
            _Push(_CHEEKBONE, (0.1, -0.9, 0.35), (20, 16)),
            _Push(_CHEEK, (0.0, -0.6, 0.25), (18, 15)),
            _Push(_LOWER_LID, (0.0, -0.5, 0.0), (14, 7)),
        ),
        (
            _Furrow((_At(33, 263, 4, -1), _At(33, 263, 16, -6)), 0.25, 1.3),
            _Furrow((_At(33, 263, 4, 4), _At(33, 263, 16, 8)), 0.25, 1.3),
            _Furrow((_near(_LOWER_LID, -8, 9), _near(_LOWER_LID, 10, 9)), 0.15, 1.6),
        ),
    ),
    "AU7": (
        (
            _Push(_LOWER_LID, (0.0, -1.0, 0.0), (13, 6)),
            _Push(_UPPER_LID, (0.0, 0.6, 0.0), (13, 5)),
        ),
        (_Furrow((_near(_LOWER_LID, -9, 5), _near(_LOWER_LID, 9, 5)), 0.25, 1.4),),
    ),
    "AU9": (
        (
            _Push(_NOSE_WING, (0.1, -0.9, 0.1), (12, 12)),
            _Push(_NOSE_SIDE, (0.0, -0.8, 0.15), (10, 10)),
            _Push(_INNER_BROW, (-0.2, 0.4, 0.0), (13, 11)),
            _Push(_At(37, 267), (0.0, -0.4, 0.0), (14, 8)),
        ),
        (
            _Furrow((_At(6, 6, 0, -2), _At(6, 6, 9, -4)), 0.3, 1.4),
            _Furrow((_near(_NOSE_SIDE, -2, -9), _near(_NOSE_SIDE, 6, -3)), 0.3, 1.4),
            _Furrow(_NASOLABIAL[:2], 0.2, 1.8),
        ),
    ),
    "AU12": (
        (
            _Push(_MOUTH_CORNER, (0.7, -0.75, -0.25), (16, 14)),
            _Push(_CHEEK, (0.2, -0.45, 0.25), (18, 15)),
        ),
        (_Furrow(_NASOLABIAL, 0.3, 2.0),),
    ),
    "AU14": (
        (_Push(_MOUTH_CORNER, (0.5, 0.05, -0.9), (12, 11)),),
        (_Furrow((_near(_MOUTH_CORNER, 7, -6), _near(_MOUTH_CORNER, 8, 5)), 0.35, 1.8),),
    ),
    "AU15": (
        (
            _Push(_MOUTH_CORNER, (0.15, 1.0, -0.1), (14, 12)),
            _Push(_LOWER_LIP_SIDE, (0.0, 0.3, 0.0), (12, 8)),
        ),
        (_Furrow((_near(_MOUTH_CORNER, 2, 5), _near(_MOUTH_CORNER, 7, 17)), 0.3, 1.8),),
    ),
    "AU17": (
        (
            _Push(_CHIN_BOSS, (0.0, -0.9, 0.45), (20, 14)),
            _Push(_LOWER_LIP, (0.0, -0.7, 0.45), (20, 8)),
        ),
        (
            _Furrow((_near(_LOWER_LIP, 0, 7), _near(_LOWER_LIP, 14, 6)), 0.25, 1.8),
            _Furrow((_near(_CHIN_BOSS, 4, -3), _near(_CHIN_BOSS, 5, 1)), 0.3, 1.4),
            _Furrow((_near(_CHIN_BOSS, 11, -5), _near(_CHIN_BOSS, 12, -2)), 0.25, 1.4),
        ),
    ),
    "AU18": (
        (
            _Push(_MOUTH_CORNER, (-0.8, 0.0, 0.5), (14, 12)),
            _Push(_UPPER_LIP, (0.0, -0.1, 1.0), (17, 9)),
            _Push(_LOWER_LIP, (0.0, 0.1, 1.0), (17, 9)),
        ),
        (
            _Furrow((_near(_UPPER_LIP, 7, -8), _near(_UPPER_LIP, 7, -2)), 0.2, 1.2),
            _Furrow((_near(_LOWER_LIP, 8, -3), _near(_LOWER_LIP, 8, 3)), 0.15, 1.2),
        ),
    ),
    "AU20": (
        (
            _Push(_MOUTH_CORNER, (1.0, 0.3, -0.35), (16, 13)),
            _Push(_LOWER_LIP_SIDE, (0.4, 0.15, -0.1), (12, 9)),
        ),
        (_Furrow((_near(_MOUTH_CORNER, 8, -2), _near(_MOUTH_CORNER, 10, 10)), 0.2, 1.8),),
    ),
    "AU24": (
        (
            _Push(_UPPER_LIP, (0.0, 0.7, -0.6), (20, 6)),
            _Push(_LOWER_LIP, (0.0, -0.7, -0.6), (20, 7)),
            _Push(_MOUTH_CORNER, (-0.3, 0.0, -0.2), (11, 9)),
        ),
        (
            _Furrow((_near(_UPPER_LIP, 3, -6), _near(_UPPER_LIP, 15, -2)), 0.2, 1.5),
            _Furrow((_near(_LOWER_LIP, 2, 6), _near(_LOWER_LIP, 14, 4)), 0.2, 1.5),
        ),
    ),
    "blink": ((_Push(_UPPER_LID, (0.0, 1.0, 0.0), (14, 6)),), ()),
    "gaze": ((_Push(_near(_UPPER_LID, 0, 5), (1.0, 0.0, 0.0), (7, 5)),), ()),
    "mouth_drift": ((_Push(_MOUTH_CORNER, (0.4, 0.8, 0.0), (15, 12)),), ()),
    "jaw_drift": ((_Push(_At(152, 152), (0.0, 1.0, 0.2), (32, 22)),), ()),
}
