"""DINOv2 (Oquab et al. 2024), with registers (Darcet et al. 2024) and without; the feature is the normalised CLS token.

Checkpoints are those of Hugging Face (``encoder.layer.*``) or of the authors (``blocks.*``, ``.pth``). Positions at
other sizes than those of training are interpolated as Hugging Face's code does it: cubic, with registers also
antialiased.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Mapping

import numpy as np

from mer_jax.errors import UserError
from mer_jax.extractors.checkpoints import Source, looks_like, read_checkpoint, same
from mer_jax.extractors.networks import Network
from mer_jax.extractors.resize import Filter
from mer_jax.extractors.vit import Architecture
from mer_jax.extractors.vit_networks import IMAGENET, block_sources, fill_transformer, patch_kernel, transformer_network

# Width, depth, heads and width inside the MLP, by the letter of the variant; and what the hub calls it.
_SIZES = {
    "s": (384, 12, 6, 1536, "small"),
    "b": (768, 12, 12, 3072, "base"),
    "l": (1024, 24, 16, 4096, "large"),
    "g": (1536, 40, 24, 4096, "giant"),
}
_PATCH, _GRID, _REGISTERS = 14, (37, 37), 4
# Hugging Face's processor: the shorter side to 256, the central 224 x 224.
FILTER: Filter = "bicubic"
_SHORTEST_EDGE, _CROP = 256, 224


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Names of a checkpoint: tokens, patch embedding, last normalisation, block and its layers."""

    tokens: str
    positions: str
    embed: str
    norm: str
    block: str
    names: Mapping[str, str | tuple[str, ...]]
    gated: Mapping[str, str]


_COMMON = {"attention_norm": "norm1", "mlp_norm": "norm2", "mlp/in": "mlp.fc1", "mlp/out": "mlp.fc2"}
_HUGGING_FACE = _Layout(
    tokens="embeddings.",
    positions="embeddings.position_embeddings",
    embed="embeddings.patch_embeddings.projection",
    norm="layernorm",
    block="encoder.layer.",
    names=_COMMON
    | {
        "attention/qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        "attention/out": "attention.output.dense",
        "attention_scale": "layer_scale1.lambda1",
        "mlp_scale": "layer_scale2.lambda1",
    },
    gated={"mlp/in": "mlp.weights_in", "mlp/out": "mlp.weights_out"},
)
_AUTHORS = _Layout(
    tokens="",
    positions="pos_embed",
    embed="patch_embed.proj",
    norm="norm",
    block="blocks.",
    names=_COMMON
    | {
        "attention/qkv": "attn.qkv",
        "attention/out": "attn.proj",
        "attention_scale": "ls1.gamma",
        "mlp_scale": "ls2.gamma",
    },
    gated={"mlp/in": "mlp.w12", "mlp/out": "mlp.w3"},
)
_SKIPPED = {r"(embeddings\.)?mask_token$": "stands for hidden patches in training"}


def architecture(variant: str, *, registers: bool) -> Architecture:
    """DINOv2 of ``variant`` (s, b, l, g), with registers or without."""
    width, depth, heads, hidden, _ = _SIZES[variant]
    return Architecture(
        _PATCH, width, depth, heads, hidden, _GRID,
        activation="swiglu" if variant == "g" else "gelu",
        positions="cubic_antialias" if registers else "cubic",
        prefix=1 + _REGISTERS * registers,
        summary=(0,),
        layer_scale=True,
    )  # fmt: skip


