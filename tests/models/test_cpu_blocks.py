"""The CPU's own code for blocks: what it promises beyond its values."""

import re
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mer_jax.models import cpu_blocks, tiles
from mer_jax.models.convolution import Block, convolution_block, train_block
from mer_jax.models.registry import build_learner
from mer_jax.models.ststnet import STSTNet


def arguments(rng, batch, sides=(9, 10), size=3, channels=2):
    """x, kernel, bias, scale and shift, of three features."""
    shapes = (channels, *sides, batch), (size, size, channels, 3), (3,), (3,), (3,)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


compiled = pytest.mark.usefixtures("compiled")


FLOW = {"flow": jnp.zeros((1, 28, 28, 3))}


@compiled
def test_a_samples_result_depends_neither_on_its_place_nor_on_its_neighbours(rng):
    x, *others = arguments(rng, 37)
    block, order = Block(1, 2, 0, True), rng.permutation(37)
    whole = cpu_blocks.IMPLEMENTATION.extremes(block, x, *others[:3])
    np.testing.assert_array_equal(
        cpu_blocks.IMPLEMENTATION.extremes(block, x[..., order], *others[:3]), whole[..., order]
    )
    np.testing.assert_array_equal(cpu_blocks.IMPLEMENTATION.extremes(block, x[..., 5:6], *others[:3]), whole[..., 5:6])


@compiled
def test_padding_changes_no_bit(rng):
    x, *others = arguments(rng, 19)
    garbage = jnp.concatenate([x, jnp.full_like(x[..., :7], jnp.nan)], axis=-1)
    mask = jnp.ones(19)

    def run(x, mask):
        def loss(*others):
            y, mean, variance = train_block(cpu_blocks.IMPLEMENTATION, Block(2, 3, 1, True), x, *others, mask)
            return jnp.sum(y[..., :19] ** 2), (y[..., :19], mean, variance)

        return jax.grad(loss, argnums=range(4), has_aux=True)(*others)

    (bare, values), (padded, others) = run(x, mask), run(garbage, jnp.pad(mask, (0, 7)))
    jax.tree.map(np.testing.assert_array_equal, values, others)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), bare, padded)


@compiled
def test_threads_and_other_shapes_change_no_bit(rng):
    """Scratch memory belongs to a thread, and is used again by calls of other shapes."""
    given = [arguments(rng, batch) for batch in (3, 40, 17)]

    @jax.jit
    def run(x, *others):
        def loss(*given):
            return jnp.sum(
                train_block(cpu_blocks.IMPLEMENTATION, Block(1, 2, 0, True), *given, jnp.ones(x.shape[-1]))[0]
            )

        return jax.value_and_grad(loss, argnums=range(5))(x, *others)

    want = [run(*each) for each in given]
    with ThreadPoolExecutor(4) as pool:
        for place, got in enumerate(pool.map(lambda n: run(*given[n % 3]), range(60))):
            jax.tree.map(np.testing.assert_array_equal, got, want[place % 3])


@compiled
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("sides", [(11, 9), (15, 22), (43, 40)])  # the first with several rows of results at a time
def test_kernels_of_all_sides(size, sides, textbook, rng):
    x, kernel, *others = arguments(rng, 17, sides, size, channels=6)
    block = Block(min(2, size - 1), 3, 1, True)

    def run(implementation):
        def loss(*given):
            y = train_block(implementation, block, *given, jnp.ones(17))[0]
            return jnp.mean(y**3), y

        return jax.jit(jax.value_and_grad(loss, argnums=range(5), has_aux=True))(x, kernel, *others)

    def close(ours, theirs):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * max(1, np.abs(theirs).max()))

    jax.tree.map(close, run(cpu_blocks.IMPLEMENTATION), run(textbook))


@compiled
@pytest.mark.parametrize(("batch", "sides", "channels"), [(37, (9, 10), 2), (16, (28, 28), 3), (3, (5, 3), 1)])
def test_data_as_they_lie_change_no_bit(batch, sides, channels, rng):
    x, *others = arguments(rng, batch, sides, channels=channels)
    mask = jnp.asarray(np.arange(batch) % 5 != 2, jnp.float32)

    def run(x, batch_first):
        block = Block(1, 2, 0, True, batch_first=batch_first)

        def loss(*given):
            outputs = train_block(cpu_blocks.IMPLEMENTATION, block, *given, mask)
            return jnp.sum(outputs[0] * jnp.sin(jnp.arange(batch)).reshape(1, 1, 1, -1)), outputs

        of_x, *of_others = jax.jit(jax.grad(loss, argnums=range(5), has_aux=True))(x, *others)[0]
        of_data, outputs = jax.jit(jax.grad(lambda *others: loss(x, *others), argnums=range(4), has_aux=True))(*others)
        extreme = cpu_blocks.IMPLEMENTATION.extremes(block, x, *others[:3])
        return of_x.transpose(3, 1, 2, 0) if batch_first else of_x, of_others, of_data, outputs, extreme

    jax.tree.map(np.testing.assert_array_equal, run(x.transpose(3, 1, 2, 0), True), run(x, False))


