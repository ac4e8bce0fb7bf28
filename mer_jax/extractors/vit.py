"""One vision transformer for SigLIP, RADIO and DINOv2, whose differences are the fields of an :class:`Architecture`.

All are pre-norm transformers (Dosovitskiy et al. 2021) on linearly embedded patches. SigLIP2 (Tschannen et al. 2025)
has no CLS token and pools by attention of a learned probe. RADIO (Ranzinger et al. 2024; Heinrich et al. 2025) has a
CLS token for each of its teachers, registers, and positions cropped from a large grid. DINOv2 (Oquab et al. 2024;
Darcet et al. 2024) scales what its layers add and interpolates its positions.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from mer_jax.extractors.folded_convolution import in_chunks
from mer_jax.extractors.resize import resize_grid

_EPSILON = 1e-6
# Tokens at a time on a CPU: matrix products of more lose a third of their speed.
_TOGETHER = 2304
# Bytes of scores at a time on a CPU: those of all heads and images would fall out of its caches.
_SCORES = 4 * 2**20


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a vision transformer is made of.

    Attributes:
        patch: Side of a patch in pixels, p.
        width: Width of the tokens, D.
        depth: Number of blocks.
        heads: Number of attention heads, H; they share D equally.
        hidden: Width inside the MLP.
        grid: Rows and columns of the learned position embeddings.
        activation: In the MLP: ``'gelu'`` (exact), ``'gelu_tanh'`` (approximated), or ``'swiglu'``, where one half of
            twice ``hidden`` units gates the other.
        positions: How positions follow the input's size. ``'fixed'``: they do not, the input has ``grid``'s size; what
            does not fill a patch on the right and below is not seen.
            ``'crop'``: the grid is resized (linear) to a square as large as the input's longer side, and its top left
            corner taken. ``'cubic'`` and ``'cubic_antialias'``: the grid is resized to the input's.
        prefix: Number of tokens before those of the patches: CLS tokens, then registers.
        summary: Which of these make up the feature, one after another; none for a probe that attends to all tokens.
        patch_bias: Whether the patch embedding has a bias.
        layer_scale: Whether what attention and MLP add is scaled per channel.
        mlp_norm: Whether the MLP normalises after its activation.
        final_norm: Whether the tokens are normalised after the last block.
    """

    patch: int
    width: int
    depth: int
    heads: int
    hidden: int
    grid: tuple[int, int]
    activation: Literal["gelu", "gelu_tanh", "swiglu"]
    positions: Literal["fixed", "crop", "cubic", "cubic_antialias"]
    prefix: int = 0
    summary: tuple[int, ...] = ()
    patch_bias: bool = True
    layer_scale: bool = False
    mlp_norm: bool = False
    final_norm: bool = True

    @property
    def dim(self) -> int:
        """Width of the feature."""
        return self.width * max(1, len(self.summary))


def observed(architecture: Architecture, params: Mapping[str, Any]) -> Architecture:
    """The architecture with everything that parameters show taken from them.

    Heads, activation, positions and summary leave no trace in the parameters; registers, the grid of positions and the
    optional parts do, and releases of one name differ in them.
    """
    block = params["block_0"]
    rows, columns, width = params["positions"].shape
    return dataclasses.replace(
        architecture,
        width=width,
        depth=sum(name.startswith("block_") for name in params),
        hidden=block["mlp"]["out"]["kernel"].shape[0],
        grid=(rows, columns),
        prefix=params["prefix"].shape[0] if "prefix" in params else 0,
        patch_bias="bias" in params["embed"],
        layer_scale="attention_scale" in block,
        mlp_norm="norm" in block["mlp"],
        final_norm="norm" in params,
    )


