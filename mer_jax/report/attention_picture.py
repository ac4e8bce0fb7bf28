"""A picture of one clip: its frames, what a transformer attends to in them, and to which frames the study attends."""

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from mer_jax.report.canvas import (
    FAINT,
    GREEN,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    PRINT,
    PURPLE,
    RULE,
    Canvas,
    draw_probabilities,
    save_png,
)

_WIDTH, _MARGIN, _GUTTER, _GAP = 1080, 36, 58, 6
_LEFT, _RIGHT = _MARGIN + _GUTTER, _WIDTH - _MARGIN
_LARGEST = 132  # side of a frame
_CURVE = 120  # height
_COLOURS = (GREEN, PURPLE, GREY)  # of the modalities, as in the report
_TINT = 0.6  # share of the colour where it lies over a face
_STEPS = 64  # of a colour bar


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """What a network attends to in K frames.

    Attributes:
        name: Of the network.
        shares: ``(K, h, w)`` of its patches; each frame's sum is 1 at most.
        area: The part of a frame that the patches cover: top, left, bottom, right as shares of its sides.
    """

    name: str
    shares: np.ndarray
    area: Sequence[float]


@dataclasses.dataclass(frozen=True)
class AttentionPicture:
    """What the picture shows.

    K frames that are shown, T positions that a study samples, L labels.

    Attributes:
        title: One line.
        note: One line below it.
        crops: ``(K, S, S, 3)`` uint8 RGB.
        crop_names: K captions.
        places: ``(K,)`` their positions, rising.
        heat_maps: One for each network whose attention is known.
        lacking: One line in their place where there are none.
        attention: Modality to ``(M, T)`` shares of the positions, a row for each member.
        marks: Word to the position, which may lie between two, of the onset, the apex and the offset, where known.
        label_names: ``(L,)``.
        truth: ``(L,)`` int, 1 where the clip has the label.
        mean: ``(L,)`` probability.
        spread: ``(L,)`` its standard deviation over members.
        thresholds: ``(L,)``, or None where the largest probability decides.
        decisions: ``(L,)`` bool.
        gate: Modality to its weight, mean over the members; empty for a model without a gate.
    """

    title: str
    note: str
    crops: np.ndarray
    crop_names: Sequence[str]
    places: np.ndarray
    heat_maps: Sequence[HeatMap]
    lacking: str
    attention: Mapping[str, np.ndarray]
    marks: Mapping[str, float]
    label_names: Sequence[str]
    truth: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    thresholds: np.ndarray | None
    decisions: np.ndarray
    gate: Mapping[str, float]


