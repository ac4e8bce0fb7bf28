"""Every form of a folded convolution against PyTorch's convolution and normalisation; what which platform runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mer_jax.errors import UserError
from mer_jax.extractors import folded_convolution
from mer_jax.extractors.folded_convolution import Convolution, Layer, arrange, convolve, fold, forms, in_chunks

EPSILON = 1e-3
LAYERS = {
    "pointwise": Layer("c", "n", 1, 12, 20, relu=False),
    "pointwise strided": Layer("c", "n", 1, 12, 20, stride=2, padding=0),
    "depthwise": Layer("c", "n", 3, 12, 12, depthwise=True),
    "depthwise strided": Layer("c", "n", 3, 12, 12, stride=2, depthwise=True),
    "winograd": Layer("c", "n", 3, 12, 20, padding=1),
    "winograd, SAME": Layer("c", "n", 3, 12, 20),
    "strided": Layer("c", "n", 3, 12, 20, stride=2, padding=1),
    "without padding": Layer("c", "n", 3, 12, 20, padding=0, relu=False),
    "small stem": Layer("c", "n", 3, 3, 16, stride=2),
    "large stem": Layer("c", "n", 7, 3, 16, stride=2, padding=3),
}
SIDES = [(8, 8), (3, 5)]


def weights(rng, layer):
    """A kernel in PyTorch's order and a normalisation, as they stand in a checkpoint."""
    kernel = rng.normal(size=(layer.features, layer.kernel_shape[2], layer.size, layer.size)).astype(np.float32)
    names = ("weight", "bias", "running_mean", "running_var")
    return kernel, {name: rng.uniform(0.5, 1.5, layer.features).astype(np.float32) for name in names}


def folded(layer, kernel, norm):
    filled = {
        "params": {"c": {"kernel": kernel.transpose(2, 3, 1, 0)}, "n": {"scale": norm["weight"], "bias": norm["bias"]}},
        "batch_stats": {"n": {"mean": norm["running_mean"], "var": norm["running_var"]}},
    }
    return fold([layer], filled, EPSILON, "file")["c"]


def by_torch(layer, kernel, norm, x):
    (top, bottom), (left, right) = (layer.pads(side) for side in x.shape[1:3])
    y = torch.from_numpy(x).permute(0, 3, 1, 2).double()
    y = F.pad(y, (left, right, top, bottom))
    groups = layer.channels if layer.depthwise else 1
    y = F.conv2d(y, torch.from_numpy(kernel).double(), stride=layer.stride, groups=groups)
    norm = {name: torch.from_numpy(value).double() for name, value in norm.items()}
    y = F.batch_norm(y, norm["running_mean"], norm["running_var"], norm["weight"], norm["bias"], eps=EPSILON)
    return (torch.relu(y) if layer.relu else y).permute(0, 2, 3, 1).numpy()


def relative(found, expected):
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_torch(rng, name, sides):
    layer = LAYERS[name]
    kernel, norm = weights(rng, layer)
    x = rng.normal(size=(2, *sides, layer.channels)).astype(np.float32)
    expected = by_torch(layer, kernel, norm, x)
    params = folded(layer, kernel, norm)
    found = jax.jit(Convolution(layer).apply)({"params": params}, x)
    assert found.shape == expected.shape and relative(found, expected) < 1e-5


@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if layer.form != "pointwise"])
def test_both_forms_of_a_platform_agree(rng, name):
    layer = LAYERS[name]
    kernel = arrange(layer, rng.normal(size=layer.kernel_shape).astype(np.float32))
    x = rng.normal(size=(2, 9, 6, layer.channels)).astype(np.float32)
    ours, theirs = (np.asarray(jax.jit(form)(x, kernel)) for form in forms(layer))
    assert relative(ours, theirs) < 1e-5


def test_forms_are_those_meant():
    assert [layer.form for layer in LAYERS.values()] == [
        *("pointwise", "pointwise", "depthwise", "depthwise", "winograd", "winograd"),
        *("direct", "direct", "direct", "direct"),
    ]


