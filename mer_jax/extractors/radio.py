"""RADIO and C-RADIO (Ranzinger et al. 2024, Heinrich et al. 2025): one network distilled from several teachers.

The feature is the *summary*: of the CLS tokens, one for each teacher, those that the release counts in, one after
another. Checkpoints are those of Hugging Face (``radio_model.*``, safetensors) or of torch.hub (``base_model.*``,
``.pth.tar`` with its settings). RADIOv2.5-g stands on DINOv2's ViT-g instead: gated MLPs, one CLS token and a
normalisation at the end.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from mer_jax.errors import UserError
from mer_jax.extractors.checkpoints import Source, looks_like, read_with_settings, same
from mer_jax.extractors.networks import Network
from mer_jax.extractors.resize import Filter
from mer_jax.extractors.vit import Architecture
from mer_jax.extractors.vit_networks import block_sources, fill_transformer, patch_kernel, transformer_network

# Width, depth, heads and width inside the MLP.
_SIZES = {
    "b": (768, 12, 12, 3072),
    "l": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "h": (1280, 32, 16, 5120),
    "g": (1536, 40, 24, 4096),
}
_NVIDIA = "NVIDIA Source Code License-NC (non-commercial)"
_OPEN = "NVIDIA Open Model License"
# NVlabs' example resizes so, to the nearest size of whole patches.
FILTER: Filter = "bilinear_unfiltered"

# What the checkpoint's names begin with, of torch.hub and of Hugging Face: in the transformer, and outside of it.
_LAYOUTS = {"base_model.": "", "radio_model.model.": "radio_model."}
_BLOCK = {
    "attention_norm": "norm1",
    "mlp_norm": "norm2",
    "attention/qkv": "attn.qkv",
    "attention/out": "attn.proj",
    "mlp/in": "mlp.fc1",
    "mlp/norm": "mlp.norm",
    "mlp/out": "mlp.fc2",
}
_GATED = {"mlp/in": "mlp.w12", "mlp/out": "mlp.w3"}
# How transformers saves the same after its own conversion.
_GATED_APART = {"mlp/in": ("mlp.gate_proj", "mlp.up_proj"), "mlp/out": "mlp.down_proj"}
_SCALES = ("ls{}.grandma", "ls{}.gamma", "layer_scale{}.lambda1")
_SKIPPED = {
    r"(_heads|_feature_projections|radio_model\.adaptors)\.": "projections to the teachers' features",
    r"(radio_model\.|_)(inter_|intermediate_)?feature_normalizer\.": "normalisation of the patches' features",
    r"(base_model|radio_model\.model)\.(inner\.)?(head|mask_token|patch_generator\.video_embedder)\b": "other tasks",
    r"radio_model\.summary_idxs$": "checked, not a weight",
}
_SKIPPED_NORM = {r"(base_model|radio_model\.model)\.norm\.": "a normalisation that the release leaves out"}


def architecture(size: str, *, teachers: int = 3) -> Architecture:
    """RADIO of ``size`` (b, l, so400m, h, g), whose summary counts in the CLS tokens of the first ``teachers``."""
    width, depth, heads, hidden = _SIZES[size]
    if size == "g":
        return Architecture(
            14, width, depth, heads, hidden, (128, 128), "swiglu", "crop", prefix=5, summary=(0,), layer_scale=True
        )
    return Architecture(
        16, width, depth, heads, hidden, (128, 128), "gelu", "crop",
        prefix=8, summary=tuple(range(teachers)), patch_bias=False, final_norm=False,
    )  # fmt: skip


def load(path: str | os.PathLike, *, architecture: Architecture, name: str) -> dict:
    """Reads an official checkpoint.

    Registers, the grid of positions, the width inside the MLP, LayerScale and normalisations follow the file.

    Args:
        path: As :func:`mer_jax.extractors.checkpoints.read_checkpoint`; of a ``.pth.tar``, the average over training
            where it holds one.
        architecture: What the network is, as far as the file does not show it.
        name: The network's name, for messages.

    Returns:
        Variables of :class:`mer_jax.extractors.vit.VisionTransformer`, float32, with mean and standard deviation of the
        input as the checkpoint has them.

    Raises:
        UserError: The file cannot be read, is of another network, or sums up other CLS tokens.
    """
    state, settings = read_with_settings(path)
    args = settings.get("args") if isinstance(settings.get("args"), dict) else None
    root = next((root for root in _LAYOUTS if any(key.startswith(root) for key in state)), next(iter(_LAYOUTS)))
    outside = _LAYOUTS[root]

    def refuse(what: str) -> UserError:
        return UserError(f"{path}: {what}; weights of {name} are expected, this looks like {looks_like(state)}")

    skipped = dict(_SKIPPED)
    if any(key.startswith(f"{root}inner.") for key in state):
        root += "inner."  # whose CLS token is the summary, whatever the settings count in
    else:
        summary = _summary(state.get(f"{outside}summary_idxs"), args)
        if summary not in (None, architecture.summary):
            raise refuse(f"its summary is of the tokens {summary}, that of {name} of {architecture.summary}")
        if args is not None and not args.get("model_norm"):
            skipped |= _SKIPPED_NORM
            state = {key: array for key, array in state.items() if not key.startswith(f"{root}norm.")}
    conditioner = [f"{outside}input_conditioner.norm_{part}" for part in ("mean", "std")]
    for key in conditioner:
        if key not in state or state[key].size != 3:
            raise refuse(f"lacks {key} of three channels")
    normalisation = tuple(state[key].astype(np.float32) for key in conditioner)

    found = _found(architecture, state, root)
    return fill_transformer(
        found,
        {key: array for key, array in state.items() if key not in conditioner},
        _sources(found, state, root),
        where=path,
        network=name,
        normalisation=normalisation,
        skipped=skipped,
    )


def _summary(indices: np.ndarray | None, args: Mapping[str, Any] | None) -> tuple[int, ...] | None:
    """Which CLS tokens a checkpoint counts in: as it says, or as torch.hub derives it from the settings."""
    if indices is not None:
        return tuple(int(index) for index in indices.reshape(-1))
    if args is None or not isinstance(args.get("teachers"), list):
        return None
    if not args.get("cls_token_per_teacher", True):
        return (0,)
    first: dict[Any, int] = {}
    for number, teacher in enumerate(args["teachers"]):
        if isinstance(teacher, dict) and teacher.get("use_summary", True):
            first.setdefault(teacher.get("name"), number)
    return tuple(sorted(first.values()))


def _found(architecture: Architecture, state: Mapping[str, np.ndarray], root: str) -> Architecture:
    """The architecture with what the checkpoint shows of its variable parts."""
    tokens, positions = (state.get(f"{root}patch_generator.{name}") for name in ("cls_token.token", "pos_embed"))
    inside = next((state[key] for key in (f"{root}blocks.0.mlp.fc2.weight", f"{root}blocks.0.mlp.w3.weight",
                                          f"{root}blocks.0.mlp.down_proj.weight") if key in state), None)  # fmt: skip
    side = math.isqrt(positions.shape[1]) if positions is not None and positions.ndim == 3 else architecture.grid[0]
    return dataclasses.replace(
        architecture,
        prefix=tokens.shape[0] if tokens is not None and tokens.ndim == 2 else architecture.prefix,
        grid=(side, side),
        hidden=inside.shape[1] if inside is not None and inside.ndim == 2 else architecture.hidden,
        patch_bias=f"{root}patch_generator.embedder.bias" in state,
        layer_scale=any(f"{root}blocks.0.{key.format(1)}" in state for key in _SCALES),
        mlp_norm=f"{root}blocks.0.mlp.norm.weight" in state,
        final_norm=f"{root}norm.weight" in state,
    )


def _sources(architecture: Architecture, state: Mapping[str, np.ndarray], root: str) -> dict[str, Source]:
    generator = f"{root}patch_generator"
    rows, columns = architecture.grid
    sources = {
        "params/embed/kernel": patch_kernel(f"{generator}.embedder.weight", architecture, flat=True),
        "params/embed/bias": same(f"{generator}.embedder.bias"),
        "params/positions": same(f"{generator}.pos_embed", shape=(1, rows * columns, architecture.width)),
        "params/prefix": same(f"{generator}.cls_token.token"),
        "params/norm/scale": same(f"{root}norm.weight"),
        "params/norm/bias": same(f"{root}norm.bias"),
    }
    scale = next((key for key in _SCALES if f"{root}blocks.0.{key.format(1)}" in state), _SCALES[0])
    names = _BLOCK | {"attention_scale": scale.format(1), "mlp_scale": scale.format(2)}
    if architecture.activation == "swiglu":
        names |= _GATED_APART if f"{root}blocks.0.mlp.gate_proj.weight" in state else _GATED
    for number in range(architecture.depth):
        sources |= block_sources(number, f"{root}blocks.{number}.", names)
    return sources


def network(
    name: str,
    architecture: Architecture,
    size: tuple[int, int],
    *,
    licence: str = _NVIDIA,
    hub: str = "",
    how: Filter = FILTER,
) -> Network:
    """The extractor of a RADIO network.

    Args:
        name: What to call it.
        architecture: Of :func:`architecture`, or a smaller one.
        size: (h, w) of its input, multiples of the patch.
        licence: Of the weights.
        hub: Id of the weights on the Hugging Face hub.
        how: How crops are resized.
    """
    return transformer_network(
        name,
        architecture,
        size,
        load=functools.partial(load, architecture=architecture, name=name),
        licence=licence,
        preprocessing="RGB in [0, 1], less the mean and over the standard deviation in the checkpoint",
        how=how,
        hub=hub,
    )


def _released() -> dict[str, Network]:
    # Sides of the inputs are those that NVlabs prefers; of v2.5-g that of the micro-expression pipeline whose images of
    # 1024 x 1024 become the nearest multiple of 14.
    releases = {
        **{f"radio_v2.5-{size}": (size, 3, 768, _NVIDIA, f"nvidia/RADIO-{size.upper()}") for size in "blh"},
        "radio_v2.5-g": ("g", 1, 1022, _NVIDIA, "nvidia/RADIO-g"),
        **{f"c-radio_v2-{size}": (size, 3, 768, _OPEN, f"nvidia/C-RADIOv2-{size.upper()}") for size in "blh"},
        **{f"c-radio_v3-{size}": (size, 3, 512, _OPEN, f"nvidia/C-RADIOv3-{size.upper()}") for size in "blh"},
        **{f"c-radio_v4-{size}": (size, 2, 512, _OPEN, f"nvidia/C-RADIOv4-{size.upper()}") for size in ("h", "so400m")},
    }
    return {
        name: network(name, architecture(size, teachers=teachers), (side, side), licence=licence, hub=hub)
        for name, (size, teachers, side, licence, hub) in releases.items()
    }


NETWORKS: dict[str, Network] = _released()