def heat_scale(shares: np.ndarray) -> float:
    """The share at which colours saturate: that below which 99 % of the patches of all frames stay; never 0."""
    return max(float(np.quantile(shares.astype(np.float64), 0.99)), 1e-9)


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] to colours of Viridis, which are as far apart to the eye as the values: ``(..., 3)`` uint8."""
    import cv2

    index = np.round(255 * np.clip(values, 0.0, 1.0)).astype(np.uint8)
    return cv2.applyColorMap(index.reshape(-1, 1), cv2.COLORMAP_VIRIDIS)[:, 0, ::-1].reshape(*index.shape, 3)


def overlay(crop: np.ndarray, shares: np.ndarray, area: Sequence[float], scale: float) -> np.ndarray:
    """Lays the shares of patches over the part of a crop that they are of.

    Args:
        crop: ``(S, S, 3)`` uint8 RGB.
        shares: ``(h, w)``; each is shown as the square that it is of, without smoothing.
        area: Top, left, bottom, right as shares of the crop's sides.
        scale: The share of full colour.

    Returns:
        ``(S, S, 3)`` uint8 RGB: the crop in grey, tinted where patches are and faded where the network saw nothing.
    """
    grey = crop.astype(np.float64) @ np.array([0.299, 0.587, 0.114])  # (S, S)
    inside, patch = [], []
    for axis in (0, 1):
        start, stop, count = area[axis], area[axis + 2], shares.shape[axis]
        centres = (np.arange(crop.shape[axis]) + 0.5) / crop.shape[axis]
        inside.append((centres >= start) & (centres < stop))
        patch.append(np.clip(((centres - start) / (stop - start) * count).astype(int), 0, count - 1))
    colours = heat_colours(shares.astype(np.float64) / scale)[np.ix_(*patch)]  # (h, w, 3) -> (S, S, 3)
    tinted = _TINT * colours + (1 - _TINT) * grey[..., None]
    faded = 0.3 * grey[..., None] + 0.7 * 255.0
    return np.round(np.where(np.logical_and.outer(*inside)[..., None], tinted, faded)).astype(np.uint8)


def draw_picture(picture: AttentionPicture, resolution: int = 1) -> Image.Image:
    """Draws it.

    Args:
        picture: What to show.
        resolution: Pixels to a unit of length, 1, 2 or 4.

    Returns:
        An RGB image, 1080 units wide.
    """
    positions = next(iter(picture.attention.values())).shape[1]
    side, x = _columns(picture.places, positions)
    heat = 92 + 22 + side + 28
    curve = heat + (len(picture.heat_maps) * (22 + side + 44) if picture.heat_maps else 30)
    lower = curve + 30 + _CURVE + 52
    canvas = Canvas(_WIDTH, lower + 34 + 30 * len(picture.label_names) + _MARGIN - 10)
    canvas.text(_MARGIN, 28, picture.title, 24, width=_WIDTH - 2 * _MARGIN)
    canvas.text(_MARGIN, 60, picture.note, 14, MUTED, width=_WIDTH - 2 * _MARGIN)

    canvas.text(_MARGIN, 92, "Frames of the clip, by their number", 14)
    for crop, name, place in zip(picture.crops, picture.crop_names, picture.places, strict=True):
        _frame(canvas, x(place), 92 + 24, side, crop)
        canvas.text(x(place), 92 + 24 + side + 6, name, 12, MUTED, "ma")
    for heat_map in picture.heat_maps:
        _draw_heat(canvas, heat, heat_map, picture, side, x)
        heat += 22 + side + 44
    if not picture.heat_maps:
        canvas.text(_MARGIN, heat, picture.lacking, 12, MUTED, width=_WIDTH - 2 * _MARGIN)
    _draw_curve(canvas, curve, picture, x, positions)
    words = [
        ", ".join(word for word, holds in (("predicted", decided), ("labelled", true == 1)) if holds)
        for decided, true in zip(picture.decisions, picture.truth, strict=True)
    ]
    draw_probabilities(
        canvas, _MARGIN, lower, picture.label_names, picture.mean, picture.spread, picture.thresholds,
        picture.decisions, words,
    )  # fmt: skip
    if picture.gate:
        _draw_gate(canvas, lower, picture)
    return canvas.image(resolution)


def save_picture(path: str | os.PathLike, picture: AttentionPicture) -> None:
    """Writes it as a PNG for print: 2160 px wide, 300 dpi.

    Raises:
        UserError: The file cannot be written.
    """
    save_png(path, draw_picture(picture, PRINT))


def _columns(places: np.ndarray, positions: int):
    """The side of a frame, and where the middle of a position is, so that frames stand above their positions."""
    width, last = _RIGHT - _LEFT, max(positions - 1, 1)
    side = _LARGEST
    if len(places) > 1:
        # Neighbouring middles are ``step (width - side) / last`` apart, which is to be the side and a gap.
        step = int(np.diff(places).min())
        side = min(side, int((step * width / last - _GAP) / (1 + step / last)))

    def x(place: float) -> float:
        return _LEFT + side / 2 + place * (width - side) / last

    return side, x


def _frame(canvas: Canvas, middle: float, top: float, side: int, pixels: np.ndarray) -> None:
    left = middle - side / 2
    canvas.box(left - 1, top - 1, left + side + 1, top + side + 1, RULE)
    canvas.paste(left, top, side, pixels)


def _draw_heat(canvas: Canvas, top: int, heat_map: HeatMap, picture: AttentionPicture, side: int, x) -> None:
    """The frames under the shares of their patches, and the colours' key."""
    shares = heat_map.shares.astype(np.float64)
    scale, even = heat_scale(shares), 1 / shares[0].size
    rows, columns = shares.shape[1:]
    canvas.text(_MARGIN, top, f"What {heat_map.name} attends to in these frames", 14)
    whole = np.allclose(heat_map.area, (0, 0, 1, 1), atol=1e-3)
    told = f"last layer, mean over heads, {rows} x {columns} patches" + (
        "" if whole else "; it does not see the margin"
    )
    canvas.text(_RIGHT, top + 1, told, 12, MUTED, "ra")
    for crop, of_frame, place in zip(picture.crops, shares, picture.places, strict=True):
        _frame(canvas, x(place), top + 24, side, overlay(crop, of_frame, heat_map.area, scale))
    below = top + 24 + side + 8
    bar = np.linspace(_LEFT + 24, _LEFT + 204, _STEPS + 1)
    for left, right, colour in zip(bar[:-1], bar[1:], heat_colours(np.linspace(0, 1, _STEPS)), strict=True):
        canvas.box(left, below, right, below + 12, tuple(colour.tolist()))
    canvas.text(bar[0] - 8, below + 6, "0", 12, MUTED, "rm")
    sums = shares.sum(axis=(1, 2))
    low, high = (min(100.0, 100 * float(value)) for value in (sums.min(), sums.max()))
    sum_told = f"{low:.0f}" if round(low) == round(high) else f"{low:.0f} to {high:.0f}"
    told = f"{scale / even:.2g} times an even share (1/{rows * columns}) and more"
    if low < 99.5:
        told += f"; all patches of a frame together got {sum_told} % of the attention, other tokens the rest"
    canvas.text(bar[-1] + 8, below + 6, told, 12, MUTED, "lm", width=_RIGHT - bar[-1] - 8)


