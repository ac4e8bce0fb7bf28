"""Dropout masks: their rate, and that nothing but the key and the place in the batch tells what is dropped."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mer_jax.models.layers import counter_bits, dropout_scale

COUNT = 1 << 16


class Drop(nn.Module):
    shape: tuple
    rate: float
    axis: int = 0

    @nn.compact
    def __call__(self):
        return dropout_scale(self, self.shape, self.rate, True, sample_axis=self.axis)


def draw(shape, rate, seed=0, axis=0):
    return np.asarray(Drop(shape, rate, axis).apply({}, rngs={"dropout": jax.random.key(seed)}))


def bits_of(seed):
    return np.asarray(counter_bits(jax.random.key(seed), jnp.arange(COUNT, dtype=jnp.uint32)))


def test_every_bit_is_fair_and_bytes_are_uniform():
    bits = bits_of(3)
    ones = [(bits >> position & 1).sum() for position in range(32)]
    assert np.all(np.abs(np.array(ones) - COUNT / 2) < 5 * np.sqrt(COUNT) / 2)
    for shift in (0, 8, 16, 24):
        counts = np.bincount(bits >> shift & 255, minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("lag", [1, 2, 3, 7, 16, 100, 1600])
def test_neighbours_are_uncorrelated(lag):
    values = bits_of(5) / 2.0**32 - 0.5
    correlation = np.mean(values[lag:] * values[:-lag]) * 12
    assert abs(correlation) < 5 / np.sqrt(COUNT)


def test_keys_are_uncorrelated_and_share_no_stream():
    streams = [bits_of(seed) for seed in range(12)] + [
        np.asarray(counter_bits(jax.random.fold_in(jax.random.key(0), step), jnp.arange(COUNT, dtype=jnp.uint32)))
        for step in range(12)
    ]
    values = np.stack(streams) / 2.0**32 - 0.5
    correlation = values @ values.T * 12 / COUNT
    assert np.abs(correlation - np.diag(np.diag(correlation))).max() < 5 / np.sqrt(COUNT)
    # By the birthday bound about half a word in 2^16 is met again in another stream; a shifted copy would share all.
    assert len(np.intersect1d(streams[0], streams[1])) < 20


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.9])
def test_the_rate_is_met_and_the_mean_kept(rate):
    scale = draw((256, 300), rate)
    dropped = (scale == 0).mean()
    assert abs(dropped - rate) < 5 * np.sqrt(rate * (1 - rate) / scale.size)
    np.testing.assert_allclose(scale[scale > 0], 1 / (1 - rate), rtol=1e-6)


def test_later_samples_and_the_layout_change_no_draw():
    few, many = draw((5, 4, 3), 0.5), draw((9, 4, 3), 0.5)
    np.testing.assert_array_equal(few, many[:5])
    np.testing.assert_array_equal(np.moveaxis(draw((4, 3, 9), 0.5, axis=2), -1, 0), many)


def test_nothing_is_drawn_where_nothing_is_dropped():
    assert Drop((2, 2), 0).apply({}) is None
