"""Blocks by tiles, a few samples at a time: equal to all samples at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mer_jax.models import pieces, tiles
from mer_jax.models.convolution import Block, extremes, train_block


@pytest.fixture(autouse=True)
def eight_at_a_time(monkeypatch):
    monkeypatch.setattr(pieces, "_CACHE_BYTES", 1)


def arguments(rng, batch):
    """x, kernel, bias, scale and shift: two channels of 9 x 8 pixels, a 3 x 3 kernel and three features."""
    shapes = (2, 9, 8, batch), (3, 3, 2, 3), (3,), (3,), (3,)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("counted", [19, 6])  # of 21, in three pieces: of the last some or none
@pytest.mark.parametrize("rectify", [False, True])
def test_pieces_change_nothing(rectify, counted, rng):
    given, mask = arguments(rng, 21), jnp.asarray(np.arange(21) < counted, jnp.float32)
    block = Block(1, 3, 0, rectify)
    assert pieces._pieces(block, *given[:2]) == 3

    def run(way):
        def total(*given):
            y, mean, variance = train_block(way.IMPLEMENTATION, block, *given, mask)
            weights = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape) * mask.reshape(1, 1, 1, -1)
            return jnp.sum(y * weights), (y * mask.reshape(1, 1, 1, -1), mean, variance)

        return jax.jit(jax.value_and_grad(total, argnums=range(5), has_aux=True))(*given)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), run(pieces), run(tiles))


def test_extremes_and_their_gradients(rng):
    *given, _ = arguments(rng, 21)
    block = Block(1, 2, 1, True)

    def run(way):
        def total(*given):
            y = extremes(way.IMPLEMENTATION, block, *given)
            return jnp.sum(y * jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)), y

        return jax.jit(jax.value_and_grad(total, argnums=range(3), has_aux=True))(*given)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), run(pieces), run(tiles))


def test_a_fully_masked_batch_is_harmless(rng):
    x, *others = arguments(rng, 21)

    def loss(x):
        return jnp.sum(train_block(pieces.IMPLEMENTATION, Block(1, 2, 0, False), x, *others, jnp.zeros(21))[0])

    assert np.isfinite(jax.grad(loss)(x)).all()
