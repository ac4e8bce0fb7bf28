"""Adam and AdamW on a CPU by C++ that reads and writes everything once (``cpu_adam.cc``).

XLA writes the gradient of a large kernel to memory and reads it for the update. The C++ works it out from its factors
where it is used up, which costs hardly more than the update alone: a core multiplies while it waits for memory.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mer_jax import compiled
from mer_jax.models.products import Factors

_SOURCE = Path(__file__).with_suffix(".cc")
_TARGETS = ("mer_jax_adam",)


def version() -> str:
    """What was compiled, as :func:`mer_jax.compiled.version` has it; empty where this machine cannot."""
    return compiled.version(_SOURCE, _TARGETS)


def update_in_place(
    params: Any, means: Any, squares: Any, gradients: Any, update: jax.Array, terms: list, *, decoupled: bool
) -> tuple[Any, Any, Any]:
    """Changes parameters and moments where they lie.

    Args:
        params: Tree of float32 arrays.
        means: Tree of the first moments.
        squares: Tree of the second moments.
        gradients: Tree of arrays or, for kernels, :class:`Factors`.
        update: Scalar bool; nothing changes where it is False.
        terms: Scalars: what is kept and added of the mean, of the square, the factors that correct the two for their
            start, the rate, the weight decay and epsilon.
        decoupled: Whether weight decay is decoupled (AdamW) or a term of the gradient.

    Returns:
        New parameters, means and squares.
    """
    tree = jax.tree.structure(params)
    arguments: list[jax.Array] = [update, jnp.stack([jnp.asarray(term, jnp.float32) for term in terms])]
    results, aliases, factored = [], {}, []
    for *given, gradient in zip(
        *(tree.flatten_up_to(each) for each in (params, means, squares, gradients)), strict=True
    ):
        aliases |= {len(arguments) + n: len(results) + n for n in range(len(given))}
        results += [jax.ShapeDtypeStruct(each.shape, np.float32) for each in given]
        factored.append(isinstance(gradient, Factors))
        arguments += [*given, *(gradient if factored[-1] else (gradient,))]
    call = jax.ffi.ffi_call("mer_jax_adam", results, input_output_aliases=aliases, vmap_method="sequential")
    new = call(*arguments, decoupled=decoupled, factored=np.array(factored, np.int64))
    return tuple(tree.unflatten(new[n::3]) for n in range(3))
