"""SigLIP's image tower against transformers, through files that transformers saves."""

import importlib.util
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mer_jax.errors import UserError
from mer_jax.extractors import networks, siglip, vit
from mer_jax.extractors.vit import Architecture, VisionTransformer

_spec = importlib.util.spec_from_file_location("torch_reference", Path(__file__).parents[1] / "torch_reference.py")
torch_reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(torch_reference)
transformers, channels_first = torch_reference.transformers, torch_reference.channels_first
randomised, relative_error = torch_reference.randomised, torch_reference.relative_error

SIZE, PATCH = 60, 14  # with a rest that fills no patch, as 384 has with 14
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": SIZE,
    "patch_size": PATCH,
}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 99}
TINY = Architecture(PATCH, 32, 3, 4, 48, (4, 4), "gelu_tanh", "fixed")
features = jax.jit(vit.features, static_argnums=0)


@pytest.fixture(scope="module")
def tower():
    return randomised(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)))


@pytest.fixture(scope="module")
def saved(tower, tmp_path_factory):
    """A file as version 5 saves the tower: without prefix."""
    folder = tmp_path_factory.mktemp("siglip")
    tower.save_pretrained(folder)
    return folder / "model.safetensors"


@pytest.fixture
def images(rng):
    return rng.random((2, SIZE, SIZE, 3), np.float32)


def official(tower, images, **options):
    with torch.no_grad():
        return tower(channels_first(images) * 2 - 1, **options)


def load(path, architecture=TINY, name="tiny"):
    return siglip.load(path, architecture=architecture, name=name)


def test_every_layer_is_transformers_(tower, saved, images):
    variables = load(saved)
    _, state = jax.jit(
        lambda v, x: VisionTransformer(TINY).apply(v, x, capture_intermediates=True, mutable=["intermediates"])
    )(variables, images)
    layers = state["intermediates"]
    theirs = official(tower, images, output_hidden_states=True)
    for number in range(3):
        assert relative_error(layers[f"block_{number}"]["__call__"][0], theirs.hidden_states[number + 1]) < 1e-5
    assert relative_error(layers["norm"]["__call__"][0], theirs.last_hidden_state) < 1e-5
    assert relative_error(layers["__call__"][0], theirs.pooler_output) < 1e-5


def test_attention_map_is_that_of_the_probe(tower, saved, images):
    with torch.no_grad():
        tokens = official(tower, images).last_hidden_state
        head = tower.head
        _, shares = head.attention(head.probe.repeat(2, 1, 1), tokens, tokens, need_weights=True)  # (2, 1, N)
    ours = jax.jit(vit.attention_map, static_argnums=0)(TINY, load(saved), images)
    assert ours.shape == (2, 4, 4) and relative_error(ours.reshape(2, 1, 16), shares) < 1e-5


def older_prefix(state, folder):
    save_file({f"vision_model.{name}": tensor for name, tensor in state.items()}, folder / "w.safetensors")
    return folder / "w.safetensors"


def whole_model(state, folder):
    model = transformers.SiglipModel(transformers.SiglipConfig(vision_config=VISION, text_config=TEXT))
    model.vision_model.load_state_dict(state)
    model.save_pretrained(folder)
    return folder


def with_position_ids(state, folder):
    prefixed = {f"vision_model.{name}": tensor for name, tensor in state.items()}
    save_file(prefixed | {"vision_model.embeddings.position_ids": torch.arange(16)[None]}, folder / "w.safetensors")
    return folder / "w.safetensors"


def torch_file(state, folder):
    torch.save(state, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


@pytest.mark.parametrize("save", [older_prefix, whole_model, with_position_ids, torch_file])
def test_other_files_of_the_same_weights(saved, tmp_path, save):
    expected = load(saved)
    found = load(save(load_file(saved), tmp_path))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(tower, saved, tmp_path, images, dtype):
    state = {name: tensor.to(dtype) for name, tensor in load_file(saved).items()}
    save_file(state, tmp_path / "w.safetensors")
    variables = load(tmp_path / "w.safetensors")
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    rounded = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION))
    rounded.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    theirs = official(rounded.eval(), images).pooler_output
    assert relative_error(features(TINY, variables, images), theirs) < 1e-5


