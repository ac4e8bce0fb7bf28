"""The CPU's own code for fusion: its values and gradients, and what it promises beyond them."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mer_jax.models import cpu_fusion, mqa
from mer_jax.models.products import BY_XLA, project, project_back
from mer_jax.models.registry import build_learner
from mer_jax.models.stored import Stored

compiled = pytest.mark.usefixtures("compiled")
CONFIG = {
    "name": "fusion",
    "fusion": "gate",
    "num_queries": {"appearance": 3, "geometry": 2},
    "key_dim": 8,
    "hidden_dim": 6,
    "feature_dropout_kind": "clip",
    "concat_width": 0,
}


def given(rng, batch, frames, width, queries, samples=7, folds=2):
    """Data, samples of them, a mask with an all but empty row, a scale with zeros, and probes."""
    data = jnp.asarray(rng.normal(size=(folds, samples, frames, width)), jnp.float32)
    index = jnp.asarray(rng.integers(0, samples, batch), jnp.int32)
    mask = np.arange(frames) < rng.integers(1, frames + 1, size=(batch, 1))
    mask[0] = np.arange(frames) == frames - 1
    scale = jnp.asarray((rng.random((batch, width)) < 0.7) / 0.7, jnp.float32)
    probes = jnp.asarray(rng.normal(size=(queries, width)) / width**0.5, jnp.float32)
    return Stored(data, jnp.int32(folds - 1), index), jnp.asarray(mask), scale, probes


# Widths and numbers of frames and queries within, at and beyond vectors, tiles and chunks.
SHAPES = [
    (16, 18, 171, 8),
    (3, 1, 1, 1),
    (5, 2, 15, 2),
    (2, 3, 16, 7),
    (4, 7, 33, 9),
    (1, 5, 256, 8),
    (3, 64, 300, 20),
    (2, 17, 1536, 3),
]


@compiled
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_pooling_and_its_gradient_are_xlas(shape, masked, scaled, rng):
    frames, mask, scale, probes = given(rng, *shape)
    mask, scale = mask if masked else None, scale if scaled else None
    weights = [jnp.asarray(rng.normal(size=size), jnp.float32) for size in (shape[::2], (shape[0], shape[3], shape[1]))]

    def loss(probes, pool):
        pooled, attention = pool(frames, mask, scale, probes)
        return jnp.vdot(weights[0], pooled) + jnp.vdot(weights[1], attention), (pooled, attention)

    ours, theirs = (
        jax.jit(jax.grad(lambda p, pool=pool: loss(p, pool), has_aux=True))(probes)
        for pool in (cpu_fusion.pool_frames, mqa.pool_frames)
    )
    largest = float(jnp.abs(theirs[0]).max())
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4, atol=1e-5 * max(largest, 1.0))
    for one, other in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(ours[1][1].sum(axis=-1), 1.0, rtol=1e-6)


@compiled
def test_attention_is_that_of_double_precision(rng):
    """Scores far apart, so that most of the exponential's range is met."""
    frames, mask, scale, probes = given(rng, 6, 18, 40, 8)
    probes = 12.0 * probes
    _, attention = cpu_fusion.pool_frames(frames, mask, scale, probes)
    values = np.asarray(frames.fetch(), np.float64) * np.asarray(scale, np.float64)[:, None]
    scores = np.einsum("btd,qd->bqt", values, np.asarray(probes, np.float64))  # (B, T, D) (Q, D) -> (B, Q, T)
    scores = np.where(np.asarray(mask)[:, None], scores, -np.inf)
    exact = np.exp(scores - scores.max(axis=-1, keepdims=True))
    exact /= exact.sum(axis=-1, keepdims=True)
    assert (exact[exact > 0] < 1e-20).any()
    np.testing.assert_allclose(attention, exact, rtol=2e-4, atol=1e-37)  # scores of 100 are known to 1e-5
    np.testing.assert_array_equal(np.asarray(attention)[~np.broadcast_to(np.asarray(mask)[:, None], exact.shape)], 0.0)