@compiled
@pytest.mark.parametrize("batch", [1, 16, 37])
def test_sums_are_those_of_double_precision(batch, rng):
    gradient, extreme = rng.normal(size=(2, 5, 4, 3, batch)).astype(np.float32) + np.float32(1e2)
    mean, mask = extreme.mean(axis=(1, 2, 3)), (np.arange(batch) % 4 != 1).astype(np.float32)
    got = cpu_blocks.IMPLEMENTATION.sums(*map(jnp.asarray, (gradient, extreme, mean, mask)))
    counted = gradient.astype(np.float64) * mask
    want = (counted * (extreme.astype(np.float64) - mean[:, None, None, None])).sum((1, 2, 3)), counted.sum((1, 2, 3))
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-3)


@compiled
@pytest.mark.parametrize("kind", [jnp.bfloat16, jnp.int32, jnp.float16])
def test_other_types_are_refused(kind, rng):
    given = [each.astype(kind) for each in arguments(rng, 5)[:4]]
    with pytest.raises(ValueError, match="take float32 and float64"):
        cpu_blocks.IMPLEMENTATION.extremes(Block(1, 2, 0, False), *given)


@compiled
def test_mixed_types_are_promoted(rng):
    x, *others = arguments(rng, 5)

    def run(x, *others):
        def loss(*given):
            return jnp.sum(train_block(cpu_blocks.IMPLEMENTATION, Block(1, 2, 0, True), *given, jnp.ones(5))[0] ** 2)

        return jax.grad(loss, argnums=range(5))(x, *others)

    narrow = x.astype(jnp.bfloat16)
    got, want = run(narrow, *others), run(narrow.astype(jnp.float32), *others)
    assert [each.dtype for each in got] == [jnp.bfloat16] + [jnp.float32] * 4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got[1:], want[1:])


@pytest.mark.parametrize(
    ("block", "told"),
    [
        (Block(3, 2, 0, False), r"padding must be in \[0, 3\)"),
        (Block(1, 2, 2, False), r"pool_padding in \[0, 2\)"),
        (Block(1, 256, 0, False), r"window in \[1, 255\]"),
        (Block(1, 11, 0, False), "smaller than a window"),
    ],
)
def test_shapes_that_nothing_is_made_for_are_refused(block, told, rng):
    x, kernel, bias, *_ = arguments(rng, 5)
    with pytest.raises(ValueError, match=told):
        convolution_block(tiles.IMPLEMENTATION, block, x, kernel, bias, [], jnp.ones(5, bool), train=True)


@compiled
def test_data_take_no_gradient(rng):
    x, kernel, *others = arguments(rng, 5)

    def loss(x, kernel):
        return jnp.sum(
            train_block(cpu_blocks.IMPLEMENTATION, Block(1, 2, 0, False), x, kernel, *others, jnp.ones(5))[0]
        )

    def results(argnums):  # of the call
        text = jax.jit(jax.grad(loss, argnums)).lower(x, kernel).as_text()
        return re.search(r"custom_call @mer_jax_backward.* -> \((.*)\)", text)[1].count("tensor<")

    assert (results(1), results((0, 1))) == (2, 3)


def ststnet(platform):
    learner = build_learner({"name": "ststnet"}, ("u", "v", "m"), 3, platform)
    variables = jax.eval_shape(learner.init, jax.random.key(0), FLOW)
    return jax.jit(lambda v: learner.apply(v, FLOW, jnp.ones(1, bool), False, None, None)[0]).lower(variables).as_text()


@compiled
def test_a_cpu_takes_it_and_nothing_else_does():
    assert "mer_jax_extremes" in ststnet("cpu")
    assert "mer_jax_extremes" not in ststnet("gpu")


def test_without_a_compiler_a_cpu_goes_without(monkeypatch):
    monkeypatch.setattr(cpu_blocks, "version", lambda: "")
    assert "mer_jax_extremes" not in ststnet("cpu")


@compiled
def test_both_ways_give_the_same_network(rng):
    flow = rng.normal(size=(6, 28, 28, 3)).astype(np.float32)
    variables = STSTNet(3).init(jax.random.key(0), flow)
    ours, theirs = (STSTNet(3, way.IMPLEMENTATION).apply(variables, flow) for way in (cpu_blocks, tiles))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
