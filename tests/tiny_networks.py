"""Small networks in the places of large ones: what is tested around a network does not depend on its size.

Register them with ``networks.NETWORKS["tiny"] = "tiny_networks:NETWORKS"``; worker processes import them by this name,
so the folder of this file must be on the path.
"""

import dataclasses
import os
import time

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from mer_jax.errors import UserError
from mer_jax.extractors.networks import Network
from mer_jax.extractors.pt_files import load_state_dict

SIZE, PATCH, WIDTH, DIM = 32, 8, 24, 12
SHAPES = {
    "patch.weight": (3 * PATCH**2, WIDTH),
    "mix.weight": (WIDTH, 3 * WIDTH),
    "head.weight": (WIDTH, DIM),
}


def prepare(crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Resized crops (T, SIZE, SIZE, 3) uint8; all found."""
    images = np.stack([cv2.resize(crop, (SIZE, SIZE), interpolation=cv2.INTER_AREA) for crop in crops])
    return images, np.ones(len(images), bool)


def prepare_bright(crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`prepare` in float32; dark crops are not found."""
    images, _ = prepare(crops)
    return images.astype(np.float32), crops.mean(axis=(1, 2, 3)) > 60


def prepare_slowly(crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`prepare`, so slowly that one can be in time to interrupt it."""
    time.sleep(0.05)
    return prepare(crops)


def prepare_or_die(crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`prepare`; black crops end the process, as a crash in native code does."""
    if not crops.any():
        os._exit(1)
    return prepare(crops)


def load(path: str | os.PathLike) -> dict:
    """Weights of ``torch.save`` by the names of ``SHAPES``."""
    state = load_state_dict(path)
    for name, shape in SHAPES.items():
        if name not in state or state[name].shape != shape:
            raise UserError(f"{path}: no {name} of shape {shape}; this is no checkpoint of a tiny network")
    return {"params": {name: state[name].astype(np.float32) for name in SHAPES}}


def _tokens(variables: dict, images: jax.Array) -> tuple[jax.Array, ...]:
    """Of the patches: tokens (B, N, WIDTH), then queries, keys and values (B, N, 1, WIDTH)."""
    weights = variables["params"]
    dtype = weights["patch.weight"].dtype
    side = SIZE // PATCH
    tokens = images.astype(dtype) / 255
    # (B, SIZE, SIZE, 3) -> (B, side^2, 3 PATCH^2)
    tokens = tokens.reshape(-1, side, PATCH, side, PATCH, 3).swapaxes(2, 3).reshape(-1, side**2, 3 * PATCH**2)
    tokens = jnp.einsum("bnc,cd->bnd", tokens, weights["patch.weight"])
    mixed = jnp.einsum("bnd,de->bne", tokens, weights["mix.weight"])
    return tokens, *jnp.split(mixed[:, :, None], 3, axis=-1)


def apply(variables: dict, images: jax.Array) -> jax.Array:
    """One block of attention over patches: (B, SIZE, SIZE, 3) to (B, DIM) float32."""
    tokens, query, key, value = _tokens(variables, images)
    tokens = tokens + jax.nn.dot_product_attention(query, key, value)[:, :, 0]
    return jnp.einsum("bd,de->be", tokens.mean(axis=1), variables["params"]["head.weight"]).astype(jnp.float32)


def attention(variables: dict, images: jax.Array) -> jax.Array:
    """What the mean of all queries attends to: (B, SIZE, SIZE, 3) to (B, 4, 4) float32."""
    _, query, key, _ = _tokens(variables, images)
    scores = jnp.einsum("bd,bnd->bn", query.mean(axis=1)[:, 0], key[:, :, 0]) * WIDTH**-0.5
    shares = jax.nn.softmax(scores, axis=-1)
    return shares.reshape(-1, SIZE // PATCH, SIZE // PATCH).astype(jnp.float32)  # (B, N) -> (B, 4, 4)


def area(shape: tuple[int, int]) -> tuple[float, float, float, float]:
    """All of a crop (H, W)."""
    return (0.0, 0.0, *map(float, shape))


def random_state(seed: int = 0, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Random weights by their names in the checkpoint."""
    rng = np.random.default_rng(seed)
    return {
        name: (scale * rng.normal(size=shape) / shape[0] ** 0.5).astype(np.float32) for name, shape in SHAPES.items()
    }


TINY = Network(
    name="tiny",
    modality="appearance",
    dim=DIM,
    licence="Test-1.0",
    preprocessing=f"resized to {SIZE} x {SIZE} (area)",
    input_shape=(SIZE, SIZE),
    prepare=prepare,
    load=load,
    apply=apply,
    hub="tests/tiny",
)
NETWORKS = {
    "tiny": TINY,
    "tiny_geometry": dataclasses.replace(
        TINY, name="tiny_geometry", modality="geometry", preprocessing="bright crops", prepare=prepare_bright, hub=""
    ),
    "tiny_attentive": dataclasses.replace(
        TINY, name="tiny_attentive", attention=attention, attention_grid=(SIZE // PATCH,) * 2, attention_area=area
    ),
    "tiny_deadly": dataclasses.replace(TINY, name="tiny_deadly", prepare=prepare_or_die, hub=""),
    "tiny_slow": dataclasses.replace(TINY, name="tiny_slow", prepare=prepare_slowly, hub=""),
}
