"""Convolution, batch normalisation and max pooling for many small networks at once.

Plain convolutions do badly in a study: under ``vmap`` over members they become grouped convolutions, and inside
``scan`` XLA runs them on a slow path of the CPU (jax issue 12868). Here everything is slices, matrix products and
element-wise loops, which stay fast under both. Two choices carry the speed:

* **Channels first, samples last**, ``(C, H, W, B)``. A patch is a block copy of whole rows of samples, every reduction
  over positions keeps the samples in vector lanes, and both products of a convolution are plain matrix products.
* **Pooling before the affine map.** Normalisation maps a channel by ``a x + b``, and ``max(a x + b) = a max(x) + b``
  for ``a > 0``, ``a min(x) + b`` for ``a < 0``. So :func:`batch_norm_max_pool` pools first and touches the large map
  only for its statistics; its gradient is written out, too, in one pass over the map.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


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
    weights = kernel.reshape(-1, kernel.shape[-1])  # (k, k, C, F) -> (k k C, F)
    return (weights.T @ flat).reshape(-1, *columns.shape[3:])  # (F, k k C) (k k C, n) -> (F, H', W', B)


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
    ends = [
        (padding, pooled * window - side - padding) for side, pooled in zip(x.shape[1:3], (height, width), strict=True)
    ]
    x = jax.lax.pad(x, jnp.asarray(fill, x.dtype), ((0, 0, 0), (*ends[0], 0), (*ends[1], 0), (0, 0, 0)))
    return [x[:, i::window, j::window] for i in range(window) for j in range(window)]


def _pooled_side(side: int, window: int, padding: int) -> int:
    return (side + 2 * padding - window) // window + 1


def _spread(x: jax.Array, window: int, padding: int, shape: tuple[int, ...]) -> jax.Array:
    """Repeats ``(C, H', W', B)`` over the members of each window: ``(C, H, W, B)``, 0 outside all windows."""
    x = jnp.repeat(jnp.repeat(x, window, axis=1), window, axis=2)
    after = [max(0, side + padding - now) for side, now in zip(shape[1:3], x.shape[1:3], strict=True)]
    x = jnp.pad(x, ((0, 0), (0, after[0]), (0, after[1]), (0, 0)))
    return x[:, padding : padding + shape[1], padding : padding + shape[2]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _normalise_and_pool(x, scale, bias, sample_mask, window, padding, epsilon):
    return _normalise_and_pool_forward(x, scale, bias, sample_mask, window, padding, epsilon)[0]


def _channels(values: jax.Array) -> jax.Array:
    return values[:, None, None, None]  # (C,) -> (C, 1, 1, 1)


def _masked_moments(x: jax.Array, sample_mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean and biased variance ``(C,)`` of maps ``(C, H, W, B)`` over positions and the samples of the mask."""
    count = jnp.maximum(jnp.sum(sample_mask), 1.0) * (x.shape[1] * x.shape[2])
    mean = jnp.sum(x, axis=(1, 2)) @ sample_mask / count  # (C, B) (B,) -> (C,)
    variance = jnp.sum((x - _channels(mean)) ** 2, axis=(1, 2)) @ sample_mask / count
    return mean, variance, count


def _normalise_and_pool_forward(x, scale, bias, sample_mask, window, padding, epsilon):
    mean, variance, count = _masked_moments(x, sample_mask)
    inverse = jax.lax.rsqrt(variance + epsilon)
    extreme, place = _signed_max_pool(x, scale, window, padding)
    normalised = (extreme - _channels(mean)) * _channels(inverse)
    y = _channels(scale) * normalised + _channels(bias)
    return (y, mean, variance), (x, scale, mean, inverse, count, normalised, place, sample_mask)


