"""MicroAttNet and STSTNet against independent PyTorch networks: outputs, gradients, running statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

from mer_jax.errors import UserError
from mer_jax.models import cpu_blocks, pieces, tiles
from mer_jax.models.micro_attnet import MicroAttNet
from mer_jax.models.registry import build_learner
from mer_jax.models.ststnet import STSTNet, average_pool


@pytest.fixture(autouse=True)
def compiled_where_it_is_tested(request):
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("way") is cpu_blocks:
        request.getfixturevalue("compiled")


def copy_conv(conv, params):
    conv.weight.data = torch.tensor(np.array(params["kernel"])).permute(3, 2, 0, 1).contiguous()
    conv.bias.data = torch.tensor(np.array(params["bias"]))


def copy_dense(dense, params):
    dense.weight.data = torch.tensor(np.array(params["kernel"])).T.contiguous()
    dense.bias.data = torch.tensor(np.array(params["bias"]))


def copy_norm(norm, params):
    norm.weight.data = torch.tensor(np.array(params["scale"]))
    norm.bias.data = torch.tensor(np.array(params["bias"]))


def test_average_pooling_is_pytorchs(rng):
    maps, weights = rng.normal(size=(3, 6, 8, 5)).astype(np.float32), rng.normal(size=(3, 3, 4, 5)).astype(np.float32)
    theirs = torch.tensor(maps.transpose(3, 0, 1, 2), requires_grad=True)
    want = nn.functional.avg_pool2d(theirs, 2)
    torch.sum(want * torch.tensor(weights.transpose(3, 0, 1, 2))).backward()
    got, of_maps = jax.value_and_grad(lambda maps: jnp.sum(average_pool(maps) * weights))(jnp.asarray(maps))
    np.testing.assert_allclose(average_pool(jnp.asarray(maps)).transpose(3, 0, 1, 2), want.detach(), atol=1e-6)
    np.testing.assert_allclose(got, np.sum(want.detach().numpy().transpose(1, 2, 3, 0) * weights), rtol=1e-5)
    np.testing.assert_allclose(of_maps.transpose(3, 0, 1, 2), theirs.grad, atol=1e-6)


class TorchSTSTNet(nn.Module):
    """The authors' network by its description."""

    def __init__(self, params):
        super().__init__()
        for number, features in enumerate((3, 5, 8), start=1):
            conv, norm = nn.Conv2d(3, features, 3, padding=2), nn.BatchNorm2d(features)
            copy_conv(conv, params[f"conv{number}"])
            copy_norm(norm, params[f"bn{number}"])
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", norm)
        self.fc = nn.Linear(400, 3)
        copy_dense(self.fc, params["fc"])

    def forward(self, x):  # (B, 3, 28, 28)
        streams = []
        for number in (1, 2, 3):
            y = self.get_submodule(f"bn{number}")(torch.relu(self.get_submodule(f"conv{number}")(x)))
            streams.append(nn.functional.max_pool2d(y, 3, 3, 1))
        return self.fc(nn.functional.avg_pool2d(torch.cat(streams, 1), 2).flatten(1))

    def norms(self):
        return {f"bn{number}": self.get_submodule(f"bn{number}") for number in (1, 2, 3)}


