"""Convolution, batch normalisation and max pooling for many small networks at once.

Plain convolutions do badly in a study: under ``vmap`` over members they become grouped convolutions, and inside
``scan`` XLA runs them on a slow path of the CPU (jax issue 12868). Here a block is one operation. Two choices carry the
speed, whatever works it out:

* **Channels first, samples last**, ``(C, H, W, B)``: samples fill the lanes of vectors.
* **Pooling before the affine map.** Normalisation maps a channel by ``a x + b``, and ``max(a x + b) = a max(x) + b``
  for ``a > 0``, ``a min(x) + b`` for ``a < 0``. So a block pools first and touches the large map only for its
  statistics. The bias, which normalisation takes off again, is never added.

What touches the large map is left to an :class:`Implementation`: :mod:`mer_jax.models.cpu_blocks` for CPUs,
:mod:`mer_jax.models.pieces` for those without a C++ compiler, and :mod:`mer_jax.models.tiles` for accelerators.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


class Block(NamedTuple):
    """The static part of a block.

    Attributes:
        padding: Zeros on each side of the convolved maps, at most k - 1.
        window: Side and stride p of the pooling windows, at most 255.
        pool_padding: Padding of the pooling, below ``window``; it never wins.
        rectify: Whether there is a ReLU between convolution and normalisation.
        epsilon: Added to the variance.
        batch_first: Whether x is ``(B, H, W, C)``, as data lie, in place of ``(C, H, W, B)``.
    """

    padding: int
    window: int
    pool_padding: int
    rectify: bool
    epsilon: float = 1e-5
    batch_first: bool = False

    def samples(self, x: jax.Array) -> int:
        """B."""
        return x.shape[0 if self.batch_first else -1]

    def map_sides(self, x: jax.Array, kernel: jax.Array) -> tuple[int, int]:
        """Rows and columns of the maps of ``x`` and ``kernel`` ``(k, k, C, F)``, before pooling."""
        height, width = (side + 2 * self.padding - kernel.shape[0] + 1 for side in x.shape[1:3])
        return height, width

    def check(self, x: jax.Array, kernel: jax.Array) -> None:
        """Refuses what no implementation is made for.

        Raises:
            ValueError: Paddings or a window beyond their bounds, or maps that are smaller than a window.
        """
        size = kernel.shape[0]
        if not (0 <= self.padding < size and 0 <= self.pool_padding < self.window <= 255):
            raise ValueError(
                f"{self}: padding must be in [0, {size}), window in [1, 255] and pool_padding in [0, {self.window})"
            )
        if min(self.map_sides(x, kernel)) < 1 or min(self.pooled_sides(x, kernel)) < 1:
            raise ValueError(f"{self}: maps of {x.shape[1:3]} with kernels of {size} are smaller than a window")

    def pooled_sides(self, x: jax.Array, kernel: jax.Array) -> tuple[int, int]:
        """Rows and columns after pooling."""
        height, width = (
            (side + 2 * self.pool_padding - self.window) // self.window + 1 for side in self.map_sides(x, kernel)
        )
        return height, width


def _channels(values: jax.Array) -> jax.Array:
    return values[:, None, None, None]  # (F,) -> (F, 1, 1, 1)


def _over_samples(maps: jax.Array, sample_mask: jax.Array) -> jax.Array:
    """Sums over pixels and the samples of a mask, ``(F, H', W', B)`` to ``(F,)``; never of rounded factors.

    The sum over samples is a product: a reduction over all three axes at once is a scalar loop on a CPU.
    """
    return jnp.matmul(jnp.sum(maps, axis=(1, 2)), sample_mask, precision="highest")  # (F, B) (B,) -> (F,)


def _sums(
    gradient: jax.Array, extreme: jax.Array, mean: jax.Array, sample_mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The ``sums`` of implementations that have none of their own."""
    products = gradient * (extreme - _channels(mean))
    return _over_samples(products, sample_mask), _over_samples(gradient, sample_mask)


