"""MobileNetV3 (Howard et al. 2019), the minimal variants of TensorFlow as timm's ``tf_mobilenetv3_*_minimal_100``.

Minimal: ReLU everywhere, no squeeze-and-excitation, all kernels 3 x 3. From TensorFlow: strided convolutions pad as
SAME does, and batch normalisation adds 1e-3.
"""

import dataclasses
from collections.abc import Iterator

import flax.linen as nn
import jax

from mer_jax.extractors.folded_convolution import Convolution, Layer

EPSILON = 1e-3


@dataclasses.dataclass(frozen=True)
class Block:
    """An inverted residual block: pointwise to ``expanded`` channels, depthwise 3 x 3, pointwise to ``features``.

    Attributes:
        expanded: Channels of the depthwise convolution; 0 for those of the input, without the first pointwise
            convolution (a depthwise-separable block).
        features: Channels of the output.
        stride: Of the depthwise convolution.
    """

    expanded: int
    features: int
    stride: int = 1


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a MobileNetV3 is made of.

    Attributes:
        stem: Channels of the first convolution, 3 x 3 of stride 2.
        stages: Blocks, grouped as the checkpoint numbers them.
        features: F, channels of the last, pointwise, convolution.
    """

    stem: int
    stages: tuple[tuple[Block, ...], ...]
    features: int


LARGE_MINIMAL = Architecture(
    16,
    (
        (Block(0, 16),),
        (Block(64, 24, 2), Block(72, 24)),
        (Block(72, 40, 2), Block(120, 40), Block(120, 40)),
        (Block(240, 80, 2), Block(200, 80), Block(184, 80), Block(184, 80)),
        (Block(480, 112), Block(672, 112)),
        (Block(672, 160, 2), Block(960, 160), Block(960, 160)),
    ),
    960,
)
SMALL_MINIMAL = Architecture(
    16,
    (
        (Block(0, 16, 2),),
        (Block(72, 24, 2), Block(88, 24)),
        (Block(96, 40, 2), Block(240, 40), Block(240, 40)),
        (Block(120, 48), Block(144, 48)),
        (Block(288, 96, 2), Block(576, 96), Block(576, 96)),
    ),
    576,
)


def layers(architecture: Architecture) -> list[Layer]:
    """All layers in their order."""
    stem, blocks, last = _parts(architecture)
    return [stem, *(layer for block in blocks for layer in block), last]


class MobileNetV3(nn.Module):
    """The network up to its last feature map.

    Attributes:
        architecture: What it is made of.
    """

    architecture: Architecture

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (B, H, W, 3) to (B, H / 32, W / 32, F), sides rounded up."""
        stem, blocks, last = _parts(self.architecture)
        x = Convolution(stem, name=stem.name)(x)
        for block in blocks:
            y = x
            for layer in block:
                y = Convolution(layer, name=layer.name)(y)
            adds = all(layer.stride == 1 for layer in block) and block[0].channels == block[-1].features
            x = x + y if adds else y
        return Convolution(last, name=last.name)(x)


def _parts(architecture: Architecture) -> tuple[Layer, list[list[Layer]], Layer]:
    """The stem, the layers of each block, and the last convolution, by the checkpoint's names."""
    stem = Layer("conv_stem", "bn1", 3, 3, architecture.stem, stride=2)
    blocks, channels = [], architecture.stem
    for number, stage in enumerate(architecture.stages):
        for index, block in enumerate(stage):
            blocks.append(list(_block(f"blocks.{number}.{index}", block, channels)))
            channels = block.features
    name = f"blocks.{len(architecture.stages)}.0"
    return stem, blocks, Layer(f"{name}.conv", f"{name}.bn1", 1, channels, architecture.features)


def _block(name: str, block: Block, channels: int) -> Iterator[Layer]:
    expanded, norms, last = block.expanded or channels, iter(("bn1", "bn2", "bn3")), "conv_pw"
    if block.expanded:
        last = "conv_pwl"
        yield Layer(f"{name}.conv_pw", f"{name}.{next(norms)}", 1, channels, expanded)
    yield Layer(f"{name}.conv_dw", f"{name}.{next(norms)}", 3, expanded, expanded, stride=block.stride, depthwise=True)
    yield Layer(f"{name}.{last}", f"{name}.{next(norms)}", 1, expanded, block.features, relu=False)
