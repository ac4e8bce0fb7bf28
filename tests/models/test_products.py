import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import torch

from mer_jax.models import products
from mer_jax.models.products import BY_XLA, Factors, dense_product, no_factors, project, project_back, with_factors

PRODUCTS = {
    "project": (project, (6, 40), lambda rows, kernel: rows @ kernel),
    "project_back": (project_back, (6, 24), lambda rows, kernel: rows @ kernel.T),
}


@pytest.mark.parametrize("added_up", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_values_and_gradients_are_torchs(name, added_up, rng, monkeypatch):
    if added_up:  # as on a GPU
        monkeypatch.setattr(products, "_outer_products", products._added_up)
    ours, shape, theirs = PRODUCTS[name]
    rows, kernel = rng.normal(size=shape).astype(np.float32), rng.normal(size=(40, 24)).astype(np.float32)
    inputs = [torch.tensor(rows, requires_grad=True), torch.tensor(kernel, requires_grad=True)]
    expected = theirs(*inputs)
    torch.sin(expected).sum().backward()

    def loss(rows, kernel):
        value = ours(rows, kernel)
        return jnp.sin(value).sum(), value

    (_, value), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(rows, kernel)
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-5, atol=1e-5)
    for gradient, tensor in zip(gradients, inputs, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "fewer"), [(16, 1), (64, 0)])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_gpu_adds_few_rows_up(name, rows, fewer):
    product, (_, width), _ = PRODUCTS[name]
    gradient = jax.jit(jax.grad(lambda *inputs: product(*inputs).sum(), argnums=1))
    traced = gradient.trace(jnp.ones((rows, width)), jnp.ones((40, 24)))
    counts = [
        traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.dot_general")
        for platform in ("cpu", "cuda")
    ]
    assert counts[0] - counts[1] == fewer


@pytest.mark.parametrize("name", PRODUCTS)
def test_gradients_are_finite_differences_and_hold_over_members(name, rng):
    product, shape, _ = PRODUCTS[name]
    rows, kernel = rng.normal(size=(3, *shape)), rng.normal(size=(3, 40, 24))
    jax.test_util.check_grads(product, (rows[0], kernel[0]), order=2, modes=["rev"], atol=1e-2, rtol=1e-2)
    many = jax.vmap(jax.grad(lambda *inputs: jnp.sin(product(*inputs)).sum(), argnums=1))(rows, kernel)
    one = jax.grad(lambda *inputs: jnp.sin(product(*inputs)).sum(), argnums=1)(rows[1], kernel[1])
    np.testing.assert_allclose(many[1], one, rtol=1e-4, atol=1e-5)


def test_a_dense_layer_may_use_it(rng):
    x = rng.normal(size=(6, 40)).astype(np.float32)
    layer = nn.Dense(24, dot_general=dense_product(BY_XLA))
    variables = layer.init(jax.random.key(0), x)
    np.testing.assert_allclose(layer.apply(variables, x), nn.Dense(24).apply(variables, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PRODUCTS)
def test_taps_get_the_factors_of_the_kernels_gradient(name, rng):
    product, shape, _ = PRODUCTS[name]
    rows, kernel = rng.normal(size=shape).astype(np.float32), rng.normal(size=(40, 24)).astype(np.float32)

    def loss(rows, kernel, taps):
        return jnp.sin(product(rows, kernel, taps)).sum()

    expected = jax.grad(loss, (0, 1))(rows, kernel, None)
    of_rows, of_kernel, factors = jax.grad(loss, (0, 1, 2))(rows, kernel, no_factors(len(rows), kernel))
    np.testing.assert_array_equal(of_rows, expected[0])
    np.testing.assert_array_equal(of_kernel, 0.0)
    np.testing.assert_allclose(factors.product(), expected[1], rtol=1e-6)
    np.testing.assert_allclose(factors.left.T @ factors.right, expected[1], rtol=1e-4, atol=1e-5)


def test_factors_take_the_place_of_their_kernels():
    factors = Factors(jnp.ones((1, 2)), jnp.ones((1, 3)))
    gradients = {"pool": {"kernel": 0, "query": 1}, "head": {"bias": 2}}
    assert with_factors(gradients, {"pool": {"kernel": factors}}) == {
        "pool": {"kernel": factors, "query": 1},
        "head": {"bias": 2},
    }
    assert with_factors(gradients, {}) == gradients