@pytest.mark.parametrize("name", ["depthwise", "winograd", "small stem"])
def test_only_a_cpu_gets_the_cpus_form(rng, name):
    layer = LAYERS[name]
    kernel = arrange(layer, rng.normal(size=layer.kernel_shape).astype(np.float32))
    x = rng.normal(size=(2, 8, 8, layer.channels)).astype(np.float32)
    traced = jax.jit(lambda x, kernel: convolve(x, kernel, layer)).trace(x, kernel)
    convolutions = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.convolution")
        for platform in ("cpu", "cuda", "tpu")
    }
    assert convolutions == {"cpu": 0, "cuda": 1, "tpu": 1}


def test_same_padding_is_tensorflows():
    stride = Layer("c", "n", 3, 1, 1, stride=2)
    # An even side needs one zero, which comes last; an odd one needs one on each side.
    assert [stride.pads(side) for side in (2, 8, 7, 1)] == [(0, 1), (0, 1), (1, 1), (1, 1)]
    assert Layer("c", "n", 3, 1, 1).pads(8) == (1, 1)


def test_fold_by_hand():
    layer = Layer("c", "n", 1, 1, 2)
    kernel = np.array([2.0, -3.0], np.float32).reshape(2, 1, 1, 1)
    norm = {
        "weight": np.array([3.0, 1.0], np.float32),
        "bias": np.array([0.5, 0.0], np.float32),
        "running_mean": np.array([1.0, -2.0], np.float32),
        "running_var": np.array([4.0, 0.25], np.float32) - np.float32(EPSILON),
    }
    params = folded(layer, kernel, norm)
    # (2 x - 1) / 2 * 3 + 0.5 = 3 x - 1 and (-3 x + 2) / 0.5 = -6 x + 4.
    np.testing.assert_allclose(params["kernel"], [[3.0, -6.0]], rtol=1e-6)
    np.testing.assert_allclose(params["bias"], [-1.0, 4.0], rtol=1e-6)


def test_negative_variance_is_refused(rng):
    layer = LAYERS["winograd"]
    kernel, norm = weights(rng, layer)
    norm["running_var"][3] = -0.1
    with pytest.raises(UserError, match=r"^file: n\.running_var is negative, which no variance is; fetch .* again$"):
        folded(layer, kernel, norm)


@pytest.mark.parametrize("name", ["winograd", "depthwise", "strided"])
def test_bfloat16_is_computed_in_bfloat16(rng, name):
    layer = LAYERS[name]
    kernel, norm = weights(rng, layer)
    x = rng.normal(size=(2, 8, 8, layer.channels)).astype(np.float32)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), folded(layer, kernel, norm))
    found = jax.jit(Convolution(layer).apply)({"params": params}, jnp.asarray(x, jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    assert 0 < relative(found.astype(jnp.float32), by_torch(layer, kernel, norm, x)) < 2e-2


def test_random_parameters_have_the_folded_shapes(rng):
    for layer in LAYERS.values():
        kernel, norm = weights(rng, layer)
        x = jnp.zeros((1, 8, 8, layer.channels))
        drawn = jax.eval_shape(Convolution(layer).init, jax.random.key(0), x)["params"]
        shapes = jax.tree.map(lambda leaf: leaf.shape, drawn)
        assert shapes == jax.tree.map(lambda leaf: leaf.shape, folded(layer, kernel, norm))


@pytest.mark.parametrize("count", [1, 3, 4, 8, 9])
def test_chunks_change_nothing(rng, count):
    images = rng.normal(size=(count, 4, 4, 3)).astype(np.float32)
    sizes = []

    def function(x):
        sizes.append(len(x))
        return x.sum(axis=(1, 2)) ** 2

    found = jax.jit(lambda x: in_chunks(function, x, 4))(images)
    np.testing.assert_allclose(found, images.sum(axis=(1, 2)) ** 2, rtol=1e-5)
    # The CPU's chunks, a rest, and the whole for other platforms: never one image more.
    assert set(sizes) == {min(count, 4), count} | ({count % 4} if count > 4 and count % 4 else set())


def test_winograd_takes_sixteen_products():
    """As many as there are points; the definition would take 36 for the same outputs."""
    layer = LAYERS["winograd"]
    points = arrange(layer, np.ones(layer.kernel_shape, np.float32))
    text = jax.jit(forms(layer)[0]).lower(np.ones((1, 8, 8, layer.channels), np.float32), points).as_text()
    assert text.count("stablehlo.dot_general") == len(points) == 16
    assert folded_convolution._restored(points).shape == layer.kernel_shape
