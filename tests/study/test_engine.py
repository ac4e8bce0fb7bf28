"""The training engine: members are independent of their neighbours, exact, frozen when they diverge, compiled once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mer_jax.models.products import Factors
from mer_jax.models.registry import Learner, build_learner
from mer_jax.study import engine
from mer_jax.study.members import HYPER_NAMES, Member, member_key
from mer_jax.study.train import block_size

SAMPLES, FRAMES, WIDTHS = 40, 6, {"appearance": 9, "geometry": 5}
FOLD = np.arange(SAMPLES) // 2 % 3  # clips of two views, three folds
HYPER = {"learning_rate": 3e-3, "weight_decay": 0.01, "dropout": 0.2, "feature_dropout": 0.3, "focal_gamma": 0.0}
RECIPE = engine.Recipe(
    epochs=6,
    batch_size=8,
    optimiser="adamw",
    schedule="cosine",
    warmup_fraction=0.1,
    exclusive=False,
    focal_gamma=0.0,
    balanced=False,
    patience=0,
)
MODEL = {
    "name": "fusion",
    "fusion": "gate",
    "num_queries": {"appearance": 3, "geometry": 2},
    "key_dim": 8,
    "hidden_dim": 8,
    "feature_dropout_kind": "clip",
    "concat_width": 0,
}


@functools.cache
def arrays():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (SAMPLES, 5)).astype(np.float32)
    features = {}
    for name, width in WIDTHS.items():
        noise = rng.normal(size=(3, SAMPLES, FRAMES, width))
        noise[..., :5] += 1.5 * labels[:, None, :]
        features[name] = noise.astype(np.float32)
    inputs = {"features": features, "frame_mask": np.ones((1, SAMPLES, FRAMES), bool)}
    return jax.device_put(engine.Arrays(inputs=inputs, labels=labels))


@functools.cache
def learner():
    return build_learner(MODEL, tuple(WIDTHS), 5)


def member(fold, seed, watched=40, **hyper):
    heldout = fold == FOLD
    inner = ~heldout & (np.arange(SAMPLES) // 2 % 5 == seed % 5)
    values = HYPER | hyper
    key = member_key(0, Member(fold, seed, tuple(values.items())))
    return engine.member_inputs(key, fold, values, ~heldout & ~inner, inner, heldout, watched)


@functools.cache
def compiled_once(recipe, num_steps, one_by_one):
    return engine.make_programs(learner(), recipe, num_steps, one_by_one=one_by_one)


def programs(recipe=RECIPE, num_steps=3, one_by_one=False):
    """The same for all tests that train by the same recipe, whatever of it they say."""
    return compiled_once(recipe, num_steps, one_by_one)


def on_device(tree, device=None):
    return jax.device_put(tree, device or jax.devices()[0])


def run(members, recipe=RECIPE, num_steps=3, calls=((1, 2, 3), (4, 5, 6)), device=None, one_by_one=False):
    """Trains members as one block; returns final state, watches joined over epochs, and predictions."""
    data, block = on_device((arrays(), engine.stack_members(members)), device)
    compiled = programs(recipe, num_steps, one_by_one)
    state, watches = compiled.init(data, block), []
    for epochs in calls:
        state, watch = compiled.epochs(data, block, state, jnp.array(epochs, jnp.int32))
        watches.append(jax.device_get(watch))
    joined = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *watches)
    return jax.device_get(state), joined, jax.device_get(compiled.finish(data, block, state))


TEN = [(fold, seed) for fold in range(3) for seed in range(4)][:10]


def test_a_member_alone_equals_itself_among_ten():
    _, together, predictions = run([member(*spec) for spec in TEN])
    for position in (0, 4, 9):
        _, alone, prediction = run([member(*TEN[position])])
        np.testing.assert_allclose(
            prediction["probabilities"][0], predictions["probabilities"][position], rtol=1e-4, atol=1e-4
        )
        np.testing.assert_allclose(alone.train_loss[0], together.train_loss[position], rtol=1e-4, atol=1e-4)


def test_members_in_turn_equal_members_together():
    """As a CPU trains them: in any order to the bit, a diverging one harms nobody, and near to a vectorised program."""
    specs = [member(*TEN[0]), member(*TEN[4], learning_rate=1e38), member(*TEN[9])]
    state, watch, predictions = run(specs, one_by_one=True)
    assert (state.diverged_at >= 0).tolist() == [False, True, False]
    _, reversed_watch, backward = run(specs[::-1], one_by_one=True)
    np.testing.assert_array_equal(predictions["probabilities"], backward["probabilities"][::-1])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[::-1]), watch, reversed_watch)
    _, together, expected = run(specs)
    np.testing.assert_allclose(predictions["probabilities"], expected["probabilities"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(watch.inner_loss, together.inner_loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_stopped_member_takes_no_step_and_a_finished_block_ends(one_by_one):
    """Also a copy that fills a block up, which is stopped from the first."""
    # Laid on the device as run() lays them, or they would be other programs to the compiler.
    data, block = on_device((arrays(), engine.stack_members([member(*spec) for spec in TEN[:3]])))
    compiled = programs(one_by_one=one_by_one)
    state = compiled.init(data, block)
    for stopped in ([False, True, False], [True, True, True]):
        before = jax.device_get(state.replace(stopped=jnp.array(stopped)))
        state, watch = compiled.epochs(data, block, on_device(before), jnp.arange(1, 4))
        assert ((np.asarray(state.step) > before.step) == ~np.array(stopped)).all()
        for curve in watch:
            assert (np.isfinite(np.asarray(curve)).reshape(3, -1).all(axis=1) == ~np.array(stopped)).all()
        for new, old in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True):
            np.testing.assert_array_equal(np.asarray(new)[stopped], old[stopped])
    _, watch = compiled.epochs(data, block, compiled.init(data, block), jnp.arange(5, 8))
    assert np.isfinite(watch.inner_loss[:, :2]).all() and np.isnan(watch.inner_loss[:, 2:]).all()


def test_each_member_has_its_own_focal_exponent():
    """Beside each other, as in a program whose exponent is a constant; 0 is cross-entropy."""
    spec = member(1, 2), member(1, 2, focal_gamma=2.0)
    _, watch, together = run(spec, RECIPE._replace(focal_gamma=None))
    for row, gamma in enumerate((0.0, 2.0)):
        _, constant, alone = run([spec[row]], RECIPE._replace(focal_gamma=gamma))
        np.testing.assert_allclose(together["probabilities"][row], alone["probabilities"][0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(watch.inner_loss[row], constant.inner_loss[0], rtol=1e-4)
    assert np.abs(np.subtract(*together["probabilities"])).max() > 0.01


def test_order_and_device_change_no_bit():
    _, _, forward = run([member(*spec) for spec in TEN])
    _, _, backward = run([member(*spec) for spec in TEN[::-1]], device=jax.devices()[2])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[::-1]), forward, backward)


def test_more_steps_and_wider_watch_than_a_member_needs_change_nothing():
    state, _, exact = run([member(0, 0), member(1, 1), member(2, 2)])
    padded_state, _, padded = run([member(fold, fold, watched=57) for fold in range(3)], num_steps=5)
    np.testing.assert_array_equal(state.step, padded_state.step)
    np.testing.assert_allclose(exact["probabilities"], padded["probabilities"], rtol=1e-5, atol=1e-6)


def test_the_number_of_epochs_a_call_changes_nothing():
    _, _, in_two = run([member(fold, fold) for fold in range(3)])
    _, _, in_three = run([member(fold, fold) for fold in range(3)], calls=((1, 2), (3, 4), (5, 6)))
    np.testing.assert_array_equal(in_two["probabilities"], in_three["probabilities"])


def test_epochs_beyond_the_last_change_nothing():
    state, _, exact = run([member(*TEN[0])])
    over, _, prediction = run([member(*TEN[0])], calls=((1, 2, 3), (4, 5, 6), (7, 8, 9)))
    np.testing.assert_array_equal(state.step, over.step)
    np.testing.assert_array_equal(exact["probabilities"], prediction["probabilities"])


def test_every_training_sample_is_seen_exactly_once_an_epoch():
    """A model that only adds up what it is shown: remainder batches are masked, nothing is dropped or doubled."""

    def init(key, inputs):
        del key, inputs
        return {"params": {"bias": jnp.zeros(5)}, "seen": jnp.zeros(SAMPLES)}

    def apply(variables, inputs, sample_mask, train, hyper, dropout_key):
        shown = jnp.zeros(SAMPLES).at[inputs["number"]].add(sample_mask.astype(jnp.float32))
        logits = jnp.broadcast_to(variables["params"]["bias"][None], (len(sample_mask), 5))
        return logits, {"seen": variables["seen"] + (shown if train else 0.0)}, {}

    data = engine.Arrays(inputs={"number": np.arange(SAMPLES)[None]}, labels=arrays().labels)
    one = member(2, 1)
    compiled = engine.make_programs(Learner(init, apply), RECIPE, 3)
    block = engine.stack_members([one])
    state = compiled.init(data, block)
    for epoch in (1, 2):
        state, _ = compiled.epochs(data, block, state, jnp.array([epoch]))
        np.testing.assert_array_equal(state.variables["seen"][0], epoch * np.asarray(one.train_mask))


def test_held_out_labels_and_features_reach_no_parameter():
    first = member(1, 2)
    state, _, _ = run([first])
    rng = np.random.default_rng(1)
    heldout = FOLD == 1
    data = jax.tree.map(np.array, jax.device_get(arrays()))
    data.labels[heldout] = 1 - data.labels[heldout]
    for feature in data.inputs["features"].values():
        feature[:, heldout] = 50 * rng.normal(size=feature[:, heldout].shape)
    compiled = programs()
    data, block = on_device((data, engine.stack_members([first])))
    changed = compiled.init(data, block)
    for epochs in ((1, 2, 3), (4, 5, 6)):
        changed, _ = compiled.epochs(data, block, changed, jnp.array(epochs, jnp.int32))
    for before, after in zip(
        jax.tree.leaves(state.best_variables), jax.tree.leaves(changed.best_variables), strict=True
    ):
        np.testing.assert_array_equal(before, after)


def test_inner_samples_give_no_gradient_but_choose_the_epoch():
    recipe = RECIPE._replace(patience=2, epochs=6)
    fast = [member(fold, seed, learning_rate=0.1) for fold, seed in TEN]
    state, watch, _ = run(fast, recipe)
    for row in range(len(TEN)):
        losses = watch.inner_loss[row]
        best, expected = np.inf, None
        for epoch, loss in enumerate(losses, start=1):
            if expected is not None and epoch - expected > 2:
                break
            if loss < best:
                best, expected = loss, epoch
        assert state.best_epoch[row] == expected
        np.testing.assert_allclose(state.best_loss[row], losses[expected - 1], rtol=1e-6)
    assert state.stopped.any()


def test_a_stopped_member_stays_as_it_is():
    recipe = RECIPE._replace(patience=2, epochs=6)
    state, watch, _ = run([member(fold, seed, learning_rate=0.1) for fold, seed in TEN], recipe)
    for row in np.flatnonzero(state.stopped & (state.best_epoch < 4)):
        stop = state.best_epoch[row] + 2
        for curve in watch:
            assert np.isfinite(curve[row][:stop]).all()
            assert np.isnan(curve[row][stop:]).all()


def test_a_diverging_member_is_frozen_and_harms_nobody():
    bad = [member(0, 0), member(1, 1, learning_rate=1e38), member(2, 2)]
    good = [member(0, 0), member(1, 1), member(2, 2)]
    state, _, predictions = run(bad)
    _, _, expected = run(good)
    assert state.diverged_at.tolist()[0::2] == [-1, -1]
    assert state.diverged_at[1] >= 0
    assert np.isnan(predictions["probabilities"][1]).all()
    for leaf in jax.tree.leaves(state.variables):
        assert np.isfinite(leaf).all()
    np.testing.assert_array_equal(predictions["probabilities"][[0, 2]], expected["probabilities"][[0, 2]])


def test_what_only_the_predictions_meet_is_a_divergence_of_the_last_step():
    data, block = on_device((arrays(), engine.stack_members([member(*spec) for spec in TEN[:3]])))
    state = programs().init(data, block)
    expected = jax.device_get(programs().finish(data, block, state))
    assert expected["diverged_at"].tolist() == [-1, -1, -1]
    variables = jax.tree.map(lambda x: x.at[1].set(jnp.nan), state.best_variables)
    broken = state.replace(best_variables=variables, step=jnp.array([7, 7, 7], jnp.int32))
    finished = jax.device_get(programs().finish(data, block, broken))
    assert finished["diverged_at"].tolist() == [-1, 6, -1]
    assert np.isnan(finished["probabilities"][1]).all()
    np.testing.assert_array_equal(finished["probabilities"][[0, 2]], expected["probabilities"][[0, 2]])


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf, 1e25])
def test_no_broken_value_of_a_large_kernels_gradient_stays_unseen(rng, broken):
    """Dense and convolution kernels: whichever value of a layer's inputs or of its outputs' gradient is broken."""
    size = jax.jit(engine._gradient_size)
    rows, cotangent = rng.normal(size=(288, 6)).astype(np.float32), rng.normal(size=(6, 64)).astype(np.float32)
    assert np.isfinite(size({"dense": rows @ cotangent, "bias": cotangent.sum(axis=0)}))
    for factor in (rows, cotangent):
        for _ in range(20):
            place = tuple(rng.integers(side) for side in factor.shape)
            kept, factor[place] = factor[place], broken
            with np.errstate(invalid="ignore"):
                gradient = rows @ cotangent
            factor[place] = kept
            for kernel in (gradient, gradient.reshape(3, 3, 32, 64)):
                assert not np.isfinite(size({"kernel": kernel, "bias": np.zeros(64, np.float32)}))


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf, 1e25])
def test_no_broken_value_of_a_gradients_factors_stays_unseen(rng, broken):
    size = jax.jit(engine._gradient_size)
    left, right = rng.normal(size=(6, 300)).astype(np.float32), rng.normal(size=(6, 64)).astype(np.float32)
    bias = np.zeros(64, np.float32)
    assert np.isfinite(size({"kernel": Factors(left, right), "bias": bias}))
    for factor in (left, right):
        for _ in range(20):
            place = tuple(rng.integers(side) for side in factor.shape)
            kept, factor[place] = factor[place], broken
            assert not np.isfinite(size({"kernel": Factors(left, right), "bias": bias}))
            factor[place] = kept
    # Both are finite, and so are their squares; those of the product are not.
    assert not np.isfinite(size({"kernel": Factors(left * 1e15, right * 1e15), "bias": bias}))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("one_by_one", [True, False])
def test_training_by_compiled_code_is_that_by_xla(one_by_one, monkeypatch):
    members = [member(fold, seed, dropout=0.2, feature_dropout=0.1) for fold, seed in ((0, 1), (2, 5))]
    data, block = on_device((arrays(), engine.stack_members(members)))

    def results():
        own = build_learner(MODEL, tuple(WIDTHS), 5, "cpu")
        compiled = engine.make_programs(own, RECIPE, 3, one_by_one=one_by_one)
        epochs = compiled.epochs.lower(data, block, compiled.init(data, block), jnp.arange(1, 7)).as_text()
        state, watch = compiled.epochs(data, block, compiled.init(data, block), jnp.arange(1, 7))
        return (state.variables, watch, compiled.finish(data, block, state)), "mer_jax_adam" in epochs

    ours, by_compiled_code = results()
    monkeypatch.setattr("mer_jax.models.cpu_fusion.version", lambda: "")
    monkeypatch.setattr("mer_jax.study.cpu_adam.version", lambda: "")
    theirs, other_code = results()
    assert (by_compiled_code, other_code) == (True, False)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4), ours, theirs)


@pytest.mark.usefixtures("compiled")
def test_members_of_compiled_code_keep_every_bit_whatever_their_neighbours_and_calls():
    members = [member(fold, seed, dropout=0.2, feature_dropout=0.1) for fold, seed in TEN[:3]]
    compiled = engine.make_programs(build_learner(MODEL, tuple(WIDTHS), 5, "cpu"), RECIPE, 3, one_by_one=True)

    def results(members, calls):
        data, block = on_device((arrays(), engine.stack_members(members)))
        state, watches = compiled.init(data, block), []
        for numbers in calls:
            state, watch = compiled.epochs(data, block, state, jnp.array(numbers))
            watches.append(jax.device_get(watch))
        joined = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *watches)
        return jax.device_get((state.variables, joined, compiled.finish(data, block, state)))

    whole = results(members, [[1, 2, 3, 4, 5, 6]])
    for order in ([1, 1, 1], [2, 0, 1]):
        some = results([members[place] for place in order], [[1, 2], [3, 4, 5, 6]])
        jax.tree.map(lambda one, other, order=order: np.testing.assert_array_equal(one, other[order]), some, whole)


def test_training_equals_a_plain_loop():
    """Dropout off: an eager loop over Optax, written without masks, scans or vmaps."""
    spec = member(1, 3, dropout=0.0, feature_dropout=0.0)
    state, _, _ = run([spec])
    data = arrays()
    variables = learner().init(
        jax.random.fold_in(spec.key, _crc("init")), engine.take_samples(data, spec.fold, jnp.zeros(1, jnp.int32))
    )
    train = np.flatnonzero(spec.train_mask)
    steps = -(-len(train) // 8)
    total, warmup = steps * 6, int(np.ceil(0.1 * steps * 6))
    schedule = [
        3e-3 * ((t + 1) / warmup if t < warmup else 0.5 * (1 + np.cos(np.pi * (t - warmup) / (total - warmup))))
        for t in range(total)
    ]

    @jax.jit
    def gradient(params, index):
        def loss(params):
            inputs = engine.take_samples(data, spec.fold, index)
            logits, _, _ = learner().apply({"params": params}, inputs, None, False, None, None)
            return optax.sigmoid_binary_cross_entropy(logits, data.labels[index]).mean()

        return jax.grad(loss)(params)

    params, number = variables["params"], 0
    optimiser_state = optax.adamw(1.0).init(params)
    for epoch in range(1, 7):
        draw = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(spec.key, _crc("order")), epoch), (SAMPLES,))
        order = train[np.argsort(np.asarray(draw)[train], kind="stable")]
        for start in range(0, len(train), 8):
            optimiser = optax.adamw(schedule[number], weight_decay=0.01)
            updates, optimiser_state = optimiser.update(
                gradient(params, jnp.asarray(order[start : start + 8])), optimiser_state, params
            )
            params, number = optax.apply_updates(params, updates), number + 1
    assert state.step.tolist() == [number]
    ours = jax.tree.map(lambda x: x[0], state.variables["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, params)


def _crc(name):
    import zlib

    return zlib.crc32(name.encode())


def test_one_trace_serves_a_whole_study():
    traces = []
    plain = learner()

    def apply(*args):
        traces.append(1)
        return plain.apply(*args)

    compiled = engine.make_programs(plain._replace(apply=apply), RECIPE, 3)
    block = engine.stack_members([member(0, 0), member(1, 1, learning_rate=1e-2, dropout=0.5)])
    state = compiled.init(arrays(), block)
    state, _ = compiled.epochs(arrays(), block, state, jnp.array([1, 2], jnp.int32))
    first = len(traces)
    other = engine.stack_members([member(2, 5, weight_decay=0.0), member(2, 6)])
    state, _ = compiled.epochs(arrays(), other, state, jnp.array([3, 4], jnp.int32))
    assert len(traces) == first


def test_golden_losses_of_the_first_epochs():
    """Random numbers, order, schedule and update: none may change unseen."""
    _, watch, _ = run([member(0, 0)])
    np.testing.assert_allclose(watch.train_loss[0][:3], GOLDEN_LOSSES, rtol=1e-4)


GOLDEN_LOSSES = [0.838478, 0.790188, 0.781238]


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_cpu_blocks_do_not_depend_on_the_number_of_devices(devices):
    assert block_size(30, devices, "cpu", 0) == 2
    assert block_size(301, devices, "cpu", 0) == 2
    assert block_size(1, devices, "cpu", 0) == 1
    assert block_size(30, devices, "cpu", 7) == 7


def test_accelerators_share_the_members():
    assert block_size(300, 4, "gpu", 0) == 75
    assert block_size(300, 1, "gpu", 0) == 100
    assert block_size(3000, 4, "gpu", 0) == 125
    assert block_size(129, 1, "tpu", 0) == 65


def test_schedule_rises_then_falls_to_nothing():
    steps = jnp.arange(100)
    rates = jax.vmap(lambda t: engine.learning_rate(RECIPE, 1.0, t, jnp.int32(100)))(steps)
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
    assert (np.diff(rates[10:]) < 0).all()
    assert rates[-1] < 1e-3


def test_hyper_names_are_those_that_members_carry():
    assert set(HYPER) == set(HYPER_NAMES)
