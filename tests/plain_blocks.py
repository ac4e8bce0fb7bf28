"""Blocks of a convolutional network as a textbook has them: XLA's convolution, whole maps, gradients by JAX."""

import jax
import jax.numpy as jnp

from mer_jax.models.convolution import Implementation


def responses(block, x, kernel, bias):
    axes = "CHWN", "HWIO", "CHWN"
    z = jax.lax.conv_general_dilated(x, kernel, (1, 1), [(block.padding, block.padding)] * 2, dimension_numbers=axes)
    return jnp.maximum(z, -bias[:, None, None, None]) if block.rectify else z


def pooled(block, response, scale):
    """Extremes and their places, each (F, H', W', B)."""
    sign = jnp.where(scale < 0, -1.0, 1.0).astype(response.dtype)[:, None, None, None]
    rows, columns = ((side + 2 * block.pool_padding - block.window) // block.window + 1 for side in response.shape[1:3])
    ends = [
        (block.pool_padding, max(0, count * block.window - block.pool_padding - side))
        for count, side in zip((rows, columns), response.shape[1:3], strict=True)
    ]
    padded = jnp.pad(response * sign, ((0, 0), *ends, (0, 0)), constant_values=-jnp.inf)
    padded = padded[:, : rows * block.window, : columns * block.window]
    windows = padded.reshape(-1, rows, block.window, columns, block.window, response.shape[-1])
    windows = windows.transpose(2, 4, 0, 1, 3, 5).reshape(block.window**2, -1, rows, columns, response.shape[-1])
    place = jnp.argmax(windows, axis=0)
    return jnp.take_along_axis(windows, place[None], axis=0)[0] * sign, place


def _extremes(block, x, kernel, bias, scale):
    return pooled(block, responses(block, x, kernel, bias), scale)[0]


def _forward(block, x, kernel, bias, scale, sample_mask):
    def both(x, kernel, bias):
        response = responses(block, x, kernel, bias)
        return pooled(block, response, scale)[0], response

    (extreme, response), pull = jax.vjp(both, x, kernel, bias)
    count = jnp.maximum(jnp.sum(sample_mask) * response[0, :, :, 0].size, 1.0)
    mean = jnp.sum(response * sample_mask[None, None, None], axis=(1, 2, 3)) / count
    deviation = (response - mean[:, None, None, None]) * sample_mask[None, None, None]
    variance = jnp.sum(deviation**2, axis=(1, 2, 3)) / count
    return extreme, pooled(block, response, scale)[1], mean, variance, (response, pull)


def _backward(block, x, kernel, bias, sample_mask, gradient, place, factor, constant, slope, kept, to_x):
    response, pull = kept
    gradient = factor[:, None, None, None] * gradient * sample_mask[None, None, None]
    constant, slope = (each[:, None, None, None] for each in (constant, slope))
    dense = -(constant + slope * response) * sample_mask[None, None, None]
    of_x, of_kernel, of_bias = pull((gradient, dense))
    # A response falls with the bias where the ReLU is closed, and z does not count there.
    total = jnp.sum(gradient, axis=(1, 2, 3)) + jnp.sum(dense, axis=(1, 2, 3)) + of_bias
    return of_kernel, total if block.rectify else of_bias, of_x if to_x else None


IMPLEMENTATION = Implementation(_extremes, _forward, _backward)
