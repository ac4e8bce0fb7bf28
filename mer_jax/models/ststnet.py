"""STSTNet: a shallow triple-stream three-dimensional network (Liong et al. 2019), as its authors' PyTorch code has it.

Three parallel streams see all channels of one flow image of 28 x 28 pixels. Written so that the authors' published
weights (one file a left-out subject) can be loaded: see :mod:`mer_jax.models.import_ststnet`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mer_jax.models import tiles
from mer_jax.models.convolution import BatchNorm, Block, ConvParams, Dense, Implementation, convolution_block
from mer_jax.models.layers import dropout_scale

STREAM_FEATURES = (3, 5, 8)


class STSTNet(nn.Module):
    """The network of three shallow streams.

    Each is Conv 3x3 (padding 2) - ReLU - BatchNorm - MaxPool 3x3 (stride 3, padding 1) - Dropout; then come average
    pooling 2x2 of all streams, flattening, and one dense layer.

    Attributes:
        num_classes: C.
        implementation: What works out the maps; changes speed alone.
    """

    num_classes: int
    implementation: Implementation = tiles.IMPLEMENTATION

    @nn.compact
    def __call__(
        self,
        flow: jax.Array,
        sample_mask: jax.Array | None = None,
        *,
        train: bool = False,
        dropout: jax.Array | float = 0.5,
    ) -> jax.Array:
        """Classifies flow images.

        Args:
            flow: ``(B, H, W, channels)``; the published weights expect 28 x 28 pixels, values 0 to 255 and the
                channels (strain, v, u).
            sample_mask: ``(B,)`` bool, False for padding; None for none.
            train: Whether to drop out and to use the statistics of the batch.
            dropout: Rate, in [0, 1).

        Returns:
            Logits ``(B, C)``.
        """
        mask = jnp.ones(flow.shape[0], bool) if sample_mask is None else sample_mask
        convs = [ConvParams(f, 3, name=f"conv{n}")(flow.shape[-1]) for n, f in enumerate(STREAM_FEATURES, start=1)]
        norms = [BatchNorm(name=f"bn{number}")(features) for number, features in enumerate(STREAM_FEATURES, start=1)]
        x = convolution_block(
            self.implementation,
            Block(padding=2, window=3, pool_padding=1, rectify=True, batch_first=True),
            flow,
            jnp.concatenate([kernel for kernel, _ in convs], axis=-1),  # (3, 3, channels, 16)
            jnp.concatenate([bias for _, bias in convs]),
            norms,
            mask,
            train=train,
        )  # (16, H', W', B)
        scale = dropout_scale(self, x.shape, dropout, train, sample_axis=3)
        x = x if scale is None else x * scale
        x = average_pool(x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2])
        x = x.reshape(-1, x.shape[-1])  # (16, H'', W'', B) -> (16 H'' W'', B), in the order of PyTorch's flattening
        return Dense(self.num_classes, name="fc")(x, samples_last=True)


@jax.custom_vjp
def average_pool(maps: jax.Array) -> jax.Array:
    """Means of windows of 2 x 2 pixels.

    Args:
        maps: ``(F, 2 H, 2 W, B)``.

    Returns:
        ``(F, H, W, B)``.
    """
    return 0.25 * sum(maps[:, row::2, column::2] for row in range(2) for column in range(2))


def _average_pool_backward(_, gradient):
    # Broadcast, which takes less than the sum of four padded arrays that differentiating slices would make.
    features, height, width, batch = gradient.shape
    spread = jnp.broadcast_to(0.25 * gradient[:, :, None, :, None], (features, height, 2, width, 2, batch))
    return (spread.reshape(features, 2 * height, 2 * width, batch),)


average_pool.defvjp(lambda maps: (average_pool(maps), ()), _average_pool_backward)
