"""STSTNet: a shallow triple-stream three-dimensional network (Liong et al. 2019), as its authors' PyTorch code has it.

Three parallel streams see all channels of one flow image of 28 x 28 pixels. Written so that the authors' published
weights (one file a left-out subject) can be loaded: see :mod:`mer_jax.models.import_ststnet`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mer_jax.models.convolution import BatchNorm, Dense, batch_norm_max_pool, convolve, torch_uniform
from mer_jax.models.layers import dropout_scale

STREAM_FEATURES = (3, 5, 8)


class _ConvParams(nn.Module):
    """The parameters of one stream's convolution; the streams are computed as one."""

    features: int

    @nn.compact
    def __call__(self, channels: int) -> tuple[jax.Array, jax.Array]:
        fan_in = channels * 9
        kernel = self.param("kernel", torch_uniform(fan_in), (3, 3, channels, self.features))
        return kernel, self.param("bias", torch_uniform(fan_in), (self.features,))


class STSTNet(nn.Module):
    """The network of three shallow streams.

    Each is Conv 3x3 (padding 2) - ReLU - BatchNorm - MaxPool 3x3 (stride 3, padding 1) - Dropout; then come average
    pooling 2x2 of all streams, flattening, and one dense layer.

    Attributes:
        num_classes: C.
    """

    num_classes: int

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
        x = flow.transpose(3, 1, 2, 0)  # (B, H, W, channels) -> (channels, H, W, B)
        convs = [_ConvParams(f, name=f"conv{n}")(x.shape[0]) for n, f in enumerate(STREAM_FEATURES, start=1)]
        kernel = jnp.concatenate([kernel for kernel, _ in convs], axis=-1)  # (3, 3, channels, 16)
        bias = jnp.concatenate([bias for _, bias in convs])
        x = nn.relu(convolve(x, kernel, 2) + bias[:, None, None, None])  # (16, H + 2, W + 2, B)
        norms = [BatchNorm(name=f"bn{number}")(features) for number, features in enumerate(STREAM_FEATURES, start=1)]
        x = batch_norm_max_pool(x, norms, mask, window=3, padding=1, train=train)  # (16, H', W', B)
        # Drawn sample by sample: padding a batch further leaves the draws of its samples as they are.
        scale = dropout_scale(self, (x.shape[-1], *x.shape[:-1]), dropout, train)  # (B, 16, H', W')
        x = x if scale is None else x * jnp.moveaxis(scale, 0, -1)
        height, width = x.shape[1] // 2, x.shape[2] // 2
        x = x[:, : 2 * height, : 2 * width].reshape(-1, height, 2, width, 2, x.shape[-1]).mean(axis=(2, 4))
        x = x.reshape(-1, x.shape[-1]).T  # (16, H'', W'', B) -> (B, 16 H'' W''), as PyTorch flattens
        return Dense(self.num_classes, name="fc")(x)
