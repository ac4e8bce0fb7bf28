"""A picture of one prediction: the frames, the motion between them, and what the model makes of it."""

import dataclasses
import itertools
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mer_jax.report.canvas import (
    BARS,
    BLUE,
    GREEN,
    GREY,
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

_WIDTH, _MARGIN, _GAP = 1080, 36, 18
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
    canvas = Canvas(_WIDTH, tops["lower"] + lower + _MARGIN)
    canvas.text(_MARGIN, 28, picture.title, 24, width=_WIDTH - 2 * _MARGIN)
    canvas.text(_MARGIN, 60, picture.note, 14, MUTED, width=_WIDTH - 2 * _MARGIN)
    for column, (frame, name) in enumerate(zip(picture.frames, picture.frame_names, strict=True)):
        _panel(canvas, column, tops["frames"], frame, name)
    if len(picture.flows):
        scale = flow_scale(picture.flows)
        for column, (flow, name) in enumerate(zip(picture.flows, picture.flow_names, strict=True)):
            _panel(canvas, column, tops["flows"], flow_colours(flow, scale), name)
        _draw_wheel(canvas, tops["flows"], scale)
    if picture.intensity is not None:
        _draw_curve(canvas, tops["curve"], picture)
    draw_probabilities(
        canvas,
        _MARGIN,
        tops["lower"],
        picture.label_names,
        picture.mean,
        picture.spread,
        picture.thresholds,
        picture.decisions,
        ["predicted" if decided else "" for decided in picture.decisions],
    )
    if len(picture.stream_names):
        _draw_streams(canvas, tops["lower"], picture)
    return canvas.image(resolution)


def save_picture(path: str | os.PathLike, picture: FlowPicture) -> None:
    """Writes it as a PNG for print: 2160 px wide, 300 dpi.

    Raises:
        UserError: The file cannot be written.
    """
    save_png(path, draw_picture(picture, PRINT))


def _panel(canvas: Canvas, column: int, top: int, pixels: np.ndarray, name: str) -> None:
    """A square picture in one of three columns, with its caption."""
    left = _MARGIN + column * (_PANEL + _GAP)
    canvas.box(left - 1, top - 1, left + _PANEL + 1, top + _PANEL + 1, RULE)
    canvas.paste(left, top, _PANEL, pixels)
    canvas.text(left, top + _PANEL + 8, name, 14, MUTED, width=_PANEL)


def _draw_wheel(canvas: Canvas, top: int, scale: float) -> None:
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
        canvas.text(middle_x + dx * (radius - 6 * abs(dx)), middle_y + dy * radius, words, 14, MUTED, anchor)
    canvas.text(left, top + side + 8, f"colours: white is rest, full colour {scale:.2g} px", 14, MUTED, width=side)


def _draw_curve(canvas: Canvas, top: int, picture: FlowPicture) -> None:
    left, right, upper, lower = _MARGIN + 56, _WIDTH - _MARGIN, top + 30, top + 140
    times, values = np.asarray(picture.times, float), np.asarray(picture.intensity, float)
    span, height = max(times[-1] - times[0], 1e-9), max(float(values.max()), 1e-9)
    x = left + (times - times[0]) / span * (right - left)
    y = lower - values / height * (lower - upper)
    canvas.text(_MARGIN, top, "Motion of the face against the onset", 14)
    if picture.smooth:
        told = f"apex: its largest after smoothing over {picture.smooth:g} frame{'s' * (picture.smooth != 1)}"
        canvas.text(_MARGIN + 270, top + 1, told, 12, MUTED)
    for value, y_tick in ((0.0, lower), (float(values.max()), upper)):
        canvas.line([(left, y_tick), (right, y_tick)], RULE)
        if value or y_tick == lower:
            canvas.text(left - 8, y_tick, f"{value:.2g} px", 13, MUTED, "rm")
    canvas.line([(x[picture.apex], upper - 6), (x[picture.apex], lower)], ORANGE, 2)
    canvas.line(list(zip(x, y, strict=True)), BLUE, 2.2)
    if len(x) <= _DOTS:
        for place in zip(x, y, strict=True):
            canvas.dot(*place, 2.4, BLUE)
    canvas.dot(x[picture.apex], y[picture.apex], 4.5, ORANGE)
    canvas.text(
        x[picture.apex], upper - 10, "apex", 14, ORANGE, "ms" if left + 16 < x[picture.apex] < right - 16 else "ls"
    )
    for place, anchor in ((0, "la"), (-1, "ra")):
        canvas.text(x[place], lower + 8, f"{times[place]:.2f} s", 13, MUTED, anchor)


def _draw_streams(canvas: Canvas, top: int, picture: FlowPicture) -> None:
    """One bar a row, cut into the streams' shares."""
    left = _MARGIN + 116 + BARS + 140
    width = _WIDTH - _MARGIN - left
    canvas.text(left, top, "Attention to the streams " + ", ".join(picture.stream_names), 14, width=width)
    shades = [BLUE, ORANGE, GREEN, PURPLE, GREY]
    bar, room = left + 170, width - 170
    for row, name in enumerate(picture.stream_rows):
        y = top + 34 + 30 * row
        canvas.text(left, y + 9, name, 13, MUTED, "lm", width=162)
        edges = bar + room * np.concatenate([[0.0], np.cumsum(picture.streams[row])])
        for stream, (start, end) in enumerate(itertools.pairwise(edges)):
            canvas.box(start, y, end, y + 18, shades[stream % len(shades)])
            words = f"{picture.stream_names[stream]} {picture.streams[row][stream]:.2f}"
            if end - start > 52:
                canvas.text((start + end) / 2, y + 9, words, 12, PAPER, "mm")
