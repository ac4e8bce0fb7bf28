"""A ResNet-50 that regresses the coefficients of a morphable face model: 3DDFA-V3 and FaceVerse v4.

Both are Deep3DFaceRecon's network (Deng et al. 2019): the backbone, its mean over the last feature map, and one linear
layer for each kind of coefficients, the last of which, translation, in two parts.
"""

import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mer_jax.errors import UserError
from mer_jax.extractors import resnet
from mer_jax.extractors.checkpoints import ENTRIES, fill, read_checkpoint, torch_sources
from mer_jax.extractors.folded_convolution import expected, fold, in_chunks
from mer_jax.extractors.resnet import RESNET50, Architecture, ResNet

SKIPPED = {r".*\.num_batches_tracked$": "how many batches the normalisation saw"}
# Images at a time on a CPU; of 1, 2, 4 and 8 the fastest.
_CHUNK = 4
_HEADS = "final_layers"
_ENTRY = "net_recon"  # of 3DDFA-V3's file; FaceVerse's is bare


class FaceRegressor(nn.Module):
    """The backbone and all heads as one dense layer.

    Attributes:
        num_coefficients: N, of all heads together.
        architecture: The backbone.
    """

    num_coefficients: int
    architecture: Architecture = RESNET50

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (B, H, W, 3), RGB in [0, 1], to coefficients (B, N)."""
        x = ResNet(self.architecture, name="backbone")(images)
        return nn.Dense(self.num_coefficients, name=_HEADS)(x.mean(axis=(1, 2)))


def coefficients(
    variables: Any, images: jax.Array, *, columns: slice = slice(None), architecture: Architecture = RESNET50
) -> jax.Array:
    """The coefficients of images; pure and traceable.

    Args:
        variables: Of :class:`FaceRegressor`, float32 or bfloat16; the computation is in their type.
        images: (B, h, w, 3), RGB, uint8 or float in [0, 1].
        columns: Which of the N coefficients.
        architecture: The backbone.

    Returns:
        (B, n) float32.
    """
    heads = jax.tree.map(lambda x: x[..., columns], variables["params"][_HEADS])
    variables = {"params": {**variables["params"], _HEADS: heads}}
    model = FaceRegressor(heads["bias"].shape[0], architecture)
    return in_chunks(lambda x: model.apply(variables, scaled(x, heads["bias"].dtype)), images, _CHUNK).astype(
        jnp.float32
    )


def scaled(images: jax.Array, dtype: Any) -> jax.Array:
    """Images as numbers in [0, 1]: uint8 is divided by 255."""
    if images.dtype == jnp.uint8:
        return (images.astype(jnp.float32) / 255).astype(dtype)
    return images.astype(dtype)


def load(
    path: str | os.PathLike,
    *,
    name: str,
    heads: Mapping[str, int],
    architecture: Architecture = RESNET50,
) -> dict:
    """Reads an official checkpoint.

    Args:
        path: As :func:`mer_jax.extractors.checkpoints.read_checkpoint`.
        name: The network's name, for messages.
        heads: Kind of coefficients to their number, in the checkpoint's order.
        architecture: The backbone.

    Returns:
        Variables of :class:`FaceRegressor`, float32.

    Raises:
        UserError: The file cannot be read or is of another network.
    """
    state = read_checkpoint(path, (_ENTRY, *ENTRIES))
    if any(key.startswith("backbone.features.") for key in state):
        raise UserError(
            f"{path}: the regressor on a MobileNetV3; weights of {name} on a ResNet-50 are expected (net_recon.pth)"
        )
    layers = resnet.layers(architecture)
    shapes = expected(layers)
    named = {kind: {f"backbone.{layer}": leaves for layer, leaves in found.items()} for kind, found in shapes.items()}
    for number, size in enumerate(heads.values()):
        named["params"][f"{_HEADS}.{number}"] = {
            "kernel": jax.ShapeDtypeStruct((1, 1, architecture.features, size), np.float32),
            "bias": jax.ShapeDtypeStruct((size,), np.float32),
        }
    filled = fill(named, state, torch_sources(named), where=path, network=name, skipped=SKIPPED)
    backbone = {kind: {layer: filled[kind][f"backbone.{layer}"] for layer in found} for kind, found in shapes.items()}
    parts = [filled["params"][f"{_HEADS}.{number}"] for number in range(len(heads))]
    dense = {
        "kernel": np.concatenate([part["kernel"][0, 0] for part in parts], axis=1),  # (features, N)
        "bias": np.concatenate([part["bias"] for part in parts]),
    }
    return {"params": {"backbone": fold(layers, backbone, resnet.EPSILON, path), _HEADS: dense}}
