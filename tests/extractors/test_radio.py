"""RADIO against transformers, and against a PyTorch writing of what that lacks, through both official layouts."""

import argparse
import dataclasses
import importlib.util
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mer_jax.errors import UserError
from mer_jax.extractors import networks, radio, vit
from mer_jax.extractors.vit import Architecture, VisionTransformer

_spec = importlib.util.spec_from_file_location("torch_reference", Path(__file__).parents[1] / "torch_reference.py")
torch_reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(torch_reference)
transformers, channels_first = torch_reference.transformers, torch_reference.channels_first
randomised, relative_error = torch_reference.randomised, torch_reference.relative_error

PATCH, GRID = 8, 6
# What the file does not show, and placeholders for what it does.
TINY = Architecture(
    PATCH, 32, 3, 4, 1, (1, 1), "gelu", "crop", prefix=1, summary=(0, 2), patch_bias=False, final_norm=False
)
SIZES = [
    (48, 48),
    (24, 24),
    (80, 80),
    (16, 40),
    (40, 16),
    (64, 8),
    (32, 48),
]  # up, down and beyond the grid; not square
features = jax.jit(vit.features, static_argnums=0)


@pytest.fixture(scope="module")
def official():
    config = transformers.RadioConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        patch_size=PATCH,
        max_img_size=PATCH * GRID,
        num_cls_tokens=3,
        num_registers=2,
        summary_idxs=[0, 2],
        norm_mean=(0.4, 0.5, 0.6),
        norm_std=(0.2, 0.3, 0.4),
        attn_implementation="eager",
    )
    return randomised(transformers.RadioModel(config))


@pytest.fixture(scope="module")
def saved(official, tmp_path_factory):
    """A file in the layout of the hub, as transformers writes it."""
    folder = tmp_path_factory.mktemp("radio")
    official.save_pretrained(folder)
    return folder / "model.safetensors"


def load(path, architecture=TINY, name="tiny"):
    return radio.load(path, architecture=architecture, name=name)


@pytest.mark.parametrize("size", SIZES)
def test_summary_at_any_size(official, saved, rng, size):
    images = rng.random((2, *size, 3), np.float32)
    with torch.no_grad():
        theirs = official(channels_first(images)).summary
    assert relative_error(features(TINY, load(saved), images), theirs) < 1e-5


def test_every_layer_is_transformers_(official, saved, rng):
    images = rng.random((2, 24, 40, 3), np.float32)
    variables = load(saved)
    own = vit.observed(TINY, variables["params"])
    assert own == dataclasses.replace(TINY, hidden=128, grid=(GRID, GRID), prefix=5, layer_scale=True)
    _, state = jax.jit(
        lambda v, x: VisionTransformer(own).apply(v, x, capture_intermediates=True, mutable=["intermediates"])
    )(variables, images)
    with torch.no_grad():
        theirs = official(channels_first(images), output_hidden_states=True, output_attentions=True)
    for number in range(3):
        ours = state["intermediates"][f"block_{number}"]["__call__"][0]
        assert relative_error(ours, theirs.hidden_states[number + 1]) < 1e-5
    shares = theirs.attentions[-1].mean(dim=1)[:, [0, 2]].mean(dim=1)[:, 5:].reshape(2, 3, 5)
    ours = jax.jit(vit.attention_map, static_argnums=0)(TINY, variables, images)
    assert relative_error(ours, shares) < 1e-5


# --- the layout of torch.hub --------------------------------------------------------------------------------------

TEACHERS = [{"name": "clip"}, {"name": "sam", "use_summary": False}, {"name": "dino"}, {"name": "clip"}]


def hub_to_torch(state):
    """Names of torch.hub's files for those of Hugging Face's."""
    names = {name: name.removeprefix("radio_model.").replace("model.", "base_model.", 1) for name in state}
    renamed = {names[name]: tensor for name, tensor in state.items() if name != "radio_model.summary_idxs"}
    return {re.sub(r"layer_scale(\d)\.lambda1", r"ls\1.grandma", name): tensor for name, tensor in renamed.items()}


