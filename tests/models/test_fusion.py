"""The fusion model against an independent PyTorch writing of section 3.1.3, and its properties."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.test_util import check_grads
from torch import nn

from mer_jax.models.fusion import FusionClassifier, SoftmaxGate
from mer_jax.models.mqa import MultiQueryPooling

WIDTHS = {"appearance": 24, "geometry": 10}
BATCH, FRAMES, KEY_DIM, HIDDEN, CLASSES = 6, 7, 16, 12, 5


class TorchPooling(nn.Module):
    """The textbook order: K and V are made, every query answers, the answers are averaged."""

    def __init__(self, width, queries):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(queries, KEY_DIM))
        self.key = nn.Linear(width, KEY_DIM, bias=False)
        self.value = nn.Linear(width, KEY_DIM, bias=False)

    def forward(self, frames, mask=None):
        scores = self.query @ self.key(frames).transpose(1, 2) / KEY_DIM**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, :], float("-inf"))
        attention = scores.softmax(-1)
        return (attention @ self.value(frames)).mean(1), attention


class TorchFusion(nn.Module):
    def __init__(self, queries, fusion):
        super().__init__()
        self.fusion = fusion
        if fusion == "concat":
            self.pools = nn.ModuleList([TorchPooling(sum(WIDTHS.values()), next(iter(queries.values())))])
        else:
            self.pools = nn.ModuleList([TorchPooling(WIDTHS[name], number) for name, number in queries.items()])
        self.gate = nn.Parameter(torch.zeros(len(queries)))
        self.head = nn.Sequential(
            nn.Linear(KEY_DIM, HIDDEN), nn.GELU(), nn.LayerNorm(HIDDEN), nn.Dropout(0.0), nn.Linear(HIDDEN, CLASSES)
        )

    def forward(self, *frames):
        if self.fusion == "concat":
            frames = [torch.cat(frames, -1)]
        pooled = [pool(frame)[0] for pool, frame in zip(self.pools, frames, strict=True)]
        weights = self.gate.softmax(0) if self.fusion == "gate" else torch.full((len(pooled),), 1 / len(pooled))
        return self.head(sum(weight * z for weight, z in zip(weights, pooled, strict=True)))


def to_torch(params, queries, fusion):
    """Our parameters in the PyTorch model (its Linear keeps kernels transposed)."""
    model = TorchFusion(queries, fusion)
    names = ["concat"] if fusion == "concat" else list(queries)
    state = {"gate": params["gate"]["logits"] if fusion == "gate" else np.zeros(len(queries))}
    for number, name in enumerate(names):
        pool = params[f"pool_{name}"]
        state[f"pools.{number}.query"] = pool["query"]
        state[f"pools.{number}.key.weight"] = pool["key_kernel"].T
        state[f"pools.{number}.value.weight"] = pool["value_kernel"].T
    head = params["head"]
    state |= {
        "head.0.weight": head["hidden"]["kernel"].T,
        "head.0.bias": head["hidden"]["bias"],
        "head.2.weight": head["norm"]["scale"],
        "head.2.bias": head["norm"]["bias"],
        "head.4.weight": head["logits"]["kernel"].T,
        "head.4.bias": head["logits"]["bias"],
    }
    model.load_state_dict({name: torch.tensor(np.array(value), dtype=torch.float32) for name, value in state.items()})
    return model


def from_torch(model, params, fusion):
    """The PyTorch model's gradients or parameters in the shape of ours."""
    names = [name.removeprefix("pool_") for name in params if name.startswith("pool_")]
    ordered = [name for name in ("concat", "appearance", "geometry") if name in names]
    read = {name: value.numpy() for name, value in model.items()}
    tree = {
        f"pool_{name}": {
            "query": read[f"pools.{number}.query"],
            "key_kernel": read[f"pools.{number}.key.weight"].T,
            "value_kernel": read[f"pools.{number}.value.weight"].T,
        }
        for number, name in enumerate(ordered)
    }
    tree["head"] = {
        "hidden": {"kernel": read["head.0.weight"].T, "bias": read["head.0.bias"]},
        "norm": {"scale": read["head.2.weight"], "bias": read["head.2.bias"]},
        "logits": {"kernel": read["head.4.weight"].T, "bias": read["head.4.bias"]},
    }
    if fusion == "gate":
        tree["gate"] = {"logits": read["gate"]}
    return tree


