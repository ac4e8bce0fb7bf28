"""Members that stand still leave their places: fewer and narrower calls, the same results."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mer_jax.models.registry import Learner
from mer_jax.study import engine, places
from mer_jax.study.places import Places, places_for

SAMPLES, WIDTH, EPOCHS = 24, 5, 60
RECIPE = engine.Recipe(
    epochs=EPOCHS,
    batch_size=8,
    optimiser="adam",
    schedule="constant",
    warmup_fraction=0.0,
    exclusive=False,
    focal_gamma=0.0,
    balanced=False,
    patience=2,
)


# Count, places of a call, expected: narrowed to half and half again, cut into several calls, hardly worth it.
NARROWED = [(128, 128, 128), (65, 128, 128), (64, 128, 64), (33, 128, 64), (5, 128, 8), (1, 128, 8), (8, 15, 8)]
IN_PARTS = [(300, 128, 384), (257, 128, 384), (256, 128, 256), (129, 128, 256)]
TOO_FEW = [(1, 5, 5), (9, 12, 12), (7, 12, 12), (1, 1, 1)]


@pytest.mark.parametrize(("count", "together", "expected"), [*NARROWED, *IN_PARTS, *TOO_FEW])
def test_places_by_hand(count, together, expected):
    assert places_for(count, together, fewest=8) == expected


def test_programs_that_train_in_turn_are_never_narrowed():
    assert [places_for(count, 12, fewest=12) for count in (1, 6, 12, 13)] == [12, 12, 12, 24]


def _init(key, inputs):
    return {"params": {"weight": jax.random.normal(key, (inputs["x"].shape[-1], 2))}}


def _apply(variables, inputs, sample_mask, train, hyper, dropout_key):
    del sample_mask, train, hyper, dropout_key
    return inputs["x"] @ variables["params"]["weight"], {}, {}


@functools.cache
def study(count):
    """Members whose learning rates have them stop early, late, never or at once, as they diverge; and the programs."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, SAMPLES, WIDTH)).astype(np.float32)
    labels = (x[0, :, :2] + rng.normal(size=(SAMPLES, 2)) > 0).astype(np.float32)
    inner = np.arange(SAMPLES) < 8
    rates = np.geomspace(2e-3, 1.0, count)
    rates[2] = np.nan
    members = [
        engine.member_inputs(
            jax.random.key(number),
            0,
            {"learning_rate": rate, "weight_decay": 0.0},
            ~inner,
            inner,
            np.zeros(24, bool),
            8,
        )
        for number, rate in enumerate(rng.permutation(rates))
    ]
    data, block = jax.device_put((engine.Arrays({"x": x}, labels), engine.stack_members(members)), jax.devices()[0])
    return engine.make_programs(Learner(_init, _apply), RECIPE, 2), data, block


def train(count, together, in_turn, copies=0):
    """Trains to the end; the final states, losses by row and epoch, and how many each call trained."""
    programs, data, block = study(count)
    state = programs.init(data, block)
    state = state.replace(stopped=state.stopped | (jnp.arange(count) >= count - copies))
    block_places = Places(block, state, together, jax.devices()[0], in_turn)
    seen, calls = np.full((count, EPOCHS), np.nan), []
    for epoch in range(0, EPOCHS, 2):

        def call(width, members, state, epoch=epoch):
            assert width == len(members.fold) == len(state.step)
            calls.append(width)
            return programs.epochs(data, members, state, jnp.arange(epoch + 1, epoch + 3))

        trained = block_places.train(call)
        if trained is None:
            break
        rows, watch = trained
        seen[rows, epoch : epoch + 2] = watch.inner_loss
        joined = block_places.joined()
        assert len(joined.step) == count
    return jax.device_get(joined), seen, calls


@pytest.mark.parametrize(("together", "copies"), [(12, 0), (12, 3), (5, 0)])
def test_results_are_those_of_members_that_keep_their_places(together, copies, monkeypatch):
    monkeypatch.setattr(places, "_FEWEST_PLACES", 2)
    kept, kept_seen, kept_calls = train(12, 12, in_turn=True, copies=copies)
    ours, seen, calls = train(12, together, in_turn=False, copies=copies)
    stops = np.isfinite(kept_seen[: 12 - copies]).sum(axis=1)
    assert len(set(stops)) > 4 and 0 in stops and stops.max() == EPOCHS, "members stop at several epochs"
    assert set(kept_calls) == {12}
    # By fives it is three parts at first, of which one is left soon.
    widths = [12, 6, 3, 2] if together == 12 else [5, 3, 2]
    assert list(dict.fromkeys(calls)) == widths and calls == sorted(calls, reverse=True)
    assert sum(calls) < 0.5 * sum(kept_calls)
    np.testing.assert_array_equal(np.isnan(seen), np.isnan(kept_seen))
    np.testing.assert_allclose(seen, kept_seen, rtol=1e-5)
    for name in ("step", "stopped", "diverged_at", "best_epoch"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(kept, name))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours.best_variables, kept.best_variables
    )


def test_a_block_goes_on_from_any_checkpoint_as_if_it_had_not_been_stopped(monkeypatch):
    """Places are taken anew from the states alone."""
    monkeypatch.setattr(places, "_FEWEST_PLACES", 2)
    programs, data, block = study(12)
    whole, _, calls = train(12, 12, in_turn=False)

    state, again = programs.init(data, block), []
    for epoch in range(0, EPOCHS, 2):

        def call(width, members, state, epoch=epoch):
            again.append(width)
            return programs.epochs(data, members, state, jnp.arange(epoch + 1, epoch + 3))

        places_anew = Places(block, state, 12, jax.devices()[0], in_turn=False)
        if places_anew.train(call) is None:
            break
        state = jax.device_put(jax.device_get(places_anew.joined()), jax.devices()[0])
    assert again == calls
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), whole)
