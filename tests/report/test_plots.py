import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer_jax.report import plots

LABELS = ("Negative", "Positive", "Repression", "Surprise", "Others")


def parse(svg):
    """The drawing as a tree; raises where it is not well-formed."""
    assert "nan" not in svg and "inf" not in svg
    return ElementTree.fromstring(svg)


def shapes(tree, tag, css):
    return [e for e in tree.iter(tag) if set(css.split()) <= set(e.get("class", "").split())]


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.12345, 3, "0.123"),
        (-0.5, 2, "−0.50"),
        (-0.0001, 3, "0.000"),
        (None, 3, "–"),
        (math.nan, 3, "–"),
        (12, 0, "12"),
    ],
)
def test_numbers_are_written_as_people_read_them(value, digits, text):
    assert plots.format_number(value, digits) == text


@settings(deadline=None)
@given(low=st.floats(-1e6, 1e6), width=st.floats(1e-6, 1e6), count=st.integers(2, 10))
def test_ticks_are_round_evenly_spaced_and_inside(low, width, count):
    # In proportion to the numbers, so that floats resolve a step: 1e-6 around 1e6 has no evenly spaced ticks.
    span = width * max(1.0, abs(low))
    high = low + span
    ticks = plots.nice_ticks(low, high, count)
    tolerance = 1e-6 * span
    assert (ticks >= low - tolerance).all() and (ticks <= high + tolerance).all()
    assert 1 <= len(ticks) <= 2 * count + 1
    if len(ticks) > 1:
        step = ticks[1] - ticks[0]
        assert np.diff(ticks) == pytest.approx(step, rel=1e-5)
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-3


def test_strips_place_a_dot_per_seed_in_the_order_of_its_score():
    honest, leaky = np.array([0.5, 0.6, np.nan, 0.55]), np.array([0.7, 0.72, 0.71, 0.69])
    tree = parse(plots.score_strips([("pooled", honest, leaky, [0, 1, 2, 3])], score_name="macro-F1", chance=0.3))
    dots = [dot for dot in shapes(tree, "circle", "dot blue") if dot.find("title") is not None]
    assert sorted(dot.find("title").text for dot in dots) == [
        "pooled, seed 0: 0.500",
        "pooled, seed 1: 0.600",
        "pooled, seed 3: 0.550",
    ]
    by_score = sorted(dots, key=lambda dot: dot.find("title").text[-5:])
    x = [float(dot.get("cx")) for dot in by_score]
    assert x == sorted(x) and len(set(x)) == 3
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert len([dot for dot in shapes(tree, "circle", "ring orange") if dot.find("title") is not None]) == 4
    assert "honest median 0.550" in tree.get("aria-label")


def test_many_equal_scores_stay_within_their_lane():
    tree = parse(plots.score_strips([("pooled", np.full(100, 0.5), [], range(100))], score_name="F1", chance=0.3))
    y = [float(dot.get("cy")) for dot in shapes(tree, "circle", "dot") if dot.find("title") is not None]
    assert max(y) - min(y) <= 30 and len(set(y)) > 50


def test_bars_are_as_long_as_the_scores():
    score = np.array([0.2, 0.4, 0.6, 0.8, np.nan])
    interval = np.stack([score - 0.1, score + 0.1], axis=1)
    tree = parse(
        plots.class_bars(
            LABELS,
            score,
            interval,
            score_name="F1",
            untuned=score,
            leaky=np.full(5, np.nan),
            reference=np.full(5, 0.1),
        )
    )
    width = [float(bar.get("width")) for bar in shapes(tree, "rect", "bar blue") if bar.find("title") is not None]
    assert np.allclose(np.array(width) / width[0], [1, 2, 3, 4], rtol=1e-2)
    assert not shapes(tree, "path", "ring orange")


def test_confusions_print_the_counts():
    counts = np.arange(20.0).reshape(4, 5) + 0.5
    tree = parse(plots.confusions(LABELS, counts))
    texts = [e.text for e in shapes(tree, "text", "value")]
    assert texts == [f"{counts[row, c]:.1f}" for c in range(5) for row in (0, 2, 1, 3)]


def test_learning_curves_leave_out_what_is_missing(rng):
    losses = rng.uniform(0.2, 0.7, (6, 9))
    losses[2] = np.nan
    losses[:, 4] = np.nan
    svg = plots.learning_curves(np.arange(1, 10), {"train": losses, "held out": losses + 0.1}, np.arange(3, 9))
    tree = parse(svg)
    assert len(shapes(tree, "path", "line grey")) == 2  # broken at the epoch without losses
    assert "train" in tree.get("aria-label")


def test_one_epoch_of_one_member_is_a_dot():
    tree = parse(plots.learning_curves(np.array([1]), {"train": np.array([[0.5]])}, np.array([1])))
    assert shapes(tree, "circle", "dot grey")