class TorchMicroAttNet(nn.Module):
    """Section 3.5 of the paper, for S streams."""

    def __init__(self, params, sizes, se_stream, num_streams):
        super().__init__()
        self.sizes, self.se_stream, self.num_streams = sizes, se_stream, num_streams
        self.attention = "attention1" in params
        for block in (1, 2):
            for stream in range(num_streams):
                kernel = np.array(params[f"conv{block}_{stream}"]["kernel"])
                conv = nn.Conv2d(kernel.shape[2], kernel.shape[3], kernel.shape[0], padding=kernel.shape[0] // 2)
                norm = nn.BatchNorm2d(kernel.shape[3])
                copy_conv(conv, params[f"conv{block}_{stream}"])
                copy_norm(norm, params[f"bn{block}_{stream}"])
                self.add_module(f"conv{block}_{stream}", conv)
                self.add_module(f"bn{block}_{stream}", norm)
        self.free = nn.ParameterDict(
            {
                f"{name}_{layer}": nn.Parameter(torch.tensor(np.array(params[name][layer])))
                for name in ("attention1", "attention2", "se")
                if name in params
                for layer in ("first", "second")
            }
        )
        shape = np.array(params["hidden"]["kernel"]).shape
        self.hidden, self.bn_hidden = nn.Linear(*shape), nn.BatchNorm1d(shape[1])
        self.logits = nn.Linear(*np.array(params["logits"]["kernel"]).shape)
        copy_dense(self.hidden, params["hidden"])
        copy_norm(self.bn_hidden, params["bn_hidden"])
        copy_dense(self.logits, params["logits"])

    def forward(self, x):  # (B, S, H, W)
        streams = [x[:, n : n + 1] for n in range(self.num_streams)]
        for block in (1, 2):
            for n in range(self.num_streams):
                y = self.get_submodule(f"bn{block}_{n}")(self.get_submodule(f"conv{block}_{n}")(streams[n]))
                streams[n] = nn.functional.max_pool2d(torch.relu(y), self.sizes["pools"][block - 1])
            if block == 2 and self.se_stream >= 0:
                maps = streams[self.se_stream]
                squeezed = maps.mean((2, 3)) @ self.free["se_first"]
                gate = torch.sigmoid(torch.relu(squeezed) @ self.free["se_second"])
                streams[self.se_stream] = maps * gate[:, :, None, None]
            if self.attention:
                pooled = torch.cat([maps.mean((2, 3)) for maps in streams], 1)
                scores = torch.relu(pooled @ self.free[f"attention{block}_first"])
                alpha = torch.softmax(scores @ self.free[f"attention{block}_second"], 1)
                streams = [maps * alpha[:, n, None, None, None] for n, maps in enumerate(streams)]
        flat = torch.cat([maps.flatten(1) for maps in streams], 1)
        return self.logits(torch.relu(self.bn_hidden(self.hidden(flat))))

    def norms(self):
        named = {f"bn{b}_{n}": self.get_submodule(f"bn{b}_{n}") for b in (1, 2) for n in range(self.num_streams)}
        return named | {"bn_hidden": self.bn_hidden}


SIZES = {"features": (4, 6), "kernels": (5, 3), "pools": (3, 2), "hidden_dim": 7}


def signed_scales(variables, rng):
    """Scales of both signs: pooling after the affine map takes maxima of some channels and minima of others."""

    def change(path, value):
        if path[-1].key == "scale":
            return value * jnp.asarray(rng.choice([-1.0, 1.0], value.shape) * rng.uniform(0.5, 1.5, value.shape))
        return value

    return jax.tree_util.tree_map_with_path(change, variables)


def pair(kind, rng, batch=6, way=tiles):
    """A Flax network, its variables, and the PyTorch network with the same parameters."""
    if kind == "ststnet":
        model, flow = STSTNet(3, way.IMPLEMENTATION), rng.normal(size=(batch, 28, 28, 3)).astype(np.float32)
    else:
        streams = 4 if kind == "four" else 3
        flow = rng.normal(size=(batch, 20, 17, streams)).astype(np.float32)
        se_stream = -1 if kind in ("no_se", "neither") else 2
        model = MicroAttNet(5, se_stream, attention=kind not in ("no_attention", "neither"), **SIZES)
        model = model.clone(implementation=way.IMPLEMENTATION)
    variables = signed_scales(dict(jax.jit(model.init)(jax.random.key(0), flow)), rng)
    if kind == "ststnet":
        reference = TorchSTSTNet(variables["params"])
    else:
        reference = TorchMicroAttNet(variables["params"], SIZES, se_stream, flow.shape[-1])
    return model, variables, reference, flow


def logits_of(output):
    return output[0] if isinstance(output, tuple) else output


KINDS = ("ststnet", "micro_attnet", "no_attention", "no_se", "neither", "four")


CASES = [(kind, train, tiles, 6) for kind in KINDS for train in (False, True)]
CASES += [(kind, train, cpu_blocks, 6) for kind in ("ststnet", "micro_attnet") for train in (False, True)]
CASES += [(kind, True, cpu_blocks, 19) for kind in ("ststnet", "micro_attnet")]  # more than a vector holds
CASES += [(kind, True, pieces, 19) for kind in ("ststnet", "micro_attnet")]


@pytest.mark.parametrize(("kind", "train", "way", "batch"), CASES)
def test_outputs_and_gradients_are_pytorchs(kind, train, way, batch, rng, monkeypatch):
    monkeypatch.setattr(pieces, "_CACHE_BYTES", 1)  # eight samples at a time
    model, variables, reference, flow = pair(kind, rng, batch, way)
    reference.double().train(train)  # in single precision PyTorch's own statistics are off by 1e-5 of larger batches
    target = rng.normal(size=(len(flow), 3 if kind == "ststnet" else 5)).astype(np.float32)
    dropout = {"dropout": 0.0} if kind == "ststnet" else {}

    def loss_fn(params):
        output, _ = model.apply({**variables, "params": params}, flow, train=train, mutable=["batch_stats"], **dropout)
        return jnp.sum(logits_of(output) * target), logits_of(output)

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(variables["params"])
    expected = reference(torch.tensor(flow).permute(0, 3, 1, 2).double())
    (expected * torch.tensor(target)).sum().backward()
    np.testing.assert_allclose(logits, expected.detach(), rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        if name.startswith("attention") or name == "se":
            for layer in ("first", "second"):
                want = reference.free[f"{name}_{layer}"].grad
                np.testing.assert_allclose(gradient[layer], want, rtol=1e-4, atol=1e-4, err_msg=name)
            continue
        module = reference.get_submodule(name)
        if "kernel" in gradient:
            weight = module.weight.grad
            want = weight.permute(2, 3, 1, 0) if weight.ndim == 4 else weight.T
            np.testing.assert_allclose(gradient["kernel"], want, rtol=1e-4, atol=1e-4, err_msg=name)
        else:
            np.testing.assert_allclose(gradient["scale"], module.weight.grad, rtol=1e-4, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(gradient["bias"], module.bias.grad, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("way", [tiles, cpu_blocks])
@pytest.mark.parametrize("kind", ["ststnet", "micro_attnet"])
def test_running_statistics_after_five_steps_are_pytorchs(kind, way, rng):
    model, variables, reference, _ = pair(kind, rng, way=way)
    reference.train()
    shape = (6, 28, 28, 3) if kind == "ststnet" else (6, 20, 17, 3)
    dropout = {"dropout": 0.0} if kind == "ststnet" else {}
    optimiser = optax.sgd(1e-3)
    state = optimiser.init(variables["params"])
    theirs = torch.optim.SGD(reference.parameters(), 1e-3)

    @jax.jit
    def step(variables, state, flow):
        def loss_fn(params):
            output, collections = model.apply(
                {**variables, "params": params}, flow, train=True, mutable=["batch_stats"], **dropout
            )
            return jnp.mean(logits_of(output) ** 2), collections

        gradients, collections = jax.grad(loss_fn, has_aux=True)(variables["params"])
        updates, state = optimiser.update(gradients, state)
        return {**collections, "params": optax.apply_updates(variables["params"], updates)}, state

    for _ in range(5):
        flow = rng.normal(size=shape).astype(np.float32)
        variables, state = step(variables, state, flow)
        theirs.zero_grad()
        (reference(torch.tensor(flow).permute(0, 3, 1, 2)) ** 2).mean().backward()
        theirs.step()
    for name, norm in reference.norms().items():
        mine = variables["batch_stats"][name]
        np.testing.assert_allclose(mine["mean"], norm.running_mean, rtol=1e-5, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(mine["var"], norm.running_var, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["ststnet", "micro_attnet"])
def test_masked_samples_change_nothing(kind, rng):
    masked_samples_change_nothing(kind, rng, tiles, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", [tiles, pieces, cpu_blocks])
@pytest.mark.parametrize("kind", ["ststnet", "micro_attnet"])
def test_masked_samples_change_nothing_but_the_order_of_sums(kind, way, rng):
    with jax.enable_x64(True):
        masked_samples_change_nothing(kind, rng, way, rtol=1e-9, atol=1e-9)


def masked_samples_change_nothing(kind, rng, way, **tolerance):
    model, variables, _, flow = pair(kind, rng, way=way)
    if jax.config.jax_enable_x64:
        variables, flow = jax.tree.map(lambda x: np.asarray(x, np.float64), (variables, flow))
    padded = np.concatenate([flow, 100 * rng.normal(size=flow[:3].shape).astype(flow.dtype)])
    mask = jnp.arange(9) < 6
    dropout = {"dropout": 0.0} if kind == "ststnet" else {}

    def run(params, flow, mask):
        output, collections = model.apply(
            {**variables, "params": params}, flow, mask, train=True, mutable=["batch_stats"], **dropout
        )
        return jnp.sum(logits_of(output)[:6] ** 2), (logits_of(output)[:6], collections)

    gradient = jax.jit(jax.grad(run, has_aux=True))
    mine, (logits, collections) = gradient(variables["params"], padded, mask)
    want, (expected, statistics) = gradient(variables["params"], flow, jnp.ones(6, bool))
    np.testing.assert_allclose(logits, expected, rtol=tolerance["atol"], atol=tolerance["atol"])
    for a, b in zip(jax.tree.leaves((mine, collections)), jax.tree.leaves((want, statistics)), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


def test_ststnet_has_the_parameters_of_the_published_one():
    variables = jax.eval_shape(STSTNet(3).init, jax.random.key(0), jnp.zeros((1, 28, 28, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 1683


def test_attention_weights_are_told_and_sum_to_one(rng):
    model, variables, _, flow = pair("micro_attnet", rng)
    _, extras = jax.jit(model.apply)(variables, flow)
    assert set(extras["attention"]) == {"streams1", "streams2"}
    for weights in extras["attention"].values():
        assert weights.shape == (6, 1, 3)
        np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=1e-6)


MODEL = {
    "name": "micro_attnet",
    "attention": True,
    "se_stream": "m",
    "attention_hidden": 4,
    "se_reduction": 2,
    **SIZES,
}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": "resnet"}, "config.model.name='resnet'"),
        ({"se_stream": "strain"}, "config.model.se_stream='strain'"),
        ({"kernels": (4, 3)}, "config.model.kernels"),
        ({"pools": (0, 2)}, "config.model.pools"),
        ({"pools": (256, 2)}, "config.model.pools.*from 1 to 255"),
        ({"hidden_dim": 0}, "config.model.hidden_dim"),
    ],
)
def test_bad_fields_are_named(change, field):
    with pytest.raises(UserError, match=field):
        build_learner(MODEL | change, ("u", "v", "m"), 5)


def test_flow_that_would_be_pooled_away_is_refused():
    learner = build_learner(MODEL, ("u", "v", "m"), 5)
    with pytest.raises(UserError, match="pooled away"):
        learner.init(jax.random.key(0), {"flow": jnp.zeros((1, 5, 5, 3))})