class Implementation(NamedTuple):
    """How the large maps of a block are worked out. Those there are differ in speed and in last bits alone.

    A *response* is what is normalised, less the bias: of a convolution's result z it is z, or ``max(z, -bias)`` with a
    ReLU, as ``max(z + b, 0) - b = max(z, -b)``. An *extreme* is the largest response of a pooling window, the
    smallest where the channel's scale is negative; its *place* is the number of its pixel in the window, row by row,
    the first of equals.

    Attributes:
        extremes: ``(block, x, kernel, bias, scale) -> extremes (F, H', W', B)``.
        forward: ``(block, x, kernel, bias, scale, sample_mask) -> (extremes, places, mean (F,), variance (F,), kept)``:
            moments of all responses of the mask's samples, 0 without any, and what ``backward`` may want again.
        backward: ``(block, x, kernel, bias, sample_mask, gradient (F, H', W', B), places, factor (F,), constant (F,),
            slope (F,), kept, to_x) -> (kernel gradient, sums of z's gradient (F,), x gradient or None)`` for
            ``factor gradient`` of the extremes and ``-(constant + slope response)`` of all responses, of the mask's
            samples alone. The sums are 0 without a ReLU. ``to_x`` says whether x, which may be data, needs a gradient.
        sums: ``(gradient (F, H', W', B), extremes, mean (F,), sample_mask) -> (F,), (F,)``: sums of
            ``gradient (extreme - mean)`` and of ``gradient`` over pixels and the mask's samples.
        batch_first: Whether it takes x as data lie, or must be given ``(C, H, W, B)``.
    """

    extremes: Callable
    forward: Callable
    backward: Callable
    sums: Callable = _sums
    batch_first: bool = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def extremes(
    implementation: Implementation, block: Block, x: jax.Array, kernel: jax.Array, bias: jax.Array, scale: jax.Array
) -> jax.Array:
    """The responses that pooling lets through.

    Args:
        implementation: What works out the maps.
        block: The block's static part.
        x: ``(C, H, W, B)``.
        kernel: ``(k, k, C, F)``.
        bias: ``(F,)``.
        scale: ``(F,)``, whose signs say which extremes.

    Returns:
        ``(F, H', W', B)``.
    """
    return implementation.extremes(block, x, kernel, bias, scale)


def _extremes_forward(implementation, block, *primals):
    x, kernel, bias, scale = (each.value for each in primals)
    mask = jnp.ones(block.samples(x), x.dtype)
    extreme, place, _, _, kept = implementation.forward(block, x, kernel, bias, scale, mask)
    return extreme, (x, kernel, bias, mask, place, kept, _needed(primals[0]))


def _extremes_backward(implementation, block, saved, gradient):
    x, kernel, bias, mask, place, kept, to_x = saved
    none, one = jnp.zeros_like(bias), jnp.ones_like(bias)
    of_kernel, total, of_x = implementation.backward(
        block, x, kernel, bias, mask, gradient, place, one, none, none, kept, to_x is not None
    )
    # Where a ReLU is closed, the response -bias remains.
    return of_x, of_kernel, total - _over_samples(gradient, mask) if block.rectify else none, None


extremes.defvjp(_extremes_forward, _extremes_backward, symbolic_zeros=True)


