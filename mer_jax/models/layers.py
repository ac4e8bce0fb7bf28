"""Small layers that several models share."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def counter_bits(key: jax.Array, counter: jax.Array) -> jax.Array:
    """Random bits for masks: what a number of a counter gives depends on the key and that number alone.

    Two rounds of Wellons' 32-bit mixer "lowbias32" (2018), a word of the key before each. JAX's own generator spends
    twenty rounds on a word, as numbers need that go into statistics; masks do not, and drawing them took a fifth of a
    training step.

    Args:
        key: Typed scalar key of two words.
        counter: uint32, any shape.

    Returns:
        uint32 of the counter's shape.
    """
    words = jax.random.key_data(key)
    bits = counter * np.uint32(0x9E3779B9)  # neighbouring numbers far apart
    for round_key in (words[0], words[1]):
        bits = bits ^ round_key
        bits = (bits ^ (bits >> 16)) * np.uint32(0x7FEB352D)
        bits = (bits ^ (bits >> 15)) * np.uint32(0x846CA68B)
        bits = bits ^ (bits >> 16)
    return bits


def dropout_scale(
    module: nn.Module, shape: tuple[int, ...], rate: jax.Array | float, train: bool, *, sample_axis: int = 0
) -> jax.Array | None:
    """Draws an inverted-dropout factor: 0 with probability ``rate``, else ``1 / (1 - rate)``.

    Unlike ``nn.Dropout`` the rate may be a traced scalar, so that members with different rates share one compiled
    program, and the factor is returned rather than applied, so that callers can fold it into a smaller product. A
    sample's draws do not depend on how many samples come after it.

    Args:
        module: Supplies the ``dropout`` stream of random numbers.
        shape: Shape of the factor.
        rate: Probability of a zero, in [0, 1); a Python or traced scalar.
        train: Whether to drop at all.
        sample_axis: Which axis of ``shape`` is the batch.

    Returns:
        The factor, float32 of ``shape``, or None where nothing is dropped (``train`` is False or ``rate`` is the
        Python number 0).
    """
    if not train or (isinstance(rate, int | float) and rate == 0):
        return None
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    key = module.make_rng("dropout")

    def draw():
        counter = jnp.zeros((), jnp.uint32)
        for axis in (sample_axis, *(axis for axis in range(len(shape)) if axis != sample_axis)):
            index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
            counter = counter * np.uint32(shape[axis]) + index
        # 24 bits are what a float32 in [0, 1) holds.
        return (counter_bits(key, counter) >> 8).astype(jnp.float32) * np.float32(2**-24) < keep

    # What a branch makes is made once, and kept, a byte a value; a compiler would otherwise draw anew wherever the
    # factor is used.
    kept = jax.lax.cond(keep < 1.0, draw, lambda: jnp.ones(shape, bool))
    return jnp.where(kept, 1.0 / keep, 0.0)
