"""PyTorch's weights in Flax: layers of a stand-in against torch's own forward, and files of other networks."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mer_jax.errors import UserError
from mer_jax.models.torch_weights import flax_variables


class TorchNetwork(torch.nn.Module):
    """A convolution, BatchNorm and a dense layer on what is flattened."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 5, (3, 2))
        self.bn1 = torch.nn.BatchNorm2d(5)
        self.fc = torch.nn.Linear(5 * 4 * 6, 2)

    def forward(self, x):
        return self.fc(self.bn1(self.conv1(x)).flatten(1))


class FlaxNetwork(nn.Module):
    """The same with Flax's own layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(5, (3, 2), padding="VALID", name="conv1")(x)
        x = nn.BatchNorm(use_running_average=True, epsilon=1e-5, name="bn1")(x)
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # (B, H, W, C) -> (B, C * H * W), PyTorch's order
        return nn.Dense(2, name="fc")(x)


@pytest.fixture
def network():
    torch.manual_seed(3)
    network = TorchNetwork()
    network(torch.randn(7, 3, 6, 7) * 3 + 1)  # running statistics that are neither 0 nor 1
    with torch.no_grad():
        network.bn1.weight.uniform_(0.5, 2.0)
        network.bn1.bias.uniform_(-1.0, 1.0)
    return network.eval()


@pytest.fixture
def state(network):
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


@pytest.fixture
def expected():
    return jax.eval_shape(FlaxNetwork().init, jax.random.key(0), jnp.zeros((1, 6, 7, 3)))


def test_the_forward_pass_is_that_of_torch(network, state, expected, rng):
    images = rng.normal(size=(4, 3, 6, 7)).astype(np.float32)  # (B, C, H, W)
    variables = flax_variables(state, expected, "w.pth")
    with jax.default_matmul_precision("highest"):
        ours = FlaxNetwork().apply(variables, images.transpose(0, 2, 3, 1))
    with torch.no_grad():
        theirs = network(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_structure_and_numbers(state, expected):
    variables = flax_variables(state, expected, "w.pth")
    assert jax.tree.structure(variables) == jax.tree.structure(expected)
    for leaf, wanted in zip(jax.tree.leaves(variables), jax.tree.leaves(expected), strict=True):
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
    assert variables["params"]["conv1"]["kernel"][2, 1, 0, 4] == state["conv1.weight"][4, 0, 2, 1]
    assert variables["params"]["fc"]["kernel"][9, 1] == state["fc.weight"][1, 9]
    assert variables["params"]["bn1"]["scale"][3] == state["bn1.weight"][3]
    np.testing.assert_array_equal(variables["batch_stats"]["bn1"]["var"], state["bn1.running_var"])


def test_half_precision_and_a_missing_counter(state, expected):
    short = {name: array.astype(np.float16) for name, array in state.items() if "num_batches" not in name}
    variables = flax_variables(short, expected, "w.pth")
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda s: s.pop("bn1.running_var"), "lacks bn1.running_var (5,)"),
        (lambda s: s.pop("fc.weight"), "lacks fc.weight (2, 120)"),
        (lambda s: s.update({"conv2.bias": s["fc.bias"]}), "holds conv2.bias (2,), which the config's model does not"),
        (
            lambda s: s.update({"conv1.weight": s["conv1.weight"][:, :1]}),
            "conv1.weight has shape (5, 1, 3, 2), the config's model (5, 3, 3, 2)",
        ),
        (
            lambda s: s.update({"fc.weight": s["fc.weight"].T}),
            "fc.weight has shape (120, 2), the config's model (2, 120)",
        ),
        (lambda s: s.update({"fc.bias": s["fc.bias"] * np.inf}), "fc.bias holds values that are not finite"),
    ],
)
def test_weights_of_another_network_are_one_line(state, expected, change, told):
    change(state)
    with pytest.raises(UserError, match=re.escape(f"weights/s1.pth: {told}")) as caught:
        flax_variables(state, expected, "weights/s1.pth")
    assert "\n" not in str(caught.value) and ";" in str(caught.value)
