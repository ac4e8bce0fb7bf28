"""Convolutions of trained networks, with the batch normalisation behind each folded into its weights.

What a checkpoint holds as a convolution and a normalisation is one kernel and one bias here, each kernel arranged for
the form in which it runs:

* ``pointwise`` (1 x 1): a matrix product.
* ``depthwise``: shifted copies of the maps, weighted and summed.
* ``winograd`` (3 x 3 of stride 1): Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray, "Fast Algorithms for
  Convolutional Neural Networks", CVPR 2016), 16 products where the definition has 36. The kernels are transformed when
  they are loaded; in each call that would cost as much as it saves.
* ``direct``: everything else.

These are the CPU's forms, faster there than XLA's convolution, which other platforms run.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mer_jax.errors import UserError

# Kernel to the 4 x 4 points at which the products of F(2, 3) are taken, along one axis, and back again.
_TO_POINTS = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
_FROM_POINTS = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, -1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
_POINTS = [f"{row}{column}" for row in range(4) for column in range(4)]
# Patches with fewer values are better gathered before one product than left to XLA's convolution.
_FEW_VALUES = 32


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution without bias, the batch normalisation behind it, and perhaps a ReLU.

    Attributes:
        name: The convolution's, in the checkpoint.
        norm: The normalisation's, in the checkpoint.
        size: Side of the kernel, k.
        channels: C, of the input.
        features: F, of the output.
        stride: Of both axes.
        padding: Zeros on each side; None for as many as TensorFlow's SAME puts there, of which the odd one comes last.
        depthwise: Whether each channel is filtered on its own; then F is C.
        relu: Whether negative outputs become 0.
    """

    name: str
    norm: str
    size: int
    channels: int
    features: int
    stride: int = 1
    padding: int | None = None
    depthwise: bool = False
    relu: bool = True

    @property
    def form(self) -> str:
        """How the layer runs on a CPU: ``pointwise``, ``depthwise``, ``winograd`` or ``direct``."""
        if self.depthwise:
            return "depthwise"
        if self.size == 1:
            return "pointwise"
        return "winograd" if (self.size, self.stride, self.pads(3)) == (3, 1, (1, 1)) else "direct"

    @property
    def kernel_shape(self) -> tuple[int, int, int, int]:
        """(k, k, C, F), or (k, k, 1, C) if depthwise."""
        return self.size, self.size, 1 if self.depthwise else self.channels, self.features

    def pads(self, side: int) -> tuple[int, int]:
        """Zeros before and after maps of ``side`` pixels."""
        if self.padding is not None:
            return self.padding, self.padding
        total = max((-(-side // self.stride) - 1) * self.stride + self.size - side, 0)
        return total // 2, total - total // 2


# --- weights ------------------------------------------------------------------------------------------------------


def expected(layers: Sequence[Layer]) -> dict[str, Any]:
    """The variables of the layers as a checkpoint has them, convolutions and normalisations apart.

    Args:
        layers: The network's.

    Returns:
        Shapes of ``params`` and ``batch_stats``, by the checkpoint's names, as
        :func:`mer_jax.extractors.checkpoints.torch_sources` understands them.
    """
    params: dict[str, Any] = {}
    statistics: dict[str, Any] = {}
    for layer in layers:
        vector = jax.ShapeDtypeStruct((layer.features,), np.float32)
        params[layer.name] = {"kernel": jax.ShapeDtypeStruct(layer.kernel_shape, np.float32)}
        params[layer.norm] = {"scale": vector, "bias": vector}
        statistics[layer.norm] = {"mean": vector, "var": vector}
    return {"params": params, "batch_stats": statistics}


def fold(layers: Sequence[Layer], filled: Mapping[str, Any], epsilon: float, where: str | os.PathLike) -> dict:
    """Folds normalisations into the convolutions before them.

    Args:
        layers: The network's.
        filled: Arrays as :func:`expected` has them.
        epsilon: What the normalisations add to the variance.
        where: The file, for messages.

    Returns:
        Parameters of :class:`Convolution` for each layer by its name, float32.

    Raises:
        UserError: A variance is so far below zero that nothing can be divided by its root.
    """
    folded = {}
    for layer in layers:
        norm, statistics = filled["params"][layer.norm], filled["batch_stats"][layer.norm]
        variance = statistics["var"].astype(np.float64) + epsilon
        if not (variance > 0).all():
            raise UserError(
                f"{where}: {layer.norm}.running_var is negative, which no variance is; fetch the file again"
            )
        scale = norm["scale"] / np.sqrt(variance)  # (F,)
        kernel = filled["params"][layer.name]["kernel"] * scale
        folded[layer.name] = {
            "kernel": jax.tree.map(lambda x: np.ascontiguousarray(x, np.float32), arrange(layer, kernel)),
            "bias": (norm["bias"] - statistics["mean"] * scale).astype(np.float32),
        }
    return folded


def arrange(layer: Layer, kernel: Any) -> Any:
    """A kernel of :attr:`Layer.kernel_shape` as the layer's form takes it.

    Args:
        layer: Whose kernel it is.
        kernel: NumPy or JAX array.

    Returns:
        ``pointwise``: (C, F). ``depthwise``: (k, k, C). ``winograd``: for each of 4 x 4 points, ``'00'`` to ``'33'``,
        (C, F). ``direct``: (k, k, C, F).
    """
    if layer.form == "pointwise":
        return kernel[0, 0]
    if layer.form == "depthwise":
        return kernel[:, :, 0]
    if layer.form == "direct":
        return kernel
    rows = [sum(w * kernel[i] for i, w in enumerate(weights) if w) for weights in _TO_POINTS]  # 4 of (3, C, F)
    points = [sum(w * row[j] for j, w in enumerate(weights) if w) for row in rows for weights in _TO_POINTS]
    return dict(zip(_POINTS, points, strict=True))  # 16 of (C, F): products of each are matrix products of their own


def _restored(points: Mapping[str, jax.Array]) -> jax.Array:
    """The kernel (3, 3, C, F) behind Winograd's points."""
    stacked = jnp.stack([points[name].astype(jnp.float32) for name in _POINTS]).reshape(4, 4, *points["00"].shape)
    back = jnp.asarray(_FROM_POINTS, jnp.float32)
    # (3, 4) (4, 4, C, F) (3, 4) -> (3, 3, C, F)
    return jnp.einsum("ia,abcf,jb->ijcf", back, stacked, back, precision="highest").astype(points["00"].dtype)


# --- the layer ----------------------------------------------------------------------------------------------------


class Convolution(nn.Module):
    """A :class:`Layer` with its normalisation folded in.

    Attributes:
        layer: What it is.
    """

    layer: Layer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to (B, H', W', F)."""
        layer = self.layer

        def init(key):
            draw = nn.initializers.variance_scaling(2.0, "fan_in", "normal", in_axis=(0, 1, 2))
            return arrange(layer, draw(key, layer.kernel_shape))

        kernel = self.param("kernel", init)
        bias = self.param("bias", nn.initializers.zeros, (layer.features,))
        y = convolve(x, kernel, layer) + bias[None, None, None]
        return nn.relu(y) if layer.relu else y


def convolve(x: jax.Array, kernel: Any, layer: Layer) -> jax.Array:
    """A layer's convolution, in the fastest form of the platform for which it is compiled.

    Args:
        x: (B, H, W, C).
        kernel: As :func:`arrange` gives it, of the same type.
        layer: What the layer is.

    Returns:
        (B, H', W', F).
    """
    if layer.form == "pointwise":
        x = x[:, :: layer.stride, :: layer.stride]
        return (x.reshape(-1, layer.channels) @ kernel).reshape(*x.shape[:3], -1)  # (B H' W', C) (C, F)
    on_cpu, elsewhere = forms(layer)
    if x.dtype != jnp.float32:
        # Sums of a quarter's precision spoil the products, and no CPU is fast in bfloat16.
        return elsewhere(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=elsewhere)


def forms(layer: Layer) -> tuple[Callable[[jax.Array, Any], jax.Array], Callable[[jax.Array, Any], jax.Array]]:
    """The two ways in which a layer of more than one pixel is computed: on a CPU, and elsewhere.

    Args:
        layer: Not pointwise.

    Returns:
        Two functions of (B, H, W, C) and a kernel as :func:`arrange` gives it, to (B, H', W', F).
    """

    def by_xla(x: jax.Array, kernel: Any) -> jax.Array:
        if layer.form == "winograd":
            kernel = _restored(kernel)
        return jax.lax.conv_general_dilated(
            x,
            kernel.reshape(layer.kernel_shape),
            (layer.stride, layer.stride),
            [layer.pads(side) for side in x.shape[1:3]],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=layer.channels if layer.depthwise else 1,
        )

    def by_shifts(x: jax.Array, kernel: jax.Array) -> jax.Array:
        terms = [
            piece * kernel[i, j][None, None, None]
            for i, row in enumerate(_shifted(x, layer))
            for j, piece in enumerate(row)
        ]
        return sum(terms[1:], terms[0])

    def by_columns(x: jax.Array, kernel: jax.Array) -> jax.Array:
        products = []
        for row, weights in zip(_shifted(x, layer), kernel, strict=True):
            columns = jnp.concatenate(row, axis=-1)  # (B, H', W', k C)
            # (B H' W', k C) (k C, F)
            products.append(columns.reshape(-1, columns.shape[-1]) @ weights.reshape(-1, layer.features))
        return sum(products[1:], products[0]).reshape(*columns.shape[:3], -1)

    if layer.form == "direct":
        few = layer.size**2 * layer.channels <= _FEW_VALUES
        return (by_columns if few else by_xla), by_xla
    return {"depthwise": by_shifts, "winograd": _winograd}[layer.form], by_xla


def _shifted(x: jax.Array, layer: Layer) -> list[list[jax.Array]]:
    """What lies under each of the k x k places of a kernel: k rows of k maps (B, H', W', C)."""
    (top, bottom), (left, right) = (layer.pads(side) for side in x.shape[1:3])
    # Read many times: a padding fused into its readers would be worked out anew by each.
    x = jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0))))
    height, width = ((side - layer.size) // layer.stride * layer.stride + 1 for side in x.shape[1:3])
    return [
        [x[:, i : i + height : layer.stride, j : j + width : layer.stride] for j in range(layer.size)]
        for i in range(layer.size)
    ]


def _winograd(x: jax.Array, points: Mapping[str, jax.Array]) -> jax.Array:
    """A 3 x 3 convolution of stride 1 and padding 1: (B, H, W, C) to (B, H, W, F) by F(2x2, 3x3)."""
    batch, height, width, channels = x.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2  # tiles of 2 x 2 outputs, from 4 x 4 inputs each
    x = jnp.pad(x, ((0, 0), (1, 1 + 2 * rows - height), (1, 1 + 2 * columns - width), (0, 0)))

    def of_input(d):
        return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]

    def of_output(m):
        return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]

    tiles = [[x[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2] for j in range(4)] for i in range(4)]
    along = [of_input([tiles[i][j] for i in range(4)]) for j in range(4)]  # [j][a] of (B, rows, columns, C)
    inputs = [of_input([along[j][a] for j in range(4)]) for a in range(4)]  # [a][b]
    # (B rows columns, C) (C, F)
    products = [[inputs[a][b].reshape(-1, channels) @ points[f"{a}{b}"] for b in range(4)] for a in range(4)]
    down = [of_output([products[a][b] for a in range(4)]) for b in range(4)]  # [b][p]
    outputs = [of_output([down[b][p] for b in range(4)]) for p in range(2)]  # [p][q]
    outputs = [[y.reshape(batch, rows, 1, columns, 1, -1) for y in row] for row in outputs]
    # (B, rows, 2, columns, 2, F) -> (B, 2 rows, 2 columns, F)
    y = jnp.concatenate([jnp.concatenate(row, axis=4) for row in outputs], axis=2)
    return y.reshape(batch, 2 * rows, 2 * columns, -1)[:, :height, :width]


def in_chunks(function: Callable[[jax.Array], jax.Array], images: jax.Array, size: int) -> jax.Array:
    """Maps images to features; a CPU takes a few at a time.

    Maps of a whole batch outgrow a CPU's caches, and above 32 MiB the C library fetches their memory from the system
    anew in each call, which costs more than writing it.

    Args:
        function: (b, h, w, 3) to (b, D), for any b; an image's features depend on no other image.
        images: (B, h, w, 3).
        size: Most images at a time on a CPU.

    Returns:
        (B, D).
    """

    def by_chunks(images):
        whole = len(images) // size * size
        if len(images) <= size:
            return function(images)
        chunks = images[:whole].reshape(-1, size, *images.shape[1:])  # (B, h, w, 3) -> (B / b, b, h, w, 3)
        features = jax.lax.map(function, chunks).reshape(whole, -1)  # (B / b, b, D) -> (B, D)
        return jnp.concatenate([features, function(images[whole:])]) if whole < len(images) else features

    return jax.lax.platform_dependent(images, cpu=by_chunks, default=function)
