"""Blocks of a convolutional network on a CPU without a C++ compiler: by tiles, a few samples at a time.

What is between convolution and pooling stays in the cache of a core, and is computed again for the gradient; what cores
do side by side would otherwise wait for memory.
"""

import jax
import jax.numpy as jnp

from mer_jax.models import tiles
from mer_jax.models.convolution import Block, Implementation

_CACHE_BYTES = 1 << 21  # for maps
_LEAST_TOGETHER = 8  # samples; they fill a vector register


def _pieces(block: Block, x: jax.Array, kernel: jax.Array) -> int:
    """How many parts the samples are cut into."""
    height, width = block.map_sides(x, kernel)
    sample_bytes = height * width * kernel.shape[-1] * x.dtype.itemsize
    together = max(_LEAST_TOGETHER, _CACHE_BYTES // sample_bytes // _LEAST_TOGETHER * _LEAST_TOGETHER)
    return -(-x.shape[-1] // together)


def _cut(x: jax.Array, pieces: int) -> jax.Array:
    """``(..., B)`` to ``(pieces, ..., b)``, the last piece filled up with zeros."""
    size = -(-x.shape[-1] // pieces)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size * pieces - x.shape[-1])])
    return jnp.moveaxis(x.reshape(*x.shape[:-1], pieces, size), -2, 0)


def _join(x: jax.Array, batch: int) -> jax.Array:
    """``(pieces, ..., b)`` to ``(..., B)``."""
    x = jnp.moveaxis(x, 0, -2)
    return x.reshape(*x.shape[:-2], -1)[..., :batch]


def _extremes(block, x, kernel, bias, scale):
    def piece(x):
        return tiles.IMPLEMENTATION.extremes(block, x, kernel, bias, scale)

    return _join(jax.lax.map(piece, _cut(x, _pieces(block, x, kernel))), x.shape[-1])


def _forward(block, x, kernel, bias, scale, sample_mask):
    pieces, batch = _pieces(block, x, kernel), x.shape[-1]

    def piece(taken):
        x, mask = taken
        extreme, place, mean, variance, _ = tiles.IMPLEMENTATION.forward(block, x, kernel, bias, scale, mask)
        return extreme, place, mean, variance, jnp.sum(mask)

    extreme, place, means, variances, counts = jax.lax.map(piece, (_cut(x, pieces), _cut(sample_mask, pieces)))
    # Chan, Golub and LeVeque 1979: deviations of the parts, and of their means.
    count = jnp.maximum(jnp.sum(counts), 1.0)
    mean = counts @ means / count  # (pieces,) (pieces, F) -> (F,)
    variance = counts @ (variances + (means - mean[None]) ** 2) / count
    return _join(extreme, batch), _join(place, batch), mean, variance, None


def _backward(block, x, kernel, bias, sample_mask, gradient, place, factor, constant, slope, kept, to_x):
    def piece(taken):
        x, mask, gradient, place = taken
        of_kernel, of_bias, of_x = tiles.IMPLEMENTATION.backward(
            block, x, kernel, bias, mask, gradient, place, factor, constant, slope, kept, to_x
        )
        return of_kernel, of_bias, of_x if to_x else ()

    cut = (_cut(each, _pieces(block, x, kernel)) for each in (x, sample_mask, gradient, place))
    of_kernel, of_bias, of_x = jax.lax.map(piece, tuple(cut))
    return of_kernel.sum(axis=0), of_bias.sum(axis=0), _join(of_x, x.shape[-1]) if to_x else None


IMPLEMENTATION = Implementation(_extremes, _forward, _backward)
