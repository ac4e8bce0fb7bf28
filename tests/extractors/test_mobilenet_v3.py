"""Both minimal MobileNetV3s, layer by layer, against timm."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from mer_jax.extractors import mobilenet_v3
from mer_jax.extractors.checkpoints import fill, torch_sources
from mer_jax.extractors.face_regressor import SKIPPED
from mer_jax.extractors.folded_convolution import expected, fold
from mer_jax.extractors.mobilenet_v3 import LARGE_MINIMAL, SMALL_MINIMAL, Architecture, Block, MobileNetV3

_spec = importlib.util.spec_from_file_location("torch_faces", Path(__file__).parents[1] / "torch_faces.py")
torch_faces = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(torch_faces)


def reference(size):
    torch.manual_seed(0)
    return torch_faces.randomise(torch_faces.mobilenet(size))


def variables(architecture, network):
    state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    layers = mobilenet_v3.layers(architecture)
    shapes = expected(layers)
    filled = fill(shapes, state, torch_sources(shapes), where="file", network="it", skipped=SKIPPED)
    return {"params": fold(layers, filled, mobilenet_v3.EPSILON, "file")}


@pytest.mark.parametrize(("size", "architecture", "sides"), [
    ("large", LARGE_MINIMAL, (75, 49)),
    ("small", SMALL_MINIMAL, (64, 64)),
])  # fmt: skip
def test_every_layer_equals_timm(rng, size, architecture, sides):
    network = reference(size)
    outputs = {}
    for layer in mobilenet_v3.layers(architecture):
        # timm's normalisations hold the ReLU.
        network.get_submodule(layer.norm).register_forward_hook(
            lambda _module, _inputs, output, name=layer.name: outputs.update({name: output})
        )
    x = rng.random((2, *sides, 3), np.float32)
    with torch.no_grad():
        last = network(torch.from_numpy(x).permute(0, 3, 1, 2))[-1]
    model = MobileNetV3(architecture)
    apply = jax.jit(lambda variables, x: model.apply(variables, x, capture_intermediates=True, mutable="intermediates"))
    found, intermediates = apply(variables(architecture, network), x)
    assert outputs.keys() == {layer.name for layer in mobilenet_v3.layers(architecture)}
    for name, output in outputs.items():
        ours = np.asarray(intermediates["intermediates"][name]["__call__"][0])
        theirs = output.permute(0, 2, 3, 1).numpy()
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max(), name
    np.testing.assert_array_equal(found, intermediates["intermediates"]["__call__"][0])
    assert found.shape == (2, *(-(-side // 32) for side in sides), architecture.features)
    assert np.abs(found - last.permute(0, 2, 3, 1).numpy()).max() <= 1e-5 * last.abs().max()


def test_only_blocks_that_keep_sides_and_channels_add_their_input(rng):
    """A strided block whose output happens to have its input's shape, one pixel, adds nothing."""
    kept = Architecture(8, ((Block(0, 8, 1),),), 4)
    strided = Architecture(8, ((Block(0, 8, 2),),), 4)
    x = rng.random((1, 2, 2, 3), np.float32)  # one pixel behind the stem
    drawn = jax.jit(MobileNetV3(kept).init)(jax.random.key(0), x)
    drawn["params"]["blocks.0.0.conv_pw"] = jax.tree.map(np.zeros_like, drawn["params"]["blocks.0.0.conv_pw"])
    adds, does_not = jax.jit(lambda drawn, x: [MobileNetV3(each).apply(drawn, x) for each in (kept, strided)])(drawn, x)
    assert np.abs(adds).max() > 0 and np.abs(does_not).max() == 0
