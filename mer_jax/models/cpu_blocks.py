"""Blocks of a convolutional network on a CPU, by C++ that is compiled once on a machine (``cpu_blocks.cc``).

XLA's CPU backend writes each step over a large map to memory and reads it for the next, and its products of small
kernels do not come near the rate of large ones. The C++ convolves, sums up and pools a row at a time in the registers
and the cache of a core.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mer_jax import compiled
from mer_jax.models.convolution import Block, Implementation

_SOURCE = Path(__file__).with_suffix(".cc")
_TARGETS = ("mer_jax_extremes", "mer_jax_forward", "mer_jax_backward", "mer_jax_sums")
_PLACES = np.uint16
_VECTOR_BYTES = 64  # the widest there are


def version() -> str:
    """What was compiled, as :func:`mer_jax.compiled.version` has it; empty where this machine cannot."""
    return compiled.version(_SOURCE, _TARGETS)


def _call(target: str, block: Block, results: list[jax.ShapeDtypeStruct], *arrays: jax.Array):
    call = jax.ffi.ffi_call(target, results, vmap_method="sequential")
    return call(
        *arrays,
        padding=np.int64(block.padding),
        window=np.int64(block.window),
        pool_padding=np.int64(block.pool_padding),
        rectify=block.rectify,
        batch_first=block.batch_first,
    )


def _promoted(*arrays: jax.Array) -> list[jax.Array]:
    """Arrays of one type, of the two that there is code for."""
    dtype = jnp.result_type(*arrays)
    if dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"arrays of {dtype}: a CPU's convolutions take float32 and float64")
    return [each.astype(dtype) for each in arrays]


def _pooled(block: Block, x: jax.Array, kernel: jax.Array, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((kernel.shape[-1], *block.pooled_sides(x, kernel), block.samples(x)), dtype)


def _places(pooled: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """In an order of the C++'s own, and of full vectors."""
    *maps, batch = pooled.shape
    lanes = _VECTOR_BYTES // pooled.dtype.itemsize
    return jax.ShapeDtypeStruct((-(-batch // lanes) * lanes, *maps), _PLACES)


def _spoilt(block: Block, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """The kernel, not a number where the bias is none: what the ReLU compares with must not just lose."""
    return kernel + 0.0 * bias[None, None, None] if block.rectify else kernel


def _extremes(block, x, kernel, bias, scale):
    x, kernel, bias, scale = _promoted(x, _spoilt(block, kernel, bias), bias, scale)
    (extreme,) = _call("mer_jax_extremes", block, [_pooled(block, x, kernel, x.dtype)], x, kernel, bias, scale)
    return extreme


def _forward(block, x, kernel, bias, scale, sample_mask):
    given = _promoted(x, _spoilt(block, kernel, bias), bias, scale, sample_mask)
    moment = jax.ShapeDtypeStruct(bias.shape, given[0].dtype)
    pooled = _pooled(block, x, kernel, given[0].dtype)
    return *_call("mer_jax_forward", block, [pooled, _places(pooled), moment, moment], *given), None


def _backward(block, x, kernel, bias, sample_mask, gradient, place, factor, constant, slope, kept, to_x):
    if to_x and block.batch_first:
        turned, block = x.transpose(3, 1, 2, 0), block._replace(batch_first=False)  # to (C, H, W, B)
        others = kernel, bias, sample_mask, gradient, place, factor, constant, slope, kept, to_x
        of_kernel, of_bias, of_x = _backward(block, turned, *others)
        return of_kernel, of_bias, of_x.transpose(3, 1, 2, 0)
    *given, factor, constant, slope = _promoted(x, kernel, bias, sample_mask, gradient, factor, constant, slope)
    wanted = (kernel, bias, x) if to_x else (kernel, bias)
    results = [jax.ShapeDtypeStruct(each.shape, given[0].dtype) for each in wanted]
    gradients = _call("mer_jax_backward", block, results, *given, place, factor, constant, slope)
    of_kernel, of_bias, *of_x = (each.astype(like.dtype) for each, like in zip(gradients, wanted, strict=True))
    return of_kernel, of_bias, of_x[0] if to_x else None


def _sums(gradient, extreme, mean, sample_mask):
    given = _promoted(gradient, extreme, mean, sample_mask)
    result = jax.ShapeDtypeStruct(mean.shape, given[0].dtype)
    return jax.ffi.ffi_call("mer_jax_sums", [result, result], vmap_method="sequential")(*given)


IMPLEMENTATION = Implementation(_extremes, _forward, _backward, _sums, batch_first=True)
