"""Matrix products of few rows with large kernels, or with many frames, in the order that is fastest.

A CPU's compiler that is free to choose packs the whole kernel anew for a handful of rows. Rows that lie turned in
memory spare it that, and the gradient of the kernel takes them so as well. A GPU's compiler writes the result of every
product to memory, as large as the kernel for its gradient; a sum over few rows it works out where it is used, within
the update. Values and gradients are those of ``@``.
"""

import jax
import jax.numpy as jnp

# Rows beyond which a GPU takes longer to add them up than to write and read their sum.
_FEW_ROWS = 32


@jax.custom_vjp
def project(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """``rows @ kernel``: ``(N, D)`` by ``(D, K)`` to ``(N, K)``; no forward-mode derivative."""
    return _project_turned(_turn(rows), kernel)


@jax.custom_vjp
def project_back(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """``rows @ kernel.T``: ``(N, K)`` by ``(D, K)`` to ``(N, D)``; no forward-mode derivative."""
    return jax.lax.optimization_barrier(kernel @ rows.T).T  # (D, K) (K, N) -> (D, N) -> (N, D)


@jax.custom_vjp
def score(frames: jax.Array, probes: jax.Array) -> jax.Array:
    """``frames @ probes.T``: many ``(N, D)`` by few ``(Q, D)`` to ``(N, Q)``; no forward-mode derivative."""
    return frames @ probes.T  # (N, D) (D, Q) -> (N, Q)


def _turn(rows):
    return jax.lax.optimization_barrier(rows.T)


def _project_turned(turned, kernel):
    return jax.lax.dot_general(turned, kernel, (((0,), (0,)), ((), ())))  # (D, N) (D, K) -> (N, K)


def _outer_products(turned, rows):
    """Their sum, ``(D, N) (N, K) -> (D, K)``."""
    if turned.shape[1] > _FEW_ROWS:
        return turned @ rows
    return jax.lax.platform_dependent(
        turned, rows, cuda=_added_up, rocm=_added_up, default=lambda turned, rows: turned @ rows
    )


def _added_up(turned, rows):
    return jnp.sum(turned[:, :, None] * rows[None], axis=1)  # (D, N, 1) (1, N, K) -> (D, K)


def _project_forward(rows, kernel):
    turned = _turn(rows)  # (N, D) -> (D, N)
    return _project_turned(turned, kernel), (turned, kernel)


def _project_backward(kept, cotangent):
    turned, kernel = kept
    return project_back(cotangent, kernel), _outer_products(turned, cotangent)  # (N, D), (D, N) (N, K) -> (D, K)


def _project_back_forward(rows, kernel):
    return project_back(rows, kernel), (rows, kernel)


def _project_back_backward(kept, cotangent):
    rows, kernel = kept
    turned = _turn(cotangent)  # (N, D) -> (D, N)
    return _project_turned(turned, kernel), _outer_products(turned, rows)  # (N, K), (D, N) (N, K) -> (D, K)


project.defvjp(_project_forward, _project_backward)
project_back.defvjp(_project_back_forward, _project_back_backward)


def _score_forward(frames, probes):
    return score(frames, probes), (frames, probes)


def _score_backward(kept, cotangent):
    frames, probes = kept
    return cotangent @ probes, _turn(cotangent) @ frames  # (N, Q) (Q, D) -> (N, D), (Q, N) (N, D) -> (Q, D)


score.defvjp(_score_forward, _score_backward)


def project_general(rows, kernel, dimension_numbers, precision=None, preferred_element_type=None):
    """:func:`project` for ``flax.linen.Dense(dot_general=...)`` on ``(N, D)``; the other arguments are Dense's own."""
    del dimension_numbers, precision, preferred_element_type
    return project(rows, kernel)