@compiled
def test_a_sample_depends_neither_on_its_place_nor_on_its_neighbours(rng):
    frames, mask, scale, probes = given(rng, 9, 18, 171, 8)
    whole = cpu_fusion.pool_frames(frames, mask, scale, probes)
    for rows in (np.array([4]), np.arange(9)[::-1], np.array([2, 2, 8])):
        some = Stored(frames.data, frames.fold, frames.index[rows])
        part = cpu_fusion.pool_frames(some, mask[rows], scale[rows], probes)
        for one, other in zip(part, whole, strict=True):
            np.testing.assert_array_equal(one, other[rows])
    fetched = cpu_fusion.pool_frames(frames.fetch(), mask, scale, probes)
    jax.tree.map(np.testing.assert_array_equal, fetched, whole)


@compiled
def test_padding_samples_and_threads_change_no_bit_of_the_gradient(rng):
    frames, mask, scale, probes = given(rng, 6, 18, 171, 8)
    weights = jnp.asarray(rng.normal(size=(6, 171)), jnp.float32).at[4:].set(0.0)  # what padding gets

    def gradient(count):
        some = Stored(frames.data, frames.fold, frames.index[:count])
        return jax.grad(
            lambda p: jnp.vdot(weights[:count], cpu_fusion.pool_frames(some, mask[:count], scale[:count], p)[0])
        )(probes)

    with ThreadPoolExecutor(4) as pool:
        several = list(pool.map(gradient, [6, 4, 6, 4, 6, 4]))
    for each in several:
        np.testing.assert_array_equal(each, several[0])


@compiled
def test_what_is_not_a_number_stays_so(rng):
    frames, _, _, probes = given(rng, 4, 5, 20, 3)
    own = int(frames.index[1])
    broken = Stored(frames.data.at[:, own, 0, 7].set(jnp.nan), frames.fold, frames.index)
    pooled, attention = cpu_fusion.pool_frames(broken, None, None, probes)
    hit = np.asarray(frames.index) == own
    assert np.isnan(pooled[hit]).any() and np.isnan(attention[hit]).all()
    assert np.isfinite(pooled[~hit]).all() and np.isfinite(attention[~hit]).all()


@compiled
def test_samples_that_are_not_there_are_read_as_the_nearest(rng):
    frames, mask, scale, probes = given(rng, 3, 4, 20, 2)
    beyond = Stored(frames.data, jnp.int32(9), jnp.array([-1, 3, 99], jnp.int32))
    within = Stored(frames.data, jnp.int32(1), jnp.array([0, 3, 6], jnp.int32))
    ours, theirs = (cpu_fusion.pool_frames(each, mask, scale, probes) for each in (beyond, within))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@compiled
def test_frames_and_scales_take_no_gradient(rng):
    frames, mask, scale, probes = given(rng, 3, 4, 20, 2)
    with pytest.raises(TypeError, match=r"gradients of its probes alone; differentiate mqa.pool_frames"):
        jax.grad(lambda s: cpu_fusion.pool_frames(frames, mask, s, probes)[0].sum())(scale)
    with pytest.raises(TypeError, match="gradients of its probes alone"):
        jax.grad(lambda f: cpu_fusion.pool_frames(f, mask, scale, probes)[0].sum())(frames.fetch())


@compiled
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 8, 9, 16, 17, 48])
@pytest.mark.parametrize(("depth", "width"), [(1, 1), (7, 45), (64, 64), (65, 16), (171, 256), (50, 130)])
def test_products_and_their_gradients_are_those_of_double_precision(rows, depth, width, rng):
    by = cpu_fusion.IMPLEMENTATION.products
    kernel = rng.normal(size=(depth, width)).astype(np.float32)
    exact = kernel.astype(np.float64)
    for product, size, theirs in ((project, depth, exact), (project_back, width, exact.T)):
        given = rng.normal(size=(rows, size)).astype(np.float32)
        cotangent = rng.normal(size=(rows, theirs.shape[1])).astype(np.float32)
        value, back = jax.vjp(lambda r, k, product=product: product(r, k, by=by), given, kernel)
        of_rows, of_kernel = back(cotangent)
        np.testing.assert_allclose(value, given @ theirs, rtol=1e-5, atol=1e-5 * size**0.5)
        np.testing.assert_allclose(of_rows, cotangent @ theirs.T, rtol=1e-5, atol=1e-5 * theirs.shape[1] ** 0.5)
        outer = given.T.astype(np.float64) @ cotangent
        np.testing.assert_allclose(
            of_kernel, outer if product is project else outer.T, rtol=1e-5, atol=1e-5 * rows**0.5
        )


