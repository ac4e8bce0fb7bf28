"""Small layers that several models share."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def dropout_scale(module: nn.Module, shape: tuple[int, ...], rate: jax.Array | float, train: bool) -> jax.Array | None:
    """Draws an inverted-dropout factor: 0 with probability ``rate``, else ``1 / (1 - rate)``.

    Unlike ``nn.Dropout`` the rate may be a traced scalar, so that members with different rates share one compiled
    program, and the factor is returned rather than applied, so that callers can fold it into a smaller product.

    Args:
        module: Supplies the ``dropout`` stream of random numbers.
        shape: Shape of the factor.
        rate: Probability of a zero, in [0, 1); a Python or traced scalar.
        train: Whether to drop at all.

    Returns:
        The factor, float32 of ``shape``, or None where nothing is dropped (``train`` is False or ``rate`` is the
        Python number 0).
    """
    if not train or (isinstance(rate, int | float) and rate == 0):
        return None
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    kept = jax.random.uniform(module.make_rng("dropout"), shape) < keep
    return jnp.where(kept, 1.0 / keep, 0.0)
