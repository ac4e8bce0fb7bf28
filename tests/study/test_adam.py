import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from mer_jax.models.products import Factors
from mer_jax.study import cpu_adam
from mer_jax.study.adam import OPTIMISERS, adam_update, init_adam

STEPS = 12
RATES = np.linspace(1e-2, 1e-3, STEPS)


@pytest.fixture(params=["compiled", "by XLA"])
def way(request, monkeypatch):
    """Both ways that a CPU has."""
    if request.param == "compiled":
        request.getfixturevalue("compiled")
    else:
        monkeypatch.setattr(cpu_adam, "version", lambda: "")


pytestmark = pytest.mark.usefixtures("way")


@pytest.fixture
def params(rng):
    return {"kernel": rng.normal(size=(5, 3)).astype(np.float32), "bias": rng.normal(size=3).astype(np.float32)}


@pytest.fixture
def gradients(rng):
    scales = 10.0 ** rng.integers(-6, 3, size=STEPS)
    return [
        {
            "kernel": (rng.normal(size=(5, 3)) * scale).astype(np.float32),
            "bias": (rng.normal(size=3) * scale).astype(np.float32),
        }
        for scale in scales
    ]


def step(params, gradients, state, optimiser, rate, update=True):
    return jax.jit(adam_update, static_argnames="optimiser")(
        params,
        gradients,
        state,
        optimiser=optimiser,
        rate=jnp.float32(rate),
        weight_decay=jnp.float32(0.05),
        update=jnp.bool_(update),
    )


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_updates_are_optaxs(params, gradients, optimiser):
    def peer(rate):
        if optimiser == "adamw":
            return optax.adamw(rate, weight_decay=0.05)
        return optax.chain(optax.add_decayed_weights(0.05), optax.adam(rate))

    ours, state = params, init_adam(params)
    theirs, their_state = params, peer(0.0).init(params)
    for rate, gradient in zip(RATES, gradients, strict=True):
        ours, state = step(ours, gradient, state, optimiser, rate)
        updates, their_state = peer(rate).update(gradient, their_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)
    moments = next(each for each in jax.tree.leaves(their_state, is_leaf=_is_adam) if _is_adam(each))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-12), state, moments)


def _is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_updates_are_pytorchs(params, gradients, optimiser):
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in params.items()}
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[optimiser]
    peer = kind(theirs.values(), lr=0.0, weight_decay=0.05)
    ours, state = params, init_adam(params)
    for rate, gradient in zip(RATES, gradients, strict=True):
        ours, state = step(ours, gradient, state, optimiser, rate)
        peer.param_groups[0]["lr"] = float(rate)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[name])
        peer.step()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name].detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("value", [np.nan, np.inf, 1.0])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_without_an_update_no_bit_changes(params, gradients, optimiser, value, steps_before):
    state = init_adam(params)
    for rate, gradient in zip(RATES[:steps_before], gradients[:steps_before], strict=True):
        params, state = step(params, gradient, state, optimiser, rate)
    bad = jax.tree.map(lambda x: np.full_like(x, value), params)
    after = step(params, bad, state, optimiser, 0.1, update=False)
    jax.tree.map(np.testing.assert_array_equal, after, (params, state))


def test_members_decide_by_themselves(params, gradients):
    two = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    state = jax.vmap(init_adam)(two)
    gradient = jax.tree.map(lambda x: jnp.stack([x, x]), gradients[0])
    update = jax.vmap(
        lambda p, g, s, u: adam_update(
            p, g, s, optimiser="adamw", rate=jnp.float32(0.1), weight_decay=jnp.float32(0.0), update=u
        )
    )
    after, state = update(two, gradient, state, jnp.array([False, True]))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b), after, params)
    assert all(np.any(a[1] != b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True))
    assert state.count.tolist() == [0, 1]


# Kernels below, at and beyond vectors and tiles, and fewer and more outer products than a batch has.
@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize(
    ("shape", "count"), [((1, 1), 1), ((5, 17), 3), ((40, 128), 8), ((33, 300), 16), ((7, 64), 50)]
)
def test_a_gradients_factors_are_its_product(shape, count, optimiser, rng):
    kernel, bias = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in (shape, shape[1:]))
    params = {"kernel": kernel, "bias": bias}
    ours, theirs = (params, init_adam(params)), (params, init_adam(params))
    for rate in RATES[:4]:
        factors = Factors(*(jnp.asarray(rng.normal(size=(count, side)), jnp.float32) for side in shape))
        product = jnp.asarray(
            np.asarray(factors.left, np.float64).T @ np.asarray(factors.right, np.float64), jnp.float32
        )
        of_bias = jnp.asarray(rng.normal(size=shape[1]), jnp.float32)
        ours = step(ours[0], {"kernel": factors, "bias": of_bias}, ours[1], optimiser, rate)
        theirs = step(theirs[0], {"kernel": product, "bias": of_bias}, theirs[1], optimiser, rate)
    # A gradient that nearly cancels is known to 1e-6 of its terms, and its first update has the size of the rate.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), ours, theirs)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_factors_without_an_update_change_no_bit(value, rng):
    params = {"kernel": jnp.asarray(rng.normal(size=(20, 24)), jnp.float32)}
    factors = Factors(jnp.full((3, 20), value), jnp.ones((3, 24)))
    after = step(params, {"kernel": factors}, init_adam(params), "adamw", 0.1, update=False)
    jax.tree.map(np.testing.assert_array_equal, after, (params, init_adam(params)))


def test_what_was_given_stays_as_it_was(params, gradients):
    """Updates are made where arrays lie; who goes on to use the old ones has them."""

    @jax.jit
    def twice(params, state):
        terms = {"optimiser": "adamw", "weight_decay": jnp.float32(0.1), "update": jnp.bool_(True)}
        one, _ = adam_update(params, gradients[0], state, rate=jnp.float32(0.1), **terms)
        other, _ = adam_update(params, gradients[0], state, rate=jnp.float32(0.2), **terms)
        return params, one, other

    before = jax.tree.map(np.array, params)
    same, one, other = twice(jax.tree.map(jnp.asarray, params), init_adam(params))
    jax.tree.map(np.testing.assert_array_equal, same, before)
    jax.tree.map(
        lambda p, a, b: np.testing.assert_allclose(b - p, 2 * (a - p), rtol=1e-3, atol=1e-6), before, one, other
    )
