"""Convolution, batch normalisation and max pooling for many small networks at once.

Plain convolutions do badly in a study: under ``vmap`` over members they become grouped convolutions, and inside
``scan`` XLA runs them on a slow path of the CPU (jax issue 12868). Here everything is slices, matrix products and
element-wise loops, which stay fast under both. Three choices carry the speed:

* **Channels first, samples last**, ``(C, H, W, B)``. A patch is a block copy of whole rows of samples, every reduction
  over positions keeps the samples in vector lanes, and both products of a convolution are plain matrix products.
* **Pooling before the affine map.** Normalisation maps a channel by ``a x + b``, and ``max(a x + b) = a max(x) + b``
  for ``a > 0``, ``a min(x) + b`` for ``a < 0``. So a block pools first and touches the large map only for its
  statistics.
* **A few samples at a time.** The large map between convolution and pooling is never stored: some samples' maps are
  computed, summed up and pooled while they are in the cache of a CPU core, and computed again for the gradient. What
  cores do side by side would otherwise wait for memory.

That is how a CPU does it; :mod:`mer_jax.models.tiles` does the same for accelerators.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mer_jax.models import tiles

_LEAST_TOGETHER = 8  # samples; they fill a vector register
_STRIPS = 4  # of a map, at least, that are added up before they are summed


def patches(x: jax.Array, size: int, padding: int) -> jax.Array:
    """All ``size x size`` neighbourhoods of zero-padded maps.

    Args:
        x: ``(C, H, W, B)``.
        size: Side k of the kernel.
        padding: Zeros on each side.

    Returns:
        ``(k, k, C, H', W', B)`` with ``H' = H + 2 padding - k + 1``.
    """
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    height, width = x.shape[1] - size + 1, x.shape[2] - size + 1
    rows = [[x[:, i : i + height, j : j + width] for j in range(size)] for i in range(size)]
    return jnp.stack([jnp.stack(row) for row in rows])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: jax.Array, kernel: jax.Array, padding: int) -> jax.Array:
    """Cross-correlation of stride 1, as ``torch.nn.Conv2d`` without bias, by one matrix product.

    Args:
        x: ``(C, H, W, B)``.
        kernel: ``(k, k, C, F)``.
        padding: Zeros on each side, at most ``k - 1``.

    Returns:
        ``(F, H', W', B)`` with ``H' = H + 2 padding - k + 1``.
    """
    columns = patches(x, kernel.shape[0], padding)
    flat = columns.reshape(-1, columns[0, 0, 0].size)  # (k, k, C, H', W', B) -> (k k C, H' W' B)
    # Turned around before, not within, the product, which takes half the time then for eight features on a CPU.
    weights = jax.lax.optimization_barrier(kernel.reshape(-1, kernel.shape[-1]).T)  # (k, k, C, F) -> (F, k k C)
    return (weights @ flat).reshape(-1, *columns.shape[3:])  # (F, k k C) (k k C, n) -> (F, H', W', B)


def _convolve_forward(x, kernel, padding):
    return convolve(x, kernel, padding), (x, kernel)


def _convolve_backward(padding, saved, gradient):
    x, kernel = saved
    size, features = kernel.shape[0], kernel.shape[-1]
    columns = patches(x, size, padding).reshape(-1, gradient[0].size)  # (k k C, n)
    flat = gradient.reshape(features, -1)  # (F, H', W', B) -> (F, n)
    kernel_gradient = (columns @ flat.T).reshape(kernel.shape)  # (k k C, n) (n, F) -> (k, k, C, F)
    flipped = kernel[::-1, ::-1].transpose(0, 1, 3, 2)  # (k, k, C, F) -> (k, k, F, C)
    return convolve(gradient, flipped, size - 1 - padding), kernel_gradient


convolve.defvjp(_convolve_forward, _convolve_backward)


def _window_pieces(x: jax.Array, window: int, padding: int, fill: float) -> list[jax.Array]:
    """The ``window**2`` members of every pooling window, row by row, each ``(C, H', W', B)``."""
    height, width = (_pooled_side(side, window, padding) for side in x.shape[1:3])
    pieces = []
    for i in range(window):
        for j in range(window):
            piece, ends = x, [(0, 0, 0)]
            for axis, place, pooled in ((1, i, height), (2, j, width)):
                missing = 1 if place < padding else 0  # the first window's member lies in the padding
                start = place - padding + missing * window
                taken = min(pooled - missing, -(-(x.shape[axis] - start) // window))
                piece = jax.lax.slice_in_dim(piece, start, start + (taken - 1) * window + 1, window, axis)
                ends.append((missing, pooled - missing - taken, 0))
            pieces.append(jax.lax.pad(piece, jnp.asarray(fill, x.dtype), [*ends, (0, 0, 0)]))
    return pieces


def _pooled_side(side: int, window: int, padding: int) -> int:
    return (side + 2 * padding - window) // window + 1


def _spread(x: jax.Array, window: int, padding: int, shape: tuple[int, ...]) -> jax.Array:
    """Repeats ``(C, H', W', B)`` over the members of each window: ``(C, H, W, B)``, 0 outside all windows."""
    x = jnp.repeat(jnp.repeat(x, window, axis=1), window, axis=2)
    after = [max(0, side + padding - now) for side, now in zip(shape[1:3], x.shape[1:3], strict=True)]
    x = jnp.pad(x, ((0, 0), (0, after[0]), (0, after[1]), (0, 0)))
    return x[:, padding : padding + shape[1], padding : padding + shape[2]]


def _channels(values: jax.Array) -> jax.Array:
    return values[:, None, None, None]  # (C,) -> (C, 1, 1, 1)


class _Block(NamedTuple):
    """The static part of a block.

    Attributes:
        padding: Zeros on each side of the convolved maps.
        window: Side and stride of the pooling windows.
        pool_padding: Padding of the pooling, which never wins.
        rectify: Whether there is a ReLU between convolution and normalisation.
        pieces: How many parts the samples are worked on in.
        epsilon: Added to the variance.
    """

    padding: int
    window: int
    pool_padding: int
    rectify: bool
    pieces: int
    epsilon: float


def _response(block: _Block, z: jax.Array, bias: jax.Array) -> jax.Array:
    """What is normalised, less the bias, of what a convolution gave: ``(F, H, W, B)`` to the same.

    Normalisation takes a bias off again, so that none is added: ``max(z + b, 0) - b = max(z, -b)``. It is monotone, so
    that it may come after pooling.
    """
    return jnp.maximum(z, _channels(-bias)) if block.rectify else z


def _sum_over_positions(function, z: jax.Array) -> jax.Array:
    """The sum of ``function(z)`` over positions, ``(F, H, W, B)`` to ``(F, B)``.

    Strips of rows are added up first, in a loop that reads the map once and holds ``function``; the rest is a product.
    A reduction on a CPU would have what ``function`` gives written to memory, and read it slowly.
    """
    even = (count for count in range(_STRIPS, 2 * _STRIPS + 1) if z.shape[1] % count == 0)
    rows = max(1, z.shape[1] // next(even, _STRIPS))
    strips = [function(z[:, start : start + rows]) for start in range(0, z.shape[1], rows)]
    whole = [strip for strip in strips if strip.shape[1] == rows]
    total = jnp.zeros((z.shape[0], z.shape[-1]), z.dtype)
    for strip in [sum(whole), *strips[len(whole) :]]:
        flat = strip.reshape(strip.shape[0], -1, strip.shape[-1])  # (F, h, W, B) -> (F, n, B)
        total += (jnp.ones((flat.shape[0], 1, flat.shape[1]), z.dtype) @ flat)[:, 0]  # (F, 1, n) (F, n, B) -> (F, 1, B)
    return total


def _over_pieces(function, block: _Block, xs):
    """Maps over the leading axis of ``xs``, the pieces, one after another; without a loop where there is one."""
    if block.pieces == 1:
        return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], xs)))
    return jax.lax.map(function, xs)


def _cut(block: _Block, x: jax.Array) -> jax.Array:
    """``(..., B)`` to ``(pieces, ..., b)``, the last piece filled up with zeros."""
    size = -(-x.shape[-1] // block.pieces)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size * block.pieces - x.shape[-1])])
    return jnp.moveaxis(x.reshape(*x.shape[:-1], block.pieces, size), -2, 0)


def _join(x: jax.Array, batch: int) -> jax.Array:
    """``(pieces, ..., b)`` to ``(..., B)``."""
    x = jnp.moveaxis(x, 0, -2)
    return x.reshape(*x.shape[:-2], -1)[..., :batch]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _train_block(block, x, kernel, bias, scale, shift, sample_mask):
    return _train_block_forward(block, x, kernel, bias, scale, shift, sample_mask)[0]


def _train_block_forward(block, x, kernel, bias, scale, shift, sample_mask):
    def piece(taken):
        x, mask = taken
        z = convolve(x, kernel, block.padding)
        count = jnp.sum(mask) * (z.shape[1] * z.shape[2])
        total = _sum_over_positions(lambda rows: _response(block, rows, bias), z)
        mean = total @ mask / jnp.maximum(count, 1.0)  # (F, b) (b,) -> (F,)
        squares = _sum_over_positions(lambda rows: (_response(block, rows, bias) - _channels(mean)) ** 2, z)
        extreme, place = _signed_max_pool(z, scale, block.window, block.pool_padding)
        extreme = _response(block, extreme, bias)
        return (count, mean, squares @ mask), extreme, place, z if block.pieces == 1 else None

    batch = x.shape[-1]
    moments, extreme, place, z = _over_pieces(piece, block, (_cut(block, x), _cut(block, sample_mask)))
    counts, means, deviations = moments  # (pieces,), (pieces, F), (pieces, F)
    count = jnp.maximum(jnp.sum(counts), 1.0)
    mean = counts @ means / count  # (pieces,) (pieces, F) -> (F,)
    # Chan, Golub and LeVeque 1979: deviations of the parts, and of their means.
    variance = (jnp.sum(deviations, axis=0) + counts @ (means - mean[None]) ** 2) / count
    inverse = jax.lax.rsqrt(variance + block.epsilon)
    normalised = (_join(extreme, batch) - _channels(mean)) * _channels(inverse)
    y = _channels(scale) * normalised + _channels(shift)
    outputs = y, mean + bias, variance
    return outputs, (x, kernel, bias, scale, mean, inverse, count, normalised, place, sample_mask, z)


def _train_block_backward(block, saved, gradients):
    x, kernel, bias, scale, mean, inverse, count, normalised, place, sample_mask, z = saved
    gradient = gradients[0] * sample_mask[None, None, None]  # (F, H', W', B); statistics carry no gradient
    scale_gradient = jnp.sum(gradient * normalised, axis=(1, 2, 3))
    shift_gradient = jnp.sum(gradient, axis=(1, 2, 3))
    # Of the usual gradient of batch normalisation the first term lives on the windows' winners alone.
    factor = _channels(scale * inverse)
    constant = factor * _channels(shift_gradient / count - mean * inverse * scale_gradient / count)
    slope = factor * _channels(inverse * scale_gradient / count)
    gradient = factor * gradient

    def piece(taken):
        x, gradient, place, mask, z = taken
        z = _response(block, convolve(x, kernel, block.padding) if z is None else z, bias)

        def gradient_of_z():
            # Made here, as XLA would make them anew for every number: (1, H, W, 1), the place in its window.
            rows, columns = ((np.arange(side) + block.pool_padding) % block.window for side in z.shape[1:3])
            here = (rows[:, None] * block.window + columns[None]).astype(place.dtype)[None, :, :, None]
            won = _spread(place, block.window, block.pool_padding, z.shape) == here
            sparse = jnp.where(won, _spread(gradient, block.window, block.pool_padding, z.shape), 0.0)
            constants, slopes = (each * mask[None, None, None] for each in (constant, slope))  # (F, 1, 1, b)
            return sparse - (constants + slopes * z)

        if block.rectify:
            z_gradient = jnp.where(z > _channels(-bias), gradient_of_z(), 0.0)
            bias_gradient = jnp.sum(z_gradient, axis=(1, 2, 3))
        else:
            # Padding alone needs no work. And what a branch makes keeps its shape: an XLA that merges these loops into
            # the flat array of the product below takes twice as long.
            z_gradient = jax.lax.cond(jnp.any(mask > 0), gradient_of_z, lambda: jnp.zeros_like(z))
            bias_gradient = jnp.zeros_like(bias)
        x_gradient, kernel_gradient = _convolve_backward(block.padding, (x, kernel), z_gradient)
        return x_gradient, kernel_gradient, bias_gradient

    taken = (_cut(block, x), _cut(block, gradient), place, _cut(block, sample_mask), z)
    x_gradient, kernel_gradient, bias_gradient = _over_pieces(piece, block, taken)
    return (
        _join(x_gradient, x.shape[-1]),
        jnp.sum(kernel_gradient, axis=0),
        jnp.sum(bias_gradient, axis=0),
        scale_gradient,
        shift_gradient,
        None,
    )


_train_block.defvjp(_train_block_forward, _train_block_backward)


def _signed_max_pool(x: jax.Array, scale: jax.Array, window: int, padding: int) -> tuple[jax.Array, jax.Array]:
    """Window maxima of channels of non-negative ``scale``, minima of the others, and which member won (the first)."""
    sign = _channels(jnp.where(scale < 0, -1.0, 1.0).astype(x.dtype))
    pieces = _window_pieces(x * sign, window, padding, -jnp.inf)
    best, place = pieces[0], jnp.zeros_like(pieces[0])  # integers would leave vectors half empty
    for number, piece in enumerate(pieces[1:], start=1):
        place = jnp.where(piece > best, float(number), place)
        best = jnp.maximum(best, piece)
    return best * sign, place


def _pooled_extremes(block: _Block, x: jax.Array, kernel: jax.Array, bias: jax.Array, scale: jax.Array) -> jax.Array:
    """Responses that pooling lets through, less the bias: ``(C, H, W, B)`` to ``(F, H', W', B)``."""

    def extremes(x):
        pooled, _ = _signed_max_pool(convolve(x, kernel, block.padding), scale, block.window, block.pool_padding)
        return _response(block, pooled, bias)

    return _join(_over_pieces(extremes, block, _cut(block, x)), x.shape[-1])


class BatchNorm(nn.Module):
    """The parameters and running statistics of a batch normalisation; the work is in :func:`convolution_block`.

    Attributes:
        momentum: Weight of a new batch in the running statistics, as PyTorch counts it.
    """

    momentum: float = 0.1

    @nn.compact
    def __call__(self, channels: int) -> "Normaliser":
        """Makes, or finds, the variables of ``channels`` channels."""
        return Normaliser(
            self.param("scale", nn.initializers.ones, (channels,)),
            self.param("bias", nn.initializers.zeros, (channels,)),
            self.variable("batch_stats", "mean", jnp.zeros, (channels,)),
            self.variable("batch_stats", "var", jnp.ones, (channels,)),
            None if self.is_initializing() else self.momentum,
        )


class Normaliser(NamedTuple):
    """Batch normalisation of some channels.

    Attributes:
        scale: ``(C,)``.
        bias: ``(C,)``.
        mean: Variable with the running mean ``(C,)``.
        var: Variable with the running variance ``(C,)``.
        momentum: Weight of a new batch; None leaves the running statistics alone.
    """

    scale: jax.Array
    bias: jax.Array
    mean: nn.Variable
    var: nn.Variable
    momentum: float | None


def convolution_block(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    normalisers: Sequence[Normaliser],
    sample_mask: jax.Array,
    *,
    padding: int,
    window: int,
    pool_padding: int = 0,
    rectify: bool,
    train: bool,
    cache_bytes: int = 0,
    epsilon: float = 1e-5,
) -> jax.Array:
    """Convolution, a ReLU or none, batch normalisation and max pooling, exact with masked samples.

    Statistics in training run over the samples of the mask alone, so padding changes nothing. Running statistics
    follow PyTorch: the running variance takes the unbiased estimate.

    Args:
        x: ``(C, H, W, B)``.
        kernel: ``(k, k, C, F)``.
        bias: ``(F,)``.
        normalisers: One or more, whose channels together are F: several streams cost no more than one.
        sample_mask: ``(B,)`` bool, False for padding.
        padding: Zeros on each side of ``x``, at most ``k - 1``.
        window: Side of a pooling window and its stride.
        pool_padding: Padding of the pooling, below ``window``; it never wins.
        rectify: Whether a ReLU comes before the normalisation.
        train: Whether to use, and update, statistics of the batch.
        cache_bytes: Work on so many samples at a time that their maps take no more, as a CPU likes it; 0 for all at
            once and by tiles, as an accelerator does.
        epsilon: Added to the variance.

    Returns:
        ``(F, H', W', B)`` with ``H' = (H + 2 padding - k + 1 + 2 pool_padding - window) // window + 1``.
    """
    scale = jnp.concatenate([each.scale for each in normalisers])
    shift = jnp.concatenate([each.bias for each in normalisers])
    height, width = (side + 2 * padding - kernel.shape[0] + 1 for side in x.shape[1:3])
    if cache_bytes:
        sample_bytes = height * width * kernel.shape[-1] * x.dtype.itemsize
        pieces = -(-x.shape[-1] // max(_LEAST_TOGETHER, cache_bytes // sample_bytes // 8 * 8))
        block = _Block(padding, window, pool_padding, rectify, pieces, epsilon)
        train_block, pooled_extremes = _train_block, _pooled_extremes
    else:
        block = tiles.Block(padding, window, pool_padding, rectify, epsilon)
        train_block, pooled_extremes = tiles.train_block, tiles.pooled_extremes
    if not train:
        mean = jnp.concatenate([each.mean.value for each in normalisers]) - bias
        variance = jnp.concatenate([each.var.value for each in normalisers])
        extreme = pooled_extremes(block, x, kernel, bias, scale)
        return _channels(scale * jax.lax.rsqrt(variance + epsilon)) * (extreme - _channels(mean)) + _channels(shift)
    mask = sample_mask.astype(x.dtype)
    y, mean, variance = train_block(block, x, kernel, bias, scale, shift, mask)
    _update(normalisers, mean, variance, jnp.sum(mask) * (height * width))
    return y


def masked_batch_norm(
    x: jax.Array, normaliser: Normaliser, sample_mask: jax.Array, *, train: bool, epsilon: float = 1e-5
) -> jax.Array:
    """Batch normalisation of vectors, exact with masked samples.

    Args:
        x: ``(B, C)``.
        normaliser: Of C channels.
        sample_mask: ``(B,)`` bool, False for padding.
        train: Whether to use, and update, statistics of the batch.
        epsilon: Added to the variance.

    Returns:
        ``(B, C)``.
    """
    mean, variance = normaliser.mean.value, normaliser.var.value
    if train:
        mask = sample_mask.astype(x.dtype)
        count = jnp.sum(mask)
        # Statistics are never made of rounded factors.
        sums = functools.partial(jnp.matmul, mask, precision="highest")  # (B,) (B, C) -> (C,)
        mean = sums(x) / jnp.maximum(count, 1.0)
        variance = sums((x - mean[None]) ** 2) / jnp.maximum(count, 1.0)
        _update([normaliser], mean, variance, count)
    return (normaliser.scale * jax.lax.rsqrt(variance + epsilon))[None] * (x - mean[None]) + normaliser.bias[None]


def _update(normalisers: Sequence[Normaliser], mean: jax.Array, variance: jax.Array, count: jax.Array) -> None:
    """Blends moments ``(C,)`` of ``count`` values into the running statistics; a fully masked batch changes nothing."""
    unbiased = variance * count / jnp.maximum(count - 1.0, 1.0)
    start = 0
    for each in normalisers:
        end = start + each.scale.shape[0]
        if each.momentum is not None:
            for running, new in ((each.mean, mean[start:end]), (each.var, unbiased[start:end])):
                blended = (1.0 - each.momentum) * running.value + each.momentum * jax.lax.stop_gradient(new)
                running.value = jnp.where(count > 0, blended, running.value)
        start = end


class ConvParams(nn.Module):
    """The parameters of a convolution, initialised as PyTorch initialises ``Conv2d``; for :func:`convolution_block`.

    Attributes:
        features: F.
        size: Side k of the kernel.
    """

    features: int
    size: int

    @nn.compact
    def __call__(self, channels: int) -> tuple[jax.Array, jax.Array]:
        """Makes, or finds, the kernel ``(k, k, channels, F)`` and the bias ``(F,)``."""
        fan_in = channels * self.size**2
        kernel = self.param("kernel", torch_uniform(fan_in), (self.size, self.size, channels, self.features))
        return kernel, self.param("bias", torch_uniform(fan_in), (self.features,))


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default initialiser of convolutions and dense layers: uniform in ±1 / sqrt(fan_in).

    Args:
        fan_in: Inputs of one output.

    Returns:
        An initialiser ``(key, shape, dtype) -> array``.
    """

    def init(key, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Dense(nn.Module):
    """A dense layer on ``(B, D)``, initialised as PyTorch initialises ``Linear``.

    Attributes:
        features: Width of the output.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(B, D)`` to ``(B, features)``."""
        kernel = self.param("kernel", torch_uniform(x.shape[-1]), (x.shape[-1], self.features))
        bias = self.param("bias", torch_uniform(x.shape[-1]), (self.features,))
        return x @ kernel + bias[None]
