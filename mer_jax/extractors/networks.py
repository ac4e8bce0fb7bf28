"""The extractors that are neural networks with a checkpoint of their own, and what each of them must say.

The embedded extractors (:mod:`mer_jax.extractors.base`) need nothing but what is installed; these need a file of
weights, which ``scripts/extract_features.py`` runs over the clips of a data set.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mer_jax.errors import UserError

if TYPE_CHECKING:
    import jax


@dataclasses.dataclass(frozen=True)
class Network:
    """A per-frame extractor that is a neural network with a checkpoint of its own.

    Attributes:
        name: What configs, command lines and data sets call it.
        modality: ``'appearance'`` (2D) or ``'geometry'`` (3D).
        dim: D, the number of features per frame.
        licence: Licence of the code and of the weights.
        preprocessing: What is done to the crops, in words, with every constant. Two networks that give different
            numbers differ here: finished work is reused only where this text is the same.
        input_shape: (H, W) of the images that ``prepare`` gives.
        prepare: On the host, one sample's crops, (T, H, W, 3) uint8 RGB, to images (T, h, w, 3), uint8 or float32,
            and ``found`` (T,) bool, False where no face was found to align (the image is then not looked at). A
            frame's image depends on no other frame.
        load: Reads the official checkpoint into Flax variables, a tree of float32 NumPy arrays. Raises a
            :class:`UserError` that names the first wrong key and what the file looks like.
        apply: Variables and images (B, h, w, 3) to features (B, D) float32. Pure and traceable; scales uint8 itself,
            computes in bfloat16 where the variables are bfloat16, and no image's features depend on another image.
        hub: Id on the Hugging Face hub of the weights; empty where they are not there.
        attention: Variables and images (B, h, w, 3) to what the CLS or probe token attends to in the last block,
            mean over heads, per patch (B, h', w'); None for networks without attention.
        attention_grid: (h', w'); None for networks without attention.
        attention_area: (H, W) of a crop to the part of it that these patches cover together: top, left, bottom and
            right in pixels; None for networks without attention.
    """

    name: str
    modality: Literal["appearance", "geometry"]
    dim: int
    licence: str
    preprocessing: str
    input_shape: tuple[int, int]
    prepare: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    load: Callable[[str | os.PathLike], Any]
    apply: Callable[[Any, jax.Array], jax.Array]
    hub: str = ""
    attention: Callable[[Any, jax.Array], jax.Array] | None = None
    attention_grid: tuple[int, int] | None = None
    attention_area: Callable[[tuple[int, int]], tuple[float, float, float, float]] | None = None


def _in(module: str, *names: str) -> dict[str, str]:
    return {name: f"mer_jax.extractors.{module}:NETWORKS" for name in names}


# Modules are named, not imported: listing the networks must not load JAX. Each holds its networks by name.
NETWORKS: dict[str, str] = {
    **_in("siglip", *(f"siglip2_b16_{size}" for size in (224, 256, 384, 512))),
    **_in("siglip", *(f"siglip2_l16_{size}" for size in (256, 384, 512))),
    **_in("siglip", *(f"siglip2_so400m14_{size}" for size in (224, 384))),
    **_in("siglip", *(f"siglip2_so400m16_{size}" for size in (256, 384, 512))),
    **_in("siglip", *(f"siglip2_gopt16_{size}" for size in (256, 384))),
    **_in("radio", *(f"radio_v2.5-{size}" for size in "blhg")),
    **_in("radio", *(f"c-radio_v{version}-{size}" for version in (2, 3) for size in "blh")),
    **_in("radio", "c-radio_v4-h", "c-radio_v4-so400m"),
    **_in("dinov2", *(f"dinov2_{size}14{registers}" for size in "sblg" for registers in ("", "_reg"))),
    **_in("smirk", "smirk", "smirk_full"),
    **_in("ddfa_v3", "3ddfa_v3"),
    **_in("faceverse", "faceverse_v4"),
}  # fmt: skip


def get_network(name: str) -> Network:
    """Returns the network called ``name``.

    Raises:
        UserError: There is none of this name.
    """
    if name not in NETWORKS:
        raise UserError(f"extractor '{name}' is unknown; networks are {', '.join(NETWORKS)}")
    return network_at(NETWORKS[name], name)


def network_at(place: str, name: str) -> Network:
    """Returns a network of the dict that ``place``, as the values of :data:`NETWORKS`, names."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)[name]


def checked_frames(frames: np.ndarray) -> np.ndarray:
    """Returns frames as an array, if they are (T, H, W, 3) uint8 RGB.

    Raises:
        UserError: They are not.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise UserError(
            f"frames of shape {frames.shape} and type {frames.dtype}: RGB of 8 bits, (T, H, W, 3), is expected; "
            "convert grey and transparent images first"
        )
    return frames
