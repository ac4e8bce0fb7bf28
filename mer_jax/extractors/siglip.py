"""The image towers of SigLIP2 (Tschannen et al. 2025), fixed resolution; those of SigLIP have the same form.

Checkpoints are those of Hugging Face: of the whole model (``vision_model.*`` beside ``text_model.*``) or of the image
tower alone, with the prefix or without it. The feature is the pooled output of the probe, as wide as the tokens.
"""

import functools
import os

from mer_jax.extractors.checkpoints import Source, linear, read_checkpoint, same
from mer_jax.extractors.networks import Network
from mer_jax.extractors.resize import Filter
from mer_jax.extractors.vit import Architecture
from mer_jax.extractors.vit_networks import HALF, block_sources, fill_transformer, patch_kernel, transformer_network

# Width, depth, heads and width inside the MLP, by the name of the variant; and what the hub calls it.
_SIZES = {
    "b": (768, 12, 12, 3072, "base"),
    "l": (1024, 24, 16, 4096, "large"),
    "so400m": (1152, 27, 16, 4304, "so400m"),
    "gopt": (1536, 40, 16, 6144, "giant-opt"),
}
# Variant and patch to the sides of the images it was trained on.
_RELEASED = {
    ("b", 16): (224, 256, 384, 512),
    ("l", 16): (256, 384, 512),
    ("so400m", 14): (224, 384),
    ("so400m", 16): (256, 384, 512),
    ("gopt", 16): (256, 384),
}
# Hugging Face's processor of the released checkpoints resizes with this filter (``resample`` 2).
FILTER: Filter = "bilinear"

_BLOCK = {
    "attention_norm": "layer_norm1",
    "mlp_norm": "layer_norm2",
    "attention/qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention/out": "self_attn.out_proj",
    "mlp/in": "mlp.fc1",
    "mlp/out": "mlp.fc2",
}
_SKIPPED = {
    r"text_model\.": "the text tower",
    r"logit_(scale|bias)$": "how images and texts are compared",
    r"embeddings\.position_ids$": "0, 1, 2, ..., which older versions saved",
}


def architecture(variant: str, patch: int, size: int) -> Architecture:
    """The image tower of SigLIP2 ``variant`` (b, l, so400m, gopt) with patches of ``patch`` for images of ``size``."""
    width, depth, heads, hidden, _ = _SIZES[variant]
    return Architecture(patch, width, depth, heads, hidden, (size // patch,) * 2, "gelu_tanh", "fixed")


def load(path: str | os.PathLike, *, architecture: Architecture, name: str) -> dict:
    """Reads an official checkpoint.

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
    if any(key.startswith("vision_model.") for key in state):
        state = {key.removeprefix("vision_model."): array for key, array in state.items()}
    width, (rows, columns) = architecture.width, architecture.grid
    sources = {
        "params/embed/kernel": patch_kernel("embeddings.patch_embedding.weight", architecture, flat=False),
        "params/embed/bias": same("embeddings.patch_embedding.bias"),
        "params/positions": same("embeddings.position_embedding.weight", shape=(rows * columns, width)),
        "params/norm/scale": same("post_layernorm.weight"),
        "params/norm/bias": same("post_layernorm.bias"),
        **_head_sources(width),
    }
    for number in range(architecture.depth):
        sources |= block_sources(number, f"encoder.layers.{number}.", _BLOCK)
    return fill_transformer(
        architecture, state, sources, where=path, network=name, normalisation=HALF, skipped=_SKIPPED
    )


def _head_sources(width: int) -> dict[str, Source]:
    head = {
        f"params/head/{layer}/{leaf}": make(f"head.{key}.{weight}")
        for layer, key in (
            ("norm", "layernorm"),
            ("mlp/in", "mlp.fc1"),
            ("mlp/out", "mlp.fc2"),
            ("out", "attention.out_proj"),
        )
        for leaf, weight, make in (
            ("scale" if layer == "norm" else "kernel", "weight", same if layer == "norm" else linear),
            ("bias", "bias", same),
        )
    }
    # torch packs the projections of queries, keys and values, (3 D, D); the probe needs the first alone.
    for layer, rows in (("query", slice(0, width)), ("key_value", slice(width, 3 * width))):
        head[f"params/head/{layer}/kernel"] = Source(
            ("head.attention.in_proj_weight",), lambda _: (3 * width, width), lambda array, rows=rows: array[rows].T
        )
        head[f"params/head/{layer}/bias"] = Source(
            ("head.attention.in_proj_bias",), lambda _: (3 * width,), lambda array, rows=rows: array[rows]
        )
    return head | {"params/head/probe": same("head.probe", shape=(1, 1, width))}


def network(
    name: str, architecture: Architecture, size: tuple[int, int], *, hub: str = "", how: Filter = FILTER
) -> Network:
    """The extractor of a SigLIP image tower.

    Args:
        name: What to call it.
        architecture: Of :func:`architecture`, or a smaller one.
        size: (h, w) of its input.
        hub: Id of its weights on the Hugging Face hub.
        how: How crops are resized.
    """
    return transformer_network(
        name,
        architecture,
        size,
        load=functools.partial(load, architecture=architecture, name=name),
        licence="Apache-2.0",
        preprocessing="RGB to [-1, 1]",
        how=how,
        hub=hub,
    )


def _released() -> dict[str, Network]:
    networks = {}
    for (variant, patch), sizes in _RELEASED.items():
        for size in sizes:
            name = f"siglip2_{variant}{patch}_{size}"
            hub = f"google/siglip2-{_SIZES[variant][-1]}-patch{patch}-{size}"
            networks[name] = network(name, architecture(variant, patch, size), (size, size), hub=hub)
    return networks


NETWORKS: dict[str, Network] = _released()
