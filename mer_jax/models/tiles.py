"""Blocks of a convolutional network by tiles of one pooling window each, in JAX alone, as accelerators like them.

A patch for every pixel of a map is 9 or 25 times as large as the map, and an accelerator waits for memory, not for
arithmetic. Here a patch is all that the pixels of one pooling window are computed from, ``p + k - 1`` pixels a side for
a window of p and a kernel of k: for windows of 3 and kernels of 5 a fifth of the memory, for twice the arithmetic,
which is one product with a kernel that is spread over the window. The pixels of a window lie along an axis of their
own, so that pooling and its gradient are element-wise.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mer_jax.models.convolution import Block, Implementation


class _Axis(NamedTuple):
    """One direction of a map that is cut into windows.

    Attributes:
        windows: How many cover the map, n; the last may hang over.
        pooled: How many of them pooling takes.
        before: Zeros before the input.
        after: Zeros after it.
        within: ``(p, n)`` bool, which places of a window lie in the map.
    """

    windows: int
    pooled: int
    before: int
    after: int
    within: np.ndarray


def _axis(block: Block, side: int, size: int) -> _Axis:
    mapped = side + 2 * block.padding - size + 1
    windows = -(-(mapped + block.pool_padding) // block.window)
    pooled = (mapped + 2 * block.pool_padding - block.window) // block.window + 1
    before = block.pool_padding + block.padding
    after = windows * block.window + size - 1 - before - side
    place = np.arange(block.window)[:, None] + block.window * np.arange(windows) - block.pool_padding  # (p, n)
    return _Axis(windows, pooled, before, after, (place >= 0) & (place < mapped))


def _axes(block: Block, x: jax.Array, kernel: jax.Array) -> tuple[_Axis, _Axis]:
    return _axis(block, x.shape[1], kernel.shape[0]), _axis(block, x.shape[2], kernel.shape[0])


def _within(rows: _Axis, columns: _Axis) -> np.ndarray:
    """Which pixels of the windows lie in the map, ``(p p, 1, n, m, 1)``."""
    inside = rows.within[:, None, :, None] & columns.within[None, :, None, :]  # (p, p, n, m)
    return inside.reshape(-1, 1, *inside.shape[2:], 1)


def _spread_kernel(kernel: jax.Array, window: int) -> jax.Array:
    """The kernel at each place of a window: ``(k, k, C, F)`` to ``(p p F, l l C)``, ``l = p + k - 1``."""
    placed = [
        jnp.pad(kernel, ((i, window - 1 - i), (j, window - 1 - j), (0, 0), (0, 0)))
        for i in range(window)
        for j in range(window)
    ]
    spread = jnp.stack(placed)  # (p p, l, l, C, F)
    return spread.transpose(0, 4, 1, 2, 3).reshape(window**2 * kernel.shape[-1], -1)


def _window_patches(block: Block, x: jax.Array, size: int, rows: _Axis, columns: _Axis) -> jax.Array:
    """What the pixels of each window are computed from: ``(C, H, W, B)`` to ``(l l C, n m B)``."""
    x = jnp.pad(x, ((0, 0), (rows.before, rows.after), (columns.before, columns.after), (0, 0)))
    # What x is made of would be made anew for every slice.
    x = jax.lax.optimization_barrier(x)
    step, side = block.window, block.window + size - 1
    taken = [
        x[:, i : i + step * (rows.windows - 1) + 1 : step, j : j + step * (columns.windows - 1) + 1 : step]
        for i in range(side)
        for j in range(side)
    ]
    return jnp.stack(taken).reshape(side**2 * x.shape[0], -1)  # (l l, C, n, m, B) -> (l l C, n m B)


def _convolve(block: Block, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Maps without bias, window by window: ``(C, H, W, B)`` and ``(k, k, C, F)`` to ``(p p, F, n, m, B)``."""
    rows, columns = _axes(block, x, kernel)
    # (p p F, l l C) (l l C, n m B) -> (p p F, n m B)
    z = _spread_kernel(kernel, block.window) @ _window_patches(block, x, kernel.shape[0], rows, columns)
    return z.reshape(block.window**2, kernel.shape[-1], rows.windows, columns.windows, x.shape[-1])


def _channels(values: jax.Array) -> jax.Array:
    return values[:, None, None, None]  # (F,) -> (F, 1, 1, 1), for what is pooled