@pytest.fixture
def batch(rng):
    features = {name: rng.normal(size=(BATCH, FRAMES, width)).astype(np.float32) for name, width in WIDTHS.items()}
    return features, rng.integers(0, 2, (BATCH, CLASSES)).astype(np.float32)


def make(fusion="gate", **changes):
    settings = dict(num_queries={"appearance": 4, "geometry": 3}, key_dim=KEY_DIM, hidden_dim=HIDDEN)
    return FusionClassifier(num_classes=CLASSES, fusion=fusion, **settings | changes)


def randomised(params, rng):
    """Every parameter away from its special initial value, so that none can be forgotten unseen."""
    return jax.tree.map(lambda x: jnp.asarray(x + 0.3 * rng.normal(size=x.shape), jnp.float32), params)


def assert_trees_close(ours, theirs, tolerance):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, theirs)


@pytest.mark.parametrize("fusion", ["gate", "mean", "concat"])
def test_forward_gradients_and_training_match_pytorch(fusion, batch, rng):
    features, labels = batch
    model = make(fusion)
    params = randomised(model.init(jax.random.key(0), features)["params"], rng)
    reference = to_torch(params, model.num_queries, fusion)
    frames = [torch.tensor(features[name]) for name in WIDTHS]

    logits, extras = model.apply({"params": params}, features)
    np.testing.assert_allclose(logits, reference(*frames).detach().numpy(), rtol=1e-5, atol=1e-5)
    assert ("gate" in extras) == (fusion == "gate")

    def loss(params):
        return optax.sigmoid_binary_cross_entropy(model.apply({"params": params}, features)[0], labels).mean()

    gradient = jax.jit(jax.grad(loss))
    optimiser = optax.adamw(3e-3, weight_decay=0.05)
    state, update = optimiser.init(params), jax.jit(optimiser.update)
    torch_optimiser = torch.optim.AdamW(reference.parameters(), lr=3e-3, weight_decay=0.05)
    for number in range(20):
        torch_optimiser.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(reference(*frames), torch.tensor(labels)).backward()
        gradients = gradient(params)
        if number == 0:
            theirs = {
                name: torch.zeros_like(value) if value.grad is None else value.grad
                for name, value in reference.named_parameters()
            }
            assert_trees_close(gradients, from_torch(theirs, params, fusion), 1e-4)
        torch_optimiser.step()
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    assert_trees_close(params, from_torch(dict(reference.state_dict()), params, fusion), 1e-4)


def test_gate_matches_pytorch(rng):
    descriptors = rng.normal(size=(2, BATCH, KEY_DIM)).astype(np.float32)
    logits = rng.normal(size=2).astype(np.float32)
    mixture, weights = SoftmaxGate().apply({"params": {"logits": logits}}, descriptors)
    expected = torch.tensor(logits).softmax(0)
    np.testing.assert_allclose(weights, expected.numpy(), rtol=1e-5)
    np.testing.assert_allclose(
        mixture, (expected[:, None, None] * torch.tensor(descriptors)).sum(0).numpy(), rtol=1e-5, atol=1e-6
    )


