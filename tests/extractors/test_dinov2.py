"""DINOv2 against transformers, through the files of Hugging Face and of the authors."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mer_jax.errors import UserError
from mer_jax.extractors import dinov2, networks, vit
from mer_jax.extractors.vit import VisionTransformer

_spec = importlib.util.spec_from_file_location("torch_reference", Path(__file__).parents[1] / "torch_reference.py")
torch_reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(torch_reference)
transformers, channels_first = torch_reference.transformers, torch_reference.channels_first
randomised, relative_error = torch_reference.randomised, torch_reference.relative_error

PATCH, GRID = 14, 5
SIZES = [(70, 70), (42, 42), (112, 112), (28, 84), (98, 56)]
KINDS = pytest.mark.parametrize(
    "registers, gated", [(False, False), (False, True), (True, False), (True, True)],
    ids=["plain", "plain-gated", "registers", "registers-gated"],
)  # fmt: skip
features = jax.jit(vit.features, static_argnums=0)


def tiny(registers, gated):
    return dataclasses.replace(
        dinov2.architecture("g" if gated else "b", registers=registers),
        width=32,
        depth=3,
        heads=4,
        hidden=88 if gated else 128,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Each kind as transformers' network and its file."""
    made = {}
    for registers in (False, True):
        kind = "Dinov2WithRegisters" if registers else "Dinov2"
        for gated in (False, True):
            config = getattr(transformers, f"{kind}Config")(
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=4,
                image_size=PATCH * GRID,
                patch_size=PATCH,
                use_swiglu_ffn=gated,
                attn_implementation="eager",
            )
            model = randomised(getattr(transformers, f"{kind}Model")(config))
            folder = tmp_path_factory.mktemp("dinov2")
            model.save_pretrained(folder)
            made[registers, gated] = model, folder / "model.safetensors"
    return made


MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def official(model, images, **options):
    with torch.no_grad():
        return model((channels_first(images) - MEAN) / STD, **options)


def load(path, architecture, name="tiny"):
    return dinov2.load(path, architecture=architecture, name=name)


@KINDS
@pytest.mark.parametrize("size", SIZES)
def test_features_at_any_size(models, rng, registers, gated, size):
    model, path = models[registers, gated]
    architecture = tiny(registers, gated)
    images = rng.random((2, *size, 3), np.float32)
    ours = features(architecture, load(path, architecture), images)
    assert relative_error(ours, official(model, images).pooler_output) < 1e-5


@KINDS
def test_every_layer_is_transformers_(models, rng, registers, gated):
    model, path = models[registers, gated]
    architecture = tiny(registers, gated)
    variables = load(path, architecture)
    own = vit.observed(architecture, variables["params"])
    assert own == dataclasses.replace(architecture, grid=(GRID, GRID))
    images = rng.random((2, 42, 70, 3), np.float32)
    _, state = jax.jit(
        lambda v, x: VisionTransformer(own).apply(v, x, capture_intermediates=True, mutable=["intermediates"])
    )(variables, images)
    theirs = official(model, images, output_hidden_states=True, output_attentions=True)
    layers = state["intermediates"]
    for number in range(3):
        assert relative_error(layers[f"block_{number}"]["__call__"][0], theirs.hidden_states[number + 1]) < 1e-5
    assert relative_error(layers["norm"]["__call__"][0], theirs.last_hidden_state) < 1e-5
    shares = theirs.attentions[-1].mean(dim=1)[:, 0, own.prefix :].reshape(2, 3, 5)
    ours = jax.jit(vit.attention_map, static_argnums=0)(architecture, variables, images)
    assert relative_error(ours, shares) < 1e-5


def as_the_authors_name_it(state, depth=3):
    """The names of the authors' files, queries, keys and values packed."""
    renamed = {}
    for name, tensor in state.items():
        for old, new in (
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.", ""),
            ("encoder.layer.", "blocks."),
            ("attention.output.dense", "attn.proj"),
            ("layer_scale1.lambda1", "ls1.gamma"),
            ("layer_scale2.lambda1", "ls2.gamma"),
            ("mlp.weights_in", "mlp.w12"),
            ("mlp.weights_out", "mlp.w3"),
            ("layernorm", "norm"),
        ):
            name = name.replace(old, new)
        renamed[name] = tensor
    for number in range(depth):
        for leaf in ("weight", "bias"):
            parts = [f"blocks.{number}.attention.attention.{part}.{leaf}" for part in ("query", "key", "value")]
            renamed[f"blocks.{number}.attn.qkv.{leaf}"] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


