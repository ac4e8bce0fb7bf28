"""Reading checkpoints against torch and safetensors themselves, folding against the modules, and what is refused."""

import argparse
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from safetensors.torch import save_file

from mer_jax.errors import UserError
from mer_jax.extractors import checkpoints
from mer_jax.extractors.checkpoints import fill, looks_like, read_checkpoint, read_with_settings, same, torch_sources


def same_bits(array, tensor):
    tensor = tensor.detach().contiguous()
    return (
        array.shape == tuple(tensor.shape)
        and array.dtype.name == str(tensor.dtype).removeprefix("torch.")
        and array.tobytes() == (tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    )


# --- reading ------------------------------------------------------------------------------------------------------

STATE = {
    "half": (torch.arange(-12, 12).reshape(4, 6) * 1.3).to(torch.float16),
    "brain": (torch.arange(-12, 12).reshape(4, 6) * 1.3).to(torch.bfloat16),
    "single": torch.arange(24.0).reshape(2, 3, 4),
    "double": torch.arange(3).to(torch.float64) / 3,
    "scalar": torch.tensor(2.5),
    "none": torch.zeros(0, 3),
    "long": torch.tensor([2**40, -1]),
    "byte": torch.tensor([1, 255], dtype=torch.uint8),
    "flag": torch.tensor([True, False, True]),
}


def test_safetensors_bitwise(tmp_path):
    save_file(STATE, tmp_path / "w.safetensors", metadata={"format": "pt"})
    read = read_checkpoint(tmp_path / "w.safetensors")
    assert set(read) == set(STATE) and all(same_bits(read[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("given", ["model.safetensors.index.json", ""], ids=["index", "folder"])
def test_shards(tmp_path, given):
    files = {name: f"model-0000{1 + number % 3}-of-00003.safetensors" for number, name in enumerate(STATE)}
    for file in set(files.values()):
        save_file({name: STATE[name] for name in STATE if files[name] == file}, tmp_path / file)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    read = read_checkpoint(tmp_path / given)
    assert list(read) == list(STATE) and all(same_bits(read[name], STATE[name]) for name in STATE)


def test_shards_of_torch_save(tmp_path):
    first = len(STATE) // 2
    files = {name: f"pytorch_model-0000{1 + (number >= first)}-of-00002.bin" for number, name in enumerate(STATE)}
    for file in set(files.values()):
        torch.save({name: STATE[name] for name in STATE if files[name] == file}, tmp_path / file)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    read = read_checkpoint(index)
    assert list(read) == list(STATE) and all(same_bits(read[name], STATE[name]) for name in STATE)


def test_a_folder_of_one_file(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    assert set(read_checkpoint(tmp_path)) == set(STATE)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "wrap, entries, settings",
    [
        (lambda state: state, checkpoints.ENTRIES, {}),
        (lambda state: {f"module.{name}": tensor for name, tensor in state.items()}, checkpoints.ENTRIES, {}),
        (lambda state: {"state_dict": state, "epoch": 3}, checkpoints.ENTRIES, {"epoch": 3}),
        (
            lambda state: {
                "state_dict": {"old": torch.zeros(2)},
                "state_dict_ema": state,
                "args": argparse.Namespace(teachers=[{"name": "clip"}], dtype=torch.float16),
            },
            checkpoints.ENTRIES,
            {"args": {"teachers": [{"name": "clip"}], "dtype": "float16"}},
        ),
        (lambda state: {"opt_00": {"lr": 1e-4}, "net_recon": state}, ("net_recon",), {"opt_00": {"lr": 1e-4}}),
    ],
    ids=["plain", "parallel", "entry", "average", "named"],
)
def test_torch_files(tmp_path, zipped, wrap, entries, settings):
    torch.save(wrap(STATE), tmp_path / "w.pth.tar", _use_new_zipfile_serialization=zipped)
    state, found = read_with_settings(tmp_path / "w.pth.tar", entries)
    assert list(state) == list(STATE) and all(same_bits(state[name], STATE[name]) for name in STATE)
    found.pop("state_dict", None)
    assert found == settings


class Harm:
    """Runs a command when a careless reader loads it."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["state_dict", "args"])
def test_code_in_a_checkpoint_is_refused(tmp_path, zipped, place):
    harm = Harm(f"touch {tmp_path}/pwned")
    checkpoint = {"state_dict": {"a": torch.zeros(2)}, "args": argparse.Namespace(lr=1)}
    if place == "args":
        checkpoint["args"].harm = harm
    else:
        checkpoint["state_dict"]["b"] = harm
    torch.save(checkpoint, tmp_path / "w.pth.tar", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"w\.pth\.tar: refused, its pickle asks for '(posix|nt)\.system'") as caught:
        read_checkpoint(tmp_path / "w.pth.tar")
    assert "\n" not in str(caught.value) and not (tmp_path / "pwned").exists()


def test_every_truncation_of_safetensors_is_one_line(tmp_path):
    save_file(STATE, tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    for length in (0, 4, 8, 9, 50, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.safetensors: .*fetch it again") as caught:
            read_checkpoint(tmp_path / "cut.safetensors")
        assert "\n" not in str(caught.value)


def test_truncated_torch_files_are_one_line(tmp_path):
    # The older format orders storages by their addresses: an empty one, too, may be the last.
    for state, zipped in ((STATE, True), (STATE, False), ({"none": STATE["none"]}, False)):
        torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        whole = (tmp_path / "w.pth").read_bytes()
        for length in (10, len(whole) // 2, len(whole) - 1):
            (tmp_path / "cut.pth").write_bytes(whole[:length])
            with pytest.raises(UserError, match=r"cut\.pth: .*fetch it") as caught:
                read_checkpoint(tmp_path / "cut.pth")
            assert "\n" not in str(caught.value)


def header(entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "name, content, told",
    [
        ("absent", None, "absent: no such file"),
        ("w.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer, not the weights"),
        ("w.pth", b"<!DOCTYPE html><html>Sign in</html>", "a web page, not the weights"),
        ("w.pth", b"hello there, this is text", "neither safetensors nor a torch.save file"),
        ("w.safetensors", header({}), "holds no arrays"),
        ("w.safetensors", header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}), "a has not as many"),
        ("w.safetensors", header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}), "a lies beyond"),
        ("w.safetensors", header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [8, 4]}}), "damaged, a has"),
        ("w.safetensors", header({"a": {"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}}), "damaged ('Q4')"),
        ("w.safetensors", header({"a": 3}), "not a safetensors file, or damaged"),
        ("w.safetensors.index.json", b"{}", "not an index of safetensors files"),
        ("w.safetensors.index.json", b'{"weight_map": {"a": "../b"}}', "it lists '../b' as a neighbouring file"),
        ("w.index.json", b'{"weight_map": {"a": "w.index.json"}}', "it lists 'w.index.json' as a neighbouring file"),
        ("w.safetensors.index.json", b'{"weight_map": {"a": "b"}}', "lists b, which is not beside it; fetch all 1"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(tmp_path, name, content, told):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        read_checkpoint(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


def test_a_shard_of_another_download(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "s")
    (tmp_path / "w.index.json").write_text('{"weight_map": {"a": "s", "b": "s"}}')
    with pytest.raises(UserError, match=r"w\.index\.json: s lacks b; the files are of different downloads"):
        read_checkpoint(tmp_path / "w.index.json")


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(UserError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "value, told",
    [
        (torch.zeros(3), "holds a ndarray; a dict of weights is expected"),
        ([torch.zeros(3)], "holds a list; a dict of weights"),
        ({"epoch": 3, "model": {"a": torch.zeros(2)}}, "entries are epoch, model, 'state_dict_ema' or 'state_dict' is"),
        ({"state_dict": {"weight": torch.zeros(2), "version": 3}}, "its entries are weight, version"),
        ({"state_dict": {}}, "no weights in it; its entries are none"),
    ],
)
def test_torch_files_without_weights(tmp_path, value, told):
    torch.save(value, tmp_path / "w.pth")
    with pytest.raises(UserError, match=re.escape(told)):
        read_checkpoint(tmp_path / "w.pth")


# --- parametrisations ---------------------------------------------------------------------------------------------


class Reparametrised(torch.nn.Module):
    """A weight scaled to a learned spectral norm, as RADIO trains: estimated by two vectors, the scale softplus."""

    def __init__(self, weight, version, epsilon):
        super().__init__()
        self.version, self.epsilon = version, epsilon
        u, _, v = torch.linalg.svd(weight.flatten(1))
        self.register_buffer("_u", u[:, 0] + 0.1)
        self.register_buffer("_v", v[0] - 0.1)
        self.scale = torch.nn.Parameter(torch.full((1, 4 if version == 1 else 1), 1.7))
        if version == 2:
            self.register_buffer("_sn_version", torch.tensor(2))

    def forward(self, weight):
        norm = self._u @ weight.flatten(1) @ self._v + self.epsilon
        scale = self.scale[0, 0] if self.version == 1 else torch.nn.functional.softplus(self.scale[0, 0]) + 0.05
        return weight * scale / norm


class InParts(torch.nn.Module):
    def __init__(self, weight, parts, scaled, epsilon):
        super().__init__()
        self.parts = torch.nn.ModuleList(
            Reparametrised(part, 2, epsilon) if number < scaled else torch.nn.Identity()
            for number, part in enumerate(weight.chunk(parts))
        )

    def forward(self, weight):
        return torch.cat([part(piece) for part, piece in zip(self.parts, weight.chunk(len(self.parts)), strict=True)])


@pytest.mark.parametrize("settings, epsilon", [(True, 1e-6), ({"eps": 0.5}, 0.5), ({}, 1e-12), (None, 1e-6)])
def test_parametrised_weights_are_those_that_they_make(tmp_path, settings, epsilon):
    torch.manual_seed(0)
    network = torch.nn.ModuleDict(
        {
            "first": torch.nn.Linear(6, 5),
            "second": torch.nn.Linear(6, 5),
            "qkv": torch.nn.Linear(4, 12),
            "qk": torch.nn.Linear(4, 12),
            "w12": torch.nn.Linear(4, 12),
            "plain": torch.nn.Linear(3, 2),
        }
    )
    register = torch.nn.utils.parametrize.register_parametrization
    register(network["first"], "weight", Reparametrised(network["first"].weight, 1, epsilon))
    register(network["second"], "weight", Reparametrised(network["second"].weight, 2, epsilon))
    register(network["qkv"], "weight", InParts(network["qkv"].weight, 3, 3, epsilon))
    register(network["qk"], "weight", InParts(network["qk"].weight, 3, 2, epsilon))
    register(network["w12"], "weight", InParts(network["w12"].weight, 2, 2, epsilon))
    checkpoint = {"state_dict": network.state_dict()}
    if settings is not None:
        checkpoint["args"] = argparse.Namespace(spectral_reparam=settings)
    torch.save(checkpoint, tmp_path / "w.pth.tar")
    state = read_checkpoint(tmp_path / "w.pth.tar")
    assert set(state) == {f"{name}.{leaf}" for name in network for leaf in ("weight", "bias")}
    for name, layer in network.items():
        np.testing.assert_allclose(state[f"{name}.weight"], layer.weight.detach().numpy(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_torch_s_own_spectral_norm(tmp_path, dtype):
    torch.manual_seed(0)
    layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Conv2d(3, 5, 2)).eval().to(dtype)
    torch.save(layer.state_dict(), tmp_path / "w.pth")
    state = read_checkpoint(tmp_path / "w.pth")
    assert set(state) == {"weight", "bias"}
    assert state["weight"].dtype == np.dtype(str(dtype).removeprefix("torch."))
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3
    np.testing.assert_allclose(state["weight"], layer.weight.detach().numpy(), rtol=tolerance, atol=tolerance)


def test_other_parametrisations_are_refused(tmp_path):
    network = torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2)))
    torch.save(network.state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth: 0\.weight is parametrised in a way that is not known"):
        read_checkpoint(tmp_path / "w.pth")


# --- filling ------------------------------------------------------------------------------------------------------


class TorchNetwork(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, (3, 2))
        self.depthwise = torch.nn.Conv2d(4, 4, 3, groups=4, bias=False)
        self.bn = torch.nn.BatchNorm2d(4)
        self.fc = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.bn(self.depthwise(self.conv(x))).mean(dim=(2, 3)))


class FlaxNetwork(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 2), padding="VALID", name="conv")(x)
        x = nn.Conv(4, (3, 3), padding="VALID", feature_group_count=4, use_bias=False, name="depthwise")(x)
        x = nn.BatchNorm(use_running_average=True, epsilon=1e-5, name="norm")(x)
        return nn.Dense(2, name="fc")(x.mean(axis=(1, 2)))


@pytest.fixture
def network():
    torch.manual_seed(1)
    network = TorchNetwork()
    network(torch.randn(5, 3, 9, 9) * 3 + 1)  # running statistics that are neither 0 nor 1
    return network.eval()


@pytest.fixture
def expected():
    return jax.eval_shape(FlaxNetwork().init, jax.random.key(0), jnp.zeros((1, 9, 9, 3)))


def layer(name):
    return f"net.{'bn' if name == 'norm' else name}"


SKIPPED = {r".*\.num_batches_tracked$": "how long it was trained", r"generator\.": "draws faces"}


def filled(state, expected):
    return fill(expected, state, torch_sources(expected, layer), where="w.pt", network="our net", skipped=SKIPPED)


@pytest.fixture
def state(network):
    state = {f"net.{name}": tensor.numpy() for name, tensor in network.state_dict().items()}
    return state | {"generator.weight": np.zeros(3)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_filled_network_is_torch_s(network, state, expected, rng, dtype):
    images = rng.normal(size=(4, 9, 9, 3)).astype(np.float32)
    state = {name: array.astype(dtype) for name, array in state.items()}
    variables = filled(state, expected)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), expected
    )
    with torch.no_grad():
        theirs = network(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    with jax.default_matmul_precision("highest"):
        ours = FlaxNetwork().apply(variables, images)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_several_keys_side_by_side(rng):
    state = {name: rng.normal(size=(3, 4)).astype(np.float16) for name in "qkv"}
    expected = {"params": {"qkv": {"kernel": jax.ShapeDtypeStruct((4, 9), np.float32)}}}
    variables = fill(
        expected, state, {"params/qkv/kernel": checkpoints.linear(*"qkv")}, where="w", network="n", skipped={}
    )
    kernel = variables["params"]["qkv"]["kernel"]
    assert kernel.dtype == np.float32 and kernel.flags.c_contiguous
    np.testing.assert_array_equal(kernel, np.concatenate(list(state.values())).T)
    state["k"] = state["k"][:, :2]
    with pytest.raises(UserError, match=r"w: k does not fit beside q \(3, 4\); weights of n are expected"):
        fill(expected, state, {"params/qkv/kernel": checkpoints.linear(*"qkv")}, where="w", network="n")


def test_another_shape_of_as_many_elements():
    expected = {"params": {"probe": jax.ShapeDtypeStruct((4,), np.float32)}}
    source = {"params/probe": same("probe", shape=(1, 1, 4))}
    variables = fill(expected, {"probe": np.arange(4.0).reshape(1, 1, 4)}, source, where="w", network="n")
    np.testing.assert_array_equal(variables["params"]["probe"], np.arange(4))
    with pytest.raises(UserError, match=r"w: probe has shape \(4,\), \(1, 1, 4\) is needed"):
        fill(expected, {"probe": np.arange(4.0)}, source, where="w", network="n")


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda s: s.pop("net.bn.running_var"), "lacks net.bn.running_var (4,)"),
        (lambda s: s.pop("net.fc.weight"), "lacks net.fc.weight (2, 4)"),
        (lambda s: s.update({"net.fc.weight": s["net.fc.weight"].T}), "net.fc.weight has shape (4, 2), (2, 4) is"),
        (
            lambda s: s.update({"net.conv.weight": s["net.conv.weight"][:, :1]}),
            "net.conv.weight has shape (4, 1, 3, 2), (4, 3, 3, 2) is needed",
        ),
        (lambda s: s.update({"net.conv2.bias": np.zeros(3)}), "holds net.conv2.bias (3,), which our net does not have"),
        (
            lambda s: s.update({"net.fc.bias": np.zeros(2, np.int8)}),
            "net.fc.bias holds int8, floating-point numbers are needed",
        ),
    ],
)
def test_what_does_not_fit_is_named(state, expected, change, told):
    change(state)
    with pytest.raises(UserError) as caught:
        filled(state, expected)
    message = str(caught.value)
    assert message.startswith(f"w.pt: {told}") and "\n" not in message
    assert "; weights of our net are expected, this looks like " in message


def test_weights_that_are_not_finite(state, expected):
    state["net.fc.bias"][0] = np.nan
    with pytest.raises(UserError, match=r"w\.pt: net\.fc\.bias holds values that are not finite; fetch the file again"):
        filled(state, expected)


@pytest.mark.parametrize(
    "keys, told",
    [
        ({}, "0 arrays such as none"),
        ({"conv1.weight": (3, 3)}, "1 array such as conv1.weight"),
        ({"smirk_encoder.pose_encoder.encoder.conv_stem.weight": (1,), "smirk_generator.x": (1,)}, "SMIRK"),
        ({"backbone.conv1.weight": (1,), "final_layers.0.weight": (80, 2048, 1, 1)}, "3DDFA-V3"),
        ({"backbone.conv1.weight": (1,), "final_layers.0.weight": (156, 2048, 1, 1)}, "FaceVerse v4"),
        ({"layer1.0.conv1.weight": (1,), "fc.weight": (1,)}, "a ResNet"),
        ({"encoder.conv_stem.weight": (1,)}, "a MobileNet"),
        ({"text_model.embeddings.token_embedding.weight": (1,)}, "the text tower of SigLIP or CLIP"),
        (
            {
                "vision_model.head.probe": (1, 1, 8),
                "vision_model.encoder.layers.0.layer_norm1.weight": (8,),
                "vision_model.encoder.layers.2.layer_norm1.weight": (8,),
                "text_model.encoder.layers.9.layer_norm1.weight": (4,),
            },
            "SigLIP with its text tower of width 8 and depth 3",
        ),
        ({"head.probe": (1, 1, 8), "embeddings.patch_embedding.weight": (8, 768)}, "SigLIP2 NaFlex"),
        (
            {"vision_model.embeddings.class_embedding": (8,), "vision_model.encoder.layers.0.layer_norm1.weight": (8,)},
            "CLIP of width 8 and depth 1",
        ),
        (
            {"base_model.patch_generator.pos_embed": (1, 4, 8), "base_model.blocks.0.norm1.weight": (8,)},
            "RADIO of width 8 and depth 1",
        ),
        (
            {
                "radio_model.model.inner.patch_generator.pos_embed": (1, 4, 8),
                "radio_model.model.inner.blocks.1.norm1.weight": (8,),
                "radio_model.model.inner.blocks.0.norm1.weight": (8,),
            },
            "RADIO on DINOv2 of width 8 and depth 2",
        ),
        ({"encoder.layer.0.layer_scale1.lambda1": (8,)}, "DINOv2"),
        ({"blocks.0.ls1.gamma": (8,), "register_tokens": (1, 4, 8)}, "DINOv2 with registers"),
        ({"blocks.0.norm1.weight": (8,)}, "a vision transformer of width 8 and depth 1"),
    ],
)
def test_what_a_checkpoint_looks_like(keys, told):
    assert looks_like({name: np.zeros(shape) for name, shape in keys.items()}) == told