def test_pooling_matches_pytorch_with_padding_and_scale(rng):
    frames = rng.normal(size=(BATCH, FRAMES, 10)).astype(np.float32)
    scale = rng.uniform(0, 2, size=(BATCH, 10)).astype(np.float32)
    mask = np.arange(FRAMES) < rng.integers(1, FRAMES + 1, size=(BATCH, 1))
    pooling = MultiQueryPooling(4, KEY_DIM)
    params = pooling.init(jax.random.key(1), frames)["params"]
    reference = TorchPooling(10, 4)
    reference.load_state_dict(
        {
            "query": torch.tensor(np.array(params["query"])),
            "key.weight": torch.tensor(np.array(params["key_kernel"].T)),
            "value.weight": torch.tensor(np.array(params["value_kernel"].T)),
        }
    )
    z, attention = pooling.apply({"params": params}, frames, mask, feature_scale=scale, return_attention=True)
    expected_z, expected_attention = reference(torch.tensor(frames * scale[:, None]), torch.tensor(mask))
    np.testing.assert_allclose(z, expected_z.detach().numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(attention, expected_attention.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_padded_frames_change_nothing(rng):
    frames = rng.normal(size=(BATCH, FRAMES, 10)).astype(np.float32)
    pooling = MultiQueryPooling(4, KEY_DIM)
    variables = pooling.init(jax.random.key(2), frames)
    padded = np.concatenate([frames, 1e3 * rng.normal(size=(BATCH, 5, 10)).astype(np.float32)], axis=1)
    mask = np.broadcast_to(np.arange(FRAMES + 5) < FRAMES, (BATCH, FRAMES + 5))

    def loss(variables, frames, mask):
        return jnp.sum(jnp.sin(pooling.apply(variables, frames, mask)))

    np.testing.assert_allclose(
        pooling.apply(variables, padded, mask), pooling.apply(variables, frames), rtol=1e-5, atol=1e-6
    )
    assert_trees_close(jax.grad(loss)(variables, padded, mask), jax.grad(loss)(variables, frames, None), 1e-5)
    by_frame = jax.grad(loss, argnums=1)(variables, padded, mask)
    np.testing.assert_array_equal(by_frame[:, FRAMES:], 0.0)


def test_a_clip_does_not_depend_on_its_batch(batch):
    features, _ = batch
    model = make()
    variables = model.init(jax.random.key(3), features)
    logits, _ = model.apply(variables, features)
    order = np.arange(BATCH)[::-1]
    turned, _ = model.apply(variables, {name: value[order] for name, value in features.items()})
    alone, _ = model.apply(variables, {name: value[2:3] for name, value in features.items()})
    np.testing.assert_allclose(turned, logits[order], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(alone, logits[2:3], rtol=1e-5, atol=1e-6)


def test_released_cut_drops_the_end_of_the_concatenation(batch):
    features, _ = batch
    model = make("concat", concat_width=30)  # of 24 + 10
    variables = model.init(jax.random.key(4), features)
    assert variables["params"]["pool_concat"]["key_kernel"].shape == (30, KEY_DIM)
    changed = {**features, "geometry": features["geometry"].copy()}
    changed["geometry"][..., 6:] += 1.0
    np.testing.assert_array_equal(model.apply(variables, changed)[0], model.apply(variables, features)[0])
    changed["geometry"][..., 5] += 1.0
    assert np.abs(model.apply(variables, changed)[0] - model.apply(variables, features)[0]).max() > 1e-4


@pytest.mark.parametrize("kind", ["clip", "frame"])
def test_feature_dropout_is_unbiased_and_of_its_kind(kind, batch):
    features, _ = batch
    model = make(feature_dropout_kind=kind)
    variables = model.init(jax.random.key(5), features)

    def run(key, rate):
        return model.apply(variables, features, train=True, dropout=0.0, feature_dropout=rate, rngs={"dropout": key})[0]

    np.testing.assert_allclose(run(jax.random.key(6), 0.0), model.apply(variables, features)[0], rtol=1e-5, atol=1e-6)
    traced = jax.jit(run)(jax.random.key(6), 0.4)
    np.testing.assert_allclose(traced, run(jax.random.key(6), 0.4), rtol=1e-4, atol=1e-5)
    assert np.abs(traced - run(jax.random.key(7), 0.4)).max() > 1e-3


def test_clip_dropout_equals_dropping_the_feature_in_every_frame(rng):
    frames = rng.normal(size=(BATCH, FRAMES, 10)).astype(np.float32)
    scale = (rng.uniform(size=(BATCH, 10)) < 0.6).astype(np.float32) / 0.6
    pooling = MultiQueryPooling(3, KEY_DIM)
    variables = pooling.init(jax.random.key(8), frames)
    folded = pooling.apply(variables, frames, feature_scale=scale)
    np.testing.assert_allclose(folded, pooling.apply(variables, frames * scale[:, None]), rtol=1e-5, atol=1e-5)


def test_pooling_gradients_are_right(rng):
    with jax.enable_x64(True):
        frames = rng.normal(size=(2, 4, 3))
        mask = np.array([[True] * 4, [True, True, False, False]])
        pooling = MultiQueryPooling(2, 5)
        params = pooling.init(jax.random.key(9), frames)["params"]
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        scale = rng.uniform(0.5, 1.5, size=(2, 3))
        check_grads(
            lambda params, frames, scale: pooling.apply({"params": params}, frames, mask, feature_scale=scale),
            (params, jnp.asarray(frames), jnp.asarray(scale)),
            order=1,
            modes=["rev"],
        )
