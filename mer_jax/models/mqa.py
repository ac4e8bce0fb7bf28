"""Multi-query attention pooling: a sequence of frame features to one vector (hybrid fusion paper, section 3.1.3)."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mer_jax.models.products import BY_XLA, Products, project, project_back, score
from mer_jax.models.stored import Stored, fetched

# Large enough to vanish after softmax, small enough that a row of nothing but padding stays finite.
_MASKED_SCORE = -1e30


def pool_frames(
    frames: jax.Array | Stored, frame_mask: jax.Array | None, feature_scale: jax.Array | None, probes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Frames by how they answer to probes, averaged over these; what is left of pooling once projections are aside.

    Args:
        frames: ``(B, T, D)``.
        frame_mask: ``(B, T)`` bool, False for padding, or None.
        feature_scale: ``(B, D)`` factor on the values of all frames, or None.
        probes: ``(Q, D)``, ``Q W_K^T / sqrt(d_k)``.

    Returns:
        The pooled frames ``(B, D)`` and the attention ``(B, Q, T)``, whose rows sum to 1.
    """
    frames = fetched(frames)
    if feature_scale is not None:
        # Scaling the probes instead would need a product a sample, which costs more than scaling the frames. The
        # barrier has frames fetched and scaled in one go, and once for all the products below.
        frames = jax.lax.optimization_barrier(frames * feature_scale[:, None, :])  # (B, T, D) (B, 1, D)
    # One product of all frames: a product a sample runs at a third of its speed on a CPU.
    scores = score(frames.reshape(-1, frames.shape[-1]), probes)  # (B T, D) (Q, D) -> (B T, Q)
    scores = scores.reshape(*frames.shape[:2], -1).swapaxes(1, 2)  # (B T, Q) -> (B, T, Q) -> (B, Q, T)
    if frame_mask is not None:
        scores = jnp.where(frame_mask[:, None, :], scores, _MASKED_SCORE)  # (B, 1, T) over (B, Q, T)
    attention = nn.softmax(scores, axis=-1)
    return jnp.einsum("bt,btd->bd", attention.mean(axis=1), frames), attention


class Implementation(NamedTuple):
    """How the large arrays of pooling are worked out. Those there are differ in speed and in last bits alone.

    Attributes:
        pool: :func:`pool_frames`, or the same by other means.
        products: Of a few rows with kernels.
    """

    pool: Callable
    products: Products


IMPLEMENTATION = Implementation(pool_frames, BY_XLA)


class MultiQueryPooling(nn.Module):
    """Learned queries attend to one shared key and value projection of the frames; their answers are averaged.

    K = F W_K, V = F W_V and z = mean over queries of softmax(Q K^T / sqrt(d_k)) V, as in section 3.1.3, eq. 1.
    Neither K nor V is ever made: the queries are learned and do not depend on the batch, so scores are
    ``F (W_K Q^T)``, and since the mean over queries is linear, ``z = (mean_q A) F W_V``. Both are equal to the
    textbook order and save about a factor T on the value side and d_k / Q on the key side.

    Attributes:
        num_queries: Number of learned queries, Q.
        key_dim: Width of queries, keys and values, d_k; also the width of the pooled vector.
        implementation: How it is worked out.
    """

    num_queries: int
    key_dim: int
    implementation: Implementation = IMPLEMENTATION

    @nn.compact
    def __call__(
        self,
        features: jax.Array | Stored,
        frame_mask: jax.Array | None = None,
        *,
        feature_scale: jax.Array | None = None,
        return_attention: bool = False,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Pools over time.

        Args:
            features: ``(B, T, D)`` frame features.
            frame_mask: ``(B, T)`` bool, False for padding; None when every frame is real. What stands in a padded
                frame changes nothing, as long as it is finite.
            feature_scale: ``(B, D)`` factor on the features of all frames, such as a dropout mask.
            return_attention: Whether to return the attention as well.

        Returns:
            The pooled vectors ``(B, d_k)``; with ``return_attention`` also the attention ``(B, Q, T)``, whose rows
            sum to 1.
        """
        width = features.shape[-1]
        # Small queries begin near the plain mean over time and learn where to look; the paper does not say.
        queries = self.param("query", nn.initializers.normal(0.1), (self.num_queries, self.key_dim))
        key_kernel = self.param("key_kernel", nn.initializers.lecun_normal(), (width, self.key_dim))
        value_kernel = self.param("value_kernel", nn.initializers.lecun_normal(), (width, self.key_dim))

        key_taps, value_taps = (self.get_variable("taps", name) for name in ("key_kernel", "value_kernel"))
        pool, by = self.implementation

        probes = project_back(queries * self.key_dim**-0.5, key_kernel, key_taps, by)  # (Q, d_k) (d_k, D) -> (Q, D)
        pooled, attention = pool(features, frame_mask, feature_scale, probes)
        pooled = project(pooled, value_kernel, value_taps, by)  # (B, D) (D, d_k) -> (B, d_k)
        return (pooled, attention) if return_attention else pooled
