"""Figures of a study as inline SVG, drawn by hand: arrays in, one string out.

Every function is pure, and the same input gives the same bytes. Colours and fonts come from the page (classes
such as ``blue`` and ``tick``, see :mod:`mer_jax.report.style`), so one drawing serves light, dark and paper.
Values that are not finite are left out of a drawing, never drawn at a wrong place.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from scipy import special

WIDTH = 960
"""Width of a full-width figure in SVG units; the page scales it to its column."""

HALF_WIDTH = 470
"""Width of a figure that shares its row with another."""


def format_number(value: float, digits: int = 3) -> str:
    """``value`` with ``digits`` decimals and a true minus sign; an en dash where there is no number."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}f}"
    if float(text) == 0.0:
        text = text.lstrip("-")
    return text.replace("-", "−")


def nice_ticks(low: float, high: float, count: int = 5) -> np.ndarray:
    """About ``count`` round numbers within ``[low, high]``, in steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return np.array([low])
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.75)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return np.arange(first, last + 1) * step


def _limits(*arrays, pad: float = 0.06, bounds: tuple[float, float] = (-math.inf, math.inf)):
    """The range of all finite values, padded on both sides and cut to ``bounds``."""
    values = np.concatenate([np.ravel(np.asarray(array, float)) for array in arrays])
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    margin = max((high - low) * pad, 1e-3)
    return max(low - margin, bounds[0]), min(high + margin, bounds[1])


def _xy(value: float) -> str:
    """A coordinate with one decimal, without a needless zero."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


class _Drawing:
    """A list of SVG elements and the few shapes that the figures are made of."""

    def __init__(self, width: float, height: float, label: str):
        self.width, self.height, self.label, self.parts = width, height, label, []

    def add(self, tag: str, css: str, text: str = "", tip: str = "", **attributes) -> None:
        """Adds one element; ``tip`` is what a pointer resting on it shows."""
        pairs = ""
        for name, value in attributes.items():
            value = value if isinstance(value, str) else _xy(value)
            pairs += f' {name.replace("_", "-")}="{escape(value)}"'
        inner = (f"<title>{escape(tip)}</title>" if tip else "") + escape(text)
        self.parts.append(f'<{tag} class="{css}"{pairs}>{inner}</{tag}>' if inner else f'<{tag} class="{css}"{pairs}/>')

    def text(self, x, y, text, css="tick", anchor="start") -> None:
        self.add("text", css, text, x=x, y=y, text_anchor=anchor)

    def line(self, x1, y1, x2, y2, css="axis") -> None:
        self.add("line", css, x1=x1, y1=y1, x2=x2, y2=y2)

    def rect(self, x, y, width, height, css, tip="", **attributes) -> None:
        self.add("rect", css, "", tip, x=x, y=y, width=max(width, 0.0), height=max(height, 0.0), **attributes)

    def dot(self, x, y, css, r=3.0, tip="") -> None:
        self.add("circle", css, "", tip, cx=x, cy=y, r=r)

    def diamond(self, x, y, css, r=5.0, tip="") -> None:
        path = f"M{_xy(x)} {_xy(y - r)}L{_xy(x + r)} {_xy(y)}L{_xy(x)} {_xy(y + r)}L{_xy(x - r)} {_xy(y)}Z"
        self.add("path", css, "", tip, d=path)

    def legend(self, x, y, entries: Sequence[tuple[str, str, str]]) -> None:
        """Swatches in a row: (shape: 'dot', 'line', 'bar' or 'diamond'; its classes; its words)."""
        for shape, css, words in entries:
            if shape == "dot":
                self.dot(x + 7, y - 4, css, 4.0)
            elif shape == "diamond":
                self.diamond(x + 7, y - 4, css)
            elif shape == "line":
                self.line(x, y - 4, x + 16, y - 4, css)
            else:
                self.rect(x, y - 10, 15.0, 11.0, css)
            self.text(x + 21, y, words, "label")
            x += 21 + 6.7 * len(words) + 22

    def svg(self) -> str:
        """The drawing as one element with the description that a screen reader speaks."""
        size = f'width="{_xy(self.width)}" height="{_xy(self.height)}"'
        return (
            f'<svg class="{"half" if self.width < WIDTH else "full"}" role="img" '
            f'aria-label="{escape(self.label)}" viewBox="0 0 {_xy(self.width)} {_xy(self.height)}" {size}>'
            f"{''.join(self.parts)}</svg>"
        )


