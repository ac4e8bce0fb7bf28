"""The large arrays of fusion on a CPU, by C++ (``cpu_pooling.cc``, ``cpu_products.cc``).

XLA fetches a batch's frames, scales them by their dropout mask, and reads what it has written four times: for scores,
for the pooled frames and for the gradients of both. The C++ reads a clip's frames from the data set, twice, and writes
nothing as large as they are. XLA packs or turns the factors of a product before and after it; the C++ does not.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from mer_jax import compiled
from mer_jax.models.mqa import Implementation
from mer_jax.models.products import Products
from mer_jax.models.stored import Stored

_FOLDER = Path(__file__).parent
_OPERATIONS = {
    "cpu_pooling.cc": ("mer_jax_pool", "mer_jax_pool_gradient"),
    "cpu_products.cc": ("mer_jax_project", "mer_jax_project_back"),
}


def version() -> str:
    """What was compiled, as :func:`mer_jax.compiled.version` has it; empty where this machine cannot."""
    versions = [compiled.version(_FOLDER / source, targets) for source, targets in _OPERATIONS.items()]
    return ", ".join(versions) if all(versions) else ""


def pool_frames(
    frames: jax.Array | Stored, frame_mask: jax.Array | None, feature_scale: jax.Array | None, probes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """:func:`mer_jax.models.mqa.pool_frames`, in float32, with gradients of the probes alone.

    Raises:
        TypeError: Anything but the probes is to be differentiated.
    """
    if not isinstance(frames, Stored):
        frames = Stored(frames[None], jnp.int32(0), jnp.arange(frames.shape[0], dtype=jnp.int32))
    batch, length, width = frames.shape
    if frame_mask is None:
        frame_mask = jnp.ones((batch, length), bool)
    if feature_scale is None:
        feature_scale = jnp.zeros((0, width))  # the C++'s word for none
    data, feature_scale = frames.data.astype(jnp.float32), feature_scale.astype(jnp.float32)
    return _pool(data, frames.fold, frames.index, frame_mask, feature_scale, probes)


def _project(rows, kernel):
    return _call("mer_jax_project", [(rows.shape[0], kernel.shape[1])], rows, kernel)[0]


def _project_back(rows, kernel):
    return _call("mer_jax_project_back", [(rows.shape[0], kernel.shape[0])], rows, kernel)[0]


def _call(target: str, results: list[tuple[int, ...]], *arrays: jax.Array) -> list[jax.Array]:
    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in results]
    return jax.ffi.ffi_call(target, shapes, vmap_method="sequential")(*arrays)


@jax.custom_vjp
def _pool(data, fold, index, mask, scale, probes):
    (batch,), (_, _, length, width), queries = index.shape, data.shape, probes.shape[0]
    results = [(batch, width), (batch, queries, length)]
    return tuple(_call("mer_jax_pool", results, data, fold, index, mask, scale, probes))


def _pool_forward(*arguments):
    if any(argument.perturbed for argument in arguments[:-1]):
        raise TypeError("pooling by C++ has gradients of its probes alone; differentiate mqa.pool_frames instead")
    data, fold, index, mask, scale, probes = (argument.value for argument in arguments)
    pooled, attention = _pool(data, fold, index, mask, scale, probes)
    return (pooled, attention), (data, fold, index, scale, attention, probes)


def _pool_backward(kept, cotangents):
    data, fold, index, scale, attention, probes = kept
    of_pooled, of_attention = (jnp.zeros(each.shape) if isinstance(each, SymbolicZero) else each for each in cotangents)
    (of_probes,) = _call(
        "mer_jax_pool_gradient", [probes.shape], data, fold, index, scale, attention, of_pooled, of_attention
    )
    return None, None, None, None, None, of_probes


_pool.defvjp(_pool_forward, _pool_backward, symbolic_zeros=True)


IMPLEMENTATION = Implementation(pool_frames, Products(_project, _project_back))