def _draw_curve(canvas: Canvas, top: int, picture: AttentionPicture, x, positions: int) -> None:
    upper, lower = top + 34, top + 34 + _CURVE
    curves = {name: (values.mean(axis=0), values.std(axis=0)) for name, values in picture.attention.items()}
    highest = max(max(float((mean + spread).max()) for mean, spread in curves.values()), 1.3 / positions)
    several = next(iter(picture.attention.values())).shape[0] > 1

    def y(value: float) -> float:
        return lower - float(np.clip(value / highest, 0.0, 1.0)) * (lower - upper)

    canvas.text(_MARGIN, top, "Which frames the study attends to", 14)
    canvas.text(_MARGIN + 250, top + 1, "band: spread over members" if several else "one member", 12, MUTED)
    right = _RIGHT
    for (name, _), colour in reversed(list(zip(curves.items(), _COLOURS, strict=False))):
        canvas.text(right, top, name, 14, colour, "ra")
        right -= canvas.width_of(name, 14) + 18
    for place in picture.places:
        canvas.line([(x(place), upper), (x(place), lower)], FAINT)
    for value in (0.0, highest):
        canvas.line([(_LEFT, y(value)), (_RIGHT, y(value))], RULE)
        canvas.text(_LEFT - 8, y(value), f"{100 * value:.2g} %", 12, MUTED, "rm")
    middles = [x(place) for place in range(positions)]
    for (mean, spread), colour in zip(curves.values(), _COLOURS, strict=False):
        edges = [[(px, y(value)) for px, value in zip(middles, mean + sign * spread, strict=True)] for sign in (1, -1)]
        if several and positions > 1:
            canvas.area([*edges[0], *edges[1][::-1]], _pale(colour))
    dashes = np.arange(_LEFT, _RIGHT, 8)
    for left in dashes:
        canvas.line([(left, y(1 / positions)), (min(left + 4, _RIGHT), y(1 / positions))], MUTED)
    if abs(y(1 / positions) - upper) > 14:
        canvas.text(_LEFT - 8, y(1 / positions), "even", 12, MUTED, "rm")
    for (mean, _), colour in zip(curves.values(), _COLOURS, strict=False):
        points = [(px, y(value)) for px, value in zip(middles, mean, strict=True)]
        canvas.line(points, colour, 2.2)
        for point in points:
            canvas.dot(*point, 2.4, colour)
    for place in picture.marks.values():
        canvas.line([(x(place), upper - 4), (x(place), lower + 4)], ORANGE, 1.6)
    taken = -np.inf
    for word, place in sorted(picture.marks.items(), key=lambda item: item[1]):
        half = canvas.width_of(word, 12) / 2
        if x(place) - half > taken:  # words never overlap; the line is there
            canvas.text(x(place), lower + 24, word, 12, ORANGE, "ma")
            taken = x(place) + half + 4
    for name, place in zip(picture.crop_names, picture.places, strict=True):
        canvas.text(x(place), lower + 8, name, 12, MUTED, "ma")


def _pale(colour: str) -> tuple[int, ...]:
    """A fifth of a colour on paper."""
    own, paper = (np.array([int(each[start : start + 2], 16) for start in (1, 3, 5)]) for each in (colour, PAPER))
    return tuple(np.round(0.2 * own + 0.8 * paper).astype(int).tolist())


def _draw_gate(canvas: Canvas, top: int, picture: AttentionPicture) -> None:
    """One bar, cut into the modalities' weights."""
    left = _MARGIN + 584
    width = _RIGHT - left
    canvas.text(left, top, "Weight of each modality in the gate", 14)
    colour_of = dict(zip(picture.attention, _COLOURS, strict=False))
    start = float(left)
    for name, weight in picture.gate.items():
        end = start + width * weight
        canvas.box(start, top + 34, end, top + 52, colour_of.get(name, INK))
        words = f"{name} {weight:.2f}"
        if end - start > canvas.width_of(words, 12) + 8:
            canvas.text((start + end) / 2, top + 43, words, 12, PAPER, "mm")
        start = end