class _Axes:
    """A rectangle of a drawing with a linear or base-10 logarithmic x axis and a linear y axis."""

    def __init__(self, drawing, left, top, width, height, xlim, ylim, log_x=False):
        self.drawing, self.log_x = drawing, log_x
        self.left, self.top, self.right, self.bottom = left, top, left + width, top + height
        self.xlim, self.ylim = xlim, ylim

    def x(self, value):
        low, high = self.xlim
        if self.log_x:
            low, high, value = math.log10(low), math.log10(high), np.log10(value)
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value):
        low, high = self.ylim
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def x_axis(self, name: str, ticks=None, texts=None, grid=True) -> None:
        ticks = nice_ticks(*self.xlim, count=6) if ticks is None else ticks
        texts = _tick_texts(ticks) if texts is None else texts
        for tick, text in zip(ticks, texts, strict=True):
            x = float(self.x(tick))
            if grid:
                self.drawing.line(x, self.top, x, self.bottom, "grid")
            self.drawing.text(x, self.bottom + 17, text, anchor="middle")
        self.drawing.line(self.left, self.bottom, self.right, self.bottom)
        self.drawing.text((self.left + self.right) / 2, self.bottom + 36, name, "name", "middle")

    def y_axis(self, name: str, count: int = 5, texts: bool = True) -> None:
        ticks = nice_ticks(*self.ylim, count=count)
        for tick, text in zip(ticks, _tick_texts(ticks), strict=True):
            y = float(self.y(tick))
            self.drawing.line(self.left, y, self.right, y, "grid")
            if texts:
                self.drawing.text(self.left - 8, y + 4, text, anchor="end")
        if name:
            self.drawing.text(self.left - 8, self.top - 14, name, "name", "start")

    def curve(self, x, y, css: str) -> None:
        """A polyline that is broken where ``y`` is not finite."""
        for run in _finite_runs(np.asarray(y, float)):
            points = [f"{_xy(self.x(x[i]))} {_xy(self.y(y[i]))}" for i in run]
            if len(points) == 1:
                self.drawing.dot(float(self.x(x[run[0]])), float(self.y(y[run[0]])), css.replace("line", "dot"))
            else:
                self.drawing.add("path", css, d="M" + "L".join(points))

    def band(self, x, low, high, css: str) -> None:
        """The area between two curves, broken where either is not finite."""
        low, high = np.asarray(low, float), np.asarray(high, float)
        for run in _finite_runs(low + high):
            points = [f"{_xy(self.x(x[i]))} {_xy(self.y(high[i]))}" for i in run]
            points += [f"{_xy(self.x(x[i]))} {_xy(self.y(low[i]))}" for i in reversed(run)]
            if len(run) > 1:
                self.drawing.add("path", css, d="M" + "L".join(points) + "Z")


def _tick_texts(ticks) -> list[str]:
    """All ticks with as many decimals as the finest of them needs."""
    digits = next((d for d in range(6) if np.allclose(np.round(ticks, d), ticks, rtol=0, atol=1e-9)), 6)
    return [format_number(float(tick), digits) for tick in ticks]


def _finite_runs(values) -> list[list[int]]:
    """Indices of each unbroken stretch of finite values."""
    runs: list[list[int]] = []
    for index in np.flatnonzero(np.isfinite(values)):
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(int(index))
        else:
            runs.append([int(index)])
    return runs


def _spread(positions: Sequence[float], gap: float) -> list[float]:
    """Moves positions apart, as little as a sweep can, until neighbours are ``gap`` from each other."""
    order = np.argsort(positions, kind="stable")
    placed = np.array(positions, float)
    for before, after in itertools.pairwise(order):
        placed[after] = max(placed[after], placed[before] + gap)
    shift = float(np.mean(placed - np.asarray(positions, float))) if len(placed) else 0.0
    return [float(value) for value in placed - shift]


def _swarm(x: np.ndarray, spacing: float, limit: float) -> np.ndarray:
    """Offsets across the axis that keep dots at ``x`` from hiding each other, at most ``limit`` to a side."""
    offsets = np.zeros(len(x))
    columns: dict[int, int] = {}
    for index in np.argsort(x, kind="stable"):
        column = round(float(x[index]) / spacing)
        rank = columns.get(column, 0)
        columns[column] = rank + 1
        offsets[index] = (rank + 1) // 2 * (1 if rank % 2 else -1) * spacing
    largest = np.abs(offsets).max(initial=0.0)
    return offsets * (limit / largest) if largest > limit else offsets


