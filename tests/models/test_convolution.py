"""Convolution by patches and pooled normalisation against finite differences and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.test_util import check_grads

from mer_jax.models.convolution import _Block, _signed_max_pool, _train_block, convolve


@pytest.mark.parametrize(("size", "padding"), [(3, 1), (3, 2), (5, 2), (1, 0), (3, 0)])
def test_convolution_is_pytorchs(size, padding, rng):
    x = rng.normal(size=(2, 9, 7, 4)).astype(np.float32)
    kernel = rng.normal(size=(size, size, 2, 3)).astype(np.float32)
    want = torch.nn.functional.conv2d(
        torch.tensor(x).permute(3, 0, 1, 2), torch.tensor(kernel).permute(3, 2, 0, 1), padding=padding
    )
    np.testing.assert_allclose(convolve(x, kernel, padding), want.permute(1, 2, 3, 0), rtol=1e-5, atol=1e-5)


def test_gradients_of_the_convolution(rng):
    with jax.enable_x64(True):
        x, kernel = jnp.asarray(rng.normal(size=(2, 6, 5, 3))), jnp.asarray(rng.normal(size=(3, 3, 2, 4)))
        check_grads(lambda x, kernel: convolve(x, kernel, 2), (x, kernel), 1, modes=["rev"])


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize(("window", "pool_padding"), [(3, 1), (2, 0), (3, 0)])
def test_gradients_of_a_block(window, pool_padding, rectify, pieces, rng):
    with jax.enable_x64(True):
        x, kernel = jnp.asarray(rng.normal(size=(2, 8, 7, 4))), jnp.asarray(rng.normal(size=(3, 3, 2, 3)))
        bias, shift = jnp.asarray(rng.normal(size=(2, 3)))
        scale = jnp.asarray([1.2, -0.7, 0.4])
        mask = jnp.asarray([1.0, 1.0, 0.0, 1.0])
        block = _Block(1, window, pool_padding, rectify, pieces, 1e-5)

        def valid(*arguments):  # what becomes of padding is nobody's business
            return _train_block(block, *arguments, mask)[0] * mask.reshape(1, 1, 1, -1)

        # Steps so small that hardly any crosses the edge of a ReLU or of a maximum.
        check_grads(valid, (x, kernel, bias, scale, shift), 1, modes=["rev"], eps=1e-7)


@pytest.mark.parametrize("rectify", [False, True])
def test_pieces_change_nothing(rectify, rng):
    x, kernel = rng.normal(size=(2, 9, 9, 21)).astype(np.float32), rng.normal(size=(3, 3, 2, 3)).astype(np.float32)
    bias, scale, shift = rng.normal(size=(3, 3)).astype(np.float32)
    mask = (np.arange(21) < 19).astype(np.float32)
    weights = rng.normal(size=(3, 3, 3, 21)).astype(np.float32) * mask

    def run(pieces):
        block = _Block(1, 3, 0, rectify, pieces, 1e-5)

        def total(*arguments):
            y, mean, variance = _train_block(block, *arguments, mask)
            return jnp.sum(y * weights), (y * mask.reshape(1, 1, 1, -1), mean, variance)

        return jax.value_and_grad(total, argnums=(0, 1, 2, 3, 4), has_aux=True)(x, kernel, bias, scale, shift)

    whole, cut = run(1), run(4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), whole, cut)


def test_the_first_of_equal_pixels_wins_as_in_pytorch():
    x = np.zeros((1, 4, 4, 1), np.float32)
    x[0, 1, 1, 0] = x[0, 1, 0, 0] = 2.0
    best, place = _signed_max_pool(jnp.asarray(x), jnp.ones(1), 2, 0)
    assert best[0, 0, 0, 0] == 2.0 and place[0, 0, 0, 0] == 2  # row 1, column 0 of the window


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_fully_masked_batch_is_harmless(pieces, rng):
    x, kernel = rng.normal(size=(2, 6, 6, 4)).astype(np.float32), rng.normal(size=(3, 3, 2, 2)).astype(np.float32)

    def loss(x):
        block = _Block(1, 2, 0, False, pieces, 1e-5)
        y, _, _ = _train_block(block, x, kernel, jnp.zeros(2), jnp.ones(2), jnp.zeros(2), jnp.zeros(4))
        return jnp.sum(y)

    assert np.isfinite(jax.grad(loss)(x)).all()
