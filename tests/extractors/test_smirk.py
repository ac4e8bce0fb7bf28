"""SMIRK's encoders, at full size, from a file in the official format."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from skimage import data, transform

from mer_jax.errors import UserError
from mer_jax.extractors import alignment, smirk
from mer_jax.extractors.networks import get_network

_spec = importlib.util.spec_from_file_location("torch_faces", Path(__file__).parents[1] / "torch_faces.py")
torch_faces = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(torch_faces)


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    network = torch_faces.randomise(torch_faces.TorchSmirk())
    with torch.no_grad():
        # Random weights reach far beyond the limits; these stay around them, on both sides.
        layer = network.expression_encoder.expression_layers[0]
        layer.weight[50:] *= 0.002
        layer.bias[50:] = torch.tensor([0.5, 1.0, 0.0, 0.2, -0.2])
    return network


@pytest.fixture(scope="module")
def checkpoint(reference, tmp_path_factory):
    return torch_faces.save_smirk(reference, tmp_path_factory.mktemp("weights") / "SMIRK_em1.pt")


def by_torch(network, images):
    with torch.no_grad():
        return network(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).numpy()


def close(found, expected):
    """Each kind of coefficients to 1e-4 of its own scale."""
    return all(
        np.abs(found[:, columns] - expected[:, columns]).max() <= 1e-4 * np.abs(expected[:, columns]).max()
        for columns in smirk.COLUMNS.values()
        if columns.start < found.shape[1]
    )


@pytest.fixture(scope="module")
def apply():
    """Compiled once for the tests of the expression encoder, which all give it two images."""
    return jax.jit(smirk.features)


@pytest.mark.slow
def test_all_encoders_equal_timms(rng, reference, checkpoint):
    assert sum(parameter.numel() for parameter in reference.parameters()) == 3_599_921
    assert len(reference.state_dict()) == 762
    images = rng.integers(0, 256, (5, 224, 224, 3), np.uint8)
    expected = by_torch(reference, images)
    network = get_network("smirk_full")
    found = np.asarray(jax.jit(network.apply)(network.load(checkpoint), images))
    assert found.shape == (5, network.dim) == (5, 361) and found.dtype == np.float32
    assert close(found, expected)


def test_default_is_the_expression_encoders_part(rng, reference, checkpoint, apply):
    images = rng.integers(0, 256, (2, 224, 224, 3), np.uint8)
    expected = by_torch(reference, images)
    network = get_network("smirk")
    variables = network.load(checkpoint)
    assert variables["params"].keys() == {"expression_encoder"}
    assert all(type(leaf) is np.ndarray and leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables))
    found = np.asarray(apply(variables, images))
    assert found.shape == (2, network.dim) == (2, 55)
    assert close(found, expected[:, :55])


def test_limits_by_hand(checkpoint, apply):
    """Eyelids in [0, 1], jaw open from 0 and turned by at most 0.2; nothing else is limited."""
    variables = get_network("smirk").load(checkpoint)
    head = variables["params"]["expression_encoder"]["head"]
    head["kernel"] = np.zeros_like(head["kernel"])
    images = np.zeros((2, 224, 224, 3), np.uint8)
    for value, limited in ((5.0, [1, 1, 5, 0.2, 0.2]), (-5.0, [0, 0, 0, -0.2, -0.2]), (0.1, [0.1] * 5)):
        head["bias"] = np.full(55, value, np.float32)
        found = apply(variables, images)[1]
        np.testing.assert_allclose(found[:50], value, rtol=1e-6)
        np.testing.assert_allclose(found[50:], limited, rtol=1e-6)


def test_features_of_a_photograph_from_end_to_end(reference, checkpoint, apply):
    """Crops to features, as SMIRK's demonstration and PyTorch's network make them."""
    network = get_network("smirk")
    frame = np.ascontiguousarray(data.astronaut()[10:165, 120:341])
    images, found = network.prepare(np.stack([frame, frame[:, ::-1]]))
    assert found.all()
    # The detector merges all boxes above its threshold: SMIRK's threshold makes SMIRK's box.
    (points,) = alignment.find_landmarks(frame[None], 0.1)
    (left, top), (right, bottom) = points.min(0), points.max(0)
    side = int((right - left + bottom - top) / 2 * 1.4)
    x, y = right - (right - left) / 2.0, bottom - (bottom - top) / 2.0
    corners = np.array([[x - side / 2, y - side / 2], [x - side / 2, y + side / 2], [x + side / 2, y - side / 2]])
    similarity = transform.estimate_transform("similarity", corners, np.array([[0, 0], [0, 223], [223, 0]]))
    image = transform.warp(frame, similarity.inverse, output_shape=(224, 224), preserve_range=True).astype(np.uint8)
    np.testing.assert_array_equal(images[0], image)
    features = np.asarray(apply(network.load(checkpoint), images))
    expected = by_torch(reference, image[None])[:, :55]
    assert np.abs(features[0] - expected[0]).max() <= 1e-3 * np.abs(expected).max()
    assert close(features[:1], expected)


def test_bfloat16_variables_give_float32_features(checkpoint):
    variables = get_network("smirk").load(checkpoint)
    halved = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), variables)
    out = jax.eval_shape(smirk.features, halved, jax.ShapeDtypeStruct((2, 64, 64, 3), np.uint8))
    assert out.dtype == jnp.float32 and out.shape == (2, 55)


@pytest.mark.slow
def test_a_few_images_at_a_time_stay_below_the_threshold_of_fresh_memory(checkpoint):
    """The C library fetches blocks of 32 MiB and more from the system anew in each call; 8 images would need 59 MB."""
    network = get_network("smirk")
    variables = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), network.load(checkpoint))
    images = jax.ShapeDtypeStruct((8, 224, 224, 3), np.uint8)
    used = jax.jit(network.apply).lower(variables, images).compile().memory_analysis().temp_size_in_bytes
    assert 2**20 < used < 32 * 2**20


PREFIX = "smirk_encoder.expression_encoder"
BAD = {
    "lacks a statistic": (
        lambda state: state.pop(f"{PREFIX}.encoder.bn1.running_var"),
        r"lacks smirk_encoder\.expression_encoder\.encoder\.bn1\.running_var \(16,\)",
    ),
    "unknown layer": (
        lambda state: state.update({f"{PREFIX}.brow_layers.0.weight": torch.zeros(5, 960)}),
        r"holds smirk_encoder\.expression_encoder\.brow_layers\.0\.weight \(5, 960\), which smirk does not have",
    ),
    "another architecture": (
        lambda state: state.update({f"{PREFIX}.expression_layers.0.weight": torch.zeros(55, 576)}),
        r"expression_layers\.0\.weight has shape \(55, 576\), \(55, 960\) is needed",
    ),
    "unknown network": (
        lambda state: state.update({"flame.shapedirs": torch.zeros(3)}),
        r"holds flame\.shapedirs \(3,\), which smirk does not have",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_weights_are_refused_in_one_line(tmp_path, checkpoint, name):
    change, message = BAD[name]
    state = torch.load(checkpoint)
    change(state)
    path = tmp_path / "SMIRK_em1.pt"
    torch.save(state, path)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: .*{message}") as error:
        get_network("smirk").load(path)
    assert "\n" not in str(error.value)


def test_all_encoders_are_needed_only_by_the_network_of_all(tmp_path, checkpoint):
    state = {name: tensor for name, tensor in torch.load(checkpoint).items() if ".pose_encoder." not in name}
    path = tmp_path / "SMIRK_em1.pt"
    torch.save(state, path)
    get_network("smirk").load(path)
    with pytest.raises(UserError, match=r"lacks smirk_encoder\.pose_encoder\.encoder\.conv_stem\.weight"):
        get_network("smirk_full").load(path)


def test_a_bare_mobilenet_and_a_truncated_file_are_refused(tmp_path, reference, checkpoint):
    bare = tmp_path / "mobilenet.pth"
    torch.save(reference.expression_encoder.encoder.state_dict(), bare)
    with pytest.raises(UserError, match=r"weights of smirk are expected, this looks like a MobileNet$"):
        get_network("smirk").load(bare)
    cut = tmp_path / "cut.pt"
    cut.write_bytes(checkpoint.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"^.*cut\.pt: .*damaged"):
        get_network("smirk").load(cut)
