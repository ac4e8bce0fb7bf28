"""Matrix products of few rows with large kernels, in the order of operands in which XLA on a CPU is fastest.

A compiler that is free to choose packs the whole kernel anew for a handful of rows. Rows that lie turned in memory
spare it that, and the gradient of the kernel takes them so as well. Values and gradients are those of ``@``.
"""

import jax


@jax.custom_vjp
def project(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """``rows @ kernel``: ``(N, D)`` by ``(D, K)`` to ``(N, K)``; no forward-mode derivative."""
    return _project_turned(_turn(rows), kernel)


@jax.custom_vjp
def project_back(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """``rows @ kernel.T``: ``(N, K)`` by ``(D, K)`` to ``(N, D)``; no forward-mode derivative."""
    return jax.lax.optimization_barrier(kernel @ rows.T).T  # (D, K) (K, N) -> (D, N) -> (N, D)


def _turn(rows):
    return jax.lax.optimization_barrier(rows.T)


def _project_turned(turned, kernel):
    return jax.lax.dot_general(turned, kernel, (((0,), (0,)), ((), ())))  # (D, N) (D, K) -> (N, K)


def _project_forward(rows, kernel):
    turned = _turn(rows)  # (N, D) -> (D, N)
    return _project_turned(turned, kernel), (turned, kernel)


def _project_backward(kept, cotangent):
    turned, kernel = kept
    return project_back(cotangent, kernel), turned @ cotangent  # (N, D), (D, N) (N, K) -> (D, K)


def _project_back_forward(rows, kernel):
    return project_back(rows, kernel), (rows, kernel)


def _project_back_backward(kept, cotangent):
    rows, kernel = kept
    turned = _turn(cotangent)  # (N, D) -> (D, N)
    return _project_turned(turned, kernel), turned @ rows  # (N, K), (D, N) (N, K) -> (D, K)


project.defvjp(_project_forward, _project_backward)
project_back.defvjp(_project_back_forward, _project_back_backward)


def project_general(rows, kernel, dimension_numbers, precision=None, preferred_element_type=None):
    """:func:`project` for ``flax.linen.Dense(dot_general=...)`` on ``(N, D)``; the other arguments are Dense's own."""
    del dimension_numbers, precision, preferred_element_type
    return project(rows, kernel)
