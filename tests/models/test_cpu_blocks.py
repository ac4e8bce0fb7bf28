"""The CPU's own code for blocks: what it promises beyond its values, and how it is compiled."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mer_jax.models import cpu_blocks, tiles
from mer_jax.models.convolution import Block, train_block
from mer_jax.models.registry import build_learner
from mer_jax.models.ststnet import STSTNet


def arguments(rng, batch):
    """x, kernel, bias, scale and shift: two channels of 9 x 10 pixels, a 3 x 3 kernel and three features."""
    shapes = (2, 9, 10, batch), (3, 3, 2, 3), (3,), (3,), (3,)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


compiled = pytest.mark.skipif(not cpu_blocks.available(), reason="no C++ compiler here")
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
        y, mean, variance = train_block(cpu_blocks.IMPLEMENTATION, Block(2, 3, 1, True), x, *others, mask)
        return y[..., :19], mean, variance

    jax.tree.map(np.testing.assert_array_equal, run(x, mask), run(garbage, jnp.pad(mask, (0, 7))))


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


def test_an_empty_cxx_goes_without(monkeypatch):
    monkeypatch.setenv("CXX", "")
    assert not cpu_blocks.available.__wrapped__()
    monkeypatch.setattr(cpu_blocks, "available", cpu_blocks.available.__wrapped__)
    assert "mer_jax_extremes" not in ststnet("cpu")


@pytest.mark.parametrize("compiler", ["no_such_compiler", f"{sys.executable} -c 'raise SystemExit(3)'"])
def test_a_compiler_that_fails_is_told_in_one_line(compiler, monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not cpu_blocks.available.__wrapped__()
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and compiler.split()[0] in told and "CXX=" in told
    assert not list(tmp_path.rglob("*.so"))


@compiled
def test_a_machine_compiles_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    commands = []

    def run(command):
        commands.append(command)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    monkeypatch.setattr(cpu_blocks, "_run", run)
    monkeypatch.setattr(cpu_blocks, "_FLAGS", [flag for flag in cpu_blocks._FLAGS if flag != "-O3"])
    compiler = cpu_blocks._compiler()
    first = cpu_blocks._built(compiler)
    again = cpu_blocks._built(compiler)
    assert (
        first == again
        and first.parent == tmp_path / "mer_jax"
        and [path.name for path in first.parent.iterdir()] == [first.name]
    )
    assert sum("-o" in command for command in commands) == 1
    monkeypatch.setattr(cpu_blocks, "_FLAGS", (*cpu_blocks._FLAGS, "-DOTHER"))
    assert cpu_blocks._built(compiler) != first


@compiled
def test_a_homeless_user_has_a_folder_too(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(cpu_blocks.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setattr(cpu_blocks.tempfile, "gettempdir", lambda: str(tmp_path))
    assert cpu_blocks._cache_folder().parent.parent == tmp_path


@compiled
def test_both_ways_give_the_same_network(rng):
    flow = rng.normal(size=(6, 28, 28, 3)).astype(np.float32)
    variables = STSTNet(3).init(jax.random.key(0), flow)
    ours, theirs = (STSTNet(3, way.IMPLEMENTATION).apply(variables, flow) for way in (cpu_blocks, tiles))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
