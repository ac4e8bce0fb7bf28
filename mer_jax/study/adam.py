"""Adam and AdamW for members that share a compiled program, in as few passes over memory as can be.

The numbers are those of ``optax.adam`` and ``optax.adamw`` with their default decay rates, and so is the state.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mer_jax.models.products import Factors
from mer_jax.study import cpu_adam
from mer_jax.study.devices import current_platform
from mer_jax.study.loops import loops_are_merged

_MEAN_DECAY = 0.9
_SQUARE_DECAY = 0.999
_EPSILON = 1e-8

OPTIMISERS = ("adamw", "adam")


def init_adam(params: Any) -> optax.ScaleByAdamState:
    """The state before the first update: zeros."""
    return optax.scale_by_adam(_MEAN_DECAY, _SQUARE_DECAY, _EPSILON).init(params)


def adam_update(
    params: Any,
    gradients: Any,
    state: optax.ScaleByAdamState,
    *,
    optimiser: str,
    rate: jax.Array,
    weight_decay: jax.Array,
    update: jax.Array,
) -> tuple[Any, optax.ScaleByAdamState]:
    """One update of one member (Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2); vmap it.

    Whether there is an update at all decides about scalars, not about arrays: a choice between the new and the old
    arrays would keep the old ones alive, which takes a copy of each and a third of the time of a step.

    Args:
        params: Tree of float32 arrays.
        gradients: Tree of the same, or of :class:`mer_jax.models.products.Factors` of them; may be NaN or infinite
            where ``update`` is False.
        state: State of the last update.
        optimiser: ``'adamw'``, or ``'adam'``, whose weight decay is an L2 term in the gradient, as in PyTorch.
        rate: Learning rate, a scalar.
        weight_decay: Its factor, a scalar.
        update: Scalar bool; where False, finite parameters and states come back as they are.

    Returns:
        The new parameters and the new state.
    """
    count = state.count + update.astype(jnp.int32)
    keep_mean, add_mean = (jnp.where(update, x, y) for x, y in ((_MEAN_DECAY, 1.0), (1 - _MEAN_DECAY, 0.0)))
    keep_square, add_square = (jnp.where(update, x, y) for x, y in ((_SQUARE_DECAY, 1.0), (1 - _SQUARE_DECAY, 0.0)))
    rate = jnp.where(update, rate, 0.0)
    at_least_one = jnp.maximum(count, 1)
    mean_scale = 1.0 / (1.0 - _MEAN_DECAY**at_least_one)
    square_scale = 1.0 / (1.0 - _SQUARE_DECAY**at_least_one)
    decoupled = optimiser == "adamw"

    def by_xla(params, means, squares, gradients):
        def gradient_of(param, gradient):
            gradient = gradient.product() if isinstance(gradient, Factors) else gradient
            gradient = jnp.where(update, gradient, 0.0)
            return gradient if decoupled else gradient + weight_decay * param

        def new_mean(mean, gradient):
            return keep_mean * mean + add_mean * gradient

        def new_square(square, gradient):
            return keep_square * square + add_square * gradient * gradient

        def new_param(param, mean, square):
            change = mean * mean_scale / (jnp.sqrt(square * square_scale) + _EPSILON)
            return param - rate * (change + weight_decay * param if decoupled else change)

        gradients = jax.tree.map(gradient_of, params, gradients)
        new_means = jax.tree.map(new_mean, means, gradients)
        new_squares = jax.tree.map(new_square, squares, gradients)
        if loops_are_merged():
            # In one loop with the moments each is at hand; apart, new parameters had better read the new moments.
            means, squares, again = jax.lax.optimization_barrier((means, squares, gradients))
            params = jax.tree.map(
                lambda param, mean, square, g: new_param(param, new_mean(mean, g), new_square(square, g)),
                params,
                means,
                squares,
                again,
            )
        else:
            params = jax.tree.map(new_param, params, new_means, new_squares)
        return params, new_means, new_squares

    def in_place(params, means, squares, gradients):
        kept = (keep_mean, add_mean, keep_square, add_square)
        terms = [*kept, mean_scale, square_scale, rate, weight_decay, _EPSILON]
        return cpu_adam.update_in_place(params, means, squares, gradients, update, terms, decoupled=decoupled)

    given = params, state.mu, state.nu, gradients
    if current_platform() == "cpu" and cpu_adam.version():
        params, means, squares = jax.lax.platform_dependent(*given, cpu=in_place, default=by_xla)
    else:
        params, means, squares = by_xla(*given)
    return params, optax.ScaleByAdamState(count, means, squares)
