"""Blocks of a convolutional network: by tiles and by a CPU's own code, against a textbook and finite differences."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.test_util import check_grads

from mer_jax.models import cpu_blocks, pieces, tiles
from mer_jax.models.convolution import Block, extremes, train_block

_spec = importlib.util.spec_from_file_location("plain_blocks", Path(__file__).parents[1] / "plain_blocks.py")
plain_blocks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain_blocks)

# Kernel, its padding, window, pooling's padding: as in the two networks, and such as leave pixels beyond all windows.
SHAPES = [(5, 2, 3, 0), (3, 1, 2, 0), (3, 2, 3, 1), (3, 0, 2, 1), (1, 0, 4, 3), (3, 1, 5, 2), (7, 1, 3, 2)]
WIDE = (3, 1, 17, 0)  # more pixels than a byte counts
SIDES = [(8, 7), (9, 10), (6, 11)]


@pytest.fixture(params=[tiles, pieces, cpu_blocks], ids=["tiles", "pieces", "cpu_blocks"])
def implementation(request, monkeypatch):
    monkeypatch.setattr(pieces, "_CACHE_BYTES", 1)  # eight samples at a time
    if request.param is cpu_blocks:
        request.getfixturevalue("compiled")
    return request.param.IMPLEMENTATION


def arguments(rng, size, sides, batch=5, channels=2, features=3, dtype=np.float32):
    x = rng.normal(size=(channels, *sides, batch)).astype(dtype)
    kernel = rng.normal(size=(size, size, channels, features)).astype(dtype)
    bias, shift = rng.uniform(-0.5, 0.5, (2, features)).astype(dtype)
    scale = (rng.uniform(0.5, 1.5, features) * np.where(np.arange(features) % 2, -1, 1)).astype(dtype)
    return tuple(map(jnp.asarray, (x, kernel, bias, scale, shift)))


def values_and_gradients(implementation, block, given, mask):
    def total(*given):
        y, mean, variance = train_block(implementation, block, *given, mask)
        weights = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape) * mask.reshape(1, 1, 1, -1)
        return jnp.sum(y * weights), (y * mask.reshape(1, 1, 1, -1), mean, variance)

    return jax.jit(jax.value_and_grad(total, argnums=range(5), has_aux=True))(*given)


def assert_as_the_textbook(implementation, block, given, mask):
    ours = values_and_gradients(implementation, block, given, mask)
    theirs = values_and_gradients(plain_blocks.IMPLEMENTATION, block, given, mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, WIDE])
def test_values_and_gradients_are_the_textbooks(shape, rectify, implementation, rng):
    size, *others = shape
    mask = jnp.array([1, 1, 0, 1, 1], np.float32)
    for sides in SIDES if shape != WIDE else [(20, 35)]:
        assert_as_the_textbook(implementation, Block(*others, rectify), arguments(rng, size, sides), mask)


@pytest.mark.parametrize(("channels", "features", "batch"), [(1, 8, 16), (9, 17, 37), (3, 16, 33), (8, 4, 1)])
def test_any_number_of_channels_features_and_samples(channels, features, batch, implementation, rng):
    given = arguments(rng, 3, (9, 7), batch, channels, features)
    assert_as_the_textbook(implementation, Block(1, 2, 0, True), given, jnp.asarray(np.arange(batch) % 5 != 3, "f4"))


@pytest.mark.parametrize("shape", SHAPES)
def test_extremes_are_those_of_whole_maps(shape, implementation, rng):
    size, *others = shape
    x, kernel, bias, scale, _ = arguments(rng, size, (9, 10), batch=21)
    for rectify in (False, True):
        block = Block(*others, rectify)
        want = plain_blocks.IMPLEMENTATION.extremes(block, x, kernel, bias, scale)
        got = jax.jit(implementation.extremes, static_argnums=0)(block, x, kernel, bias, scale)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "padding"), [(3, 1), (3, 2), (5, 2), (1, 0), (3, 0)])
def test_a_block_is_pytorchs(size, padding, implementation, rng):
    x, kernel, bias, scale, shift = arguments(rng, size, (9, 7), batch=4)
    conv = torch.nn.Conv2d(2, 3, size, padding=padding)
    norm = torch.nn.BatchNorm2d(3)
    for parameter, value in (
        (conv.weight, kernel.transpose(3, 2, 0, 1)),
        (conv.bias, bias),
        (norm.weight, scale),
        (norm.bias, shift),
    ):
        parameter.data = torch.tensor(np.array(value))
    block = torch.nn.Sequential(conv, torch.nn.ReLU(), norm, torch.nn.MaxPool2d(2))
    want = block(torch.tensor(np.array(x)).permute(3, 0, 1, 2)).detach().permute(1, 2, 3, 0)
    got, _, _ = train_block(implementation, Block(padding, 2, 0, True), x, kernel, bias, scale, shift, jnp.ones(4))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize(("window", "pool_padding"), [(3, 1), (2, 0), (3, 0)])
def test_gradients(window, pool_padding, rectify, implementation, rng):
    with jax.enable_x64(True):
        given = arguments(rng, 3, (8, 7), batch=4, dtype=np.float64)
        mask = jnp.asarray([1.0, 1.0, 0.0, 1.0])
        block = Block(1, window, pool_padding, rectify)

        def valid(*given):  # what becomes of padding is nobody's business
            return train_block(implementation, block, *given, mask)[0] * mask.reshape(1, 1, 1, -1)

        # Steps so small that hardly any crosses the edge of a ReLU or of a maximum.
        check_grads(valid, given, 1, modes=["rev"], eps=1e-7)


def test_the_first_of_equal_pixels_wins_as_in_pytorch(implementation):
    x = np.zeros((1, 4, 4, 1), np.float32)
    x[0, 1, 1, 0] = x[0, 1, 0, 0] = 2.0
    block, one = Block(0, 2, 0, False), jnp.ones(1)

    def highest(x):
        return train_block(implementation, block, x, jnp.ones((1, 1, 1, 1)), 0 * one, one, 0 * one, one)[0][0, 0, 0, 0]

    towards = jax.grad(highest)(jnp.asarray(x))[0, :2, :2, 0]
    assert towards[1, 0] > 0 and towards[1, 1] < 0  # row 1, column 0 of the window; the other only raises the mean


def test_a_fully_masked_batch_is_harmless(implementation, rng):
    x, *others = arguments(rng, 3, (6, 6))

    def loss(x):
        return jnp.sum(train_block(implementation, Block(1, 2, 0, False), x, *others, jnp.zeros(5))[0])

    assert np.isfinite(jax.grad(loss)(x)).all()


@pytest.mark.parametrize("rectify", [False, True])
def test_what_is_not_a_number_is_seen(rectify, implementation, rng):
    x, kernel, bias, scale, shift = arguments(rng, 3, (6, 6))
    x = x.at[0, 3, 3, 1].set(jnp.nan)
    for each in train_block(implementation, Block(1, 2, 0, rectify), x, kernel, bias, scale, shift, jnp.ones(5)):
        assert np.isnan(each).all()
    extreme = implementation.extremes(Block(0, 2, 0, rectify), x, kernel, bias, scale)  # (3, 2, 2, 5)
    assert np.isnan(extreme[:, ..., 1]).all() and not np.isnan(extreme[..., 0]).any()
    kernel = kernel.at[0, 0, 0, 2].set(jnp.nan)
    extreme = implementation.extremes(Block(0, 2, 0, rectify), x, kernel, bias, scale)
    assert np.isnan(extreme[2]).all() and not np.isnan(extreme[:2, ..., 0]).any()


@pytest.mark.parametrize("place", range(9))
def test_one_pixel_that_is_not_a_number_spoils_its_window(place, implementation):
    one = jnp.ones(1)
    x = jnp.arange(36.0).reshape(1, 6, 6, 1).at[0, 3 + place // 3, place % 3, 0].set(jnp.nan)
    extreme = implementation.extremes(Block(0, 3, 0, False), x, jnp.ones((1, 1, 1, 1)), 0 * one, one)
    np.testing.assert_array_equal(extreme[0, ..., 0], [[14, 17], [np.nan, 35]])


def test_a_bias_that_is_not_a_number_spoils_its_channel(implementation, rng):
    x, kernel, bias, scale, shift = arguments(rng, 3, (6, 6))
    bias = bias.at[1].set(jnp.nan)
    for each in train_block(implementation, Block(1, 2, 0, True), x, kernel, bias, scale, shift, jnp.ones(5)):
        assert np.isnan(each[1]).all() and np.isfinite(each[::2]).all()


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_extremes_are_the_textbooks(shape, rectify, implementation, rng):
    size, *others = shape
    block, given = Block(*others, rectify), arguments(rng, size, (9, 10))[:4]

    def gradients(function):
        def total(x, kernel, bias):
            y = function(x, kernel, bias, given[3])
            return jnp.sum(y * jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

        return jax.jit(jax.grad(total, argnums=range(3)))(*given[:3])

    ours = gradients(lambda *given: extremes(implementation, block, *given))
    theirs = gradients(lambda *given: plain_blocks.IMPLEMENTATION.extremes(block, *given))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)


def test_a_small_variance_beside_a_large_mean(implementation, rng):
    x = (1000 + rng.normal(size=(1, 40, 40, 20))).astype(np.float32)
    one = jnp.ones(1)
    _, mean, variance = train_block(
        implementation, Block(0, 2, 0, False), x, jnp.ones((1, 1, 1, 1)), 0 * one, one, 0 * one, jnp.ones(20)
    )
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(), rtol=1e-6)
    np.testing.assert_allclose(variance, x.astype(np.float64).var(), rtol=1e-4)


def test_vmap_is_one_after_another(implementation, rng):
    many = [arguments(rng, 3, (6, 7)) for _ in range(3)]

    def run(*given):
        return values_and_gradients(implementation, Block(1, 2, 0, True), given, jnp.ones(5))

    together = jax.vmap(run)(*(jnp.stack(each) for each in zip(*many, strict=True)))
    for place, given in enumerate(many):
        jax.tree.map(
            lambda a, b, place=place: np.testing.assert_allclose(a[place], b, rtol=1e-5, atol=1e-5),
            together,
            run(*given),
        )


def test_statistics_carry_no_gradient(implementation, rng):
    given = arguments(rng, 3, (6, 7))

    def moments(*given):
        _, mean, variance = train_block(implementation, Block(1, 2, 0, False), *given, jnp.ones(5))
        return jnp.sum(mean) + jnp.sum(variance)

    assert all(not np.any(each) for each in jax.grad(moments, argnums=range(5))(*given))
