"""Losses of multi-label and multi-class classification, from logits."""

import jax
import jax.numpy as jnp


def binary_focal_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    gamma: jax.Array | float = 0.0,
    positive_weight: jax.Array | None = None,
) -> jax.Array:
    """Sigmoid focal loss of every label on its own (Lin et al. 2017, eq. 4, read per class for multi-label data).

    ``-w y (1 - p)^gamma log p - (1 - y) p^gamma log(1 - p)`` with ``p = sigmoid(logit)``. With ``gamma = 0`` it is
    the binary cross-entropy. Written in log-probabilities throughout, so it is finite, with finite gradients, for
    any finite logit.

    Args:
        logits: ``(..., C)``.
        labels: ``(..., C)``, 0 or 1.
        gamma: Focusing exponent, >= 0.
        positive_weight: ``(C,)`` factor ``w`` on the positive term; None for 1.

    Returns:
        Losses ``(..., C)``, >= 0, not averaged.
    """
    log_p = jax.nn.log_sigmoid(logits)
    log_not_p = jax.nn.log_sigmoid(-logits)
    positive = jnp.exp(gamma * log_not_p) * log_p
    negative = jnp.exp(gamma * log_p) * log_not_p
    if positive_weight is not None:
        positive = positive * positive_weight.reshape((1,) * (positive.ndim - 1) + (-1,))  # (C,) -> (1, ..., C)
    return -(labels * positive + (1.0 - labels) * negative)


def balanced_positive_weight(labels: jax.Array, sample_mask: jax.Array) -> jax.Array:
    """Negatives over positives of each class, from the masked-in samples only.

    A class without positives or without negatives keeps the weight 1: there is nothing to balance.

    Args:
        labels: ``(N, C)``, 0 or 1.
        sample_mask: ``(N,)``, the samples that count.

    Returns:
        ``(C,)`` weights for :func:`binary_focal_loss`.
    """
    mask = sample_mask.astype(labels.dtype)
    positives = mask @ labels  # (N,) (N, C) -> (C,)
    negatives = mask.sum() - positives
    return jnp.where((positives > 0) & (negatives > 0), negatives / jnp.maximum(positives, 1.0), 1.0)


def softmax_focal_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    gamma: jax.Array | float = 0.0,
    class_weight: jax.Array | None = None,
) -> jax.Array:
    """Focal loss of exclusive classes (Lin et al. 2017, eq. 4): ``-w_c (1 - p_c)^gamma log p_c`` of the true class c.

    With ``gamma = 0`` it is the cross-entropy. Finite, with finite gradients, for any finite logit.

    Args:
        logits: ``(..., C)``.
        labels: ``(..., C)``, one-hot.
        gamma: Focusing exponent, >= 0.
        class_weight: ``(C,)`` factors ``w``; None for 1.

    Returns:
        Losses ``(...)``, >= 0, not averaged.
    """
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    log_p = logits - normaliser
    # log(1 - p) of the true class from the other classes' logits, exact also where p is 1 in float32.
    log_others = jax.nn.logsumexp(jnp.where(labels > 0, -1e30, logits), axis=-1, keepdims=True) - normaliser
    terms = labels * jnp.exp(gamma * log_others) * log_p
    if class_weight is not None:
        terms = terms * class_weight.reshape((1,) * (terms.ndim - 1) + (-1,))  # (C,) -> (1, ..., C)
    return -jnp.sum(terms, axis=-1)


def balanced_class_weight(labels: jax.Array, sample_mask: jax.Array) -> jax.Array:
    """Weights of exclusive classes, inverse to their frequency among the masked-in samples, of mean 1 over these.

    Args:
        labels: ``(N, C)``, one-hot.
        sample_mask: ``(N,)``, the samples that count.

    Returns:
        ``(C,)`` weights for :func:`softmax_focal_loss`; 0 for a class without samples.
    """
    counts = sample_mask.astype(labels.dtype) @ labels  # (N,) (N, C) -> (C,)
    present = jnp.sum(counts > 0)
    return jnp.where(counts > 0, jnp.sum(counts) / (present * jnp.maximum(counts, 1.0)), 0.0)