EXTRAS = {
    "_heads.0.fc1.weight": torch.zeros(3, 3),
    "_feature_projections.sam.fc1.weight": torch.zeros(3, 3),
    "_feature_normalizer.mean": torch.zeros(32),
    "_intermediate_feature_normalizer.means": torch.zeros(3, 32),
}


def checkpoint(state, entry="state_dict", **args):
    settings = {"teachers": TEACHERS, "cls_token_per_teacher": True, "spectral_reparam": False, "dtype": torch.float32}
    return {"arch": "vit", "epoch": 3, entry: state, "args": argparse.Namespace(**(settings | args))}


def test_torch_hub_s_layout(saved, tmp_path):
    state = hub_to_torch(load_file(saved)) | EXTRAS
    torch.save(checkpoint(state), tmp_path / "radio.pth.tar")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "radio.pth.tar"), load(saved))


def test_the_average_over_training_is_preferred_and_parallel_prefixes_go(saved, tmp_path):
    state = {f"module.{name}": tensor for name, tensor in hub_to_torch(load_file(saved)).items()}
    stale = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save(checkpoint(state, "state_dict_ema") | {"state_dict": stale}, tmp_path / "radio.pth.tar")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "radio.pth.tar"), load(saved))


def test_reparametrised_weights(saved, tmp_path):
    """Of a projection in three parts and a plain one; the vectors need not be exact, the scale makes up for them."""
    state = hub_to_torch(load_file(saved))
    expected = load(saved)
    for layer, parts in (("base_model.blocks.1.attn.qkv", 3), ("base_model.blocks.2.mlp.fc1", 1)):
        weight = state.pop(f"{layer}.weight")
        for number, piece in enumerate(weight.chunk(parts)):
            prefix = f"{layer}.parametrizations.weight.0." + (f"parts.{number}." if parts > 1 else "")
            u = torch.randn(piece.shape[0])
            v = piece.T @ u + 0.1 * torch.randn(piece.shape[1])
            # A scale stands for norms above 0.05 alone.
            v *= (-1) ** number * (0.5 + torch.rand(())) / (u @ piece @ v)
            norm = u @ piece @ v
            scale = torch.log(torch.exp(norm.abs() - 0.05) - 1)
            u = u * norm.sign()
            state |= {f"{prefix}_u": u, f"{prefix}_v": v, f"{prefix}scale": scale.reshape(1, 1)}
            state[f"{prefix}_sn_version"] = torch.tensor(2)
        state[f"{layer}.parametrizations.weight.original"] = weight
    torch.save(checkpoint(state, spectral_reparam=True), tmp_path / "radio.pth.tar")
    found = load(tmp_path / "radio.pth.tar")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_a_normalisation_that_the_settings_leave_out(saved, tmp_path):
    state = hub_to_torch(load_file(saved))
    state |= {"base_model.norm.weight": torch.full((32,), 7.0), "base_model.norm.bias": torch.zeros(32)}
    torch.save(checkpoint(state), tmp_path / "without.pth.tar")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "without.pth.tar"), load(saved))
    torch.save(checkpoint(state, model_norm=True), tmp_path / "with.pth.tar")
    assert load(tmp_path / "with.pth.tar")["params"]["norm"]["scale"].tolist() == [7.0] * 32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_releases(saved, tmp_path, dtype):
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in load_file(saved).items()}
    torch.save(checkpoint(hub_to_torch(state), dtype=dtype), tmp_path / "radio_half.pth.tar")
    save_file(state, tmp_path / "half.safetensors")
    found = load(tmp_path / "radio_half.pth.tar")
    jax.tree.map(np.testing.assert_array_equal, found, load(tmp_path / "half.safetensors"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3), found, load(saved))


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda c: c["args"].teachers.pop(1), "its summary is of the tokens (0, 1), that of tiny of (0, 2)"),
        (lambda c: setattr(c["args"], "cls_token_per_teacher", False), "its summary is of the tokens (0,), that of"),
        (lambda c: c["state_dict"].pop("input_conditioner.norm_std"), "lacks input_conditioner.norm_std of three chan"),
        (lambda c: c["state_dict"].pop("base_model.blocks.2.norm1.bias"), "lacks base_model.blocks.2.norm1.bias (32,)"),
        (
            lambda c: c["state_dict"].update({"base_model.blocks.3.norm1.bias": torch.zeros(32)}),
            "holds base_model.blocks.3.norm1.bias (32,), which tiny does not have; weights of tiny are expected, this "
            "looks like RADIO of width 32 and depth 4",
        ),
        (
            lambda c: c["state_dict"].update({"base_model.patch_generator.pos_embed": torch.zeros(1, 7, 32)}),
            "base_model.patch_generator.pos_embed has shape (1, 7, 32), (1, 4, 32) is needed",
        ),
        (
            lambda c: c["state_dict"].update({"base_model.patch_generator.embedder.weight": torch.zeros(32, 588)}),
            "base_model.patch_generator.embedder.weight has shape (32, 588), (32, 192) is needed",
        ),
    ],
)
def test_other_networks_are_one_line(saved, tmp_path, change, told):
    content = checkpoint(hub_to_torch(load_file(saved)))
    content["args"].teachers = list(TEACHERS)
    change(content)
    torch.save(content, tmp_path / "radio.pth.tar")
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        load(tmp_path / "radio.pth.tar")
    message = str(caught.value)
    assert (
        message.startswith(f"{tmp_path / 'radio.pth.tar'}: ") and "\n" not in message and "looks like RADIO" in message
    )