def _normalise_and_pool_backward(window, padding, epsilon, saved, gradients):
    del epsilon
    x, scale, mean, inverse, count, normalised, place, sample_mask = saved
    gradient = gradients[0] * sample_mask[None, None, None]  # (C, H', W', B); statistics carry no gradient
    scale_gradient = jnp.sum(gradient * normalised, axis=(1, 2, 3))
    bias_gradient = jnp.sum(gradient, axis=(1, 2, 3))
    rows, columns = ((jnp.arange(side) + padding) % window for side in x.shape[1:3])
    here = (rows[:, None] * window + columns[None])[None, :, :, None]  # (1, H, W, 1), place in its window
    won = _spread(place, window, padding, x.shape) == here
    # Of the usual gradient of batch normalisation the first term lives on the windows' winners alone.
    factor = _channels(scale * inverse)
    constant = _channels(bias_gradient / count - mean * inverse * scale_gradient / count)
    slope = _channels(inverse * scale_gradient / count)
    sparse = jnp.where(won, _spread(gradient, window, padding, x.shape), 0.0)
    x_gradient = factor * (sparse - (constant + slope * x) * sample_mask[None, None, None])
    return x_gradient, scale_gradient, bias_gradient, None


_normalise_and_pool.defvjp(_normalise_and_pool_forward, _normalise_and_pool_backward)


def _signed_max_pool(x: jax.Array, scale: jax.Array, window: int, padding: int) -> tuple[jax.Array, jax.Array]:
    """Window maxima of channels of non-negative ``scale``, minima of the others, and which member won (the first)."""
    sign = _channels(jnp.where(scale < 0, -1.0, 1.0).astype(x.dtype))
    pieces = _window_pieces(x * sign, window, padding, -jnp.inf)
    best, place = pieces[0], jnp.zeros(pieces[0].shape, jnp.int8)
    for number, piece in enumerate(pieces[1:], start=1):
        place = jnp.where(piece > best, jnp.int8(number), place)
        best = jnp.maximum(best, piece)
    return best * sign, place


class BatchNorm(nn.Module):
    """The parameters and running statistics of a batch normalisation; the work is in :func:`batch_norm_max_pool`.

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


def batch_norm_max_pool(
    x: jax.Array,
    normalisers: Sequence[Normaliser],
    sample_mask: jax.Array,
    *,
    window: int,
    padding: int = 0,
    train: bool,
    epsilon: float = 1e-5,
) -> jax.Array:
    """Batch normalisation, then max pooling with stride equal to the window, exact with masked samples.

    Statistics in training run over the samples of the mask alone, so padding changes nothing. Running statistics
    follow PyTorch: the running variance takes the unbiased estimate.

    Args:
        x: ``(C, H, W, B)``.
        normalisers: One or more, whose channels together are C: several streams cost no more than one.
        sample_mask: ``(B,)`` bool, False for padding.
        window: Side of a pooling window and its stride.
        padding: Padding of the pooling, below ``window``; it never wins.
        train: Whether to use, and update, statistics of the batch.
        epsilon: Added to the variance.

    Returns:
        ``(C, H', W', B)`` with ``H' = (H + 2 padding - window) // window + 1``.
    """
    scale = jnp.concatenate([each.scale for each in normalisers])
    bias = jnp.concatenate([each.bias for each in normalisers])
    if not train:
        mean = jnp.concatenate([each.mean.value for each in normalisers])
        variance = jnp.concatenate([each.var.value for each in normalisers])
        extreme, _ = _signed_max_pool(x, scale, window, padding)
        return _channels(scale * jax.lax.rsqrt(variance + epsilon)) * (extreme - _channels(mean)) + _channels(bias)
    mask = sample_mask.astype(x.dtype)
    y, mean, variance = _normalise_and_pool(x, scale, bias, mask, window, padding, epsilon)
    _update(normalisers, mean, variance, jnp.sum(mask) * (x.shape[1] * x.shape[2]))
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
        mean = mask @ x / jnp.maximum(count, 1.0)  # (B,) (B, C) -> (C,)
        variance = mask @ (x - mean[None]) ** 2 / jnp.maximum(count, 1.0)
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


class Conv(nn.Module):
    """A convolution of stride 1 on ``(C, H, W, B)``, initialised as PyTorch initialises ``Conv2d``.

    Attributes:
        features: F.
        size: Side of the kernel.
        padding: Zeros on each side; None keeps the size of the maps (odd kernels).
    """

    features: int
    size: int
    padding: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(C, H, W, B)`` to ``(F, H', W', B)``."""
        fan_in = x.shape[0] * self.size**2
        kernel = self.param("kernel", torch_uniform(fan_in), (self.size, self.size, x.shape[0], self.features))
        bias = self.param("bias", torch_uniform(fan_in), (self.features,))
        padding = self.size // 2 if self.padding is None else self.padding
        return convolve(x, kernel, padding) + _channels(bias)


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
