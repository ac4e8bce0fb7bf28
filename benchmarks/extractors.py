r"""Extracts features as users of PyTorch do, and as ``scripts/extract_features.py`` does: images/s and peak memory.

    python benchmarks/extractors.py
    python benchmarks/extractors.py --extractors siglip2_l16_256 3ddfa_v3 --batch_size 8 --repeats 5

The PyTorch way is transformers for SigLIP2, RADIO and DINOv2, timm's MobileNetV3 for SMIRK, and torchvision's ResNet-50
for 3DDFA-V3 and FaceVerse v4, each in inference mode. Its random weights are saved as an official checkpoint, which our
way reads; both then see the same images (uint8 in host memory, scaling included) with as many threads as there are
processors. Each way has a process of its own, and they take turns, so that whatever else the machine does meets both.
Peak memory is that of a process while it extracts: weights, images and all in between, not what loading took.
"""

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from mer_jax.cli import open_door
from mer_jax.errors import UserError
from mer_jax.extractors.networks import Network, get_network
from mer_jax.parallel import available_processors

DEFAULT = ("siglip2_b16_256", "c-radio_v3-b", "dinov2_b14_reg", "smirk", "3ddfa_v3", "faceverse_v4")
_PYTORCH, _OURS = "PyTorch", "ours"
_WARM_UP = 2
# Coefficients of each head, in the checkpoint's order, and the entry that holds the weights.
_FACE_MODELS = {
    "3ddfa_v3": ((80, 64, 80, 3, 27, 2, 1), slice(80, 144), "net_recon"),
    "faceverse_v4": ((156, 177, 251, 27, 3, 2, 1, 4), slice(156, 327), None),
}
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_NONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@dataclass(frozen=True)
class Way:
    """One way to extract features, set up.

    Attributes:
        extract: Images (B, h, w, 3) uint8 to features (B, D), both on the host.
        told: Versions and the device.
        device_bytes: Peak memory of an accelerator; 0 on a CPU, where it is the process's.
    """

    extract: Callable[[np.ndarray], np.ndarray]
    told: str
    device_bytes: Callable[[], int]


@dataclass(frozen=True)
class Reference:
    """A network of PyTorch.

    Attributes:
        model: The ``torch.nn.Module``.
        features: Model and pixels (B, 3, h, w) to features (B, D).
        save: Writes the official checkpoint into a folder and returns its path.
        normalisation: Mean and standard deviation of the pixels, in [0, 1].
        told: The package and its version.
    """

    model: Any
    features: Callable[[Any, Any], Any]
    save: Callable[[Path], Path]
    normalisation: tuple[Sequence[float], Sequence[float]]
    told: str


# --- PyTorch -------------------------------------------------------------------------------------------------