def test_quantiles_ignore_what_is_not_finite(rng):
    values = rng.normal(size=(9, 2, 3))
    values[0, 0, 0], values[1, 0, 0], values[:, 1, 2] = np.nan, np.inf, np.nan
    found = plots.quantiles(values)
    assert found.shape == (3, 2, 3)
    assert np.allclose(found[:, 0, 0], np.quantile(values[2:, 0, 0], (0.05, 0.5, 0.95)))
    assert np.isnan(found[:, 1, 2]).all()


def test_panels_share_their_scale_and_mark_thresholds():
    curves = np.linspace(0.1, 0.5, 5)[:, None, None] * np.ones((5, 1, 11))
    svg = plots.class_panels(
        LABELS,
        np.linspace(0, 1, 11),
        [("inner", "blue", curves)],
        x_name="threshold",
        x_ticks=np.array([0, 0.5, 1]),
        label="F1",
        marks=np.full((3, 5), 0.4),
    )
    tree = parse(svg)
    height = [float(p.get("d").split("L")[0][1:].split()[1]) for p in shapes(tree, "path", "line blue")][1:]
    assert height == sorted(height, reverse=True)
    assert len(shapes(tree, "path", "tip")) == 15


def test_width_curve_agrees_with_seeds_needed():
    from mer_jax.evaluation.statistics import seeds_needed

    widths = (0.05, 0.02, 0.01)
    targets = [(seeds_needed(0.03, width, 0.95), width) for width in widths]
    tree = parse(plots.width_curve(0.03, 10, targets, confidence=0.95, score_name="macro-F1"))
    for seeds, width in targets:
        assert f"plus or minus {width:g} needs {seeds}" in tree.get("aria-label")
    # Each mark lies at or below the width that it promises: more than enough seeds, never too few.
    marks = shapes(tree, "circle", "ring")
    now = next(iter(shapes(tree, "circle", "dot blue")))
    above = [seeds for seeds, _ in targets if seeds < 10]
    assert sum(float(mark.get("cy")) < float(now.get("cy")) for mark in marks) == len(above)


def test_targets_of_the_same_number_of_seeds_are_one_mark():
    targets = [(2, 0.05), (2, 0.02), (3, 0.01)]
    tree = parse(plots.width_curve(0.0005, 4, targets, confidence=0.95, score_name="macro-F1"))
    assert len(shapes(tree, "circle", "ring")) == 2


def test_confusion_matrix_says_its_counts_and_shares():
    counts = np.array([[6.0, 2.0, 0.0], [1.5, 4.5, 2.0], [0.0, 0.0, 0.0]])
    tree = parse(plots.confusion_matrix(("negative", "positive", "surprise"), counts))
    words = " ".join(tree.itertext())
    assert "75 %" in words and "25 %" in words and "4.5" in words and "nan" not in words
    label = tree.get("aria-label")
    assert "of 8 clips negative: 6 taken for negative, 2 taken for positive, 0 taken for surprise" in label
    cells = [e for e in tree.iter() if "cell" in (e.get("class") or "")]
    assert [("blue" in e.get("class")) for e in cells] == [True, False, False, False, True, False, False, False, True]
    assert float(cells[0].get("fill-opacity")) > float(cells[1].get("fill-opacity"))


def test_share_panels_split_bars_by_the_shares():
    mean = np.array([0.5, 0.3, 0.2])
    band = np.stack([mean - 0.1, mean + 0.1])
    empty = ("surprise", np.full(3, np.nan), np.full((2, 3), np.nan))
    panels = [("after block 1", [("negative", mean, band), empty]), ("after block 2", [("negative", mean[::-1], band)])]
    tree = parse(plots.share_panels(("u", "v", "m"), panels, label="Attention"))
    assert "after block 1, negative: u 50 %, v 30 %, m 20 %" in tree.get("aria-label")
    assert "surprise:" not in tree.get("aria-label") and "surprise" in " ".join(tree.itertext())
    bars = [e for e in tree.iter() if (e.get("class") or "").startswith("bar ") and e.get("rx")]
    widths = np.array([float(e.get("width")) for e in bars]) + 2
    np.testing.assert_allclose(widths[:3] / widths[:3].sum(), mean, atol=2e-3)
    np.testing.assert_allclose(widths[3:] / widths[3:].sum(), mean[::-1], atol=2e-3)
    tips = [title.text for e in bars for title in e if title.text]
    assert tips[0] == "negative, u: 50.0 % (members 40–60 %)"


def test_a_shaded_span_lies_where_it_says():
    x = np.linspace(0, 1, 11)
    drawn = {}
    for span in (None, ("swept", 0.1, 0.3)):
        tree = parse(
            plots.curves(
                x, [("a", "blue", x)], x_name="x", y_name="y", marks=[("at", "ink", 0.1)], label="l", span=span
            )
        )
        drawn[span] = [e for e in tree.iter() if e.get("class") == "box grey" and list(e)]
        mark = next(e for e in tree.iter() if e.get("class") == "mark ink")
    assert not drawn[None]
    (box,) = drawn["swept", 0.1, 0.3]
    assert float(box.get("x")) == float(mark.get("x1")) and box[0].text == "swept"
    assert float(box.get("width")) == pytest.approx(0.2 * 884, abs=0.1)