def score_strips(
    rows: Sequence[tuple[str, np.ndarray, np.ndarray, Sequence[int]]], *, score_name: str, chance: float
) -> str:
    """A row per fold: a dot per seed, a box from quartile to quartile and the median, honest above leaky.

    Args:
        rows: (row's name, honest scores ``(S,)``, leaky scores ``(S,)`` or empty, S seeds), scores in [0, 1].
        score_name: What the axis shows.
        chance: Score of a chance-level classifier, drawn as a line.

    Returns:
        The figure as an ``<svg>`` element.
    """
    lane = 30 if len(rows) <= 10 else 16
    heights = [lane * (2 if len(leaky) else 1) + 14 for _, _, leaky, _ in rows]
    top, left = 50, 150
    drawing = _Drawing(
        WIDTH,
        top + sum(heights) + 48,
        f"Strip plot of {score_name} over seeds: "
        + "; ".join(
            f"{row}: honest median {format_number(_median(honest))}"
            + (f", leaky median {format_number(_median(leaky))}" if len(leaky) else "")
            for row, honest, leaky, _ in rows
        ),
    )
    everything = [scores for _, honest, leaky, _ in rows for scores in (honest, leaky)]
    limits = _limits(*everything, np.array([chance]), bounds=(0, 1))
    axes = _Axes(drawing, left, top, WIDTH - left - 20, sum(heights), limits, (0, 1))
    axes.x_axis(score_name)
    entries = [
        ("dot", "dot blue", "honest, one dot per seed"),
        ("bar", "box blue", "quartiles, with the median"),
    ]
    entries += [("dot", "ring orange", "leaky")] if any(len(leaky) for _, _, leaky, _ in rows) else []
    drawing.legend(left, 16, entries)
    x = float(axes.x(chance))
    drawing.line(x, top, x, axes.bottom, "reference")
    drawing.text(x, top - 6, f"chance {format_number(chance)}", anchor="middle")
    y = top
    for (row, honest, leaky, seeds), height in zip(rows, heights, strict=True):
        if y > top:
            drawing.line(left, y, axes.right, y, "rule")
        drawing.text(left - 12, y + height / 2 + 4, row, "label", "end")
        tips = [f"{row}, seed {seed}" for seed in seeds]
        _strip(axes, y + 7 + lane / 2, lane, honest, "dot", "blue", tips)
        _strip(axes, y + 7 + lane * 1.5, lane, leaky, "ring", "orange", [f"leaky: {tip}" for tip in tips])
        y += height
    return drawing.svg()


def _strip(axes, y, lane, values, shape, colour, tips) -> None:
    """Dots around height ``y``, within ``lane``, over a box and a median; ``tips`` name the dots."""
    values = np.asarray(values, float)
    finite = np.isfinite(values)
    if not finite.any():
        return
    low, middle, high = (float(axes.x(q)) for q in np.quantile(values[finite], (0.25, 0.5, 0.75)))
    if finite.sum() > 2:
        axes.drawing.rect(low, y - lane * 0.4, high - low, lane * 0.8, f"box {colour}", rx=2)
    x = axes.x(values[finite])
    radius = 3.0 if lane > 20 else 2.2
    offsets = _swarm(x, 2 * radius, lane / 2 - radius)
    for position, offset, index in zip(x, offsets, np.flatnonzero(finite), strict=True):
        tip = f"{tips[index]}: {format_number(values[index])}"
        axes.drawing.dot(float(position), y + float(offset), f"{shape} {colour}", radius, tip)
    if finite.sum() > 2:
        axes.drawing.line(middle, y - lane * 0.45, middle, y + lane * 0.45, "median")


def _median(values) -> float:
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else math.nan


def learning_curves(
    epoch: np.ndarray,
    losses: Mapping[str, np.ndarray],
    selected: np.ndarray,
    y_name: str = "training loss, mean over labels (nats)",
) -> str:
    """Losses over epochs: median and 5-95 % band over members, and where training stopped.

    Args:
        epoch: Epoch of each evaluation ``(E,)``.
        losses: Name to losses ``(M, E)``; the order gives the colours; NaN is left out epoch by epoch.
        selected: The epoch whose parameters each member kept ``(M,)``, at least one member.
        y_name: What the losses are, with their unit.

    Returns:
        The figure as an ``<svg>`` element.
    """
    bands = {name: quantiles(values) for name, values in losses.items()}  # (3, E) each
    words = {name: f"{name} {format_number(_last_finite(values[1]))}" for name, values in bands.items()}
    drawing = _Drawing(WIDTH, 380, "Learning curves. Median loss at the last epoch: " + "; ".join(words.values()))
    low, high = _limits(*bands.values(), pad=0.05)
    first, last = float(np.min(epoch)), float(np.max(epoch))
    axes = _Axes(drawing, 56, 40, WIDTH - 56 - 180, 262, (first, max(last, first + 1)), (max(low, 0.0), high))
    axes.y_axis(y_name, count=6)
    axes.x_axis("epoch", grid=False)
    colours = dict(zip(losses, ("grey", "blue", "orange", "green"), strict=False))
    ends = {}
    for name, (lower, median, upper) in bands.items():
        axes.band(epoch, lower, upper, f"band {colours[name]}")
        axes.curve(epoch, median, f"line {colours[name]}")
        ends[name] = float(axes.y(_last_finite(median)))
    for name, y in zip(ends, _spread(list(ends.values()), 17), strict=True):
        drawing.text(axes.right + 10, y + 4, words[name], f"named {colours[name]}")
    early, middle, late = (float(quantile) for quantile in np.quantile(selected, (0.05, 0.5, 0.95)))
    left, centre, right = (float(axes.x(np.clip(value, first, last))) for value in (early, middle, late))
    y = axes.bottom + 60
    drawing.rect(left, y - 4, right - left, 8, "box blue", rx=3)
    drawing.dot(centre, y, "dot blue", 5.0)
    drawing.text(
        axes.right + 10,
        y + 4,
        f"kept epoch {format_number(middle, 0)} ({format_number(early, 0)}–{format_number(late, 0)})",
        "label",
    )
    return drawing.svg()