def _features(values: jax.Array) -> jax.Array:
    return values[None, :, None, None, None]  # (F,) -> (1, F, 1, 1, 1), for windows


def _response(block: Block, z: jax.Array, bias: jax.Array) -> jax.Array:
    """The responses of what a convolution gave."""
    return jnp.maximum(z, (_channels if z.ndim == 4 else _features)(-bias)) if block.rectify else z


def _places(block: Block) -> type[np.integer]:
    """What counts the pixels of a window, and one more."""
    return np.uint8 if block.window**2 < 256 else np.int32


def _extremes(block: Block, z: jax.Array, scale: jax.Array, rows: _Axis, columns: _Axis) -> tuple[jax.Array, jax.Array]:
    """Maxima of channels of non-negative ``scale``, minima of the others, and their places."""
    sign = jnp.where(scale < 0, -1.0, 1.0).astype(z.dtype)
    signed = jnp.where(_within(rows, columns), z * _features(sign), -jnp.inf)[:, :, : rows.pooled, : columns.pooled]
    kind = _places(block)
    best, place = signed[0], jnp.zeros(signed.shape[1:], kind)
    for number, candidate in enumerate(signed[1:], start=1):
        place = jnp.where(candidate > best, kind(number), place)
        best = jnp.maximum(best, candidate)
    # Both at once: a GPU's compiler would read the whole map again where places are used.
    best, place = jax.lax.optimization_barrier((best, place))
    return best * _channels(sign), place


def _pooled_extremes(block, x, kernel, bias, scale):
    extreme, _ = _extremes(block, _convolve(block, x, kernel), scale, *_axes(block, x, kernel))
    return _response(block, extreme, bias)


def _over_samples(maps: jax.Array, sample_mask: jax.Array) -> jax.Array:
    """Sums over all pixels of the samples of a mask, ``(p p, F, n, m, B)`` to ``(F,)``; never of rounded factors."""
    return jnp.matmul(jnp.sum(maps, axis=(0, 2, 3)), sample_mask, precision="highest")  # (F, B) (B,) -> (F,)


def _forward(block, x, kernel, bias, scale, sample_mask):
    rows, columns = _axes(block, x, kernel)
    within = _within(rows, columns)
    z = _convolve(block, x, kernel)
    response = _response(block, z, bias)
    count = jnp.maximum(jnp.sum(sample_mask) * int(within.sum()), 1.0)
    mean = _over_samples(jnp.where(within, response, 0.0), sample_mask) / count
    deviation = jnp.where(within, response - _features(mean), 0.0)
    variance = _over_samples(deviation**2, sample_mask) / count
    extreme, place = _extremes(block, z, scale, rows, columns)
    return _response(block, extreme, bias), place, mean, variance, z


def _backward(block, x, kernel, bias, sample_mask, gradient, place, factor, constant, slope, z, to_x):
    z = _convolve(block, x, kernel) if z is None else z
    rows, columns = _axes(block, x, kernel)
    # Windows beyond those that pooling takes have no winner.
    beyond = ((0, 0), (0, rows.windows - rows.pooled), (0, columns.windows - columns.pooled), (0, 0))
    here = np.arange(len(z), dtype=_places(block))[:, None, None, None, None]
    won = jnp.pad(place, beyond, constant_values=len(z))[None] == here
    gradient = _channels(factor) * (gradient * sample_mask[None, None, None])
    sparse = jnp.where(won, jnp.pad(gradient, beyond)[None], 0.0)
    dense = (_features(constant) + _features(slope) * _response(block, z, bias)) * sample_mask[None, None, None, None]
    z_gradient = jnp.where(_within(rows, columns), sparse - dense, 0.0)
    bias_gradient = jnp.zeros_like(bias)
    if block.rectify:
        z_gradient = jnp.where(z > _features(-bias), z_gradient, 0.0)
        bias_gradient = jnp.sum(z_gradient, axis=(0, 2, 3, 4))
    _, pull = jax.vjp(functools.partial(_convolve, block), x, kernel)
    x_gradient, kernel_gradient = pull(z_gradient)
    return kernel_gradient, bias_gradient, x_gradient if to_x else None


IMPLEMENTATION = Implementation(_pooled_extremes, _forward, _backward)