@compiled
def test_a_projected_row_depends_neither_on_its_place_nor_on_its_neighbours(rng):
    by = cpu_fusion.IMPLEMENTATION.products
    rows, kernel = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((17, 171), (171, 100)))
    whole = project(rows, kernel, by=by)
    for some in (np.array([3]), np.arange(17)[::-1], np.array([16, 0, 7, 7, 2])):
        np.testing.assert_array_equal(project(rows[some], kernel, by=by), whole[some])


@compiled
def test_members_together_are_members_alone(rng):
    rows, kernels = (jnp.asarray(rng.normal(size=(3, *size)), jnp.float32) for size in ((5, 40), (40, 24)))
    by = cpu_fusion.IMPLEMENTATION.products
    together = jax.vmap(lambda r, k: project(r, k, by=by))(rows, kernels)
    for one, r, k in zip(together, rows, kernels, strict=True):
        np.testing.assert_array_equal(one, project(r, k, by=by))


def lowered(platform):
    learner = build_learner(CONFIG, ("appearance", "geometry"), 5, platform)
    inputs = {
        "features": {"appearance": jnp.zeros((1, 4, 10)), "geometry": jnp.zeros((1, 4, 7))},
        "frame_mask": jnp.ones((1, 4), bool),
    }
    variables = jax.eval_shape(learner.init, jax.random.key(0), inputs)
    return (
        jax.jit(lambda v: learner.apply(v, inputs, jnp.ones(1, bool), False, None, None)[0]).lower(variables).as_text()
    )


@compiled
def test_a_cpu_takes_it_and_nothing_else_does(monkeypatch):
    assert "mer_jax_pool" in lowered("cpu") and "mer_jax_project" in lowered("cpu")
    assert "mer_jax" not in lowered("gpu")
    monkeypatch.setattr(cpu_fusion, "version", lambda: "")
    assert "mer_jax" not in lowered("cpu")


@compiled
@pytest.mark.parametrize("fusion", ["gate", "mean", "concat"])
@pytest.mark.parametrize("kind", ["clip", "frame"])
def test_the_network_and_its_training_are_xlas(fusion, kind, rng, monkeypatch):
    config = CONFIG | {"fusion": fusion, "feature_dropout_kind": kind}
    widths = {"appearance": 20, "geometry": 7}
    data = {name: jnp.asarray(rng.normal(size=(1, 9, 6, width)), jnp.float32) for name, width in widths.items()}
    mask = jnp.asarray(np.arange(6) < rng.integers(1, 7, size=(5, 1)))
    index = jnp.array([8, 0, 3, 3, 5], jnp.int32)
    inputs = {
        "features": {name: Stored(each, jnp.int32(0), index) for name, each in data.items()},
        "frame_mask": mask,
    }
    hyper = {"dropout": jnp.float32(0.3), "feature_dropout": jnp.float32(0.2)}

    def results(learner, variables):
        def loss(params, taps):
            given = {"params": params, "taps": taps}
            logits, _, _ = learner.apply(given, inputs, jnp.ones(5, bool), True, hyper, jax.random.key(4))
            return jnp.sin(logits).sum(), logits

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], learner.taps(variables["params"], 5))

    ours = build_learner(config, tuple(widths), 3, "cpu")
    monkeypatch.setattr(cpu_fusion, "version", lambda: "")
    theirs = build_learner(config, tuple(widths), 3, "cpu")
    variables = ours.init(jax.random.key(1), inputs)
    jax.tree.map(np.testing.assert_array_equal, variables, theirs.init(jax.random.key(1), inputs))
    for one, other in zip(*(jax.tree.leaves(results(each, variables)) for each in (ours, theirs)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_xlas_products_are_the_default():
    assert mqa.IMPLEMENTATION.products is BY_XLA and mqa.MultiQueryPooling(1, 1).implementation is mqa.IMPLEMENTATION