def test_summary_of_other_tokens_in_a_hub_file(saved):
    with pytest.raises(UserError, match=r"summary is of the tokens \(0, 2\), that of c-radio_v4-h of \(0, 1\)"):
        networks.get_network("c-radio_v4-h").load(saved)


# --- what transformers lacks --------------------------------------------------------------------------------------


class Positions(nn.Module):
    """Linear patches, their positions cut out of a resized grid, and leading tokens."""

    def __init__(self, width, patch, grid, tokens, bias):
        super().__init__()
        self.patch, self.grid = patch, grid
        self.embedder = nn.Linear(3 * patch * patch, width, bias=bias)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid * grid, width))
        self.cls_token = nn.Module()
        self.cls_token.token = nn.Parameter(torch.zeros(tokens, width))

    def forward(self, x):
        rows, columns = x.shape[2] // self.patch, x.shape[3] // self.patch
        patches = nn.functional.unfold(x, self.patch, stride=self.patch).transpose(1, 2)  # (c, y, x) in a patch
        grid = self.pos_embed.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        if (rows, columns) != (self.grid, self.grid):
            side = max(rows, columns)
            grid = nn.functional.interpolate(grid, (side, side), mode="bilinear", align_corners=False)
        positions = grid[:, :, :rows, :columns].flatten(2).transpose(1, 2)
        leading = self.cls_token.token.expand(len(x), -1, -1)
        return torch.cat([leading, self.embedder(patches) + positions], dim=1)


class SelfAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        return self.proj((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(nn.functional.silu(gate) * value)


class NormedMlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.norm, self.fc2 = (
            nn.Linear(width, hidden),
            nn.LayerNorm(hidden, eps=1e-6),
            nn.Linear(hidden, width),
        )

    def forward(self, x):
        return self.fc2(self.norm(nn.functional.gelu(self.fc1(x))))


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.grandma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.grandma


class TorchBlock(nn.Module):
    def __init__(self, width, heads, mlp, scaled):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = SelfAttention(width, heads), mlp
        self.ls1, self.ls2 = (Scale(width) if scaled else nn.Identity() for _ in range(2))

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Student(nn.Module):
    """A RADIO transformer: DINOv2 underneath (``gated``), or a ViT with a normalisation inside its MLPs."""

    def __init__(self, width, depth, heads, hidden, patch, grid, tokens, gated):
        super().__init__()
        self.patch_generator = Positions(width, patch, grid, tokens, bias=gated)
        make = Gated if gated else NormedMlp
        self.blocks = nn.Sequential(*(TorchBlock(width, heads, make(width, hidden), gated) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6) if gated else nn.Identity()

    def forward(self, x):
        return self.norm(self.blocks(self.patch_generator(x)))


MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
CONDITIONER = {"input_conditioner.norm_mean": MEAN, "input_conditioner.norm_std": STD}


def write_dino(student, folder, layout):
    if layout == "hub":
        state = {f"radio_model.model.inner.{name}": tensor for name, tensor in student.state_dict().items()}
        state |= {f"radio_model.{name}": tensor for name, tensor in CONDITIONER.items()}
        state |= {"radio_model.summary_idxs": torch.arange(3), "radio_model.model.inner.mask_token": torch.zeros(1, 3)}
        save_file(state, folder / "model.safetensors")
        return folder / "model.safetensors"
    state = {f"base_model.inner.{name}": tensor for name, tensor in student.state_dict().items()}
    torch.save(checkpoint(state | CONDITIONER | EXTRAS), folder / "radio_v2.5-g.pth.tar")
    return folder / "radio_v2.5-g.pth.tar"


GATED = dataclasses.replace(
    radio.architecture("g"), patch=PATCH, width=48, depth=3, heads=2, hidden=1, grid=(1, 1), prefix=1
)


@pytest.mark.parametrize("layout", ["hub", "torch.hub"])
@pytest.mark.parametrize("size", SIZES)
def test_radio_g_s_structure(tmp_path, rng, layout, size):
    """Gated MLPs (w12, w3), scaled layers, a bias of the patches, a normalisation at the end; one token as summary."""
    student = randomised(Student(48, 3, 2, 40, PATCH, GRID, 5, gated=True))
    variables = load(write_dino(student, tmp_path, layout), GATED)
    images = rng.random((2, *size, 3), np.float32)
    with torch.no_grad():
        theirs = student((channels_first(images) - MEAN) / STD)
    assert relative_error(features(GATED, variables, images), theirs[:, 0]) < 1e-5


def test_radio_g_layer_by_layer(tmp_path, rng):
    student = randomised(Student(48, 3, 2, 40, PATCH, GRID, 5, gated=True))
    variables = load(write_dino(student, tmp_path, "hub"), GATED)
    own = vit.observed(GATED, variables["params"])
    assert own == dataclasses.replace(GATED, hidden=40, grid=(GRID, GRID), prefix=5)
    images = rng.random((2, 24, 40, 3), np.float32)
    _, state = jax.jit(
        lambda v, x: VisionTransformer(own).apply(v, x, capture_intermediates=True, mutable=["intermediates"])
    )(variables, images)
    layers = state["intermediates"]
    with torch.no_grad():
        x = student.patch_generator((channels_first(images) - MEAN) / STD)
        for number, block in enumerate(student.blocks):
            x = block(x)
            assert relative_error(layers[f"block_{number}"]["__call__"][0], x) < 1e-5
        assert relative_error(layers["norm"]["__call__"][0], student.norm(x)) < 1e-5


def test_a_normalisation_inside_the_mlp(tmp_path, rng):
    student = randomised(Student(32, 3, 4, 40, PATCH, GRID, 5, gated=False))
    state = {f"radio_model.model.{name}": tensor for name, tensor in student.state_dict().items()}
    save_file(state | {f"radio_model.{name}": tensor for name, tensor in CONDITIONER.items()}, tmp_path / "w")
    images = rng.random((2, 24, 40, 3), np.float32)
    with torch.no_grad():
        theirs = student((channels_first(images) - MEAN) / STD)[:, [0, 2]].flatten(1)
    assert relative_error(features(TINY, load(tmp_path / "w"), images), theirs) < 1e-5


def test_the_two_kinds_are_told_apart(tmp_path, saved):
    student = randomised(Student(32, 3, 4, 40, PATCH, GRID, 5, gated=True))
    path = write_dino(student, tmp_path, "hub")
    with pytest.raises(UserError, match=r"; weights of tiny are expected, this looks like RADIO on DINOv2 of width 32"):
        load(path)
    with pytest.raises(UserError, match=r"; weights of tiny g are expected, this looks like RADIO of width 32 and"):
        load(saved, dataclasses.replace(GATED, summary=(0, 2)), "tiny g")


# --- as an extractor ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(97, 83), (48, 48), (30, 41)])
def test_the_same_crops_give_the_official_features(official, saved, height, width):
    """NVlabs' example: numbers in [0, 1], interpolated without averaging."""
    frames = torch_reference.photographs(height, width)
    pixels = torch.nn.functional.interpolate(channels_first(frames).float() / 255, (40, 40), mode="bilinear")
    with torch.no_grad():
        theirs = official(pixels).summary
    network = radio.network("tiny", TINY, (40, 40))
    prepared, found = network.prepare(frames)
    assert prepared.shape == (3, *network.input_shape, 3) and found.all()
    ours = jax.jit(network.apply)(network.load(saved), prepared)
    assert ours.shape == (3, network.dim) and relative_error(ours, theirs) < 1e-3


def test_the_released_networks():
    names = {name for name, place in networks.NETWORKS.items() if place.startswith("mer_jax.extractors.radio:")}
    assert set(radio.NETWORKS) == names
    dims = {name: (network.dim, network.input_shape[0]) for name, network in radio.NETWORKS.items()}
    assert dims == {
        "radio_v2.5-b": (2304, 768),
        "radio_v2.5-l": (3072, 768),
        "radio_v2.5-h": (3840, 768),
        "radio_v2.5-g": (1536, 1022),
        "c-radio_v2-b": (2304, 768),
        "c-radio_v2-l": (3072, 768),
        "c-radio_v2-h": (3840, 768),
        "c-radio_v3-b": (2304, 512),
        "c-radio_v3-l": (3072, 512),
        "c-radio_v3-h": (3840, 512),
        "c-radio_v4-h": (2560, 512),
        "c-radio_v4-so400m": (2304, 512),
    }
    for name, network in radio.NETWORKS.items():
        assert (network.name, network.modality) == (name, "appearance")
        assert ("Open Model" in network.licence) == name.startswith("c-")
        assert network.hub.startswith("nvidia/") and network.attention is not None


@pytest.mark.slow
def test_radio_b_in_full_size(tmp_path, rng):
    config = transformers.RadioConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_cls_tokens=4, num_registers=4,
        summary_idxs=[0, 1, 2],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.RadioModel(config).eval()
    model.save_pretrained(tmp_path)
    network = networks.get_network("radio_v2.5-b")
    variables = network.load(tmp_path)
    for size in ((224, 224), (160, 320)):
        images = rng.random((2, *size, 3), np.float32)
        with torch.no_grad():
            theirs = model(channels_first(images)).summary
        assert relative_error(jax.jit(network.apply)(variables, images), theirs) < 1e-4


@pytest.mark.slow
def test_radio_g_s_layers_in_full_size(tmp_path, rng):
    """Width, heads, gated MLP, patches and grid of the release; two of its forty blocks."""
    student = randomised(Student(1536, 2, 24, 4096, 14, 128, 5, gated=True), scale=0.02)
    architecture = dataclasses.replace(radio.architecture("g"), depth=2)
    variables = load(write_dino(student, tmp_path, "torch.hub"), architecture)
    images = rng.random((2, 224, 140, 3), np.float32)
    with torch.no_grad():
        theirs = student((channels_first(images) - MEAN) / STD)[:, 0]
    assert relative_error(features(architecture, variables, images), theirs) < 1e-4
