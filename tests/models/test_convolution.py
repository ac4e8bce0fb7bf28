"""Convolution by patches and pooled normalisation against finite differences and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.test_util import check_grads

from mer_jax.models.convolution import _normalise_and_pool, _signed_max_pool, convolve


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


@pytest.mark.parametrize(("window", "padding"), [(3, 1), (2, 0), (3, 0)])
def test_gradients_of_pooled_normalisation(window, padding, rng):
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(3, 8, 7, 4)))
        scale, bias = jnp.asarray([1.2, -0.7, 0.4]), jnp.asarray(rng.normal(size=3))
        mask = jnp.asarray([1.0, 1.0, 0.0, 1.0])

        def valid(x, scale, bias):  # what becomes of padding is nobody's business
            return _normalise_and_pool(x, scale, bias, mask, window, padding, 1e-5)[0] * mask.reshape(1, 1, 1, -1)

        check_grads(valid, (x, scale, bias), 1, modes=["rev"])


def test_the_first_of_equal_pixels_wins_as_in_pytorch():
    x = np.zeros((1, 4, 4, 1), np.float32)
    x[0, 1, 1, 0] = x[0, 1, 0, 0] = 2.0
    best, place = _signed_max_pool(jnp.asarray(x), jnp.ones(1), 2, 0)
    assert best[0, 0, 0, 0] == 2.0 and place[0, 0, 0, 0] == 2  # row 1, column 0 of the window


def test_a_fully_masked_batch_is_harmless(rng):
    x = rng.normal(size=(2, 6, 6, 4)).astype(np.float32)

    def loss(x):
        y, _, _ = _normalise_and_pool(x, jnp.ones(2), jnp.zeros(2), jnp.zeros(4), 2, 0, 1e-5)
        return jnp.sum(y)

    assert np.isfinite(jax.grad(loss)(x)).all()
