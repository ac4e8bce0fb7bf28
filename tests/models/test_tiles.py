"""Convolution by tiles of a pooling window: finite differences, and the other way to do it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from mer_jax.models import tiles
from mer_jax.models.convolution import _Block, _response, _signed_max_pool, _train_block, convolve

# Kernel, its padding, window, pooling's padding: as in the two networks, and such as leave pixels beyond all windows.
SHAPES = [(5, 2, 3, 0), (3, 1, 2, 0), (3, 2, 3, 1), (3, 0, 2, 1), (1, 0, 4, 3), (3, 1, 5, 2)]
WIDE = (3, 1, 17, 0)  # more pixels than a byte counts
SIDES = [(8, 7), (9, 10), (6, 11)]


def arguments(rng, size, sides, batch=5, dtype=np.float32):
    x = rng.normal(size=(2, *sides, batch)).astype(dtype)
    kernel = rng.normal(size=(size, size, 2, 3)).astype(dtype)
    bias, shift = rng.normal(size=(2, 3)).astype(dtype)
    return x, kernel, bias, np.array([1.2, -0.7, 0.4], dtype), shift


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, WIDE])
def test_values_and_gradients_are_those_of_patches_for_every_pixel(shape, rectify, rng):
    size, *others = shape
    mask = np.array([1, 1, 0, 1, 1], np.float32)
    for sides in SIDES if shape != WIDE else [(20, 35)]:
        given = arguments(rng, size, sides)

        def run(train_block, block, given=given):
            def total(*given):
                y, mean, variance = train_block(block, *given, mask)
                weights = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape) * mask.reshape(1, 1, 1, -1)
                return jnp.sum(y * weights), (y * mask.reshape(1, 1, 1, -1), mean, variance)

            return jax.jit(jax.value_and_grad(total, argnums=range(5), has_aux=True))(*given)

        ours = run(tiles.train_block, tiles.Block(*others, rectify, 1e-5))
        theirs = run(_train_block, _Block(*others, rectify, 1, 1e-5))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_pooled_extremes_are_those_of_whole_maps(shape, rng):
    size, padding, window, pool_padding = shape
    x, kernel, bias, scale, _ = arguments(rng, size, (9, 10))
    block = tiles.Block(padding, window, pool_padding, True, 1e-5)
    pooled, _ = _signed_max_pool(convolve(x, kernel, padding), scale, window, pool_padding)
    want = _response(_Block(padding, window, pool_padding, True, 1, 1e-5), pooled, bias)
    got = tiles.pooled_extremes(block, *(jnp.asarray(each) for each in (x, kernel, bias, scale)))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize(("window", "pool_padding"), [(3, 1), (2, 0), (3, 0)])
def test_gradients(window, pool_padding, rectify, rng):
    with jax.enable_x64(True):
        given = arguments(rng, 3, (8, 7), batch=4, dtype=np.float64)
        mask = jnp.asarray([1.0, 1.0, 0.0, 1.0])
        block = tiles.Block(1, window, pool_padding, rectify, 1e-5)

        def valid(*given):  # what becomes of padding is nobody's business
            return tiles.train_block(block, *given, mask)[0] * mask.reshape(1, 1, 1, -1)

        # Steps so small that hardly any crosses the edge of a ReLU or of a maximum.
        check_grads(valid, given, 1, modes=["rev"], eps=1e-7)


def test_the_first_of_equal_pixels_wins_as_in_pytorch():
    x = np.zeros((1, 4, 4, 1), np.float32)
    x[0, 1, 1, 0] = x[0, 1, 0, 0] = 2.0
    block, one = tiles.Block(0, 2, 0, False, 1e-5), jnp.ones(1)

    def highest(x):
        return tiles.train_block(block, x, jnp.ones((1, 1, 1, 1)), 0 * one, one, 0 * one, one)[0][0, 0, 0, 0]

    towards = jax.grad(highest)(jnp.asarray(x))[0, :2, :2, 0]
    assert towards[1, 0] > 0 and towards[1, 1] < 0  # row 1, column 0 of the window; the other only raises the mean


def test_a_fully_masked_batch_is_harmless(rng):
    x, kernel, *others = (jnp.asarray(each) for each in arguments(rng, 3, (6, 6)))

    def loss(x):
        return jnp.sum(tiles.train_block(tiles.Block(1, 2, 0, False, 1e-5), x, kernel, *others, jnp.zeros(5))[0])

    assert np.isfinite(jax.grad(loss)(x)).all()
