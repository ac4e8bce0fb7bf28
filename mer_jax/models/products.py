"""Matrix products of few rows with large kernels, or with many frames, in the order that is fastest.

A CPU's compiler that is free to choose packs the whole kernel anew for a handful of rows. Rows that lie turned in
memory spare it that, and the gradient of the kernel takes them so as well. A GPU's compiler writes the result of every
product to memory, as large as the kernel for its gradient; a sum over few rows it works out where it is used, within
the update. Values and gradients are those of ``@``.

A kernel's gradient is itself a product of few rows. Who passes *taps* beside a kernel gets its two factors as the
gradient of these, and nothing as the kernel's own, so that an optimiser may work it out where it uses it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Rows beyond which a GPU takes longer to add them up than to write and read their sum.
_FEW_ROWS = 32


class Factors(NamedTuple):
    """A kernel's gradient ``(D, K)`` as a sum of N outer products.

    Attributes:
        left: ``(N, D)``.
        right: ``(N, K)``.
    """

    left: jax.Array
    right: jax.Array

    def product(self) -> jax.Array:
        """``left.T @ right``, ``(D, K)``."""
        return _outer_products(_turn(self.left), self.right)  # (D, N) (N, K) -> (D, K)


def no_factors(count: int, kernel: jax.Array) -> Factors:
    """Taps for a kernel ``(D, K)`` whose gradient is a sum of ``count`` outer products."""
    return Factors(jnp.zeros((count, kernel.shape[0])), jnp.zeros((count, kernel.shape[1])))


def with_factors(gradients: Mapping[str, Any], factors: Mapping[str, Any]) -> dict[str, Any]:
    """Gradients of parameters, with :class:`Factors` in place of those of kernels that had taps.

    Args:
        gradients: Nested, by name.
        factors: The taps' gradients, a part of the same names.

    Returns:
        Nested like ``gradients``.
    """
    return {
        name: (factors[name] if isinstance(factors[name], Factors) else with_factors(gradient, factors[name]))
        if name in factors
        else gradient
        for name, gradient in gradients.items()
    }


class Products(NamedTuple):
    """How products are worked out. Those there are differ in speed and in last bits alone.

    Attributes:
        project: ``(rows (N, D), kernel (D, K)) -> (N, K)``.
        project_back: ``(rows (N, K), kernel (D, K)) -> (N, D)``.
    """

    project: Callable
    project_back: Callable


def _turn(rows):
    return jax.lax.optimization_barrier(rows.T)


def _project_turned(rows, kernel):
    return jax.lax.dot_general(_turn(rows), kernel, (((0,), (0,)), ((), ())))  # (D, N) (D, K) -> (N, K)


def _project_back_turned(rows, kernel):
    return jax.lax.optimization_barrier(kernel @ rows.T).T  # (D, K) (K, N) -> (D, N) -> (N, D)


BY_XLA = Products(_project_turned, _project_back_turned)


def project(rows: jax.Array, kernel: jax.Array, taps: Factors | None = None, by: Products = BY_XLA) -> jax.Array:
    """``rows @ kernel``: ``(N, D)`` by ``(D, K)`` to ``(N, K)``; no forward-mode derivative."""
    return _project(by, rows, kernel, taps)


def project_back(rows: jax.Array, kernel: jax.Array, taps: Factors | None = None, by: Products = BY_XLA) -> jax.Array:
    """``rows @ kernel.T``: ``(N, K)`` by ``(D, K)`` to ``(N, D)``; no forward-mode derivative."""
    return _project_back(by, rows, kernel, taps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(by, rows, kernel, taps):
    del taps
    return by.project(rows, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project_back(by, rows, kernel, taps):
    del taps
    return by.project_back(rows, kernel)


@jax.custom_vjp
def score(frames: jax.Array, probes: jax.Array) -> jax.Array:
    """``frames @ probes.T``: many ``(N, D)`` by few ``(Q, D)`` to ``(N, Q)``; no forward-mode derivative."""
    return frames @ probes.T  # (N, D) (D, Q) -> (N, Q)


def _outer_products(turned, rows):
    """Their sum, ``(D, N) (N, K) -> (D, K)``."""
    if turned.shape[1] > _FEW_ROWS:
        return turned @ rows
    return jax.lax.platform_dependent(
        turned, rows, cuda=_added_up, rocm=_added_up, default=lambda turned, rows: turned @ rows
    )


def _added_up(turned, rows):
    return jnp.sum(turned[:, :, None] * rows[None], axis=1)  # (D, N, 1) (1, N, K) -> (D, K)


def _project_forward(by, rows, kernel, taps):
    return _project(by, rows, kernel, taps), (rows, kernel, taps)


def _project_backward(by, kept, cotangent):
    rows, kernel, taps = kept
    return project_back(cotangent, kernel, by=by), *_to_kernel_or_taps(Factors(rows, cotangent), taps)


def _project_back_forward(by, rows, kernel, taps):
    return _project_back(by, rows, kernel, taps), (rows, kernel, taps)


def _project_back_backward(by, kept, cotangent):
    rows, kernel, taps = kept
    return project(cotangent, kernel, by=by), *_to_kernel_or_taps(Factors(cotangent, rows), taps)


def _to_kernel_or_taps(factors, taps):
    return (factors.product(), None) if taps is None else (None, factors)


_project.defvjp(_project_forward, _project_backward)
_project_back.defvjp(_project_back_forward, _project_back_backward)


def _score_forward(frames, probes):
    return score(frames, probes), (frames, probes)


def _score_backward(kept, cotangent):
    frames, probes = kept
    return cotangent @ probes, _turn(cotangent) @ frames  # (N, Q) (Q, D) -> (N, D), (Q, N) (N, D) -> (Q, D)


score.defvjp(_score_forward, _score_backward)


def dense_product(by: Products) -> Callable:
    """:func:`project` for ``flax.linen.Dense(dot_general=...)`` on ``(N, D)``."""
    return functools.partial(_project_dense, by=by)


def _project_dense(rows, kernel, dimension_numbers, precision=None, preferred_element_type=None, *, by):
    del dimension_numbers, precision, preferred_element_type  # Dense's own
    return project(rows, kernel, by=by)
