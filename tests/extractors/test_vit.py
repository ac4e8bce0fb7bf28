"""The vision transformer by itself: attention, number formats, sizes, what it reads off its parameters."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mer_jax.extractors import vit
from mer_jax.extractors.vit import Architecture, VisionTransformer, observed

_spec = importlib.util.spec_from_file_location("torch_reference", Path(__file__).parents[1] / "torch_reference.py")
torch_reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(torch_reference)
relative_error = torch_reference.relative_error

SIGLIP = Architecture(4, 32, 2, 4, 48, (4, 6), "gelu_tanh", "fixed")
RADIO = Architecture(
    4, 32, 2, 4, 48, (8, 8), "gelu", "crop", prefix=6, summary=(0, 2), patch_bias=False, final_norm=False, mlp_norm=True
)
DINO = Architecture(4, 32, 3, 2, 40, (5, 5), "swiglu", "cubic", prefix=3, summary=(0,), layer_scale=True)
# Compiled: one by one, operations would each be compiled by themselves.
features = jax.jit(vit.features, static_argnums=0)
attention_map = jax.jit(vit.attention_map, static_argnums=0)
ARCHITECTURES = pytest.mark.parametrize("architecture", [SIGLIP, RADIO, DINO], ids=["siglip", "radio", "dino"])


def variables_of(architecture, seed=0):
    """Random variables in which every term counts."""
    images = jnp.zeros((1, *(side * architecture.patch for side in architecture.grid), 3), jnp.uint8)
    shapes = jax.eval_shape(VisionTransformer(architecture).init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.2, jnp.float32), shapes)
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf + (path[-1].key == "scale"), params)
    constants = {"mean": jnp.array([0.4, 0.5, 0.6]), "std": jnp.array([0.2, 0.3, 0.4])}
    return {"params": params, "constants": constants}


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (3, 16, 24, 3), np.uint8)


# --- attention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length, source", [(9, 9), (1, 9), (33, 7)])
@pytest.mark.parametrize("way", [vit.attend, vit._attend, vit._attend_on_cpu])
def test_attention_is_torch_s(rng, length, source, way):
    query, key, value = (rng.normal(size=(2, n, 3, 8)).astype(np.float32) * 3 for n in (length, source, source))
    ours = jax.jit(way)(query, key, value)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(x).transpose(1, 2) for x in (query, key, value))
    ).transpose(1, 2)
    assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("piece", [1, 2000, 10000])
def test_attention_in_pieces_is_the_same(rng, monkeypatch, piece):
    parts = [jnp.asarray(rng.normal(size=(2, 21, 5, 4)), jnp.float32) for _ in range(3)]
    whole = vit._attend_on_cpu(*parts)
    monkeypatch.setattr(vit, "_SCORES", piece)
    np.testing.assert_allclose(vit._attend_on_cpu(*parts), whole, rtol=0, atol=1e-6)


def test_a_few_tokens_at_a_time_give_the_same_features(rng, monkeypatch):
    architecture = vit.Architecture(4, 16, 2, 2, 32, (3, 3), "gelu", "cubic", prefix=1, summary=(0,))
    images = rng.integers(0, 256, (5, 12, 12, 3), np.uint8)
    variables = jax.jit(vit.VisionTransformer(architecture).init)(jax.random.key(0), images)
    whole = jax.jit(vit.features, static_argnums=0)(architecture, variables, images)
    monkeypatch.setattr(vit, "_TOGETHER", 20)  # two images of 10 tokens
    pieces = jax.jit(lambda *given: vit.features(architecture, *given))(variables, images)
    np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize("way", [vit._attend, vit._attend_on_cpu])
def test_attention_to_scores_that_overflow_an_exponential(way):
    query = jnp.full((1, 2, 1, 4), 100.0)
    key = query * jnp.array([1.0, 0.5])[None, :, None, None]
    value = jnp.arange(8.0).reshape(1, 2, 1, 4)
    np.testing.assert_allclose(way(query, key, value)[0, 0, 0], [0, 1, 2, 3])


def test_cudnn_is_asked_on_gpus_for_half_precision_and_does_without(monkeypatch):
    asked = []

    def record(query, key, value, implementation=None):
        asked.append(implementation)
        if implementation == "cudnn" and query.shape[-1] > 64:
            raise RuntimeError("heads too wide")
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for dtype, width, expected in (
        (jnp.float32, 64, [None]),
        (jnp.bfloat16, 64, ["cudnn"]),
        (jnp.bfloat16, 72, ["cudnn", None]),
    ):
        asked.clear()
        part = jnp.zeros((1, 2, 1, width), dtype)
        vit._attend(part, part, part)
        assert asked == expected


# --- the network --------------------------------------------------------------------------------------------------


@ARCHITECTURES
def test_an_image_s_features_do_not_depend_on_its_neighbours(architecture, images):
    variables = variables_of(architecture)
    together = features(architecture, variables, images)
    assert together.shape == (3, architecture.dim) and together.dtype == jnp.float32
    for number in range(3):
        alone = features(architecture, variables, images[number : number + 1])[0]
        np.testing.assert_allclose(alone, together[number], rtol=1e-5, atol=1e-5)


@ARCHITECTURES
def test_bytes_are_scaled_to_one(architecture, images):
    variables = variables_of(architecture)
    ours = features(architecture, variables, images)
    scaled = features(architecture, variables, images.astype(np.float32) / 255)
    np.testing.assert_allclose(ours, scaled, rtol=1e-5, atol=1e-5)


@ARCHITECTURES
def test_bfloat16_is_computed_in_bfloat16(architecture, images):
    variables = variables_of(architecture)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    exact = np.asarray(features(architecture, variables, images))
    ours = features(architecture, half, images)
    assert ours.dtype == jnp.float32
    assert np.linalg.norm(ours - exact) < 0.03 * np.linalg.norm(exact)
    jaxpr = jax.make_jaxpr(lambda v, x: features(architecture, v, x))(half, images)
    products = [equation for equation in equations(jaxpr.jaxpr) if equation.primitive.name == "dot_general"]
    # Positions are resized in float32, once for all images; whatever is done for each of the three is in bfloat16.
    types = {str(v.aval.dtype) for e in products if 3 in e.outvars[0].aval.shape[:1] for v in e.invars}
    assert types == {"bfloat16"}


def equations(jaxpr):
    """All equations, also those of branches and loops."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@ARCHITECTURES
