"""Weights of a PyTorch network as the variables of a Flax model whose layers bear the same names."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mer_jax.errors import UserError

# Flax collection and leaf to what PyTorch calls it below the layer's name.
_NAMES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}
# How a PyTorch array's axes are to be ordered to become Flax's kernel, by its number of axes.
_KERNEL_AXES = {
    2: (1, 0),  # (out, in) -> (in, out)
    4: (2, 3, 1, 0),  # (out, in, height, width) -> (height, width, in, out)
}
# How often BatchNorm was trained: PyTorch keeps it for averages that no model here takes.
_UNUSED = "num_batches_tracked"


def flax_variables(state: Mapping[str, np.ndarray], expected: Any, where: str) -> Any:
    """Arranges a PyTorch state dict as Flax variables.

    Convolutions (``layer.weight (out, in, height, width)``), dense layers (``layer.weight (out, in)``) and BatchNorm
    (``weight``, ``bias``, ``running_mean``, ``running_var``) are mapped by the names of their layers; the model is
    answerable for flattening images before a dense layer in PyTorch's order (channel, row, column).

    Args:
        state: PyTorch's names and arrays.
        expected: The model's variables or their shapes (``jax.ShapeDtypeStruct``): collection to layer to leaf.
        where: The file to name in messages.

    Returns:
        A tree of ``expected``'s structure, shapes and types.

    Raises:
        UserError: An array is missing, left over, of another shape, or not finite; the message names it.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(expected)
    unused = {name for name in state if name.rpartition(".")[2] != _UNUSED}
    found = {}
    # Kernels first: where the architecture is another one, they say so more plainly than statistics do.
    for path, leaf in sorted(leaves, key=lambda pair: pair[0][-1].key != "kernel"):
        collection, *layers, last = (entry.key for entry in path)
        name = ".".join((*layers, _NAMES[collection, last]))
        axes = _KERNEL_AXES[len(leaf.shape)] if last == "kernel" else range(len(leaf.shape))
        shape = tuple(leaf.shape[axes.index(axis)] for axis in range(len(leaf.shape)))  # PyTorch's order
        if name not in state:
            raise UserError(
                f"{where}: lacks {name} {shape}; these are the weights of another architecture than the config's model"
            )
        array = state[name]
        if array.shape != shape:
            raise UserError(
                f"{where}: {name} has shape {array.shape}, the config's model {shape}; these are the weights of "
                "another architecture"
            )
        array = array.astype(leaf.dtype)
        if not np.isfinite(array).all():
            raise UserError(f"{where}: {name} holds values that are not finite; fetch the file again")
        found[path] = np.ascontiguousarray(array.transpose(axes))
        unused.discard(name)
    if unused:
        name = min(unused)
        raise UserError(
            f"{where}: holds {name} {state[name].shape}, which the config's model does not have; these are the weights "
            "of another architecture"
        )
    return jax.tree_util.tree_unflatten(structure, [found[path] for path, _ in leaves])