def _needed(primal) -> tuple | None:
    """Whether an argument needs a gradient, by a structure: what is saved for a gradient may be no bool."""
    return () if primal.perturbed else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def train_block(
    implementation: Implementation,
    block: Block,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    sample_mask: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A block with the statistics of the batch, which carry no gradient of their own.

    Args:
        implementation: What works out the maps.
        block: The block's static part.
        x: ``(C, H, W, B)``.
        kernel: ``(k, k, C, F)``.
        bias: ``(F,)``.
        scale: ``(F,)``, of the normalisation.
        shift: ``(F,)``, of the normalisation.
        sample_mask: ``(B,)``, 0 for padding and else 1; of x's type.

    Returns:
        The pooled maps ``(F, H', W', B)``, and mean and variance of the batch, each ``(F,)``.
    """
    return _normalise(implementation, block, x, kernel, bias, scale, shift, sample_mask)[0]


def _normalise(implementation, block, x, kernel, bias, scale, shift, sample_mask):
    extreme, place, mean, variance, kept = implementation.forward(block, x, kernel, bias, scale, sample_mask)
    inverse = jax.lax.rsqrt(variance + block.epsilon)
    y = _channels(scale) * ((extreme - _channels(mean)) * _channels(inverse)) + _channels(shift)
    return (y, mean + bias, variance), (mean, inverse, extreme, place, kept)


def _forward(implementation, block, *primals):
    x, kernel, bias, scale, shift, sample_mask = (each.value for each in primals)
    outputs, results = _normalise(implementation, block, x, kernel, bias, scale, shift, sample_mask)
    return outputs, (x, kernel, bias, scale, sample_mask, _needed(primals[0]), *results)


def _backward(implementation, block, saved, gradients):
    x, kernel, bias, scale, sample_mask, to_x, mean, inverse, extreme, place, kept = saved
    gradient = gradients[0]  # (F, H', W', B)
    if isinstance(gradient, SymbolicZero):
        gradient = jnp.zeros_like(extreme)
    height, width = block.map_sides(x, kernel)
    count = jnp.maximum(jnp.sum(sample_mask) * (height * width), 1.0)
    products, shift_gradient = implementation.sums(gradient, extreme, mean, sample_mask)
    scale_gradient = inverse * products
    # Of the usual gradient of batch normalisation the first term lives on the windows' winners alone.
    factor = scale * inverse
    constant = factor * (shift_gradient / count - mean * inverse * scale_gradient / count)
    slope = factor * inverse * scale_gradient / count
    of_kernel, of_bias, of_x = implementation.backward(
        block, x, kernel, bias, sample_mask, gradient, place, factor, constant, slope, kept, to_x is not None
    )
    return of_x, of_kernel, of_bias, scale_gradient, shift_gradient, None


train_block.defvjp(_forward, _backward, symbolic_zeros=True)


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
    implementation: Implementation,
    block: Block,
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    normalisers: Sequence[Normaliser],
    sample_mask: jax.Array,
    *,
    train: bool,
) -> jax.Array:
    """Convolution, a ReLU or none, batch normalisation and max pooling, exact with masked samples.

    Statistics in training run over the samples of the mask alone, so padding changes nothing. Running statistics
    follow PyTorch: the running variance takes the unbiased estimate.

    Args:
        implementation: What works out the maps.
        block: The block's static part.
        x: ``(C, H, W, B)``, or as the block says.
        kernel: ``(k, k, C, F)``.
        bias: ``(F,)``.
        normalisers: One or more, whose channels together are F: several streams cost no more than one.
        sample_mask: ``(B,)`` bool, False for padding.
        train: Whether to use, and update, statistics of the batch.

    Returns:
        ``(F, H', W', B)`` with ``H' = (H + 2 padding - k + 1 + 2 pool_padding - window) // window + 1``.

    Raises:
        ValueError: As of :meth:`Block.check`.
    """
    block.check(x, kernel)
    if block.batch_first and not implementation.batch_first:
        x, block = x.transpose(3, 1, 2, 0), block._replace(batch_first=False)  # (B, H, W, C) -> (C, H, W, B)
    scale = jnp.concatenate([each.scale for each in normalisers])
    shift = jnp.concatenate([each.bias for each in normalisers])
    if not train:
        mean = jnp.concatenate([each.mean.value for each in normalisers]) - bias
        variance = jnp.concatenate([each.var.value for each in normalisers])
        extreme = extremes(implementation, block, x, kernel, bias, scale)
        factor = scale * jax.lax.rsqrt(variance + block.epsilon)
        return _channels(factor) * (extreme - _channels(mean)) + _channels(shift)
    mask = sample_mask.astype(x.dtype)
    y, mean, variance = train_block(implementation, block, x, kernel, bias, scale, shift, mask)
    height, width = block.map_sides(x, kernel)
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
    """A dense layer on vectors, initialised as PyTorch initialises ``Linear``.

    Attributes:
        features: Width of the output.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, *, samples_last: bool = False) -> jax.Array:
        """Maps ``(B, D)``, or ``(D, B)`` with samples last, to ``(B, features)``."""
        width = x.shape[0 if samples_last else 1]
        kernel = self.param("kernel", torch_uniform(width), (width, self.features))
        bias = self.param("bias", torch_uniform(width), (self.features,))
        if not samples_last:
            return x @ kernel + bias[None]
        product = jax.lax.dot_general(kernel, x, (((0,), (0,)), ((), ())))  # (D, features) (D, B) -> (features, B)
        # The barrier keeps XLA from turning within the product, which takes a CPU ten times as long.
        return jax.lax.optimization_barrier(product).T + bias[None]