@KINDS
def test_the_authors_files(models, tmp_path, registers, gated):
    _, path = models[registers, gated]
    torch.save(as_the_authors_name_it(load_file(path)), tmp_path / "dinov2_vits14_pretrain.pth")
    architecture = tiny(registers, gated)
    found = load(tmp_path / "dinov2_vits14_pretrain.pth", architecture)
    jax.tree.map(np.testing.assert_array_equal, found, load(path, architecture))


@pytest.mark.parametrize("processor", [transformers.BitImageProcessor, transformers.BitImageProcessorPil])
@pytest.mark.parametrize("height, width", [(97, 83), (80, 80), (120, 160)])
def test_the_same_crops_give_the_official_features(models, height, width, processor):
    model, path = models[True, False]
    frames = torch_reference.photographs(height, width)
    official = processor(
        size={"shortest_edge": 64}, resample=3, crop_size={"height": 56, "width": 56},
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    with torch.no_grad():
        theirs = model(official(list(frames), return_tensors="pt")["pixel_values"]).pooler_output
    network = dinov2.network("tiny", tiny(True, False), (56, 56), shortest_edge=64)
    prepared, found = network.prepare(frames)
    assert prepared.shape == (3, *network.input_shape, 3) and found.all()
    ours = jax.jit(network.apply)(network.load(path), prepared)
    assert ours.shape == (3, network.dim) and relative_error(ours, theirs) < 1e-3


@pytest.mark.parametrize(
    "change, told",
    [
        (
            lambda s: s.pop("embeddings.register_tokens"),
            "lacks embeddings.register_tokens, (1, 4, 32) is needed; weights of tiny are expected, this looks like "
            "DINOv2 of width 32 and depth 3",
        ),
        (
            lambda s: s.update({"embeddings.cls_token": torch.zeros(1, 1, 16)}),
            "embeddings.cls_token has shape (1, 1, 16), (1, 1, 32) is needed",
        ),
        (
            lambda s: s.update({"embeddings.position_embeddings": torch.zeros(1, 8, 32)}),
            "positions has shape (7, 32), (4, 32) is needed",
        ),
        (
            lambda s: s.update({"encoder.layer.3.norm1.weight": torch.zeros(32)}),
            "holds encoder.layer.3.norm1.weight (32,), which tiny does not have; weights of tiny are expected, this "
            "looks like DINOv2 with registers of width 32 and depth 4",
        ),
        (lambda s: s.pop("layernorm.bias"), "lacks layernorm.bias (32,)"),
    ],
)
def test_other_networks_are_one_line(models, tmp_path, change, told):
    state = load_file(models[True, False][1])
    change(state)
    save_file(state, tmp_path / "w")
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        load(tmp_path / "w", tiny(True, False))
    assert str(caught.value).startswith(f"{tmp_path / 'w'}: ") and "\n" not in str(caught.value)


def test_registers_that_are_not_wanted_are_one_line(models):
    path = models[True, False][1]
    with pytest.raises(UserError, match=r"holds embeddings\.register_tokens \(1, 4, 32\), which tiny does not have"):
        load(path, tiny(False, False))


def test_the_released_networks():
    names = {name for name, place in networks.NETWORKS.items() if place.startswith("mer_jax.extractors.dinov2:")}
    assert set(dinov2.NETWORKS) == names and len(names) == 8
    for name, network in dinov2.NETWORKS.items():
        assert network.dim == {"s": 384, "b": 768, "l": 1024, "g": 1536}[name[7]]
        assert (network.name, network.modality, network.input_shape) == (name, "appearance", (224, 224))
        assert ("with-registers" in network.hub) == name.endswith("_reg")
