"""A picture of one prediction: the frames, the motion between them, and what the model makes of it."""

import dataclasses
import io
import itertools
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mer_jax.files import atomic_write_bytes

# The report's colours on light paper (mer_jax.report.style).
_PAPER, _INK, _MUTED, _RULE, _FAINT = "#ffffff", "#1b1f24", "#57606c", "#d8dce2", "#eceef1"
_BLUE, _ORANGE = "#0072b2", "#c65100"

# Everything is drawn at four times its size and reduced at the end, because Pillow draws lines without smoothing.
_ZOOM = 4
# Pixels of a written picture to one of _WIDTH: 300 dpi at 7.2 inches, the width of a page's text.
_PRINT = 2
_DPI = 300
_WIDTH, _MARGIN, _GAP = 1080, 36, 18
# Width of the bars of probability.
_BARS = 270
# A curve of up to so many frames shows each of them.
_DOTS = 80
_PANEL = (_WIDTH - 2 * _MARGIN - 2 * _GAP) // 3


@dataclasses.dataclass(frozen=True)
class FlowPicture:
    """What the picture shows.

    Attributes:
        title: One line.
        note: One line below it.
        frames: Onset, apex and offset, each ``(H, W, 3)`` uint8 RGB.
        frame_names: A caption for each.
        flows: ``(P, H, W, 2)`` px, (u right, v down), of one or two phases.
        flow_names: A caption for each.
        intensity: ``(T,)`` mean motion against the onset, px; None where the study uses none.
        apex: Index of the apex in it.
        smooth: Standard deviation in frames of the smoothing after which the apex was the largest; 0 for none.
        times: ``(T,)`` seconds of its frames in the video.
        label_names: ``(L,)``.
        mean: ``(L,)`` probability.
        spread: ``(L,)`` its standard deviation over members.
        thresholds: ``(L,)``, or None where the largest probability decides.
        decisions: ``(L,)`` bool.
        stream_names: ``(S,)``, empty for a model without stream attention.
        streams: ``(R, S)`` weights, a row for each block and phase; rows sum to 1.
        stream_rows: A caption for each row.
    """

    title: str
    note: str
    frames: Sequence[np.ndarray]
    frame_names: Sequence[str]
    flows: np.ndarray
    flow_names: Sequence[str]
    intensity: np.ndarray | None
    apex: int
    times: np.ndarray
    label_names: Sequence[str]
    mean: np.ndarray
    spread: np.ndarray
    thresholds: np.ndarray | None
    decisions: np.ndarray
    stream_names: Sequence[str] = ()
    streams: np.ndarray | None = None
    stream_rows: Sequence[str] = ()
    smooth: float = 0.0


def flow_colours(flow: np.ndarray, scale: float) -> np.ndarray:
    """A flow field in colour: hue is the direction, saturation the length.

    Args:
        flow: ``(..., 2)`` px, (u right, v down).
        scale: The length in px that is fully saturated, and all above it; positive.

    Returns:
        ``(..., 3)`` uint8 RGB. No motion is white; right is red, down is yellow-green, left is cyan, up is violet.
    """
    hue = (np.arctan2(flow[..., 1], flow[..., 0]) / (2 * np.pi)) % 1.0
    saturation = np.clip(np.hypot(flow[..., 0], flow[..., 1]) / scale, 0.0, 1.0)
    # At full value, a channel is 1 within a sixth of the circle about its own hue and falls to 0 in the next sixth.
    distance = np.abs((hue[..., None] - np.array([0.0, 1 / 3, 2 / 3]) + 0.5) % 1.0 - 0.5) * 6.0  # (..., 3)
    pure = np.clip(2.0 - distance, 0.0, 1.0)
    return np.round(255.0 * (1.0 - saturation[..., None] * (1.0 - pure))).astype(np.uint8)


def flow_scale(flows: np.ndarray) -> float:
    """The length in px at which colours saturate: that below which 99 % of the flow stays; never 0."""
    return max(float(np.quantile(np.hypot(flows[..., 0], flows[..., 1]), 0.99)), 1e-3)