def quantiles(values: np.ndarray) -> np.ndarray:
    """5, 50 and 95 % over members, ``(M, ...)`` -> ``(3, ...)``; NaN is left out, and stays where all are."""
    values = np.asarray(values, float)
    flat = np.where(np.isfinite(values), values, np.nan).reshape(len(values), -1)
    result = np.full((3, flat.shape[1]), np.nan)
    known = np.isfinite(flat).any(axis=0)
    if known.any():
        result[:, known] = np.nanquantile(flat[:, known], (0.05, 0.5, 0.95), axis=0)
    return result.reshape(3, *values.shape[1:])


def _last_finite(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if finite.size else math.nan


def class_bars(
    labels: Sequence[str],
    score: np.ndarray,
    interval: np.ndarray,
    *,
    score_name: str,
    untuned: np.ndarray,
    leaky: np.ndarray,
    reference: np.ndarray,
) -> str:
    """A bar with its confidence interval per class, and what other deciders would give.

    Args:
        labels: Name of each class ``(C,)``.
        score: Honest score of each class ``(C,)`` in [0, 1].
        interval: Its confidence interval ``(C, 2)``; NaN where there is none.
        score_name: What the axis shows.
        untuned: Score at the untuned threshold ``(C,)``.
        leaky: Score with leaking choices ``(C,)``.
        reference: Score of a decider that always says "present" ``(C,)``.

    Returns:
        The figure as an ``<svg>`` element.
    """
    row_height, top, left = 46, 34, 132
    drawing = _Drawing(
        WIDTH,
        top + row_height * len(labels) + 48,
        f"Bars of {score_name} per class: "
        + "; ".join(
            f"{label} {format_number(value)}, interval {format_number(low)} to {format_number(high)}"
            for label, value, (low, high) in zip(labels, score, interval, strict=True)
        ),
    )
    axes = _Axes(drawing, left, top, WIDTH - left - 70, row_height * len(labels), (0.0, 1.0), (0, 1))
    axes.x_axis(score_name, np.linspace(0, 1, 6))
    entries = [("bar", "bar blue", "honest, with its confidence interval")]
    for values, entry in (
        (untuned, ("dot", "ring ink", "threshold 0.5")),
        (leaky, ("diamond", "ring orange", "leaky")),
        (reference, ("line", "reference", "always “present”")),
    ):
        entries += [entry] if np.isfinite(values).any() else []
    drawing.legend(left, 16, entries)
    for index, label in enumerate(labels):
        y = top + row_height * (index + 0.5)
        drawing.text(left - 12, y + 4, label, "label", "end")
        if np.isfinite(score[index]):
            tip = f"{label}: {format_number(score[index])}"
            drawing.rect(left, y - 12, float(axes.x(score[index])) - left, 24, "bar blue", tip)
        if np.isfinite(reference[index]):
            x = float(axes.x(reference[index]))
            drawing.line(x, y - 17, x, y + 17, "reference")
        if np.isfinite(interval[index]).all():
            low, high = (float(value) for value in axes.x(interval[index]))
            drawing.line(low, y, high, y, "whisker")
            drawing.line(low, y - 5, low, y + 5, "whisker")
            drawing.line(high, y - 5, high, y + 5, "whisker")
        if np.isfinite(untuned[index]):
            drawing.dot(
                float(axes.x(untuned[index])),
                y,
                "ring ink",
                4.0,
                f"threshold 0.5: {format_number(untuned[index])}",
            )
        if np.isfinite(leaky[index]):
            drawing.diamond(float(axes.x(leaky[index])), y, "ring orange", 6.0, f"leaky: {format_number(leaky[index])}")
        drawing.text(axes.right + 10, y + 4, format_number(score[index]), "value")
    return drawing.svg()


def confusions(labels: Sequence[str], counts: np.ndarray) -> str:
    """One two-by-two table per label, shaded by the share of its row.

    Args:
        labels: Name of each class ``(C,)``.
        counts: True positives, false positives, false negatives, true negatives ``(4, C)``, in clips.

    Returns:
        The figure as an ``<svg>`` element.
    """
    pitch, cell, left, top = (WIDTH - 96) / max(len(labels), 1), 62, 96, 48
    cell_width = min(cell, (pitch - 24) / 2)
    drawing = _Drawing(
        WIDTH,
        top + 2 * cell + 20,
        "Confusion per label: "
        + "; ".join(
            f"{label}: of the present {_count(tp)} found, {_count(fn)} missed; "
            f"of the absent {_count(fp)} claimed, {_count(tn)} not claimed"
            for label, tp, fp, fn, tn in zip(labels, *counts, strict=True)
        ),
    )
    for row, words in enumerate(("truly present", "truly absent")):
        drawing.text(left - 12, top + cell * (row + 0.5) + 4, words, "label", "end")
    for index, label in enumerate(labels):
        tp, fp, fn, tn = (float(value) for value in counts[:, index])
        x = left + pitch * index
        drawing.text(x + cell_width, 16, label, "label strong", "middle")
        for column, words in enumerate(("present", "absent")):
            drawing.text(x + cell_width * (column + 0.5), 38, words, anchor="middle")
        for row, (pair, right) in enumerate((((tp, fn), 0), ((fp, tn), 1))):
            for column, value in enumerate(pair):
                share = value / sum(pair) if sum(pair) > 0 else 0.0
                box = (x + cell_width * column, top + cell * row)
                colour = "blue" if column == right else "orange"
                shade = f"{0.08 + 0.5 * share:.2f}"
                width = cell_width - 3
                drawing.rect(*box, width, cell - 3, f"cell {colour}", rx=3, fill_opacity=shade)
                centre = box[0] + width / 2
                drawing.text(centre, box[1] + 28, _count(value), "value", "middle")
                drawing.text(centre, box[1] + 45, f"{100 * share:.0f} %", "share", "middle")
    return drawing.svg()


def confusion_matrix(labels: Sequence[str], counts: np.ndarray) -> str:
    """True against predicted class, shaded by the share of the row.

    Args:
        labels: Name of each class ``(C,)``.
        counts: Clips ``(C, C)``, true class first.

    Returns:
        The figure as an ``<svg>`` element.
    """
    left, top, height = 132, 56, 62
    width = min(150.0, (WIDTH - left) / len(labels))
    drawing = _Drawing(
        WIDTH,
        top + height * len(labels) + 12,
        "Confusion matrix: "
        + "; ".join(
            f"of {_count(float(row.sum()))} clips {label}: "
            + ", ".join(f"{_count(float(n))} taken for {name}" for name, n in zip(labels, row, strict=True))
            for label, row in zip(labels, counts, strict=True)
        ),
    )
    drawing.text(left + width * len(labels) / 2, 16, "predicted", "name", "middle")
    drawing.text(left - 12, top - 12, "truth", "name", "end")
    for column, label in enumerate(labels):
        drawing.text(left + width * (column + 0.5), top - 12, label, "label strong", "middle")
    for row, label in enumerate(labels):
        y = top + height * row
        drawing.text(left - 12, y + height / 2 + 4, label, "label strong", "end")
        total = float(counts[row].sum())
        for column in range(len(labels)):
            value = float(counts[row, column])
            share = value / total if total > 0 else 0.0
            x, centre = left + width * column, left + width * (column + 0.5) - 1.5
            colour = "blue" if column == row else "orange"
            drawing.rect(x, y, width - 3, height - 3, f"cell {colour}", rx=3, fill_opacity=f"{0.08 + 0.5 * share:.2f}")
            drawing.text(centre, y + 28, _count(value), "value", "middle")
            drawing.text(centre, y + 45, f"{100 * share:.0f} %", "share", "middle")
    return drawing.svg()


def share_panels(
    names: Sequence[str], panels: Sequence[tuple[str, Sequence[tuple[str, np.ndarray, np.ndarray]]]], *, label: str
) -> str:
    """Side by side, panels of bars that are each split into shares, the same rows in all panels.

    Args:
        names: What the S shares are of.
        panels: (title, rows of (row's name, mean shares ``(S,)`` that add up to 1, low and high ``(2, S)``)); rows
            without finite shares are left empty.
        label: What a screen reader says before the shares.

    Returns:
        The figure as an ``<svg>`` element.
    """
    colours = ("blue", "green", "purple", "grey", "orange")
    lane, left, top, gap = 26, 190, 74, 28
    width = (WIDTH - left - gap * (len(panels) - 1)) / len(panels)
    spoken = [
        f"{title}, {row}: " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in zip(names, mean, strict=True))
        for title, rows in panels
        for row, mean, _ in rows
        if np.isfinite(mean).all()
    ]
    drawing = _Drawing(WIDTH, top + lane * max(len(rows) for _, rows in panels) + 8, f"{label}: " + "; ".join(spoken))
    drawing.legend(left, 16, [("bar", f"bar {colours[index % 5]}", name) for index, name in enumerate(names)])
    for number, (title, rows) in enumerate(panels):
        start = left + (width + gap) * number
        drawing.text(start, top - 14, title, "label strong")
        for index, (row, mean, band) in enumerate(rows):
            y = top + lane * index
            if number == 0:
                drawing.text(left - 12, y + 15, row, "label", "end")
            if not np.isfinite(mean).all():
                continue
            x = start
            for place, (name, share) in enumerate(zip(names, mean, strict=True)):
                low, high = (f"{100 * value:.0f}" for value in band[:, place])
                tip = f"{row}, {name}: {100 * share:.1f} % (members {low}–{high} %)"
                drawing.rect(x, y, width * share - 2, lane - 6, f"bar {colours[place % 5]}", tip, rx=2)
                if width * share > 34:
                    drawing.text(x + width * share / 2, y + 15, f"{100 * share:.0f} %", "share", "middle")
                x += width * share
    return drawing.svg()


