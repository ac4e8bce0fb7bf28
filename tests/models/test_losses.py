"""The loss against PyTorch, hand-computed cases, its limits and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.test_util import check_grads

from mer_jax.models.losses import (
    balanced_class_weight,
    balanced_positive_weight,
    binary_focal_loss,
    softmax_focal_loss,
)


@pytest.mark.parametrize("weighted", [False, True])
def test_gamma_zero_is_binary_cross_entropy(weighted, rng):
    logits, labels = rng.normal(size=(8, 5)).astype(np.float32) * 4, rng.integers(0, 2, (8, 5)).astype(np.float32)
    weight = rng.uniform(0.5, 3, 5).astype(np.float32) if weighted else None
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(logits),
        torch.tensor(labels),
        reduction="none",
        pos_weight=weight if weight is None else torch.tensor(weight),
    )
    ours = binary_focal_loss(logits, labels, positive_weight=None if weight is None else jnp.asarray(weight))
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_gamma_two_by_hand():
    # p = 0.8 of a positive: -(0.2^2) ln 0.8; of a negative: -(0.8^2) ln 0.2
    logit = np.log(0.8 / 0.2).astype(np.float32)
    losses = binary_focal_loss(jnp.array([logit, logit]), jnp.array([1.0, 0.0]), gamma=2.0)
    np.testing.assert_allclose(losses, [-0.04 * np.log(0.8), -0.64 * np.log(0.2)], rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_extreme_logits_stay_finite(gamma):
    logits = jnp.array([-100.0, -100.0, 100.0, 100.0, 0.0])
    labels = jnp.array([0.0, 1.0, 0.0, 1.0, 1.0])
    value, gradient = jax.value_and_grad(lambda x: binary_focal_loss(x, labels, gamma=gamma).sum())(logits)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_gradients(rng):
    with jax.enable_x64(True):
        labels = jnp.asarray(rng.integers(0, 2, (3, 5)), jnp.float64)
        check_grads(
            lambda x: binary_focal_loss(x, labels, gamma=2.0, positive_weight=jnp.arange(1.0, 6.0)),
            (jnp.asarray(rng.normal(size=(3, 5))),),
            order=2,
        )


def test_balanced_weight_counts_only_the_mask():
    labels = jnp.array([[1, 0], [0, 0], [0, 0], [1, 1]], jnp.float32)
    weight = balanced_positive_weight(labels, jnp.array([True, True, True, False]))
    np.testing.assert_allclose(weight, [2.0, 1.0])  # 2 negatives to 1 positive; no positive: 1


def test_softmax_focal_loss_without_focus_is_cross_entropy(rng):
    logits, classes = rng.normal(size=(8, 3)).astype(np.float32) * 3, rng.integers(0, 3, 8)
    want = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(classes), reduction="none")
    mine = softmax_focal_loss(jnp.asarray(logits), jnp.asarray(np.eye(3, dtype=np.float32)[classes]))
    np.testing.assert_allclose(mine, want, rtol=1e-5, atol=1e-6)


def test_softmax_focal_loss_by_hand():
    # Softmax of (log 1, log 2, log 1) is (1/4, 1/2, 1/4); the true class is the second: (1/2)^2 log 2.
    loss = softmax_focal_loss(jnp.log(jnp.array([[1.0, 2.0, 1.0]])), jnp.array([[0.0, 1.0, 0.0]]), gamma=2.0)
    np.testing.assert_allclose(loss, [0.25 * np.log(2.0)], rtol=1e-6)
    weighted = softmax_focal_loss(
        jnp.log(jnp.array([[1.0, 2.0, 1.0]])),
        jnp.array([[0.0, 1.0, 0.0]]),
        gamma=2.0,
        class_weight=jnp.array([1.0, 3.0, 1.0]),
    )
    np.testing.assert_allclose(weighted, [0.75 * np.log(2.0)], rtol=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_softmax_focal_loss_is_finite_at_large_logits(sign):
    logits, labels = sign * jnp.array([[100.0, -100.0, 0.0]]), jnp.array([[1.0, 0.0, 0.0]])
    value, gradient = jax.value_and_grad(lambda x: softmax_focal_loss(x, labels, gamma=2.0).sum())(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_gradients_of_the_softmax_focal_loss(rng):
    with jax.enable_x64(True):
        logits, labels = jnp.asarray(rng.normal(size=(4, 3))), jnp.eye(3)[jnp.array([0, 2, 1, 1])]
        check_grads(lambda x: softmax_focal_loss(x, labels, gamma=2.0), (logits,), 1, modes=["rev"])


def test_balanced_class_weights_by_hand():
    labels = jnp.eye(3)[jnp.array([0, 0, 0, 1, 2])]
    mask = jnp.array([True, True, True, True, False])
    # Two classes present among four samples: 4 / (2 * 3) and 4 / (2 * 1); the third has none.
    np.testing.assert_allclose(balanced_class_weight(labels, mask), [4 / 6, 2.0, 0.0], rtol=1e-6)
