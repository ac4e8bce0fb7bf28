"""ResNet with bottlenecks (He et al. 2016) as torchvision has it: strides on the 3 x 3 convolutions."""

import dataclasses
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp

from mer_jax.extractors.folded_convolution import Convolution, Layer

EPSILON = 1e-5
_EXPANSION = 4


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a ResNet is made of.

    Attributes:
        blocks: Number of blocks in each stage; all stages but the first halve the maps and double the channels.
        width: Channels of the stem and of the first stage's 3 x 3 convolutions.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64

    @property
    def features(self) -> int:
        """F, channels of the last feature map."""
        return self.width * 2 ** (len(self.blocks) - 1) * _EXPANSION


RESNET50 = Architecture()


def layers(architecture: Architecture) -> list[Layer]:
    """All layers in the order of torchvision's state dict."""
    stem, blocks = _parts(architecture)
    return [stem, *(layer for block in blocks for layer in block)]


class ResNet(nn.Module):
    """The network up to its last feature map.

    Attributes:
        architecture: What it is made of.
    """

    architecture: Architecture

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (B, H, W, 3) to (B, H / 32, W / 32, F), sides rounded up."""
        stem, blocks = _parts(self.architecture)
        x = max_pool(Convolution(stem, name=stem.name)(x))
        for block in blocks:
            y = x
            for layer in block[:3]:
                y = Convolution(layer, name=layer.name)(y)
            for layer in block[3:]:
                x = Convolution(layer, name=layer.name)(x)
            x = nn.relu(x + y)
        return x


def max_pool(x: jax.Array) -> jax.Array:
    """Maxima over 3 x 3 windows of stride 2 and padding 1, of maps that are nowhere negative.

    Args:
        x: (B, H, W, C), at least 0.

    Returns:
        (B, H', W', C), sides half as long, rounded up.
    """

    def along(x, axis):
        # A window is a pair and the second of the pair before; zeros beyond the border win over nothing.
        shape = (*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
        first, second = jnp.moveaxis(x.reshape(shape), axis + 1, 0)
        before = jnp.pad(second, [(int(n == axis), 0) for n in range(4)])
        before = jax.lax.slice_in_dim(before, 0, second.shape[axis], axis=axis)
        return jnp.maximum(jnp.maximum(first, second), before)

    def by_pairs(x):
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        return along(jax.lax.optimization_barrier(along(x, 1)), 2)

    def by_xla(x):
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

    return jax.lax.platform_dependent(x, cpu=by_pairs, default=by_xla)


def _parts(architecture: Architecture) -> tuple[Layer, list[list[Layer]]]:
    """The stem and the layers of each block, its shortcut last where it has one, by the checkpoint's names."""
    blocks, channels = [], architecture.width
    for stage, count in enumerate(architecture.blocks):
        width = architecture.width * 2**stage
        for index in range(count):
            stride = 2 if stage and not index else 1
            blocks.append(list(_block(f"layer{stage + 1}.{index}", channels, width, stride, shortcut=not index)))
            channels = width * _EXPANSION
    return Layer("conv1", "bn1", 7, 3, architecture.width, stride=2, padding=3), blocks


def _block(name: str, channels: int, width: int, stride: int, *, shortcut: bool) -> Iterator[Layer]:
    features = width * _EXPANSION
    yield Layer(f"{name}.conv1", f"{name}.bn1", 1, channels, width, padding=0)
    yield Layer(f"{name}.conv2", f"{name}.bn2", 3, width, width, stride=stride, padding=1)
    yield Layer(f"{name}.conv3", f"{name}.bn3", 1, width, features, padding=0, relu=False)
    if shortcut:
        yield Layer(
            f"{name}.downsample.0", f"{name}.downsample.1", 1, channels, features,
            stride=stride, padding=0, relu=False,
        )  # fmt: skip
