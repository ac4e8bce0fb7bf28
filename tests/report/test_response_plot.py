"""The response curves of a search: every candidate a dot in every panel, the chosen ones marked."""

import xml.etree.ElementTree as ElementTree

import numpy as np

from mer_jax.report.response_plot import Response, Score, response_curves, running_median

RATES = np.geomspace(1e-4, 1e-2, 9)
FOLDS = np.array([0, 0, 2, 0, 0, 1, 0, 0, 0])


def shapes(tree, tag, css):
    return [e for e in tree.iter(tag) if set(css.split()) <= set(e.get("class", "").split())]


def test_every_candidate_is_a_dot_in_every_panel():
    inner, heldout = np.linspace(0.3, 0.5, 9), np.linspace(0.6, 0.2, 9)
    heldout[4] = np.nan
    responses = [
        Response("learning_rate", RATES, True),
        Response("dropout", np.linspace(0, 0.6, 9), True),  # a 0 has no place on a logarithmic axis
        Response("focal_gamma", np.arange(9) % 3.0, False),
    ]
    svg = response_curves(responses, [Score("inner", "blue", inner), Score("held out", "orange", heldout)], FOLDS)
    assert "nan" not in svg and "inf" not in svg
    tree = ElementTree.fromstring(svg)
    panels = len(responses)
    for colour, known in (("blue", 9), ("orange", 8)):
        tips = [dot.find("title") for dot in shapes(tree, "circle", colour)]
        assert len(tips) == known * panels and None not in tips
        assert len(shapes(tree, "circle", f"dot {colour}")) == 2 * panels  # chosen for a fold or more
        assert len(shapes(tree, "path", f"line {colour}")) == panels
    diamonds = shapes(tree, "path", "cell ink")
    assert len(diamonds) == 1 + 2 * panels  # the legend's, and one a panel
    told = [element.text for element in tree.iter("title")]
    assert "candidate 2: learning_rate 0.000316228, 0.350, chosen for 2 folds" in told
    assert "the config's own values, candidate 0: focal_gamma 0, 0.600" in told
    texts = [element.text for element in tree.iter("text")]
    assert "learning_rate (log scale)" in texts and "dropout" in texts
    assert {"0.0001", "0.001", "0.01"} <= set(texts)
    assert "9 candidates: inner, from 0.300 to 0.500; held out, from 0.200 to 0.600" in tree.get("aria-label")
    # Equal steps of a logarithm are equal steps on paper.
    x = sorted(float(dot.get("cx")) for dot in shapes(tree, "circle", "blue") if "learning_rate" in dot[0].text)
    np.testing.assert_allclose(np.diff(x), np.diff(x).mean(), atol=0.15)


def test_a_score_that_no_candidate_has_leaves_its_panels_empty():
    tree = ElementTree.fromstring(
        response_curves([Response("rate", RATES, True)], [Score("inner", "blue", np.full(9, np.nan))], FOLDS)
    )
    assert not shapes(tree, "circle", "blue") and not shapes(tree, "path", "line blue")


def test_the_line_is_the_median_of_neighbours():
    x, y = running_median(np.array([2, 0, 1, 0, 1, 0]), np.array([9, 1, 5, 3, 7, 8]))
    assert x.tolist() == [0, 1, 2] and y.tolist() == [3, 6, 9]
    x, y = running_median(np.array([8, 7, 6, 5, 4, 3, 2, 1.0]), np.arange(8.0)[::-1])
    assert x.tolist() == [2.5, 6.5] and y.tolist() == [1.5, 5.5]
    x, _ = running_median(np.array([1, 10, 100, 1000, 1e4, 1e5, 1e6, 1e7]), np.zeros(8), log=True)
    np.testing.assert_allclose(x, [10**1.5, 10**5.5])
