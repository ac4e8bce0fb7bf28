"""Matrix products of few rows with large kernels, in the order of operands in which XLA on a CPU is fastest.

A compiler that is free to choose turns a product with a turned kernel back into one that packs the whole kernel anew
for a handful of rows. Values and gradients are those of ``@``.
"""

import jax


@jax.custom_vjp
def project(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """``rows @ kernel``: ``(N, D)`` by ``(D, K)`` to ``(N, K)``; no forward-mode derivative."""
    return rows @ kernel


@jax.custom_vjp
def project_back(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """``rows @ kernel.T``: ``(N, K)`` by ``(D, K)`` to ``(N, D)``; no forward-mode derivative."""
    return jax.lax.optimization_barrier(kernel @ rows.T).T  # (D, K) (K, N) -> (D, N) -> (N, D)


def _keep(product):
    def forward(rows, kernel):
        return product(rows, kernel), (rows, kernel)

    return forward


def _project_backward(kept, cotangent):
    rows, kernel = kept
    return project_back(cotangent, kernel), rows.T @ cotangent  # (N, D), (D, N) (N, K) -> (D, K)


def _project_back_backward(kept, cotangent):
    rows, kernel = kept
    return project(cotangent, kernel), cotangent.T @ rows  # (N, K), (D, N) (N, K) -> (D, K)


project.defvjp(_keep(project), _project_backward)
project_back.defvjp(_keep(project_back), _project_back_backward)


def project_general(rows, kernel, dimension_numbers, precision=None, preferred_element_type=None):
    """:func:`project` for ``flax.linen.Dense(dot_general=...)`` on ``(N, D)``; the other arguments are Dense's own."""
    del dimension_numbers, precision, preferred_element_type
    return project(rows, kernel)
