"""3DDFA-V3 and FaceVerse v4 from files in their official format; at full size under ``-m slow``."""

import dataclasses
import functools
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from skimage import data

from mer_jax.errors import UserError
from mer_jax.extractors import alignment, ddfa_v3, face_regressor, faceverse
from mer_jax.extractors.networks import get_network
from mer_jax.extractors.resnet import Architecture


def _module(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


torch_faces, face_crops = _module("torch_faces"), _module("face_crops")

SHALLOW = Architecture((1, 1, 1, 1))
KINDS = {
    "3ddfa_v3": (torch_faces.DDFA_HEADS, ddfa_v3),
    "faceverse_v4": (torch_faces.FACEVERSE_HEADS, faceverse),
}


def reference(name, blocks=SHALLOW.blocks):
    torch.manual_seed(0)
    return torch_faces.randomise(torch_faces.TorchRegressor(KINDS[name][0], blocks))


def save(name, network, path):
    state = network.state_dict() if isinstance(network, torch.nn.Module) else network
    torch.save({"net_recon": state, "opt_00": {}} if name == "3ddfa_v3" else state, path)
    return path


def load(name, path):
    return face_regressor.load(path, name=name, heads=KINDS[name][1].HEADS, architecture=SHALLOW)


def by_torch(network, images):
    with torch.no_grad():
        return network(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).numpy()


@dataclasses.dataclass
class Case:
    """A regressor of three images, in PyTorch and read back from its file: all coefficients, and the features."""

    name: str
    network: torch.nn.Module
    variables: dict
    coefficients: Callable
    features: Callable
    columns: slice


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    name, network = request.param, reference(request.param)
    path = save(name, network, tmp_path_factory.mktemp("weights") / "net.pth")
    columns = KINDS[name][1].EXPRESSION
    every = functools.partial(face_regressor.coefficients, architecture=SHALLOW)
    features = functools.partial(every, columns=columns)
    return Case(name, network, load(name, path), jax.jit(every), jax.jit(features), columns)


def draw(rng, case):
    return rng.integers(0, 256, (3, *get_network(case.name).input_shape, 3), np.uint8)


def test_coefficients_equal_torchs(rng, case):
    images = draw(rng, case)
    expected = by_torch(case.network, images)
    found = np.asarray(case.coefficients(case.variables, images))
    assert found.shape == expected.shape and found.dtype == np.float32
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_features_are_the_columns_of_the_expression(rng, case):
    images = draw(rng, case)
    found, every = case.features(case.variables, images), case.coefficients(case.variables, images)
    assert found.shape == (3, get_network(case.name).dim)
    np.testing.assert_allclose(found, every[:, case.columns], atol=1e-5 * np.abs(every).max(), rtol=0)


def test_images_do_not_see_each_other(rng, case):
    images = draw(rng, case)
    other = np.concatenate([255 - images[:2], images[2:]])
    found, beside_others = case.features(case.variables, images), case.features(case.variables, other)
    np.testing.assert_array_equal(found[2], beside_others[2])
    assert np.abs(found[:2] - beside_others[:2]).max() > 0


def test_features_of_a_photograph_from_end_to_end(case):
    """Crops to features, as the authors' preprocessing, written anew with Pillow and OpenCV, and PyTorch make them."""
    frame = np.ascontiguousarray(data.astronaut()[10:165, 120:341])
    images, found = get_network(case.name).prepare(np.stack([frame] * 3))
    (points,) = alignment.find_landmarks(frame[None])
    image = {"3ddfa_v3": face_crops.deep3d, "faceverse_v4": face_crops.faceverse}[case.name](frame, points)
    expected = by_torch(case.network, image[None])[:, case.columns]
    assert found.all()
    assert np.abs(case.features(case.variables, images) - expected).max() <= 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize(("weights", "images"), [(jnp.bfloat16, np.uint8), (jnp.float32, np.float32)])
def test_types(case, weights, images):
    """Variables are float32 NumPy arrays; features are float32, whatever the variables and images are."""
    assert all(type(leaf) is np.ndarray and leaf.dtype == np.float32 for leaf in jax.tree.leaves(case.variables))
    tree = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, weights), case.variables)
    function = functools.partial(face_regressor.coefficients, columns=case.columns, architecture=SHALLOW)
    out = jax.eval_shape(function, tree, jax.ShapeDtypeStruct((2, 64, 64, 3), images))
    assert out.dtype == jnp.float32 and out.shape == (2, get_network(case.name).dim)