def draw_picture(picture: FlowPicture, resolution: int = 1) -> Image.Image:
    """Draws it.

    Args:
        picture: What to show.
        resolution: Pixels to a unit of length, 1, 2 or 4.

    Returns:
        An RGB image, 1080 units wide.
    """
    lower = max(34 + 30 * len(picture.label_names), 34 + 30 * len(picture.stream_rows))
    tops = {"frames": 92}
    tops["flows"] = tops["frames"] + _PANEL + 48
    below = tops["flows"] + (_PANEL + 48 if len(picture.flows) else 0)
    tops["curve"] = below
    tops["lower"] = below + (190 if picture.intensity is not None else 0)
    canvas = _Canvas(_WIDTH, tops["lower"] + lower + _MARGIN)
    canvas.text(_MARGIN, 28, picture.title, 24, width=_WIDTH - 2 * _MARGIN)
    canvas.text(_MARGIN, 60, picture.note, 14, _MUTED, width=_WIDTH - 2 * _MARGIN)
    for column, (frame, name) in enumerate(zip(picture.frames, picture.frame_names, strict=True)):
        canvas.panel(column, tops["frames"], frame, name)
    if len(picture.flows):
        scale = flow_scale(picture.flows)
        for column, (flow, name) in enumerate(zip(picture.flows, picture.flow_names, strict=True)):
            canvas.panel(column, tops["flows"], flow_colours(flow, scale), name)
        _draw_wheel(canvas, tops["flows"], scale)
    if picture.intensity is not None:
        _draw_curve(canvas, tops["curve"], picture)
    _draw_labels(canvas, tops["lower"], picture)
    if len(picture.stream_names):
        _draw_streams(canvas, tops["lower"], picture)
    return canvas.image(resolution)


def save_picture(path: str | os.PathLike, picture: FlowPicture) -> None:
    """Writes it as a PNG for print: 2160 px wide, 300 dpi.

    Raises:
        UserError: The file cannot be written.
    """
    stream = io.BytesIO()
    draw_picture(picture, _PRINT).save(stream, "PNG", optimize=True, dpi=(_DPI, _DPI))
    atomic_write_bytes(path, stream.getvalue())


class _Canvas:
    """Pillow in the picture's own pixels."""

    def __init__(self, width: int, height: int):
        self._image = Image.new("RGB", (width * _ZOOM, height * _ZOOM), _PAPER)
        self._draw = ImageDraw.Draw(self._image)
        self._size = width, height

    def image(self, resolution: int) -> Image.Image:
        return self._image.resize([side * resolution for side in self._size], Image.Resampling.LANCZOS)

    def text(self, x, y, words, size=14, colour=_INK, anchor="la", width=None) -> None:
        """Writes one line, cut with an ellipsis where it is wider than ``width``."""
        font = ImageFont.load_default(size * _ZOOM)
        if width is not None and font.getlength(words) > width * _ZOOM:
            while words and font.getlength(words + "...") > width * _ZOOM:
                words = words[:-1]
            words += "..."
        self._draw.text((x * _ZOOM, y * _ZOOM), words, colour, font, anchor)

    def line(self, points, colour, width=1.0) -> None:
        flat = [(x * _ZOOM, y * _ZOOM) for x, y in points]
        self._draw.line(flat, colour, max(1, round(width * _ZOOM)), joint="curve")

    def box(self, left, top, right, bottom, colour) -> None:
        corners = [round(value * _ZOOM) for value in (left, top, right, bottom)]
        if corners[2] > corners[0] and corners[3] > corners[1]:
            self._draw.rectangle((corners[0], corners[1], corners[2] - 1, corners[3] - 1), colour)

    def dot(self, x, y, radius, colour) -> None:
        self._draw.ellipse([value * _ZOOM for value in (x - radius, y - radius, x + radius, y + radius)], colour)

    def paste(self, left, top, side, pixels: np.ndarray) -> None:
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        self._image.paste(
            picture.resize((side * _ZOOM, side * _ZOOM), Image.Resampling.BICUBIC), (left * _ZOOM, top * _ZOOM)
        )

    def panel(self, column: int, top: int, pixels: np.ndarray, name: str) -> None:
        """A square picture in one of three columns, with its caption."""
        left = _MARGIN + column * (_PANEL + _GAP)
        self.box(left - 1, top - 1, left + _PANEL + 1, top + _PANEL + 1, _RULE)
        self.paste(left, top, _PANEL, pixels)
        self.text(left, top + _PANEL + 8, name, 14, _MUTED, width=_PANEL)


