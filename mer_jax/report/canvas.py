"""What the pictures of single clips are drawn on: Pillow with smooth lines, in the report's colours."""

import io
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mer_jax.files import atomic_write_bytes

# The report's colours on light paper (mer_jax.report.style).
PAPER, INK, MUTED, RULE, FAINT = "#ffffff", "#1b1f24", "#57606c", "#d8dce2", "#eceef1"
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#c65100", "#007a5a", "#9a4f86", "#6a737d"

# Everything is drawn at four times its size and reduced at the end, because Pillow draws lines without smoothing.
ZOOM = 4
# Pixels of a written picture to a unit: 300 dpi at 7.2 inches, the width of a page's text, where it is 1080 wide.
PRINT = 2
_DPI = 300
# Width of the bars of probability.
BARS = 270


class Canvas:
    """Pillow in the picture's own units of length.

    Args:
        width: Of the picture, in these units.
        height: Of the picture.
    """

    def __init__(self, width: int, height: int):
        self._image = Image.new("RGB", (width * ZOOM, height * ZOOM), PAPER)
        self._draw = ImageDraw.Draw(self._image)
        self._size = width, height

    def image(self, resolution: int) -> Image.Image:
        """The picture in RGB, ``resolution`` pixels (1, 2 or 4) to a unit."""
        return self._image.resize([side * resolution for side in self._size], Image.Resampling.LANCZOS)

    def width_of(self, words: str, size: int) -> float:
        """Of one line of text."""
        return ImageFont.load_default(size * ZOOM).getlength(words) / ZOOM

    def text(self, x, y, words, size=14, colour=INK, anchor="la", width=None) -> None:
        """Writes one line, cut with an ellipsis where it is wider than ``width``."""
        font = ImageFont.load_default(size * ZOOM)
        if width is not None and font.getlength(words) > width * ZOOM:
            while words and font.getlength(words + "...") > width * ZOOM:
                words = words[:-1]
            words += "..."
        self._draw.text((x * ZOOM, y * ZOOM), words, colour, font, anchor)

    def line(self, points, colour, width=1.0) -> None:
        """Joins points (x, y)."""
        flat = [(x * ZOOM, y * ZOOM) for x, y in points]
        self._draw.line(flat, colour, max(1, round(width * ZOOM)), joint="curve")

    def area(self, points, colour) -> None:
        """Fills what points (x, y) enclose."""
        self._draw.polygon([(x * ZOOM, y * ZOOM) for x, y in points], colour)

    def box(self, left, top, right, bottom, colour) -> None:
        """Fills a rectangle."""
        corners = [round(value * ZOOM) for value in (left, top, right, bottom)]
        if corners[2] > corners[0] and corners[3] > corners[1]:
            self._draw.rectangle((corners[0], corners[1], corners[2] - 1, corners[3] - 1), colour)

    def dot(self, x, y, radius, colour) -> None:
        """Fills a circle."""
        self._draw.ellipse([value * ZOOM for value in (x - radius, y - radius, x + radius, y + radius)], colour)

    def paste(self, left, top, side, pixels: np.ndarray) -> None:
        """Shows a square picture, (S, S, 3) uint8 RGB."""
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        corner = round(left * ZOOM), round(top * ZOOM)
        self._image.paste(picture.resize((side * ZOOM, side * ZOOM), Image.Resampling.BICUBIC), corner)


def save_png(path: str | os.PathLike, image: Image.Image) -> None:
    """Writes a picture that was drawn with the resolution :data:`PRINT`, for print at 300 dpi.

    Raises:
        UserError: The file cannot be written.
    """
    stream = io.BytesIO()
    image.save(stream, "PNG", dpi=(_DPI, _DPI))
    atomic_write_bytes(path, stream.getvalue())


def draw_probabilities(
    canvas: Canvas,
    left: float,
    top: float,
    names: Sequence[str],
    mean: np.ndarray,
    spread: np.ndarray,
    thresholds: np.ndarray | None,
    decisions: np.ndarray,
    words: Sequence[str],
) -> None:
    """Bars of probability, whiskers of spread, ticks of thresholds; what is predicted is in full colour.

    Args:
        canvas: Where to draw.
        left: Of the names.
        top: Of the heading; each of the L bars below it takes 30.
        names: L labels.
        mean: ``(L,)`` probabilities.
        spread: ``(L,)`` their standard deviations over members.
        thresholds: ``(L,)``, or None where the largest probability decides.
        decisions: ``(L,)`` bool.
        words: What is said behind each bar.
    """
    start = left + 116
    canvas.text(left, top, "Probability of each label", 14)
    key = "line: spread over members" + ("" if thresholds is None else "; mark: threshold")
    canvas.text(left + 190, top + 1, key, 12, MUTED)
    for row, name in enumerate(names):
        y = top + 34 + 30 * row
        decided = bool(decisions[row])
        canvas.text(left, y + 9, name, 14, INK if decided else MUTED, "lm", width=108)
        canvas.box(start, y, start + BARS, y + 18, FAINT)
        canvas.box(start, y, start + max(BARS * float(mean[row]), 1), y + 18, BLUE if decided else "#9cc3dc")
        ends = [start + BARS * float(np.clip(mean[row] + sign * spread[row], 0.0, 1.0)) for sign in (-1, 1)]
        canvas.line([(ends[0], y + 9), (ends[1], y + 9)], INK, 1.4)
        if thresholds is not None:
            mark = start + BARS * float(thresholds[row])
            canvas.line([(mark, y - 4), (mark, y + 22)], ORANGE, 2)
        told = f"{mean[row]:.2f}" + (f"  {words[row]}" if words[row] else "")
        canvas.text(start + BARS + 10, y + 9, told, 14, INK if decided else MUTED, "lm")
