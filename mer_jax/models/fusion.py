"""The hybrid fusion of appearance and geometry (hybrid fusion paper, section 3.1.3) and its ablations (tables 2, 3)."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from mer_jax.models.layers import dropout_scale
from mer_jax.models.mqa import IMPLEMENTATION, Implementation, MultiQueryPooling
from mer_jax.models.products import BY_XLA, Products, dense_product
from mer_jax.models.stored import Stored, fetched

FUSIONS = ("gate", "mean", "concat")
DROPOUT_KINDS = ("clip", "frame")


class SoftmaxGate(nn.Module):
    """A learned convex combination: one trainable scalar a modality, softmax over them (section 3.1.3, eq. 2)."""

    @nn.compact
    def __call__(self, descriptors: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mixes the modalities' descriptors with weights that do not depend on the input.

        Args:
            descriptors: ``(G, B, d_k)``, one descriptor a modality.

        Returns:
            The mixture ``(B, d_k)`` and the weights ``(G,)``, which sum to 1 and start out equal.
        """
        logits = self.param("logits", nn.initializers.zeros, (descriptors.shape[0],))
        weights = nn.softmax(logits)
        # A sum of few terms, written out: a product with so few rows costs a CPU more than all its arithmetic.
        return sum(weight * descriptor for weight, descriptor in zip(weights, descriptors, strict=True)), weights


class ClassifierHead(nn.Module):
    """Linear, GELU, LayerNorm, Dropout, Linear, in this order (section 3.1.3, prediction head).

    Attributes:
        hidden_dim: Width between the two linear layers.
        num_classes: Number of logits.
        products: How the product with the hidden kernel is worked out.
    """

    hidden_dim: int
    num_classes: int
    products: Products = BY_XLA

    @nn.compact
    def __call__(self, descriptor: jax.Array, *, train: bool = False, dropout: jax.Array | float = 0.0) -> jax.Array:
        """Maps descriptors ``(B, d_k)`` to logits ``(B, num_classes)``; ``dropout`` is a rate in [0, 1)."""
        hidden = nn.Dense(self.hidden_dim, name="hidden", dot_general=dense_product(self.products))(descriptor)
        hidden = nn.gelu(hidden, approximate=False)
        hidden = nn.LayerNorm(epsilon=1e-5, name="norm")(hidden)
        scale = dropout_scale(self, hidden.shape, dropout, train)
        if scale is not None:
            hidden = hidden * scale
        return nn.Dense(self.num_classes, name="logits")(hidden)


class FusionClassifier(nn.Module):
    """Pools each modality over time, fuses the descriptors and classifies (section 3.1.3, figure 1).

    Attributes:
        num_queries: Modality to its number of queries; its order is the order of fusion and of concatenation. With
            ``fusion='concat'`` the first entry's number serves the one encoder.
        key_dim: Common width of the descriptors, d_k. The weighted sum needs it to be common, and the value
            projection does the matching of dimensions.
        hidden_dim: Width of the head.
        num_classes: Number of labels.
        fusion: ``'gate'`` softmax gate (the paper's system), ``'mean'`` plain mean of the descriptors (dual pool, no
            gate), ``'concat'`` one temporal encoder on the concatenated features. Without effect on one modality.
        concat_width: With ``'concat'``, keep only the first values of the concatenated features; 0 keeps all (the
            released inference keeps 1664).
        feature_dropout_kind: ``'clip'`` draws one mask per feature and clip, ``'frame'`` one per feature and frame.
            The paper says feature-level dropout and not which.
        implementation: How pooling and large products are worked out.
    """

    num_queries: Mapping[str, int]
    key_dim: int
    hidden_dim: int
    num_classes: int
    fusion: str = "gate"
    concat_width: int = 0
    feature_dropout_kind: str = "clip"
    implementation: Implementation = IMPLEMENTATION

    @nn.compact
    def __call__(
        self,
        features: Mapping[str, jax.Array | Stored],
        frame_mask: jax.Array | None = None,
        *,
        train: bool = False,
        dropout: jax.Array | float = 0.0,
        feature_dropout: jax.Array | float = 0.0,
    ) -> tuple[jax.Array, dict]:
        """Classifies clips.

        Args:
            features: Modality to ``(B, T, D_modality)`` frame features.
            frame_mask: ``(B, T)`` bool, False for padding; None when every frame is real.
            train: Whether dropout is on (needs the ``dropout`` stream of random numbers).
            dropout: Rate in the head, in [0, 1); may be traced.
            feature_dropout: Rate on the features of all modalities, in [0, 1); may be traced.

        Returns:
            Logits ``(B, num_classes)`` and a dict with ``attention`` (temporal encoder to ``(B, Q, T)``) and, with
            the gate, ``gate`` ``(G,)``, in the order of ``num_queries``.
        """
        streams = {name: features[name] for name in self.num_queries}
        if self.fusion == "concat" and len(streams) > 1:
            joined = jnp.concatenate([fetched(stream) for stream in streams.values()], axis=-1)  # (B, T, sum of D)
            streams = {"concat": joined[..., : self.concat_width or None]}

        descriptors, attention = [], {}
        for name, stream in streams.items():
            scale = None
            if self.feature_dropout_kind == "clip":
                scale = dropout_scale(self, (stream.shape[0], stream.shape[2]), feature_dropout, train)
            else:
                frame_scale = dropout_scale(self, stream.shape, feature_dropout, train)
                stream = stream if frame_scale is None else fetched(stream) * frame_scale
            queries = self.num_queries[name] if name in self.num_queries else next(iter(self.num_queries.values()))
            pooled, attention[name] = MultiQueryPooling(
                queries, self.key_dim, self.implementation, name=f"pool_{name}"
            )(stream, frame_mask, feature_scale=scale, return_attention=True)
            descriptors.append(pooled)

        extras = {"attention": attention}
        if len(descriptors) == 1:
            fused = descriptors[0]
        elif self.fusion == "gate":
            fused, extras["gate"] = SoftmaxGate(name="gate")(jnp.stack(descriptors))
        else:
            fused = jnp.stack(descriptors).mean(axis=0)  # (G, B, d_k) -> (B, d_k)
        head = ClassifierHead(self.hidden_dim, self.num_classes, self.implementation.products, name="head")
        return head(fused, train=train, dropout=dropout), extras
