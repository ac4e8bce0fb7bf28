"""Triple-stream MicroAttNet (Nguyen et al. 2026, section 3.5): one convolutional stream per channel of optical flow.

Each stream runs through two blocks, Conv - BatchNorm - ReLU - Dropout - MaxPool; after each block Fusion Attention
weighs the streams against each other; Squeeze-and-Excitation recalibrates the magnitude stream after its second block.

What the paper leaves unsaid, and what is taken here: the order of Squeeze-and-Excitation and the second Fusion
Attention (in this order, as the former belongs to the block); bias in the two attention networks (none, as in its
formulas); the kind of dropout in the blocks (whole channels of a sample, Tompson et al. 2015: neighbouring pixels of a
map say nearly the same, so dropping single ones hides little, and whole channels may be dropped after the pooling,
which is the same and much cheaper). All sizes are attributes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mer_jax.models import tiles
from mer_jax.models.convolution import (
    BatchNorm,
    Block,
    ConvParams,
    Dense,
    Implementation,
    convolution_block,
    masked_batch_norm,
    torch_uniform,
)
from mer_jax.models.layers import dropout_scale


class FusionAttention(nn.Module):
    """Scalar weights of the streams: softmax(W_2 ReLU(W_1 g)), g the streams' average-pooled maps.

    Attributes:
        hidden: Width of the layer between.
    """

    hidden: int

    @nn.compact
    def __call__(self, descriptors: jax.Array, num_streams: int) -> jax.Array:
        """Weighs the streams.

        Args:
            descriptors: ``(B, S C)``, the streams' descriptors one after another.
            num_streams: S.

        Returns:
            ``(B, S)``, positive, each row of sum 1.
        """
        width = descriptors.shape[-1]
        first = self.param("first", torch_uniform(width), (width, self.hidden))
        second = self.param("second", torch_uniform(self.hidden), (self.hidden, num_streams))
        return nn.softmax(nn.relu(descriptors @ first) @ second)  # (B, S C) -> (B, hidden) -> (B, S)


class SqueezeExcitation(nn.Module):
    """Channel weights sigmoid(W_2 ReLU(W_1 s)), s the average-pooled maps (Hu et al. 2018).

    Attributes:
        reduction: The layer between has C / reduction units, at least one.
    """

    reduction: int

    @nn.compact
    def __call__(self, descriptor: jax.Array) -> jax.Array:
        """Maps ``(B, C)`` to weights ``(B, C)`` in (0, 1)."""
        channels = descriptor.shape[-1]
        hidden = max(1, channels // self.reduction)
        first = self.param("first", torch_uniform(channels), (channels, hidden))
        second = self.param("second", torch_uniform(hidden), (hidden, channels))
        return nn.sigmoid(nn.relu(descriptor @ first) @ second)  # (B, C) -> (B, hidden) -> (B, C)


class MicroAttNet(nn.Module):
    """The network, for any number S of streams.

    Attributes:
        num_classes: C.
        se_stream: Number of the stream with Squeeze-and-Excitation, -1 for none.
        attention: Whether there is Fusion Attention.
        features: Channels of the two blocks.
        kernels: Sides of their kernels; the maps keep their size.
        pools: Sides and strides of their pooling windows.
        attention_hidden: Width inside Fusion Attention.
        se_reduction: Reduction inside Squeeze-and-Excitation.
        hidden_dim: Width of the classifier.
        implementation: What works out the maps of the blocks; changes speed alone.
    """

    num_classes: int
    se_stream: int
    attention: bool = True
    features: tuple[int, int] = (8, 16)
    kernels: tuple[int, int] = (5, 3)
    pools: tuple[int, int] = (3, 2)
    attention_hidden: int = 16
    se_reduction: int = 4
    hidden_dim: int = 64
    implementation: Implementation = tiles.IMPLEMENTATION

    @nn.compact
    def __call__(
        self,
        flow: jax.Array,
        sample_mask: jax.Array | None = None,
        *,
        train: bool = False,
        dropout: jax.Array | float = 0.0,
        feature_dropout: jax.Array | float = 0.0,
    ) -> tuple[jax.Array, dict]:
        """Classifies flow fields.

        Args:
            flow: ``(B, H, W, S)``, such as u, v and magnitude.
            sample_mask: ``(B,)`` bool, False for padding; None for none.
            train: Whether to drop out and to use the statistics of the batch.
            dropout: Rate before the last layer, in [0, 1).
            feature_dropout: Rate of channels in the blocks, in [0, 1).

        Returns:
            Logits ``(B, C)`` and, with attention, ``{'attention': {'streams1', 'streams2': (B, 1, S)}}``.
        """
        mask = jnp.ones(flow.shape[0], bool) if sample_mask is None else sample_mask
        num_streams = flow.shape[-1]
        streams = [flow[..., number : number + 1] for number in range(num_streams)]  # (B, H, W, 1)
        weights = {}
        for block in range(2):
            for number in range(num_streams):
                size = self.kernels[block]
                conv = ConvParams(self.features[block], size, name=f"conv{block + 1}_{number}")
                channels = streams[number].shape[0] if block else 1
                norm = BatchNorm(name=f"bn{block + 1}_{number}")(self.features[block])
                maps = convolution_block(
                    self.implementation,
                    Block(
                        padding=size // 2,
                        window=self.pools[block],
                        pool_padding=0,
                        rectify=False,
                        batch_first=not block,
                    ),
                    streams[number],
                    *conv(channels),
                    [norm],
                    mask,
                    train=train,
                )
                # ReLU and the dropout of whole channels commute with max pooling.
                maps = nn.relu(maps)
                scale = dropout_scale(self, (maps.shape[-1], maps.shape[0]), feature_dropout, train)  # (B, F)
                streams[number] = maps if scale is None else maps * scale.T[:, None, None]  # (F, 1, 1, B)
            if block == 1 and self.se_stream >= 0:
                maps = streams[self.se_stream]
                excitation = SqueezeExcitation(self.se_reduction, name="se")(maps.mean(axis=(1, 2)).T)
                streams[self.se_stream] = maps * excitation.T[:, None, None]  # (F, H, W, B) (F, 1, 1, B)
            if self.attention:
                descriptors = jnp.concatenate([maps.mean(axis=(1, 2)) for maps in streams]).T  # (B, S F)
                alpha = FusionAttention(self.attention_hidden, name=f"attention{block + 1}")(descriptors, num_streams)
                streams = [maps * alpha[:, n].reshape(1, 1, 1, -1) for n, maps in enumerate(streams)]
                weights[f"streams{block + 1}"] = alpha[:, None]
        flat = jnp.concatenate([maps.reshape(-1, maps.shape[-1]) for maps in streams]).T  # (B, S F H W)
        hidden = Dense(self.hidden_dim, name="hidden")(flat)
        hidden = nn.relu(masked_batch_norm(hidden, BatchNorm(name="bn_hidden")(self.hidden_dim), mask, train=train))
        scale = dropout_scale(self, hidden.shape, dropout, train)
        hidden = hidden if scale is None else hidden * scale
        return Dense(self.num_classes, name="logits")(hidden), {"attention": weights} if weights else {}
