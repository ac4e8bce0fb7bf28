import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from mer_jax.study.adam import OPTIMISERS, adam_update, init_adam

STEPS = 12
RATES = np.linspace(1e-2, 1e-3, STEPS)


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
