"""From an official checkpoint of a vision transformer to an extractor: what SigLIP, RADIO and DINOv2 share."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mer_jax.extractors.checkpoints import Source, fill, linear, same
from mer_jax.extractors.networks import Network
from mer_jax.extractors.resize import Filter, resize_frames, seen_area
from mer_jax.extractors.vit import Architecture, VisionTransformer, attention_map, features, grid_of

# Mean and standard deviation of each channel, RGB in [0, 1].
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def block_sources(number: int, prefix: str, names: Mapping[str, str | tuple[str, ...]]) -> dict[str, Source]:
    """Where a block's variables come from.

    Args:
        number: Of the block.
        prefix: What the checkpoint's names of this block begin with.
        names: Layer of :class:`mer_jax.extractors.vit.Block` to the checkpoint's layer, or to several that are packed
            into one here; for ``attention_scale`` and ``mlp_scale`` to the whole name. What a network does not have
            may be listed all the same.

    Returns:
        Variable's path to source.
    """
    sources = {}
    for layer, keys in names.items():
        keys = [prefix + key for key in ((keys,) if isinstance(keys, str) else keys)]
        path = f"params/block_{number}/{layer}"
        if layer.endswith("_scale"):
            sources[path] = same(*keys)
            continue
        sources[f"{path}/bias"] = same(*(f"{key}.bias" for key in keys))
        weights = [f"{key}.weight" for key in keys]
        if layer.endswith("norm"):
            sources[f"{path}/scale"] = same(*weights)
        else:
            sources[f"{path}/kernel"] = linear(*weights)
    return sources


def patch_kernel(key: str, architecture: Architecture, *, flat: bool) -> Source:
    """A patch embedding (p p 3, D) from a convolution (D, 3, p, p), or from a linear layer (D, 3 p p) if ``flat``."""
    side, width = architecture.patch, architecture.width

    def arrange(array: np.ndarray) -> np.ndarray:
        # (D, 3, p, p) -> (p, p, 3, D)
        return array.reshape(width, 3, side, side).transpose(2, 3, 1, 0)

    return Source((key,), lambda own: (width, 3 * side * side) if flat else (width, 3, side, side), arrange)


def fill_transformer(
    architecture: Architecture,
    state: Mapping[str, np.ndarray],
    sources: Mapping[str, Source],
    *,
    where: str | os.PathLike,
    network: str,
    normalisation: tuple[Any, Any],
    skipped: Mapping[str, str],
) -> dict:
    """Fills a vision transformer, as :func:`mer_jax.extractors.checkpoints.fill`.

    Args:
        architecture: What the network is.
        state: The checkpoint's weights.
        sources: For each variable where it comes from; others may be among them.
        where: The file, for messages.
        network: The network's name, for messages.
        normalisation: Mean and standard deviation (3,) of the input.
        skipped: As there.

    Returns:
        ``params`` and ``constants`` of :class:`mer_jax.extractors.vit.VisionTransformer`, float32.
    """
    side = [cells * architecture.patch for cells in architecture.grid]
    images = jax.ShapeDtypeStruct((1, *side, 3), jnp.uint8)
    expected = jax.eval_shape(VisionTransformer(architecture).init, jax.random.key(0), images)
    filled = fill({"params": expected["params"]}, state, sources, where=where, network=network, skipped=skipped)
    mean, std = (np.asarray(values, np.float32).reshape(3) for values in normalisation)
    return filled | {"constants": {"mean": mean, "std": std}}


def transformer_network(
    name: str,
    architecture: Architecture,
    size: tuple[int, int],
    *,
    load: Callable[[str | os.PathLike], Any],
    licence: str,
    preprocessing: str,
    how: Filter,
    shortest_edge: int = 0,
    hub: str = "",
) -> Network:
    """Makes an extractor of a vision transformer.

    Args:
        name: As :class:`Network`.
        architecture: What the network is.
        size: (h, w) of its input.
        load: As :class:`Network`.
        licence: As :class:`Network`.
        preprocessing: What the network does to the numbers; how crops are resized is put before it.
        how: As :func:`mer_jax.extractors.resize.resize_frames`.
        shortest_edge: As there.
        hub: As :class:`Network`.

    Returns:
        The extractor.

    Raises:
        ValueError: The network has no input of this size.
    """
    grid = grid_of(architecture, size)
    filters = {
        "bilinear": "bilinear (Pillow, 8 bits)",
        "bicubic": "bicubic (Pillow, 8 bits)",
        "bilinear_unfiltered": "bilinear between pixels, without averaging",
    }
    target = f"{size[0]} x {size[1]}"
    resized = f"crop resized to {target}, {filters[how]}"
    if shortest_edge:
        resized = f"crop resized to {shortest_edge} along its shorter side, {filters[how]}; its central {target}"
    return Network(
        name=name,
        modality="appearance",
        dim=architecture.dim,
        licence=licence,
        preprocessing=f"{resized}; {preprocessing}",
        input_shape=size,
        prepare=functools.partial(resize_frames, size=size, how=how, shortest_edge=shortest_edge),
        load=load,
        apply=functools.partial(features, architecture),
        hub=hub,
        attention=functools.partial(attention_map, architecture),
        attention_grid=grid,
        attention_area=functools.partial(
            _patches_area, size=size, shortest_edge=shortest_edge, patch=architecture.patch
        ),
    )


def _patches_area(
    shape: tuple[int, int], *, size: tuple[int, int], shortest_edge: int, patch: int
) -> tuple[float, float, float, float]:
    """The part of a crop that whole patches cover; what is left over on the right and below is not seen."""
    top, left, bottom, right = seen_area(shape, size, shortest_edge=shortest_edge)
    height, width = (side // patch * patch / side for side in size)  # as shares of the input
    return top, left, top + height * (bottom - top), left + width * (right - left)