def _count(value: float) -> str:
    """A count, with one decimal where it is a mean over seeds."""
    return format_number(value, 0 if float(value).is_integer() else 1)


def curves(
    x: np.ndarray,
    series: Sequence[tuple[str, str, np.ndarray]],
    *,
    x_name: str,
    y_name: str,
    marks: Sequence[tuple[str, str, float]],
    label: str,
    span: tuple[str, float, float] | None = None,
) -> str:
    """Curves over the unit interval, with vertical marks.

    Args:
        x: Positions ``(X,)`` in [0, 1].
        series: (name, colour, values ``(X,)`` in [0, 1]).
        x_name: Name of the x axis, with its unit.
        y_name: Name of the y axis, with its unit.
        marks: (name, colour, x) of vertical lines.
        label: What a screen reader says before the curves' best points.
        span: (words, low, high) of a shaded stretch of the x axis.

    Returns:
        The figure as an ``<svg>`` element.
    """
    best = [
        f"{name}, highest {format_number(np.nanmax(values))} at {format_number(x[np.nanargmax(values)], 2)}"
        for name, _, values in series
        if np.isfinite(values).any()
    ]
    drawing = _Drawing(WIDTH, 360, f"{label}: " + "; ".join(best))
    limits = _limits(*(values for _, _, values in series), bounds=(0.0, 1.0))
    axes = _Axes(drawing, 56, 66, WIDTH - 76, 240, (0.0, 1.0), limits)
    axes.y_axis(y_name)
    axes.x_axis(x_name, np.linspace(0, 1, 6), grid=False)
    entries = [("line", f"line {colour}", name) for name, colour, _ in series]
    if span:
        words, first, last = span
        left, right = float(axes.x(first)), float(axes.x(last))
        drawing.rect(left, axes.top, right - left, axes.bottom - axes.top, "box grey", words)
        entries.append(("bar", "box grey", words))
    drawing.legend(56, 16, entries)
    for name, colour, position in marks:
        at = float(axes.x(position))
        drawing.line(at, axes.top, at, axes.bottom, f"mark {colour}")
        drawing.text(at, axes.top - 4, name, f"named {colour}", "middle")
    for _, colour, values in series:
        axes.curve(x, values, f"line {colour}")
    return drawing.svg()