def test_layout_of_the_coefficients():
    """The slices of the papers' code: expression 64 of 257, and 171 of 621 without the tongue's 6."""
    assert sum(ddfa_v3.HEADS.values()) == 257 and slice(80, 80 + 64) == ddfa_v3.EXPRESSION
    assert sum(faceverse.HEADS.values()) == 621 and slice(156, 156 + 177 - 6) == faceverse.EXPRESSION
    assert tuple(ddfa_v3.HEADS.values()) == torch_faces.DDFA_HEADS
    assert tuple(faceverse.HEADS.values()) == torch_faces.FACEVERSE_HEADS


BAD = {
    "a head lacks": (lambda state: state.pop("final_layers.1.bias"), r"lacks final_layers\.1\.bias \(64,\)"),
    "a block too many": (
        lambda state: state.update({"backbone.layer1.1.conv1.weight": torch.zeros(64, 256, 1, 1)}),
        r"holds backbone\.layer1\.1\.conv1\.weight \(64, 256, 1, 1\), which 3ddfa_v3 does not have",
    ),
    "another shape": (
        lambda state: state.update({"final_layers.1.weight": torch.zeros(79, 2048, 1, 1)}),
        r"final_layers\.1\.weight has shape \(79, 2048, 1, 1\), \(64, 2048, 1, 1\) is needed",
    ),
    "not finite": (
        lambda state: state["backbone.bn1.running_mean"].fill_(float("nan")),
        r"backbone\.bn1\.running_mean holds values that are not finite; fetch the file again",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_weights_are_refused_in_one_line(tmp_path, name):
    change, message = BAD[name]
    state = {key: tensor.clone() for key, tensor in reference("3ddfa_v3").state_dict().items()}
    change(state)
    path = save("3ddfa_v3", state, tmp_path / "net_recon.pth")
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: {message}") as error:
        load("3ddfa_v3", path)
    assert "\n" not in str(error.value)


def test_files_of_other_networks_are_named(tmp_path):
    faceverse_file = save("faceverse_v4", reference("faceverse_v4"), tmp_path / "faceverse.pth")
    with pytest.raises(UserError, match=r"weights of 3ddfa_v3 are expected, this looks like FaceVerse v4$"):
        load("3ddfa_v3", faceverse_file)
    ddfa_file = save("3ddfa_v3", reference("3ddfa_v3"), tmp_path / "net_recon.pth")
    with pytest.raises(UserError, match=r"weights of faceverse_v4 are expected, this looks like 3DDFA-V3$"):
        load("faceverse_v4", ddfa_file)
    mobile = {"backbone.features.0.0.weight": torch.zeros(16, 3, 3, 3), "final_layers.0.weight": torch.zeros(80, 960)}
    with pytest.raises(UserError, match=r"MobileNetV3; weights of 3ddfa_v3 on a ResNet-50 are expected"):
        load("3ddfa_v3", save("3ddfa_v3", mobile, tmp_path / "net_recon_mbnet.pth"))
    with pytest.raises(UserError, match=r"absent\.pth: no such file"):
        load("3ddfa_v3", tmp_path / "absent.pth")


def test_truncated_file_is_refused(tmp_path):
    path = save("faceverse_v4", reference("faceverse_v4"), tmp_path / "faceverse.pth")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"faceverse\.pth: .*(damaged|cut off)") as error:
        load("faceverse_v4", path)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parameters", "entries"), [
    ("3ddfa_v3", 24_034_625, 332),
    ("faceverse_v4", 24_780_461, 334),
])  # fmt: skip
def test_full_size(rng, tmp_path, name, parameters, entries):
    network = reference(name, (3, 4, 6, 3))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert len(network.state_dict()) == entries
    extractor = get_network(name)
    variables = extractor.load(save(name, network, tmp_path / "net.pth"))
    images = rng.integers(0, 256, (2, *extractor.input_shape, 3), np.uint8)
    expected = by_torch(network, images)
    module = KINDS[name][1]
    found = np.asarray(jax.jit(face_regressor.coefficients)(variables, images))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    expression = np.asarray(jax.jit(extractor.apply)(variables, images))
    theirs = expected[:, module.EXPRESSION]
    assert expression.shape == (2, extractor.dim) and np.abs(expression - theirs).max() <= 1e-4 * np.abs(theirs).max()
    halved = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), variables)
    rough = np.asarray(jax.jit(extractor.apply)(halved, images))
    assert np.abs(rough - theirs).max() <= 5e-2 * np.abs(theirs).max()
