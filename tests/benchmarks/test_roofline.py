"""Arithmetic and bytes of the benchmark's floors: by hand, and against what XLA counts in the models themselves."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from benchmarks import jobs, roofline
from configs import fusion, micro_attnet
from mer_jax.models import registry
from mer_jax.models.registry import build_learner

_spec = importlib.util.spec_from_file_location("plain_blocks", Path(__file__).parents[1] / "plain_blocks.py")
plain_blocks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain_blocks)

MACHINE = roofline.Machine(arithmetic=1000.0, bandwidth=100.0, told={})


def test_a_dense_network_by_hand():
    # (2, 3) (3, 4) + 4 and (2, 4) (4, 5): parameters 16 and 20.
    layers = [
        roofline.dense("first", 2, 3, 4, parameters=16, kept=8, to_inputs=False),
        roofline.dense("second", 2, 4, 5),
    ]
    forward, backward = roofline.forward_work(layers, 6), roofline.backward_work(layers, 6)
    assert forward.arithmetic == 2 * 2 * 3 * 4 + 2 * 2 * 4 * 5
    assert forward.needed == 4 * (6 + 36 + 8 + 10)  # batch, parameters, hidden values, logits
    assert forward.layered == 4 * ((6 + 16 + 8) + (8 + 20 + 10))
    assert backward.arithmetic == 2 * forward.arithmetic
    assert backward.needed == 4 * (6 + 36 + 36 + 8 + 10)  # and the gradients
    assert backward.layered == 4 * ((8 + 6 + 2 * 16) + (10 + 2 * 8 + 2 * 20))


def test_an_update_by_hand():
    work = roofline.update_work(10)
    assert (work.arithmetic, work.needed, work.layered) == (180, 280, 280)
    assert roofline.update_work(10, gradients=3) == roofline.Work(180, 4 * (60 + 3), 280)


def test_gradients_that_are_handed_on_as_factors_by_hand():
    layer = roofline.dense("one", 2, 30, 40, handed_on=2 * 70)
    work = roofline.backward_work([layer], 60)
    assert work.needed == 4 * (60 + 1200 + 140 + 80)  # batch, parameters, factors, the output's gradient
    assert work.layered == 4 * (80 + 2 * 60 + 2 * 1200)


def test_the_floor_is_the_longer_of_arithmetic_and_bytes():
    assert roofline.Work(2000.0, 100.0, 300.0).floor(MACHINE) == 2.0
    assert roofline.Work(2000.0, 100.0, 300.0).floor(MACHINE, layered=True) == 3.0


def xla_arithmetic(model, channels, inputs, num_classes, hyper):
    """What XLA counts before it optimises: of a forward pass, and of it with its gradient."""
    learner = build_learner(model, channels, num_classes)
    batch = jax.tree.leaves(inputs)[0].shape[0]
    variables = jax.eval_shape(learner.init, jax.random.key(0), jax.tree.map(lambda x: x[:1], inputs))

    def forward(params, variables, inputs):
        logits, _, _ = learner.apply(
            {**variables, "params": params}, inputs, jnp.ones(batch, bool), True, hyper, jax.random.key(1)
        )
        return logits.sum()

    arguments = variables["params"], variables, inputs
    return [jax.jit(f).lower(*arguments).cost_analysis()["flops"] for f in (forward, jax.value_and_grad(forward))]


def test_fusion_counts_what_xla_counts():
    config = fusion.get_config()
    batch, frames = 16, 18
    inputs = {
        "features": {name: np.zeros((batch, frames, width), np.float32) for name, width in jobs.WIDTHS.items()},
        "frame_mask": np.ones((batch, frames), bool),
    }
    no_dropout = {"dropout": 0.0, "feature_dropout": 0.0}
    counted = xla_arithmetic(config.model, tuple(jobs.WIDTHS), inputs, 5, no_dropout)
    layers = [layer for layer in roofline.fusion_layers(config.model, batch, frames, 5) if "drop" not in layer.name]
    forward, backward = roofline.forward_work(layers, 0), roofline.backward_work(layers, 0)
    assert counted[0] == pytest.approx(forward.arithmetic, rel=0.05)
    assert counted[1] == pytest.approx(forward.arithmetic + backward.arithmetic, rel=0.05)


@pytest.mark.parametrize(("name", "side"), [("micro_attnet", 64), ("ststnet", 28)])
def test_flow_networks_count_what_xla_counts(name, side, monkeypatch):
    # XLA sees nothing of a CPU's own code, and tiles spend arithmetic to save bytes.
    monkeypatch.setattr(registry, "_implementation", lambda platform: plain_blocks.IMPLEMENTATION)
    model = micro_attnet.get_config().model if name == "micro_attnet" else ConfigDict({"name": name})
    inputs = {"flow": np.zeros((8, side, side, 3), np.float32)}
    no_dropout = {"dropout": 0.0, "feature_dropout": 0.0}
    counted = xla_arithmetic(model, ("u", "v", "m"), inputs, 5, no_dropout)
    layers = (
        roofline.micro_attnet_layers(model, 8, side, 5)
        if name == "micro_attnet"
        else roofline.ststnet_layers(8, side, 5)
    )
    forward, backward = roofline.forward_work(layers, 0), roofline.backward_work(layers, 0)
    assert counted[0] == pytest.approx(forward.arithmetic, rel=0.1)
    assert counted[1] == pytest.approx(forward.arithmetic + backward.arithmetic, rel=0.1)


def test_parameters_are_those_of_the_model():
    model = micro_attnet.get_config().model
    learner = build_learner(model, ("u", "v", "m"), 5)
    variables = jax.eval_shape(learner.init, jax.random.key(0), {"flow": jnp.zeros((1, 64, 64, 3))})
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert sum(layer.parameters for layer in roofline.micro_attnet_layers(model, 8, 64, 5)) == count