@pytest.mark.parametrize("processor", [transformers.SiglipImageProcessor, transformers.SiglipImageProcessorPil])
@pytest.mark.parametrize("height, width", [(97, 83), (60, 60), (41, 50)])
def test_the_same_crops_give_the_official_features(tower, saved, height, width, processor):
    frames = torch_reference.photographs(height, width)
    # The processor of the released files: bilinear.
    official = processor(size={"height": SIZE, "width": SIZE}, resample=2)
    pixels = official(list(frames), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        theirs = tower(pixels).pooler_output
    network = siglip.network("tiny", TINY, (SIZE, SIZE))
    prepared, found = network.prepare(frames)
    assert prepared.shape == (3, *network.input_shape, 3) and found.all()
    ours = jax.jit(network.apply)(network.load(saved), prepared)
    assert ours.shape == (3, network.dim) and relative_error(ours, theirs) < 1e-3


@pytest.mark.parametrize(
    "change, told",
    [
        (
            lambda s: {f"text_model.{n}": t for n, t in s.items() if "patch" not in n and "head" not in n},
            "lacks encoder.layers.0.self_attn.out_proj.bias (32,); weights of tiny are expected, this looks like the "
            "text tower of SigLIP or CLIP",
        ),
        (
            lambda s: s | {"encoder.layers.3.layer_norm1.weight": torch.ones(32)},
            "holds encoder.layers.3.layer_norm1.weight (32,), which tiny does not have; weights of tiny are expected, "
            "this looks like SigLIP of width 32 and depth 4",
        ),
        (
            lambda s: s | {"embeddings.position_embedding.weight": torch.ones(9, 32)},
            "embeddings.position_embedding.weight has shape (9, 32), (16, 32) is needed; weights of tiny are expected, "
            "this looks like SigLIP of width 32 and depth 3",
        ),
        (
            lambda s: s | {"embeddings.patch_embedding.weight": torch.ones(32, 588)},
            "embeddings.patch_embedding.weight has shape (32, 588), (32, 3, 14, 14) is needed; weights of tiny are "
            "expected, this looks like SigLIP2 NaFlex of width 32 and depth 3",
        ),
        (
            lambda s: {"conv1.weight": torch.zeros(3, 3)},
            "lacks encoder.layers.0.self_attn.out_proj.bias (32,); weights of tiny are expected, this looks like 1 arr",
        ),
    ],
)
def test_other_networks_are_one_line(saved, tmp_path, change, told):
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(saved)).items()}, tmp_path / "w")
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        load(tmp_path / "w")
    assert str(caught.value).startswith(f"{tmp_path / 'w'}: ") and "\n" not in str(caught.value)


def test_weights_of_another_size_are_one_line(saved):
    with pytest.raises(UserError, match=r"\(32,\).*\(768,\) is needed; weights of siglip2_b16_224 are expected, this"):
        networks.get_network("siglip2_b16_224").load(saved)


def test_the_released_networks():
    names = {name for name, place in networks.NETWORKS.items() if place.startswith("mer_jax.extractors.siglip:")}
    assert set(siglip.NETWORKS) == names and len(names) == 14
    widths = {"b": 768, "l": 1024, "s": 1152, "g": 1536}
    for name, network in siglip.NETWORKS.items():
        variant, patch, size = re.fullmatch(r"siglip2_([a-z0-9]+)(14|16)_(\d+)", name).groups()
        assert (network.name, network.modality, network.dim) == (name, "appearance", widths[variant[0]])
        assert network.input_shape == (int(size), int(size)) and f"{size} x {size}, bilinear" in network.preprocessing
        assert network.hub.endswith(f"-patch{patch}-{size}") and network.hub.startswith("google/siglip2-")


@pytest.mark.slow
def test_siglip2_l16_256_in_full_size(tmp_path, rng):
    """316 M parameters, through the file of the whole model."""
    vision = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    config = transformers.SiglipConfig(vision_config=vision | {"image_size": 256, "patch_size": 16}, text_config=TEXT)
    torch.manual_seed(0)
    model = transformers.SiglipModel(config).eval()
    model.save_pretrained(tmp_path)
    images = rng.random((2, 256, 256, 3), np.float32)
    theirs = official(model.vision_model, images).pooler_output
    network = networks.get_network("siglip2_l16_256")
    variables = network.load(tmp_path)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 315_956_224
    assert relative_error(jax.jit(network.apply)(variables, images), theirs) < 1e-4
