import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data

from mer_jax.clips.farneback import farneback_flow
from mer_jax.clips.flow import FlowConfig

FACE = cv2.cvtColor(skimage.data.astronaut()[0:250, 100:350], cv2.COLOR_RGB2GRAY)


def face_pair(height, width, seed=0):
    """A photographed face and the same under a smooth deformation of up to 2 px, both uint8."""
    first = cv2.resize(FACE, (width, height), interpolation=cv2.INTER_AREA)
    noise = np.random.default_rng(seed).normal(size=(height, width, 2)).astype(np.float32)
    field = cv2.GaussianBlur(noise, (0, 0), min(height, width) / 10)
    field *= 2 / np.hypot(field[..., 0], field[..., 1]).max()
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    places = columns - field[..., 0], rows - field[..., 1]
    return first, cv2.remap(first, *places, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)


def opencv_flow(first, second, config):
    settings = (config.pyr_scale, config.levels, config.winsize, config.iterations, config.poly_n, config.poly_sigma)
    flags = cv2.OPTFLOW_FARNEBACK_GAUSSIAN if config.gaussian_window else 0
    return cv2.calcOpticalFlowFarneback(first, second, None, *settings, flags)


def jax_flow(first, second, config):
    return np.asarray(farneback_flow(jnp.asarray(first, jnp.float32), jnp.asarray(second, jnp.float32), config))


def assert_agreement(first, second, config):
    expected, ours = opencv_flow(first, second, config), jax_flow(first, second, config)
    assert ours.shape == expected.shape and ours.dtype == np.float32
    assert np.median(np.hypot(expected[..., 0], expected[..., 1])) > 0.1  # there is something to compare
    difference = np.abs(ours - expected).max(axis=-1)
    margin = min(24, min(first.shape) // 4)
    inside = np.zeros(difference.shape, bool)
    inside[margin:-margin, margin:-margin] = True
    assert np.median(difference) < 1e-6
    assert np.percentile(difference[inside], 99) < 1e-3
    # Along the border a displacement of 1e-8 px decides by its sign what is averaged (see the module).
    assert difference[~inside].max() < 0.2
    assert (difference[~inside] > 1e-3).mean() < 0.02


@pytest.mark.parametrize("gaussian_window", [False, True])
def test_the_flow_of_faces_is_that_of_opencv(gaussian_window):
    config = FlowConfig(gaussian_window=gaussian_window)
    assert config == FlowConfig("farneback", "opencv", 0.5, 3, 15, 3, 5, 1.2, gaussian_window)
    for seed in range(4):
        assert_agreement(*face_pair(224, 224, seed), config)


@pytest.mark.parametrize("size", [(10, 13), (28, 28), (33, 64), (65, 97), (131, 70)])
def test_any_size_agrees_with_opencv(size):
    # From no level above full size, through one, to sides that do not halve evenly.
    assert_agreement(*face_pair(*size), FlowConfig())


@pytest.mark.parametrize(
    "settings",
    [
        {"pyr_scale": 0.8, "levels": 4},
        {"pyr_scale": 0.37, "levels": 1},
        {"levels": 0, "iterations": 1},
        {"iterations": 10, "winsize": 13, "poly_sigma": 1.1, "levels": 5},
        {"levels": 0, "winsize": 8},
        {"levels": 1, "winsize": 31, "gaussian_window": True},
        {"levels": 0, "winsize": 6, "gaussian_window": True},
        {"levels": 0, "poly_n": 7, "poly_sigma": 1.5},
        {"levels": 0, "poly_n": 1, "poly_sigma": 0.0},
    ],
    ids=str,
)
def test_any_setting_agrees_with_opencv(settings):
    assert_agreement(*face_pair(66, 75, seed=1), FlowConfig(**settings))


def test_pictures_may_have_fractional_grey_levels():
    first, second = (cv2.GaussianBlur(picture.astype(np.float32), (0, 0), 0.7) for picture in face_pair(65, 97, 5))
    assert_agreement(first, second, FlowConfig())


def test_a_pattern_shifted_by_fractions_of_a_pixel_is_followed():
    rows, columns = np.mgrid[:80, :90].astype(np.float64)

    def pattern(x, y):
        return 128 + 40 * np.sin(x / 3) * np.cos(y / 4) + 30 * np.cos(x / 7 + y / 5)

    flow = jax_flow(pattern(columns, rows), pattern(columns - 0.3, rows + 0.7), FlowConfig())
    inside = flow[15:-15, 15:-15]
    np.testing.assert_allclose(inside[..., 0], 0.3, atol=0.02)
    np.testing.assert_allclose(inside[..., 1], -0.7, atol=0.02)


def test_levels_that_would_be_too_small_are_left_out():
    first, second = face_pair(65, 70)
    # 65 x 0.5 is at least 32, 65 x 0.25 is not.
    one, many, none = (
        jax_flow(first, second, FlowConfig(levels=levels, poly_n=1, winsize=5, iterations=1)) for levels in (1, 9, 0)
    )
    np.testing.assert_array_equal(many, one)
    assert not np.array_equal(none, one)


@pytest.mark.parametrize("gaussian_window", [False, True])
def test_constant_pictures_have_no_flow_at_all(gaussian_window):
    config = FlowConfig(gaussian_window=gaussian_window, winsize=7, poly_n=3)
    first = np.full((64, 71), 77.3)
    for level in (77.3, 12.0):
        assert not jax_flow(first, np.full_like(first, level), config).any()


def test_leading_axes_are_pairs_of_their_own():
    config = FlowConfig(poly_n=2, winsize=7)
    pairs = [face_pair(33, 64, seed) for seed in range(6)]
    first, second = (np.stack(pictures).reshape(2, 3, 33, 64) for pictures in zip(*pairs, strict=True))
    together = jax_flow(first, second, config)
    assert together.shape == (2, 3, 33, 64, 2)
    backwards = jax_flow(first[::-1, ::-1], second[::-1, ::-1], config)
    np.testing.assert_array_equal(backwards[::-1, ::-1], together)
    mapped = jax.vmap(jax.vmap(lambda one, other: farneback_flow(one, other, config)))(
        first.astype(np.float32), second.astype(np.float32)
    )
    for flow, mapped_flow, (one, other) in zip(
        together.reshape(6, 33, 64, 2), np.asarray(mapped).reshape(6, 33, 64, 2), pairs, strict=True
    ):
        alone = jax_flow(one, other, config)
        np.testing.assert_allclose(flow, alone, atol=1e-4)
        np.testing.assert_allclose(mapped_flow, alone, atol=1e-4)


def test_one_program_serves_all_pairs_of_one_size_and_setting():
    first, second = face_pair(21, 23)
    jax_flow(first, second, FlowConfig(levels=2))
    compiled = farneback_flow._cache_size()
    jax_flow(second, first, FlowConfig(levels=2))
    assert farneback_flow._cache_size() == compiled
    jax_flow(first, second, FlowConfig(levels=2, winsize=9))
    assert farneback_flow._cache_size() == compiled + 1


def assert_slope(value, derivative, pictures, directions):
    """The derivative along a direction against a central difference."""
    step = 1e-6  # small: across a whole pixel the flow has a kink
    ahead, behind = (
        value(*(picture + sign * step * direction for picture, direction in zip(pictures, directions, strict=True)))
        for sign in (1, -1)
    )
    assert abs(derivative) > 0.01
    assert float(derivative) == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-4)