def load(path: str | os.PathLike, *, architecture: Architecture, name: str) -> dict:
    """Reads an official checkpoint; the grid of positions follows the file.

    Args:
        path: As :func:`mer_jax.extractors.checkpoints.read_checkpoint`.
        architecture: What the network is.
        name: The network's name, for messages.

    Returns:
        Variables of :class:`mer_jax.extractors.vit.VisionTransformer`, float32.

    Raises:
        UserError: The file cannot be read or is of another network.
    """
    state = read_checkpoint(path)
    layout = _AUTHORS if "blocks.0.norm1.weight" in state or "pos_embed" in state else _HUGGING_FACE
    width = architecture.width
    # The CLS token's own position never changes: both are one token here, and the file's accounts are kept by hand.
    tokens = [f"{layout.tokens}cls_token"] + [f"{layout.tokens}register_tokens"] * (architecture.prefix > 1)
    parts = {key: state.get(key) for key in (layout.positions, *tokens)}
    shapes = ((1, None, width), (1, 1, width), (1, architecture.prefix - 1, width))
    for (key, array), shape in zip(parts.items(), shapes, strict=False):
        if array is None or array.ndim != 3 or any(n not in (None, m) for n, m in zip(shape, array.shape, strict=True)):
            what = f"lacks {key}" if array is None else f"{key} has shape {array.shape}"
            wanted = "(1, positions, D)" if shape[1] is None else shape
            raise UserError(
                f"{path}: {what}, {str(wanted).replace('D', str(width))} is needed; weights of {name} are expected, "
                f"this looks like {looks_like(state)}"
            )
    positions, cls_token, *registers = (np.asarray(part, np.float32)[0] for part in parts.values())
    side = math.isqrt(len(positions) - 1)
    found = dataclasses.replace(architecture, grid=(side, side))
    joined = {
        "prefix": np.concatenate([cls_token + positions[:1], *registers]),  # (1 + R, D)
        "positions": positions[1:],
    }
    return fill_transformer(
        found,
        state | joined,
        _sources(found, layout),
        where=path,
        network=name,
        normalisation=IMAGENET,
        skipped=_SKIPPED | {f"{re.escape(key)}$": "part of prefix or positions" for key in parts},
    )


def _sources(architecture: Architecture, layout: _Layout) -> dict[str, Source]:
    rows, columns = architecture.grid
    sources = {
        "params/embed/kernel": patch_kernel(f"{layout.embed}.weight", architecture, flat=False),
        "params/embed/bias": same(f"{layout.embed}.bias"),
        "params/prefix": same("prefix"),
        "params/positions": same("positions", shape=(rows * columns, architecture.width)),
        "params/norm/scale": same(f"{layout.norm}.weight"),
        "params/norm/bias": same(f"{layout.norm}.bias"),
    }
    names = layout.names | (layout.gated if architecture.activation == "swiglu" else {})
    for number in range(architecture.depth):
        sources |= block_sources(number, f"{layout.block}{number}.", names)
    return sources


def network(
    name: str,
    architecture: Architecture,
    size: tuple[int, int] = (_CROP, _CROP),
    *,
    hub: str = "",
    how: Filter = FILTER,
    shortest_edge: int = _SHORTEST_EDGE,
) -> Network:
    """The extractor of a DINOv2 network.

    Args:
        name: What to call it.
        architecture: Of :func:`architecture`, or a smaller one.
        size: (h, w) of its input, multiples of the patch.
        hub: Id of the weights on the Hugging Face hub.
        how: How crops are resized.
        shortest_edge: To which length the shorter side of a crop is brought before its centre is cut out; 0 keeps all
            of the crop.
    """
    return transformer_network(
        name,
        architecture,
        size,
        load=functools.partial(load, architecture=architecture, name=name),
        licence="Apache-2.0",
        preprocessing=f"RGB in [0, 1], less {IMAGENET[0]}, over {IMAGENET[1]}",
        how=how,
        shortest_edge=shortest_edge,
        hub=hub,
    )


def _released() -> dict[str, Network]:
    networks = {}
    for variant, (*_, hub) in _SIZES.items():
        for registers in (False, True):
            name = f"dinov2_{variant}14{'_reg' * registers}"
            prefix = "dinov2-with-registers" if registers else "dinov2"
            networks[name] = network(name, architecture(variant, registers=registers), hub=f"facebook/{prefix}-{hub}")
    return networks


NETWORKS: dict[str, Network] = _released()
