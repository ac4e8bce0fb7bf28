"""ResNet with bottlenecks, layer by layer, against torchvision."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from mer_jax.extractors import resnet
from mer_jax.extractors.checkpoints import fill, torch_sources
from mer_jax.extractors.face_regressor import SKIPPED
from mer_jax.extractors.folded_convolution import expected, fold
from mer_jax.extractors.resnet import RESNET50, Architecture, ResNet, max_pool

_spec = importlib.util.spec_from_file_location("torch_faces", Path(__file__).parents[1] / "torch_faces.py")
torch_faces = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(torch_faces)

SMALL = Architecture((1, 2, 1), 64)


@pytest.fixture(scope="module")
def reference():
    """Torchvision's network; its last stage is left out, as in ``SMALL``."""
    torch.manual_seed(0)
    return torch_faces.randomise(torch_faces.bottlenecks((*SMALL.blocks, 1)))


@pytest.fixture(scope="module")
def variables(reference):
    state = {
        name: tensor.numpy()
        for name, tensor in reference.state_dict().items()
        if not name.startswith(("layer4.", "fc."))
    }
    layers = resnet.layers(SMALL)
    shapes = expected(layers)
    filled = fill(shapes, state, torch_sources(shapes), where="file", network="it", skipped=SKIPPED)
    return {"params": fold(layers, filled, resnet.EPSILON, "file")}


def test_every_layer_equals_torchvision(rng, reference, variables):
    outputs, handles = {}, []
    for layer in resnet.layers(SMALL):
        # ReLU in place behind them would change what is kept.
        def keep(_module, _inputs, output, layer=layer):
            outputs[layer.name] = torch.relu(output) if layer.relu else output.clone()

        handles.append(reference.get_submodule(layer.norm).register_forward_hook(keep))
    x = rng.random((2, 75, 41, 3), np.float32)
    with torch.no_grad():
        y = reference.maxpool(torch.relu(reference.bn1(reference.conv1(torch.from_numpy(x).permute(0, 3, 1, 2)))))
        last = reference.layer3(reference.layer2(reference.layer1(y))).permute(0, 2, 3, 1).numpy()
    for handle in handles:
        handle.remove()
    model = ResNet(SMALL)
    apply = jax.jit(lambda variables, x: model.apply(variables, x, capture_intermediates=True, mutable="intermediates"))
    found, intermediates = apply(variables, x)
    assert outputs.keys() == {layer.name for layer in resnet.layers(SMALL)}
    for name, output in outputs.items():
        ours = np.asarray(intermediates["intermediates"][name]["__call__"][0])
        theirs = output.permute(0, 2, 3, 1).numpy()
        assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max(), name
    assert np.abs(found - last).max() <= 1e-5 * np.abs(last).max()
    assert found.shape[-1] == SMALL.features == 1024


@pytest.mark.parametrize("sides", [(8, 8), (7, 10), (1, 3)])
def test_max_pool_equals_torch(rng, sides):
    x = np.maximum(rng.normal(size=(2, *sides, 5)), 0).astype(np.float32)
    theirs = torch.nn.functional.max_pool2d(torch.from_numpy(x).permute(0, 3, 1, 2), 3, 2, 1).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(jax.jit(max_pool)(x), theirs)


def test_resnet50_has_53_layers():
    layers = resnet.layers(RESNET50)
    assert len(layers) == 53 and RESNET50.features == 2048
    assert sum(np.prod(layer.kernel_shape) + 2 * layer.features for layer in layers) == 23_508_032
    assert [layer.form for layer in layers].count("winograd") == 13
