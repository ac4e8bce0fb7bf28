"""SMIRK (Retsinas et al., CVPR 2024): FLAME's expression, eyelids and jaw, and on request its pose and shape.

Three encoders of their own, each a minimal MobileNetV3, its mean over the last feature map and one linear layer. FLAME
itself is not needed for the coefficients.
"""

import dataclasses
import functools
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mer_jax.extractors import alignment, mobilenet_v3
from mer_jax.extractors.checkpoints import fill, read_checkpoint, torch_sources
from mer_jax.extractors.face_regressor import SKIPPED, scaled
from mer_jax.extractors.folded_convolution import expected, fold, in_chunks
from mer_jax.extractors.mobilenet_v3 import LARGE_MINIMAL, SMALL_MINIMAL, Architecture, MobileNetV3
from mer_jax.extractors.networks import Network

SIZE = 224


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """What an encoder is.

    Attributes:
        architecture: Of the backbone.
        num_coefficients: N.
        head: The checkpoint's name of the linear layer.
    """

    architecture: Architecture
    num_coefficients: int
    head: str


_ENCODERS = {
    "expression_encoder": _Encoder(LARGE_MINIMAL, 55, "expression_layers.0"),
    "pose_encoder": _Encoder(SMALL_MINIMAL, 6, "pose_cam_layers.0"),
    "shape_encoder": _Encoder(LARGE_MINIMAL, 300, "shape_layers.0"),
}
EXPRESSION = ("expression_encoder",)
ALL = tuple(_ENCODERS)
# Columns of the features, the last three of ``smirk_full`` alone.
COLUMNS = {
    "expression": slice(0, 50),
    "eyelid": slice(50, 52),
    "jaw": slice(52, 55),
    "pose": slice(55, 58),
    "camera": slice(58, 61),
    "shape": slice(61, 361),
}
_PREFIX = "smirk_encoder"
_OTHERS = {r"smirk_generator\.": "makes images, not coefficients", **SKIPPED}
_CHUNK = 4  # images at a time on a CPU; of 1, 2, 4 and 8 the fastest
_MIN_CONFIDENCE = 0.1  # of the face detector, as SMIRK sets it


class Encoder(nn.Module):
    """A backbone, its mean over the last feature map, and a linear layer.

    Attributes:
        architecture: Of the backbone.
        num_coefficients: N.
    """

    architecture: Architecture
    num_coefficients: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (B, H, W, 3), RGB in [0, 1], to (B, N)."""
        x = MobileNetV3(self.architecture, name="encoder")(images)
        return nn.Dense(self.num_coefficients, name="head")(x.mean(axis=(1, 2)))


def features(variables: Any, images: jax.Array) -> jax.Array:
    """The coefficients of images; pure and traceable.

    Args:
        variables: ``params`` of one :class:`Encoder` by its name, or of all; float32 or bfloat16, the computation is
            in their type.
        images: (B, h, w, 3), RGB, uint8 or float in [0, 1].

    Returns:
        (B, 55), or (B, 361) with all encoders: :data:`COLUMNS`. As SMIRK limits them, eyelids lie in [0, 1], the jaw
        does not close beyond 0 and turns by at most 0.2.
    """
    params = variables["params"]

    def encode(images: jax.Array) -> jax.Array:
        images, outputs = scaled(images, jax.tree.leaves(params)[0].dtype), []
        for name in (name for name in ALL if name in params):
            encoder = Encoder(_ENCODERS[name].architecture, _ENCODERS[name].num_coefficients)
            outputs.append(encoder.apply({"params": params[name]}, images))
        return jnp.concatenate(outputs, axis=-1).astype(jnp.float32)

    result = in_chunks(encode, images, _CHUNK)
    limited = [
        result[:, COLUMNS["expression"]],
        result[:, COLUMNS["eyelid"]].clip(0, 1),
        jnp.maximum(result[:, 52:53], 0),
        result[:, 53:55].clip(-0.2, 0.2),
        result[:, 55:],
    ]
    return jnp.concatenate(limited, axis=-1)


def load(path: str | os.PathLike, *, name: str, encoders: tuple[str, ...]) -> dict:
    """Reads the official checkpoint, ``SMIRK_em1.pt``.

    Args:
        path: As :func:`mer_jax.extractors.checkpoints.read_checkpoint`.
        name: The network's name, for messages.
        encoders: Which to read, of :data:`ALL`.

    Returns:
        ``params`` of each :class:`Encoder`, float32.

    Raises:
        UserError: The file cannot be read or is of another network.
    """
    state = read_checkpoint(path)
    named: dict[str, dict] = {"params": {}, "batch_stats": {}}
    shapes = {name: expected(mobilenet_v3.layers(_ENCODERS[name].architecture)) for name in encoders}
    for encoder in encoders:
        prefix, own = f"{_PREFIX}.{encoder}", _ENCODERS[encoder]
        for kind, found in shapes[encoder].items():
            named[kind] |= {f"{prefix}.encoder.{layer}": leaves for layer, leaves in found.items()}
        named["params"][f"{prefix}.{own.head}"] = {
            "kernel": jax.ShapeDtypeStruct((own.architecture.features, own.num_coefficients), np.float32),
            "bias": jax.ShapeDtypeStruct((own.num_coefficients,), np.float32),
        }
    others = {rf"{_PREFIX}\.{encoder}\.": "an encoder not asked for" for encoder in ALL if encoder not in encoders}
    filled = fill(named, state, torch_sources(named), where=path, network=name, skipped=_OTHERS | others)
    params = {}
    for encoder in encoders:
        prefix, own = f"{_PREFIX}.{encoder}", _ENCODERS[encoder]
        backbone = {
            kind: {layer: filled[kind][f"{prefix}.encoder.{layer}"] for layer in found}
            for kind, found in shapes[encoder].items()
        }
        params[encoder] = {
            "encoder": fold(mobilenet_v3.layers(own.architecture), backbone, mobilenet_v3.EPSILON, path),
            "head": filled["params"][f"{prefix}.{own.head}"],
        }
    return {"params": params}


def _network(name: str, encoders: tuple[str, ...], dim: int, what: str) -> Network:
    return Network(
        name=name,
        modality="geometry",
        dim=dim,
        licence="MIT",
        preprocessing=(
            f"{alignment.describe(_MIN_CONFIDENCE)}; square about its box, "
            f"{alignment.SQUARE_SCALE} times the mean of its sides; linear to {SIZE} x {SIZE}, black outside; "
            f"RGB in [0, 1]; {what}"
        ),
        input_shape=(SIZE, SIZE),
        prepare=functools.partial(
            alignment.prepare,
            crop=functools.partial(alignment.square_crop, size=SIZE),
            size=SIZE,
            min_confidence=_MIN_CONFIDENCE,
        ),
        load=functools.partial(load, name=name, encoders=encoders),
        apply=features,
    )


_DEFAULT = "expression 50, eyelids 2 in [0, 1], jaw 3 (opening from 0, turns within 0.2)"
NETWORKS: dict[str, Network] = {
    "smirk": _network("smirk", EXPRESSION, 55, _DEFAULT),
    "smirk_full": _network("smirk_full", ALL, 361, f"{_DEFAULT}, pose 3, camera 3, shape 300"),
}