def test_forward_derivatives_are_those_of_finite_differences(rng):
    # Two levels and two iterations pass every step at least once; filters are short, so that compilation is, too.
    config = FlowConfig(levels=1, pyr_scale=0.8, winsize=4, gaussian_window=True, iterations=2, poly_n=2)
    with jax.enable_x64(True):
        pictures = [jnp.asarray(picture, jnp.float64) for picture in face_pair(43, 41, seed=2)]
        weights = jnp.asarray(rng.normal(size=(43, 41, 2)))

        @jax.jit
        def value_and_slope(pictures, directions):
            return jax.jvp(lambda *pair: jnp.sum(weights * farneback_flow(*pair, config)), pictures, directions)

        for _ in range(3):
            directions = tuple(jnp.asarray(rng.normal(size=(43, 41))) for _ in pictures)
            value, slope = value_and_slope(tuple(pictures), directions)
            assert value.dtype == jnp.float64
            assert_slope(lambda *pair, d=directions: value_and_slope(pair, d)[0], slope, pictures, directions)


def test_gradients_are_those_of_finite_differences_and_finite_on_any_picture(rng):
    config = FlowConfig(levels=0, winsize=5, iterations=2, poly_n=1)
    with jax.enable_x64(True):
        face, other = (jnp.asarray(picture, jnp.float64) for picture in face_pair(33, 36, seed=2))
        weights = jnp.asarray(rng.normal(size=(33, 36, 2)))

        @jax.jit
        def value_and_gradients(*pair):
            return jax.value_and_grad(lambda *pair: jnp.sum(weights * farneback_flow(*pair, config)), (0, 1))(*pair)

        for _ in range(3):
            directions = [jnp.asarray(rng.normal(size=(33, 36))) for _ in range(2)]
            gradients = value_and_gradients(face, other)[1]
            slope = sum(jnp.vdot(*pair) for pair in zip(gradients, directions, strict=True))
            assert_slope(lambda *pair: value_and_gradients(*pair)[0], slope, (face, other), directions)

        constant = jnp.asarray(np.full((33, 36), 50.0))
        stripes = jnp.asarray(np.tile([0.0, 0.0, 255.0, 255.0], (33, 9)))
        for pair in ((constant, constant), (constant, face), (face, face), (stripes, stripes[:, ::-1])):
            assert all(np.isfinite(gradient).all() for gradient in value_and_gradients(*pair)[1])


def test_what_is_no_pair_of_pictures_is_refused():
    picture = jnp.zeros((20, 20))
    with pytest.raises(ValueError, match="tvl1"):
        farneback_flow(picture, picture, FlowConfig(method="tvl1"))
    for other in (jnp.zeros((20, 21)), jnp.zeros((20, 20), jnp.uint8)):
        with pytest.raises(ValueError, match="no float pairs"):
            farneback_flow(picture, other, FlowConfig())
    with pytest.raises(ValueError, match="no float pairs"):
        farneback_flow(picture.astype(jnp.uint8), picture.astype(jnp.uint8), FlowConfig())
