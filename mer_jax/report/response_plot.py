"""How scores respond to hyper-parameters: every candidate of a search as a dot, as inline SVG."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mer_jax.report.plots import WIDTH, _Axes, _Drawing, _limits, _swarm, format_number, nice_ticks

# With fewer different values than these an axis shows them all, and its dots side by side.
_FEW = 6


class Response(NamedTuple):
    """One hyper-parameter of K candidates.

    Attributes:
        name: What it is called.
        values: ``(K,)``.
        log: Whether its axis is logarithmic, where all values are above 0.
    """

    name: str
    values: np.ndarray
    log: bool


class Score(NamedTuple):
    """One score of K candidates.

    Attributes:
        name: What is scored, and on which clips.
        colour: Class of its marks.
        values: ``(K,)``, NaN where a candidate has none.
    """

    name: str
    colour: str
    values: np.ndarray


def response_curves(responses: Sequence[Response], scores: Sequence[Score], folds: np.ndarray) -> str:
    """A row of panels for each hyper-parameter, a panel for each score; the line is the median of neighbours.

    Args:
        responses: The hyper-parameters, at least one.
        scores: The scores, at least one; each keeps its scale from row to row.
        folds: ``(K,)`` number of folds that each candidate was chosen for. Candidate 0 is the default.

    Returns:
        The figure as an ``<svg>`` element.
    """
    left, gap, top, height, step = 56, 64, 76, 150, 224
    width = (WIDTH - left - 16 - gap * (len(scores) - 1)) / len(scores)
    drawing = _Drawing(WIDTH, top + step * len(responses) - 24, _spoken(responses, scores))
    drawing.legend(
        left,
        16,
        [
            ("dot", "ring grey", "a candidate"),
            ("dot", "dot grey", "chosen, larger for more folds"),
            ("diamond", "cell ink", "the config's own values"),
            ("line", "line grey", "median of neighbours"),
        ],
    )
    for row, response in enumerate(responses):
        log = response.log and bool((response.values > 0).all())
        for column, score in enumerate(scores):
            axes = _Axes(
                drawing,
                left + (width + gap) * column,
                top + step * row,
                width,
                height,
                _span(response.values, log),
                _limits(score.values, pad=0.1),
                log_x=log,
            )
            axes.y_axis(score.name if row == 0 else "", count=4)
            ticks = _ticks(response.values, axes.xlim, log)
            axes.x_axis(response.name + " (log scale)" * log, ticks, [f"{tick:g}" for tick in ticks], grid=False)
            _panel(axes, response, score, folds, log)
    return drawing.svg()


def _panel(axes: _Axes, response: Response, score: Score, folds: np.ndarray, log: bool) -> None:
    known = np.flatnonzero(np.isfinite(score.values))
    if not len(known):
        return
    axes.curve(*running_median(response.values[known], score.values[known], log), f"line {score.colour}")
    x, y = np.asarray(axes.x(response.values[known]), float), np.asarray(axes.y(score.values[known]), float)
    if len(np.unique(response.values)) < _FEW:
        x = x.copy()
        for value in np.unique(x):
            here = x == value
            x[here] += _swarm(y[here], 7.0, 22.0)
    most = max(int(folds.max()), 1)
    for index, across, up in sorted(zip(known, x, y, strict=True), key=lambda dot: folds[dot[0]]):
        tip = f"candidate {index}: {response.name} {response.values[index]:g}, {format_number(score.values[index])}"
        if folds[index]:
            tip += f", chosen for {folds[index]} {'fold' if folds[index] == 1 else 'folds'}"
        if folds[index]:
            axes.drawing.dot(float(across), float(up), f"dot {score.colour}", 4 + 3 * folds[index] / most, tip)
        else:
            axes.drawing.dot(float(across), float(up), f"ring {score.colour}", 3.2, tip)
        if index == 0:
            axes.drawing.diamond(float(across), float(up), "cell ink", 4.5, f"the config's own values, {tip}")


def running_median(x: np.ndarray, y: np.ndarray, log: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The medians of groups of neighbours: of equal values where there are few, else of about four at a time.

    Args:
        x: ``(K,)``.
        y: ``(K,)``, finite.
        log: Whether a group stands at its geometric mean.

    Returns:
        Positions and medians, each ``(G,)``, by rising position.
    """
    order = np.argsort(x, kind="stable")
    if len(np.unique(x)) < _FEW:
        groups = [np.flatnonzero(x == value) for value in np.unique(x)]
    else:
        groups = np.array_split(order, min(max(len(x) // 4, 2), 8))
    mean = (lambda values: np.exp(np.log(values).mean())) if log else np.mean
    return np.array([mean(x[group]) for group in groups]), np.array([np.median(y[group]) for group in groups])


def _span(values: np.ndarray, log: bool) -> tuple[float, float]:
    """The axis: all values, and a little more on both sides."""
    if not log:
        return _limits(values, pad=0.05)
    low, high = np.log10(values.min()), np.log10(values.max())
    margin = max(0.05 * (high - low), 0.02)
    return float(10 ** (low - margin)), float(10 ** (high + margin))


def _ticks(values: np.ndarray, span: tuple[float, float], log: bool) -> np.ndarray:
    distinct = np.unique(values)
    if len(distinct) < _FEW:
        return distinct
    if not log:
        return nice_ticks(*span)
    powers = range(int(np.floor(np.log10(span[0]))), int(np.ceil(np.log10(span[1]))) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = np.array([factor * 10.0**power for power in powers for factor in factors])
        ticks = ticks[(ticks >= span[0]) & (ticks <= span[1])]
        if len(ticks) <= 7:
            break
    return ticks


def _spoken(responses: Sequence[Response], scores: Sequence[Score]) -> str:
    """What a screen reader says: where each score's candidate is best known to stand."""
    parts = []
    for score in scores:
        known = score.values[np.isfinite(score.values)]
        if len(known):
            parts.append(f"{score.name}, from {format_number(known.min())} to {format_number(known.max())}")
    names = ", ".join(response.name for response in responses)
    return f"Response to {names} of {len(responses[0].values)} candidates: " + "; ".join(parts)