def features(architecture: Architecture, variables: Any, images: jax.Array) -> jax.Array:
    """The features of images; pure and traceable.

    Args:
        architecture: What the network is, where its variables do not show it.
        variables: Of :class:`VisionTransformer`, float32 or bfloat16; the computation is in their type.
        images: (B, h, w, 3), uint8 or float in [0, 1], h and w multiples of the patch.

    Returns:
        (B, D) float32.
    """
    own = observed(architecture, variables["params"])
    rows, columns = grid_of(own, images.shape[1:3])
    together = max(1, _TOGETHER // (own.prefix + rows * columns))
    return in_chunks(functools.partial(VisionTransformer(own).apply, variables), images, together)


def attention_map(architecture: Architecture, variables: Any, images: jax.Array) -> jax.Array:
    """What the tokens that make up the feature attend to in the last step, per patch.

    Args:
        architecture: As :func:`features`.
        variables: As :func:`features`.
        images: As :func:`features`.

    Returns:
        (B, h / p, w / p) float32, mean over heads and tokens; what is missing to a sum of 1 went to the tokens before
        the patches.
    """
    model = VisionTransformer(observed(architecture, variables["params"]))
    return model.apply(variables, images, method="attention_map")


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """softmax(Q K^T / sqrt(d)) V for each head.

    Args:
        query: (B, T, H, d).
        key: (B, S, H, d).
        value: (B, S, H, d).

    Returns:
        (B, T, H, d).
    """
    return jax.lax.platform_dependent(query, key, value, cpu=_attend_on_cpu, default=_attend)


def _attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    if query.dtype in (jnp.bfloat16, jnp.float16) and jax.default_backend() == "gpu":
        try:
            return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
        except (RuntimeError, ValueError):
            pass  # no cuDNN, or none that takes these heads
    return jax.nn.dot_product_attention(query, key, value)


def _attend_on_cpu(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """The same, heads before tokens and division after the sum: two to five times faster with XLA's CPU backend."""
    batch, length, heads, width = query.shape

    def by_head(x: jax.Array) -> jax.Array:
        return x.transpose(0, 2, 1, 3).reshape(batch * heads, x.shape[1], width)  # (B, T, H, d) -> (B H, T, d)

    def core(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        scores = jnp.einsum("...td,...sd->...ts", query, key, preferred_element_type=jnp.float32)
        shares = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        summed = jnp.einsum("...ts,...sd->...td", shares.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return (summed / shares.sum(axis=-1, keepdims=True)).astype(value.dtype)

    query, key, value = by_head(query * jnp.asarray(width**-0.5, query.dtype)), by_head(key), by_head(value)
    together = max(1, _SCORES // (4 * length * key.shape[1]))
    if together >= batch * heads:
        mixed = core(query, key, value)
    else:
        mixed = jax.lax.map(lambda parts: core(*parts), (query, key, value), batch_size=together)
    # (B H, T, d) -> (B, T, H, d)
    return mixed.reshape(batch, heads, length, width).transpose(0, 2, 1, 3)


def _shares(query: jax.Array, key: jax.Array) -> jax.Array:
    """softmax(Q K^T / sqrt(d)), mean over heads: (B, T, H, d) and (B, S, H, d) to (B, T, S) float32."""
    scores = jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    return nn.softmax(scores, axis=-1).mean(axis=1)


def _dense(width: int, name: str) -> nn.Dense:
    return nn.Dense(width, name=name, bias_init=nn.initializers.normal(1e-2))


def _norm(name: str) -> nn.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, loses digits on the large means of trained networks.
    return nn.LayerNorm(epsilon=_EPSILON, use_fast_variance=False, name=name)


class Attention(nn.Module):
    """Self-attention with one packed projection.

    Attributes:
        heads: H.
    """

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, rows: tuple[int, ...] = ()) -> tuple[jax.Array, jax.Array | None]:
        """Mixes tokens (B, N, D); with ``rows``, also what these attend to, (B, len(rows), N), mean over heads."""
        batch, length, width = x.shape
        packed = _dense(3 * width, "qkv")(x)
        packed = packed.reshape(batch, length, 3, self.heads, width // self.heads)  # (B, N, 3 D) -> (B, N, 3, H, d)
        query, key, value = packed[:, :, 0], packed[:, :, 1], packed[:, :, 2]
        mixed = attend(query, key, value).reshape(batch, length, width)  # (B, N, H, d) -> (B, N, D)
        shares = _shares(query[:, jnp.asarray(rows)], key) if rows else None
        return _dense(width, "out")(mixed), shares


class Mlp(nn.Module):
    """Two layers, or the gated variant (Shazeer 2020).

    Attributes:
        hidden: Width between the layers.
        activation: As :class:`Architecture`.
        norm: Whether to normalise before the last layer.
    """

    hidden: int
    activation: str
    norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens (B, N, D) to (B, N, D)."""
        if self.activation == "swiglu":
            gate, hidden = jnp.split(_dense(2 * self.hidden, "in")(x), 2, axis=-1)
            hidden = nn.silu(gate) * hidden
        else:
            hidden = nn.gelu(_dense(self.hidden, "in")(x), approximate=self.activation == "gelu_tanh")
        if self.norm:
            hidden = _norm("norm")(hidden)
        return _dense(x.shape[-1], "out")(hidden)


class Block(nn.Module):
    """Attention, then MLP, each on normalised tokens and added to them.

    Attributes:
        architecture: What the network is.
    """

    architecture: Architecture

    @nn.compact
    def __call__(self, x: jax.Array, rows: tuple[int, ...] = ()) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Maps tokens (B, N, D) to (B, N, D); with ``rows``, also what these attend to (:class:`Attention`)."""
        own = self.architecture

        def scaled(x: jax.Array, name: str) -> jax.Array:
            if not own.layer_scale:
                return x
            return x * self.param(name, nn.initializers.constant(1e-5), (own.width,))[None, None]

        mixed, shares = Attention(own.heads, name="attention")(_norm("attention_norm")(x), rows)
        x = x + scaled(mixed, "attention_scale")
        mlp = Mlp(own.hidden, own.activation, own.mlp_norm, name="mlp")
        x = x + scaled(mlp(_norm("mlp_norm")(x)), "mlp_scale")
        return (x, shares) if rows else x


class ProbeHead(nn.Module):
    """A learned probe that attends to all tokens (Zhai et al. 2022), then an MLP added to what it found.

    Attributes:
        architecture: What the network is.
    """

    architecture: Architecture

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps tokens (B, N, D) to (B, D) and what the probe attends to, (B, N), mean over heads."""
        own = self.architecture
        batch, length, width = x.shape
        probe = self.param("probe", nn.initializers.normal(1.0), (width,))
        query = _dense(width, "query")(probe[None]).reshape(1, 1, own.heads, -1)  # (1, D) -> (1, 1, H, d)
        query = jnp.broadcast_to(query, (batch, *query.shape[1:]))
        packed = _dense(2 * width, "key_value")(x).reshape(batch, length, 2, own.heads, -1)  # -> (B, N, 2, H, d)
        key, value = packed[:, :, 0], packed[:, :, 1]
        mixed = attend(query, key, value).reshape(batch, 1, width)  # (B, 1, H, d) -> (B, 1, D)
        pooled = _dense(width, "out")(mixed)
        pooled = pooled + Mlp(own.hidden, own.activation, name="mlp")(_norm("norm")(pooled))
        return pooled[:, 0], _shares(query, key)[:, 0]


class VisionTransformer(nn.Module):
    """Images to features.

    Attributes:
        architecture: What the network is.
    """

    architecture: Architecture

    @nn.compact
    def _run(self, images: jax.Array, with_attention: bool) -> tuple[jax.Array, jax.Array | None]:
        own = self.architecture
        rows, columns = grid_of(own, images.shape[1:3])
        mean = self.variable("constants", "mean", jnp.zeros, (3,)).value
        std = self.variable("constants", "std", jnp.ones, (3,)).value
        positions = self.param("positions", nn.initializers.normal(0.02), (*own.grid, own.width))

        patches = _patches(images, own.patch).astype(jnp.float32) / (255 if images.dtype == jnp.uint8 else 1)
        mean, std = (
            jnp.tile(part.astype(jnp.float32), own.patch**2)[None, None] for part in (mean, std)
        )  # (1, 1, p p 3)
        patches = ((patches - mean) / std).astype(positions.dtype)
        x = nn.Dense(own.width, use_bias=own.patch_bias, name="embed")(patches)
        x = x + _positions_at(positions, own, rows, columns).astype(x.dtype)[None]
        if own.prefix:
            prefix = self.param("prefix", nn.initializers.normal(0.02), (own.prefix, own.width))
            prefix = jnp.broadcast_to(prefix[None], (x.shape[0], *prefix.shape))
            x = jnp.concatenate([prefix, x], axis=1)  # (B, P + N, D)

        shares = None
        for number in range(own.depth):
            block = Block(own, name=f"block_{number}")
            if with_attention and own.summary and number == own.depth - 1:
                x, shares = block(x, own.summary)  # shares (B, S, P + N)
            else:
                x = block(x)
        if own.final_norm:
            x = _norm("norm")(x)
        if own.summary:
            feature = x[:, jnp.asarray(own.summary)].reshape(x.shape[0], -1)  # (B, S, D) -> (B, S D)
        else:
            feature, shares = ProbeHead(own, name="head")(x)
            shares = shares[:, None]  # (B, 1, N)
        if with_attention:
            shares = shares.mean(axis=1)[:, own.prefix :].reshape(-1, rows, columns)  # (B, N) -> (B, rows, columns)
        return feature.astype(jnp.float32), shares

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images (B, h, w, 3), uint8 or float in [0, 1], to features (B, D) float32."""
        return self._run(images, with_attention=False)[0]

    def attention_map(self, images: jax.Array) -> jax.Array:
        """Maps images (B, h, w, 3) to what the feature's tokens attend to, (B, h / p, w / p)."""
        return self._run(images, with_attention=True)[1]


def grid_of(architecture: Architecture, size: tuple[int, int]) -> tuple[int, int]:
    """How many patches there are along an image of ``size`` (h, w).

    Raises:
        ValueError: The network takes no images of this size.
    """
    patch = architecture.patch
    rows, columns = size[0] // patch, size[1] // patch
    if architecture.positions == "fixed":
        if (rows, columns) != architecture.grid:
            wanted = " x ".join(str(side * patch) for side in architecture.grid)
            raise ValueError(f"images of {size[0]} x {size[1]}: this network takes {wanted} alone")
    elif size[0] % patch or size[1] % patch or 0 in (rows, columns):
        raise ValueError(f"images of {size[0]} x {size[1]}: sides must be multiples of {patch}")
    return rows, columns


def _patches(images: jax.Array, patch: int) -> jax.Array:
    """(B, h, w, 3) to (B, N, p p 3): patches row by row, pixels row by row, channels last."""
    batch, height, width, channels = images.shape
    rows, columns = height // patch, width // patch
    tiles = images[:, : rows * patch, : columns * patch].reshape(batch, rows, patch, columns, patch, channels)
    return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


def _positions_at(positions: jax.Array, architecture: Architecture, rows: int, columns: int) -> jax.Array:
    """Position embeddings of an input of so many patches: (R, C, D) to (N, D)."""
    if (rows, columns) != architecture.grid:
        if architecture.positions == "crop":
            side = max(rows, columns)
            positions = resize_grid(positions, side, side, "linear", False, crop=(rows, columns))
        else:
            antialias = architecture.positions == "cubic_antialias"
            positions = resize_grid(positions, rows, columns, "cubic", antialias)
    return positions.reshape(rows * columns, -1)