def _draw_wheel(canvas: _Canvas, top: int, scale: float) -> None:
    """The colours' key: what a flow that points from the middle to a place on the wheel looks like."""
    left, side = _MARGIN + 2 * (_PANEL + _GAP), _PANEL
    y, x = np.mgrid[-1:1:1024j, -1:1:1024j]
    field = np.stack([x, y], axis=-1) * 1.25  # the circle of full colour ends inside the panel
    colours = np.where((np.hypot(x, y) > 0.8)[..., None], np.uint8(255), flow_colours(field, 1.0))
    inner = round(side * 0.72)
    canvas.paste(left + (side - inner) // 2, top + (side - inner) // 2, inner, colours)
    middle_x, middle_y = left + side / 2, top + side / 2
    radius = 0.4 * inner + 16
    for words, dx, dy in (("right", 1, 0), ("down", 0, 1), ("left", -1, 0), ("up", 0, -1)):
        anchor = {1: "lm", -1: "rm", 0: "mm"}[dx]
        canvas.text(middle_x + dx * (radius - 6 * abs(dx)), middle_y + dy * radius, words, 14, _MUTED, anchor)
    canvas.text(left, top + side + 8, f"colours: white is rest, full colour {scale:.2g} px", 14, _MUTED, width=side)


def _draw_curve(canvas: _Canvas, top: int, picture: FlowPicture) -> None:
    left, right, upper, lower = _MARGIN + 56, _WIDTH - _MARGIN, top + 30, top + 140
    times, values = np.asarray(picture.times, float), np.asarray(picture.intensity, float)
    span, height = max(times[-1] - times[0], 1e-9), max(float(values.max()), 1e-9)
    x = left + (times - times[0]) / span * (right - left)
    y = lower - values / height * (lower - upper)
    canvas.text(_MARGIN, top, "Motion of the face against the onset", 14)
    if picture.smooth:
        told = f"apex: its largest after smoothing over {picture.smooth:g} frame{'s' * (picture.smooth != 1)}"
        canvas.text(_MARGIN + 270, top + 1, told, 12, _MUTED)
    for value, y_tick in ((0.0, lower), (float(values.max()), upper)):
        canvas.line([(left, y_tick), (right, y_tick)], _RULE)
        if value or y_tick == lower:
            canvas.text(left - 8, y_tick, f"{value:.2g} px", 13, _MUTED, "rm")
    canvas.line([(x[picture.apex], upper - 6), (x[picture.apex], lower)], _ORANGE, 2)
    canvas.line(list(zip(x, y, strict=True)), _BLUE, 2.2)
    if len(x) <= _DOTS:
        for place in zip(x, y, strict=True):
            canvas.dot(*place, 2.4, _BLUE)
    canvas.dot(x[picture.apex], y[picture.apex], 4.5, _ORANGE)
    canvas.text(
        x[picture.apex], upper - 10, "apex", 14, _ORANGE, "ms" if left + 16 < x[picture.apex] < right - 16 else "ls"
    )
    for place, anchor in ((0, "la"), (-1, "ra")):
        canvas.text(x[place], lower + 8, f"{times[place]:.2f} s", 13, _MUTED, anchor)


def _draw_labels(canvas: _Canvas, top: int, picture: FlowPicture) -> None:
    """Bars of probability, whiskers of spread, ticks of thresholds; what is predicted is in full colour."""
    left, width = _MARGIN + 116, _BARS
    canvas.text(_MARGIN, top, "Probability of each label", 14)
    key = "line: spread over members" + ("" if picture.thresholds is None else "; mark: threshold")
    canvas.text(_MARGIN + 190, top + 1, key, 12, _MUTED)
    for row, name in enumerate(picture.label_names):
        y = top + 34 + 30 * row
        mean, spread, decided = float(picture.mean[row]), float(picture.spread[row]), bool(picture.decisions[row])
        canvas.text(_MARGIN, y + 9, name, 14, _INK if decided else _MUTED, "lm", width=108)
        canvas.box(left, y, left + width, y + 18, _FAINT)
        canvas.box(left, y, left + max(width * mean, 1), y + 18, _BLUE if decided else "#9cc3dc")
        ends = [left + width * float(np.clip(mean + sign * spread, 0.0, 1.0)) for sign in (-1, 1)]
        canvas.line([(ends[0], y + 9), (ends[1], y + 9)], _INK, 1.4)
        if picture.thresholds is not None:
            mark = left + width * float(picture.thresholds[row])
            canvas.line([(mark, y - 4), (mark, y + 22)], _ORANGE, 2)
        told = f"{mean:.2f}" + ("  predicted" if decided else "")
        canvas.text(left + width + 10, y + 9, told, 14, _INK if decided else _MUTED, "lm")


def _draw_streams(canvas: _Canvas, top: int, picture: FlowPicture) -> None:
    """One bar a row, cut into the streams' shares."""
    left = _MARGIN + 116 + _BARS + 140
    width = _WIDTH - _MARGIN - left
    canvas.text(left, top, "Attention to the streams " + ", ".join(picture.stream_names), 14, width=width)
    shades = ["#0072b2", "#c65100", "#007a5a", "#9a4f86", "#6a737d"]
    bar, room = left + 170, width - 170
    for row, name in enumerate(picture.stream_rows):
        y = top + 34 + 30 * row
        canvas.text(left, y + 9, name, 13, _MUTED, "lm", width=162)
        edges = bar + room * np.concatenate([[0.0], np.cumsum(picture.streams[row])])
        for stream, (start, end) in enumerate(itertools.pairwise(edges)):
            canvas.box(start, y, end, y + 18, shades[stream % len(shades)])
            words = f"{picture.stream_names[stream]} {picture.streams[row][stream]:.2f}"
            if end - start > 52:
                canvas.text((start + end) / 2, y + 9, words, 12, _PAPER, "mm")