def class_panels(
    labels: Sequence[str],
    x: np.ndarray,
    series: Sequence[tuple[str, str, np.ndarray]],
    *,
    x_name: str,
    x_ticks: np.ndarray,
    label: str,
    reference: tuple[str, float] | None = None,
    marks: np.ndarray | None = None,
) -> str:
    """One small panel per class, all on the same scales.

    Args:
        labels: Name of each class ``(C,)``.
        x: Positions ``(X,)``, rising.
        series: (name, colour, curves ``(C, 3, X)``: low, middle and high, or ``(C, 1, X)`` without a band).
        x_name: Name of the x axis.
        x_ticks: Where the x axis is labelled; it reaches from the first to the last of them.
        label: What a screen reader says before the peaks.
        reference: (words, height) of a dashed line.
        marks: ``(K, C)`` positions of K small marks per panel.

    Returns:
        The figure as an ``<svg>`` element.
    """
    gap, left, top = 28, 52, 66
    width = (WIDTH - left - 12 - gap * (len(labels) - 1)) / len(labels)
    peaks = [
        f"{name}, {words}: peak at {format_number(x[np.nanargmax(middle)], 2)}"
        for index, name in enumerate(labels)
        for words, _, curves in series
        if np.isfinite(middle := curves[index, curves.shape[1] // 2]).any()
    ]
    drawing = _Drawing(WIDTH, 290, f"{label}: " + "; ".join(peaks))
    entries = [("line", f"line {colour}", words) for words, colour, _ in series]
    entries += [("line", "reference", reference[0])] if reference else []
    drawing.legend(left, 16, entries)
    highest = [[1.2 * reference[1]]] if reference else []
    limits = (0.0, _limits(*(curves for _, _, curves in series), *highest)[1])
    span = float(x_ticks[0]), float(x_ticks[-1])
    for index, name in enumerate(labels):
        axes = _Axes(drawing, left + (width + gap) * index, top, width, 176, span, limits)
        drawing.text(axes.left, top - 14, name, "label strong")
        axes.y_axis("", count=4, texts=index == 0)
        axes.x_axis(x_name, x_ticks, grid=False)
        if reference:
            y = float(axes.y(reference[1]))
            drawing.line(axes.left, y, axes.right, y, "reference")
        for _, colour, curves in series:
            if curves.shape[1] == 3:
                axes.band(x, curves[index, 0], curves[index, 2], f"band {colour}")
            axes.curve(x, curves[index, curves.shape[1] // 2], f"line {colour}")
        for position in [] if marks is None else marks[:, index]:
            at, foot = float(axes.x(position)), axes.bottom
            path = f"M{_xy(at)} {_xy(foot - 9)}L{_xy(at + 4)} {_xy(foot)}L{_xy(at - 4)} {_xy(foot)}Z"
            drawing.add("path", "tip ink", "", format_number(position), d=path)
    return drawing.svg()


def gate_strips(
    rows: Sequence[tuple[str, np.ndarray, Sequence[str]]], *, axis: str, ends: tuple[str, str], even: float
) -> str:
    """Where the gate stands: a dot per member on the scale from 0 to 1.

    Args:
        rows: (row's name, weights ``(S,)`` in [0, 1], the S members' names for the tips).
        axis: What the axis shows.
        ends: Words at its left and right end.
        even: Weight of a gate that treats all alike, drawn as a line.

    Returns:
        The figure as an ``<svg>`` element.
    """
    lane = 40 if len(rows) <= 8 else 18
    top, left = 40, 150
    drawing = _Drawing(
        WIDTH,
        top + lane * len(rows) + 48,
        f"Strip plot of {axis}: " + "; ".join(f"{row} median {format_number(_median(v), 2)}" for row, v, _ in rows),
    )
    axes = _Axes(drawing, left, top, WIDTH - left - 20, lane * len(rows), (0.0, 1.0), (0, 1))
    axes.x_axis(axis, np.linspace(0, 1, 6))
    drawing.text(axes.left, top - 12, ends[0])
    drawing.text(axes.right, top - 12, ends[1], anchor="end")
    middle = float(axes.x(even))
    drawing.line(middle, top, middle, axes.bottom, "reference")
    for index, (row, weights, members) in enumerate(rows):
        y = top + lane * (index + 0.5)
        drawing.text(left - 12, y + 4, row, "label", "end")
        _strip(axes, y, lane - 6, weights, "dot", "blue", members)
    return drawing.svg()


def score_forest(
    rows: Sequence[tuple[str, float, tuple[float, float], np.ndarray]], *, axis: str, chance: float
) -> str:
    """Scores with their intervals, one row below the other.

    Args:
        rows: (name, mean, interval ``(low, high)``, scores of single seeds ``(S,)``).
        axis: What the axis shows.
        chance: Drawn as a line.

    Returns:
        The figure as an ``<svg>`` element.
    """
    lane, top = 28, 34
    left = min(380, 30 + 7.2 * max(len(name) for name, *_ in rows))
    label = f"{axis} of each row: " + "; ".join(f"{name} {format_number(mean)}" for name, mean, *_ in rows)
    drawing = _Drawing(WIDTH, top + lane * len(rows) + 48, label)
    limits = _limits(
        *(values for *_, values in rows), *(interval for _, _, interval, _ in rows), [chance], bounds=(0, 1)
    )
    axes = _Axes(drawing, left, top, WIDTH - left - 20, lane * len(rows), limits, (0, 1))
    axes.x_axis(axis)
    middle = float(axes.x(chance))
    drawing.line(middle, top, middle, axes.bottom, "reference")
    drawing.text(middle, top - 10, "chance", anchor="middle")
    for index, (name, mean, (low, high), values) in enumerate(rows):
        y = top + lane * (index + 0.5)
        drawing.text(left - 12, y + 4, name, "label", "end")
        for value in values:
            drawing.dot(float(axes.x(value)), y, "ring blue", 3.0)
        drawing.line(float(axes.x(low)), y, float(axes.x(high)), y, "whisker")
        words = f"{name}: {format_number(mean)} [{format_number(low)}, {format_number(high)}]"
        drawing.diamond(float(axes.x(mean)), y, "dot blue", tip=words)
    return drawing.svg()


def share_bar(parts: Sequence[tuple[str, str, float, str]], label: str) -> str:
    """One bar split into shares, each named beneath it.

    Args:
        parts: (name, colour, share in [0, 1], more words).
        label: What a screen reader says before the shares.

    Returns:
        The figure as an ``<svg>`` element.
    """
    drawing = _Drawing(
        HALF_WIDTH,
        72 + 26 * len(parts),
        f"{label}: " + "; ".join(f"{name} {100 * share:.0f} percent" for name, _, share, _ in parts),
    )
    x, width = 0.0, HALF_WIDTH
    for index, (name, colour, share, words) in enumerate(parts):
        if share > 0:
            drawing.rect(x, 14, width * share - 2, 40, f"bar {colour}", f"{name}: {100 * share:.0f} %", rx=2)
        x += width * share
        y = 84 + 26 * index
        drawing.rect(0, y - 11, 12.0, 12.0, f"bar {colour}", rx=2)
        drawing.text(20, y, name, "label")
        drawing.text(150, y, f"{100 * share:.0f} %", "value", "end")
        drawing.text(172, y, words, "label")
    return drawing.svg()


def width_curve(
    sd: float, now: int, targets: Sequence[tuple[int, float]], *, confidence: float, score_name: str
) -> str:
    """Half-width of the t interval of a mean over seeds, with this study and the wanted widths on it.

    Args:
        sd: Standard deviation of the score over seeds, above 0.
        now: Number of seeds of this study, at least 2.
        targets: (number of seeds, half-width that it reaches), any number of them.
        confidence: Of the interval, in (0, 1).
        score_name: What the interval is about.

    Returns:
        The figure as an ``<svg>`` element.
    """
    # One mark per number of seeds, for the narrowest width that it reaches.
    targets = sorted({seeds: wanted for seeds, wanted in sorted(targets, key=lambda t: -t[1])}.items())
    largest = max(now, *(seeds for seeds, _ in targets)) * 4
    smallest = max(2, min(now, *(seeds for seeds, _ in targets)) / 1.6)
    count = np.geomspace(smallest, largest, 80)
    width = special.stdtrit(count - 1, (1 + confidence) / 2) * sd / np.sqrt(count)
    drawing = _Drawing(
        HALF_WIDTH,
        306,
        f"Half-width of the interval of {score_name} over the number of seeds: "
        + "; ".join(f"plus or minus {wanted:g} needs {seeds}" for seeds, wanted in targets),
    )
    here = float(np.interp(now, count, width))
    highest = max(here, *(wanted for _, wanted in targets)) * 1.25
    axes = _Axes(drawing, 56, 44, HALF_WIDTH - 72, 220, (smallest, largest), (0.0, highest), log_x=True)
    axes.y_axis(f"half-width of the interval (± {score_name})", count=4)
    ticks = [factor * 10**power for power in range(7) for factor in (1, 2, 5)]
    ticks = [tick for tick in ticks if smallest <= tick <= largest]
    ticks = ticks if len(ticks) < 9 else [tick for tick in ticks if str(tick).startswith("1")]
    axes.x_axis("seeds (log scale)", np.array(ticks), [f"{tick:,}" for tick in ticks], grid=False)
    shown = width <= highest
    axes.curve(count[shown], width[shown], "line blue")
    for seeds, wanted in targets:
        x, y = float(axes.x(seeds)), float(axes.y(min(np.interp(seeds, count, width), highest)))
        drawing.line(x, y, x, axes.bottom, "reference")
        drawing.dot(x, y, "ring ink", 4.0, f"{seeds} seeds are enough for ±{wanted:g}")
        drawing.text(x + 7, y - 9, f"{seeds:,} for ±{wanted:g}")
    x, y = float(axes.x(now)), float(axes.y(here))
    drawing.dot(x, y, "dot blue", 5.0, f"this study: {now} seeds, ±{format_number(here)}")
    drawing.text(x - 8, y + 16, f"now {now}", "named blue", "end")
    return drawing.svg()