def test_attention_maps_are_shares_of_patches(architecture, images):
    variables = variables_of(architecture)
    shares = attention_map(architecture, variables, images)
    assert shares.shape == (3, 4, 6) and shares.dtype == jnp.float32
    total = shares.sum(axis=(1, 2))
    assert (shares > 0).all()
    if architecture.prefix:
        assert (total < 1).all() and (total > 0).all()
    else:
        np.testing.assert_allclose(total, 1, rtol=1e-5)


def test_attention_maps_follow_what_is_attended_to():
    """A probe that looks for redness finds the red patch."""
    architecture = dataclasses.replace(SIGLIP, depth=1, heads=1)
    variables = jax.tree.map(jnp.zeros_like, variables_of(architecture))
    params = variables["params"]
    red = jnp.zeros((4, 4, 3, 32)).at[:, :, 0, 0].set(1.0).reshape(48, 32)
    params["embed"]["kernel"] = red
    params["norm"]["scale"] = jnp.ones(32)
    params["head"]["probe"] = jnp.ones(32)
    params["head"]["query"]["bias"] = jnp.zeros(32).at[0].set(10.0)
    params["head"]["key_value"]["kernel"] = jnp.zeros((32, 64)).at[0, 0].set(1.0)
    variables["constants"] = {"mean": jnp.zeros(3), "std": jnp.ones(3)}
    images = np.zeros((1, 16, 24, 3), np.uint8)
    images[0, 4:8, 8:12, 0] = 255
    shares = attention_map(architecture, variables, images)[0]
    assert shares[1, 2] > 0.99 and np.unravel_index(shares.argmax(), shares.shape) == (1, 2)


@ARCHITECTURES
def test_parameters_tell_their_architecture(architecture):
    params = variables_of(architecture)["params"]
    blank = dataclasses.replace(
        architecture,
        width=1,
        depth=1,
        hidden=1,
        grid=(1, 1),
        prefix=0,
        patch_bias=not architecture.patch_bias,
        layer_scale=not architecture.layer_scale,
        mlp_norm=not architecture.mlp_norm,
        final_norm=not architecture.final_norm,
    )
    assert observed(blank, params) == architecture


@pytest.mark.parametrize(
    "architecture, size, told",
    [
        (SIGLIP, (16, 16), "images of 16 x 16: this network takes 16 x 24 alone"),
        (RADIO, (16, 18), "images of 16 x 18: sides must be multiples of 4"),
        (DINO, (0, 16), "images of 0 x 16: sides must be multiples of 4"),
    ],
)
def test_sizes_that_do_not_fit(architecture, size, told):
    with pytest.raises(ValueError, match=told):
        features(architecture, variables_of(architecture), np.zeros((1, *size, 3), np.uint8))


def test_what_does_not_fill_a_patch_is_not_seen(images):
    variables = variables_of(SIGLIP)
    wider = np.pad(images, ((0, 0), (0, 3), (0, 2), (0, 0)), constant_values=200)
    np.testing.assert_array_equal(features(SIGLIP, variables, wider), features(SIGLIP, variables, images))