def import_torch() -> Any:
    """PyTorch, with the operators declared that a torchvision for CUDA misses beside a PyTorch for CPUs."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    import torch

    if not hasattr(torch.ops.torchvision, "nms"):
        import_torch.kept = torch.library.Library("torchvision", "FRAGMENT")  # undeclares with its last reference
        for name in ("nms", "qnms"):
            import_torch.kept.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return torch


def reference(network: Network) -> Reference:
    """The network as its official code or package has it, with random weights.

    Raises:
        UserError: No package has it.
    """
    for pattern, make in _REFERENCES.items():
        found = re.fullmatch(pattern, network.name)
        if found:
            return make(network, *found.groups())
    raise UserError(f"--extractors {network.name}: no package of PyTorch has this network to compare with")


def _siglip(network: Network, variant: str, patch: str, size: str) -> Reference:
    import transformers

    from mer_jax.extractors.siglip import architecture

    sizes = _sizes(architecture(variant, int(patch), int(size)))
    config = transformers.SiglipVisionConfig(**sizes, image_size=int(size), hidden_act="gelu_pytorch_tanh")
    model = transformers.SiglipVisionModel(config)
    return _of_transformers(model, lambda model, pixels: model(pixel_values=pixels).pooler_output, _HALF)


def _radio(network: Network, size: str) -> Reference:
    import transformers

    from mer_jax.extractors.radio import architecture

    ours = architecture(size, teachers=network.dim // architecture(size).width)
    sizes = _sizes(ours)
    config = transformers.RadioConfig(
        **sizes,
        mlp_ratio=sizes["intermediate_size"] / sizes["hidden_size"],
        num_cls_tokens=len(ours.summary),
        num_registers=ours.prefix - len(ours.summary),
        summary_idxs=list(ours.summary),
    )
    return _of_transformers(
        transformers.RadioModel(config), lambda model, pixels: model(pixel_values=pixels).summary, _NONE
    )


def _dinov2(network: Network, variant: str, registers: str | None) -> Reference:
    import transformers

    from mer_jax.extractors.dinov2 import architecture

    ours = architecture(variant, registers=bool(registers))
    sizes = _sizes(ours) | {"use_swiglu_ffn": ours.activation == "swiglu", "image_size": 518}
    kind = ("Dinov2WithRegisters" if registers else "Dinov2") + "{}"
    more = {"num_register_tokens": ours.prefix - 1} if registers else {}
    config = getattr(transformers, kind.format("Config"))(**sizes, **more)
    model = getattr(transformers, kind.format("Model"))(config)
    return _of_transformers(model, lambda model, pixels: model(pixel_values=pixels).pooler_output, _IMAGENET)


def _sizes(architecture: Any) -> dict[str, int]:
    return {
        "hidden_size": architecture.width,
        "num_hidden_layers": architecture.depth,
        "num_attention_heads": architecture.heads,
        "intermediate_size": architecture.hidden,
        "patch_size": architecture.patch,
    }


def _of_transformers(model: Any, features: Callable, normalisation) -> Reference:
    import transformers

    transformers.utils.logging.disable_progress_bar()

    def save(folder: Path) -> Path:
        model.save_pretrained(folder)
        return folder / "model.safetensors"

    return Reference(model, features, save, normalisation, f"transformers {transformers.__version__}")


def _smirk(network: Network) -> Reference:
    torch = import_torch()
    import timm

    name = "tf_mobilenetv3_large_minimal_100"
    encoder = timm.create_model(name, pretrained=False, features_only=True)
    head = torch.nn.Linear(encoder.feature_info[-1]["num_chs"], 55)
    model = torch.nn.ModuleDict({"encoder": encoder, "head": head})

    def features(model: Any, pixels: Any) -> Any:
        found = model["head"](model["encoder"](pixels)[-1].mean(dim=(2, 3)))
        parts = [found[:, :50], found[:, 50:52].clamp(0, 1), found[:, 52:53].relu(), found[:, 53:].clamp(-0.2, 0.2)]
        return torch.cat(parts, dim=1)

    def save(folder: Path) -> Path:
        prefix = "smirk_encoder.expression_encoder"
        state = {f"{prefix}.encoder.{key}": value for key, value in encoder.state_dict().items()}
        state |= {f"{prefix}.expression_layers.0.{key}": value for key, value in head.state_dict().items()}
        torch.save(state, folder / "SMIRK_em1.pt")
        return folder / "SMIRK_em1.pt"

    return Reference(model, features, save, _NONE, f"timm {timm.__version__}")


def _face_model(network: Network) -> Reference:
    torch = import_torch()
    import torchvision

    sizes, columns, entry = _FACE_MODELS[network.name]
    backbone = torchvision.models.resnet50()
    del backbone.fc
    heads = torch.nn.ModuleList([torch.nn.Conv2d(2048, size, 1) for size in sizes])
    model = torch.nn.ModuleDict({"backbone": backbone, "final_layers": heads})

    def features(model: Any, pixels: Any) -> Any:
        net = model["backbone"]
        x = net.maxpool(net.relu(net.bn1(net.conv1(pixels))))
        x = net.avgpool(net.layer4(net.layer3(net.layer2(net.layer1(x)))))
        return torch.cat([head(x) for head in model["final_layers"]], dim=1).flatten(1)[:, columns]

    def save(folder: Path) -> Path:
        state = model.state_dict()
        torch.save({entry: state} if entry else state, folder / "official.pth")
        return folder / "official.pth"

    return Reference(model, features, save, _NONE, f"torchvision {torchvision.__version__}")


# Name of a network to what makes its counterpart.
_REFERENCES = {
    r"siglip2_(b|l|so400m|gopt)(14|16)_(\d+)": _siglip,
    r"(?:c-)?radio_v[\d.]+-(b|l|h|so400m)": _radio,
    r"dinov2_([sblg])14(_reg)?": _dinov2,
    r"smirk": _smirk,
    "|".join(_FACE_MODELS): _face_model,
}


# --- the two ways --------------------------------------------------------------------------------------------


def pytorch_way(network: Network, folder: Path, dtype: str) -> Way:
    """Makes the reference, and saves its checkpoint in ``folder``."""
    torch = import_torch()
    torch.manual_seed(0)
    torch.set_num_threads(available_processors())
    of = reference(network)
    (folder / "checkpoint").write_text(str(of.save(folder)))
    on_gpu = torch.cuda.is_available()
    where = {"device": "cuda" if on_gpu else "cpu", "dtype": getattr(torch, dtype)}
    model = of.model.eval().to(**where)
    mean, std = (torch.tensor(part, **where)[:, None, None] for part in of.normalisation)

    def extract(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            pixels = torch.from_numpy(images).to(where["device"]).permute(0, 3, 1, 2).to(where["dtype"]) / 255
            return of.features(model, (pixels - mean) / std).float().cpu().numpy()

    told = f"torch {torch.__version__}, {of.told}, on {torch.cuda.get_device_name() if on_gpu else 'cpu'}"
    return Way(extract, told, torch.cuda.max_memory_allocated if on_gpu else lambda: 0)


def our_way(network: Network, folder: Path, dtype: str, batch_size: int) -> Way:
    """Loads the checkpoint and compiles the network as the extraction does."""
    import jax

    from mer_jax.extractors.pipeline import compile_network, local_devices

    device = local_devices()[0]
    image = jax.ShapeDtypeStruct((*network.input_shape, 3), np.uint8)
    variables = network.load((folder / "checkpoint").read_text())
    program = compile_network(network, variables, image, [device], batch_size=batch_size, dtype=dtype)
    peak = (lambda: device.memory_stats()["peak_bytes_in_use"]) if device.platform != "cpu" else lambda: 0
    told = f"jax {jax.__version__}, on {device.device_kind}"
    return Way(lambda images: np.asarray(program.call(images)), told, peak)


def work(way_name: str, given: argparse.Namespace) -> None:
    """A way's process: sets up, says so, then times one batch for each line that it is sent."""
    network = get_network(given.extractors[0])
    began = time.perf_counter()
    if way_name == _PYTORCH:
        way = pytorch_way(network, given.folder, given.dtype)
    else:
        way = our_way(network, given.folder, given.dtype, given.batch_size)
    shape = (given.batch_size, *network.input_shape, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for _ in range(_WARM_UP):
        features = way.extract(images)
    np.save(given.folder / f"{way_name}.npy", features)
    _say(told=way.told, seconds=time.perf_counter() - began)
    _forget_peak()
    for _ in sys.stdin:
        began = time.perf_counter()
        way.extract(images)
        _say(seconds=time.perf_counter() - began, peak=way.device_bytes() or _peak())


def _say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def _forget_peak() -> None:
    """Lets the peak memory of this process count from now on, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("peak memory includes loading: this system cannot measure it apart", file=sys.stderr)


def _peak() -> int:
    try:
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- measuring -----------------------------------------------------------------------------------------------


class Process:
    """A way in a process of its own; ``start`` is what it said when it was set up.

    Raises:
        UserError: It cannot be set up.
    """

    def __init__(self, way_name: str, name: str, folder: Path, given: argparse.Namespace):
        command = [sys.executable, __file__, "--way", way_name, "--folder", folder, "--extractors", name,
                   "--batch_size", given.batch_size, "--dtype", given.dtype]  # fmt: skip
        self._process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._what = f"{name}, {way_name}"
        self.start = self._hear()

    def turn(self) -> dict[str, float]:
        """Seconds of one batch, and the peak memory up to now in bytes."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._hear()

    def end(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _hear(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"{self._what}: ended before it was done; what it said is above")
        return json.loads(line)


def measure(name: str, given: argparse.Namespace) -> None:
    """Times one extractor both ways, in turns, and prints the figures."""
    network = get_network(name)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # PyTorch first: it writes the checkpoint that ours reads.
        processes = {way: Process(way, name, folder, given) for way in (_PYTORCH, _OURS)}
        turns = {way: [] for way in processes}
        for _ in range(given.repeats):
            for way, process in processes.items():
                time.sleep(0.2)  # idle threads of the other way spin for a while
                turns[way].append(process.turn())
        for process in processes.values():
            process.end()
        reference_features, ours = (np.load(folder / f"{way}.npy") for way in processes)
    size = "x".join(map(str, network.input_shape))
    print(f"{name}: {given.batch_size} images of {size}, {given.dtype}, {given.repeats} turns")
    for way, process in processes.items():
        rates = given.batch_size / np.array([turn["seconds"] for turn in turns[way]])
        peak = turns[way][-1]["peak"] / 2**30
        told = f"{process.start['told']}; ready after {process.start['seconds']:.1f} s"
        print(f"  {way:8} {_spread(rates)} images/s, peak memory {peak:.2f} GiB ({told})")
    seconds = {way: np.array([turn["seconds"] for turn in own]) for way, own in turns.items()}
    peaks = [turns[way][-1]["peak"] for way in processes]
    difference = np.abs(ours - reference_features).max() / np.abs(reference_features).max()
    print(f"  ours / PyTorch: speed {_spread(seconds[_PYTORCH] / seconds[_OURS])}, memory {peaks[1] / peaks[0]:.2f}")
    print(f"  largest difference of a feature, relative to the largest feature: {difference:.1e}", flush=True)


def main(arguments: Sequence[str]) -> None:
    """Prints the figures that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--extractors", nargs="+", default=DEFAULT, metavar="NAME", help=f"networks (default: {' '.join(DEFAULT)})")
    add("--batch_size", type=int, default=8, help="images at once (default: %(default)s)")
    add("--repeats", type=int, default=5, help="turns of each way (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="precision (default: %(default)s)")
    add("--way", choices=(_PYTORCH, _OURS), help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    for name in ("batch_size", "repeats"):
        if getattr(given, name) < 1:
            raise UserError(f"--{name} {getattr(given, name)}: must be at least 1")
    if given.way:
        work(given.way, given)
        return
    for name in given.extractors:
        get_network(name)
    print(f"{platform.machine()}, {available_processors()} processors, Python {platform.python_version()}")
    for name in given.extractors:
        measure(name, given)


def _spread(values: np.ndarray) -> str:
    return f"median {np.median(values):.2f} ({values.min():.2f} to {values.max():.2f})"


if __name__ == "__main__":
    open_door(main, sys.argv[1:])
