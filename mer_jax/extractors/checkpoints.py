"""Checkpoints of PyTorch networks, as their authors publish them, to the variables of Flax networks.

Reading knows files and nothing of networks: safetensors (one file, or shards under an index) and ``torch.save`` (zip
or the older stream; through the restricted reader of :mod:`mer_jax.extractors.pt_files`, so nothing in a file is ever
executed). Filling knows where each variable of a network comes from, and accounts for every key of the file: it is
used, or on a list of what is left aside and why, or the first that is neither is named.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mer_jax.errors import UserError
from mer_jax.extractors.pt_files import read_pt

# Under which entry a checkpoint's weights stand, the first that is there: the average over training before the last.
ENTRIES = ("state_dict_ema", "state_dict")

_SAFETENSORS = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_INDEX_SUFFIX = ".index.json"
_INDEX = f"model.safetensors{_INDEX_SUFFIX}"
_SINGLE = "model.safetensors"


# --- reading ------------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | os.PathLike, entries: Sequence[str] = ENTRIES) -> dict[str, np.ndarray]:
    """Reads the weights of a network.

    Args:
        path: A ``.safetensors`` file, its index or a folder that holds either as the hub names them; or a file of
            ``torch.save``, whatever its suffix, or the index of several.
        entries: Names of the entry that holds the weights where a ``torch.save`` file holds more than them, in the
            order of preference.

    Returns:
        Name to array as stored (float16 and bfloat16 stay what they are), in the file's order. The prefix ``module.``
        of data-parallel training is taken off and parametrisations are folded into the weights that they make.

    Raises:
        UserError: The file is absent, damaged, of another kind, asks for code to be run, or holds no weights.
    """
    return read_with_settings(path, entries)[0]


def read_with_settings(
    path: str | os.PathLike, entries: Sequence[str] = ENTRIES
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads the weights of a network and what stands beside them.

    Args:
        path: As :func:`read_checkpoint`.
        entries: As :func:`read_checkpoint`.

    Returns:
        The weights, as :func:`read_checkpoint`, and the file's other entries, such as ``args``; empty for safetensors.

    Raises:
        UserError: As :func:`read_checkpoint`.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in (_INDEX, _SINGLE) if (path / name).is_file()]
        if not found:
            raise UserError(f"{path}: holds neither {_SINGLE} nor {_INDEX}; name the file of weights")
        path = found[0]
    state, settings = _read_file(path, entries)
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return _folded(state, path, settings.get("args")), settings


def _read_file(path: Path, entries: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The weights in a file, or in those of an index, and what stands beside them."""
    try:
        with open(path, "rb") as stream:
            start = stream.read(64)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name the file of weights") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if path.name.endswith(_INDEX_SUFFIX):
        return _read_shards(path, entries), {}
    if start[8:9] == b"{":
        return _read_safetensors(path), {}
    if start.startswith((b"PK", b"\x80")):
        return _weights_in(read_pt(path), path, entries)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a Git LFS pointer, not the weights; fetch them with 'git lfs pull'")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise UserError(f"{path}: a web page, not the weights; fetch the file itself")
    raise UserError(f"{path}: neither safetensors nor a torch.save file, or damaged; fetch it again")


def _weights_in(value: Any, path: Path, entries: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path}: holds a {type(value).__name__}; a dict of weights is expected")
    settings: dict[str, Any] = {}
    entry = next((name for name in entries if isinstance(value.get(name), dict)), None)
    if entry is not None:
        settings = {name: item for name, item in value.items() if name != entry}
        value = value[entry]
    strange = next((name for name, item in value.items() if not isinstance(item, np.ndarray)), None)
    if strange is not None or not value:
        among = ", ".join(map(str, value)) if len(value) <= 8 else f"{', '.join(list(map(str, value))[:8])}, ..."
        wanted = " or ".join(repr(name) for name in entries)
        raise UserError(f"{path}: no weights in it; its entries are {among or 'none'}, {wanted} is expected")
    return {str(name): item for name, item in value.items()}, settings


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of one file, mapped into memory rather than read."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > size - 8:
            raise UserError(f"{path}: damaged, or cut off within its header; fetch it again")
        header = stream.read(length)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        listed = [
            (name, _SAFETENSORS[e["dtype"]], tuple(map(int, e["shape"])), *map(int, e["data_offsets"]))
            for name, e in entries.items()
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a safetensors file, or damaged ({reason}); fetch it again") from error
    start = 8 + length
    content = np.memmap(path, np.uint8, "r") if size > start else np.empty(size, np.uint8)
    state = {}
    for name, dtype, shape, begin, end in listed:
        if min(shape, default=0) < 0 or not 0 <= begin <= end or end - begin != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{path}: damaged, {name} has not as many bytes as its shape {shape} needs; fetch it again")
        if start + end > size:
            raise UserError(f"{path}: cut off, {name} lies beyond its end; fetch it again")
        state[name] = content[start + begin : start + end].view(dtype).reshape(shape)
    if not state:
        raise UserError(f"{path}: holds no arrays; name the file of weights")
    return state


def _read_shards(index: Path, entries: Sequence[str]) -> dict[str, np.ndarray]:
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{index}: not an index of safetensors files, or damaged; fetch it again") from error
    content = {}
    for file in files:
        # An index lists its neighbours; anything else would read files nobody asked for.
        if not isinstance(file, str) or Path(file).name != file or file.endswith(_INDEX_SUFFIX):
            raise UserError(f"{index}: damaged, it lists {file!r} as a neighbouring file; fetch it again")
        if not (index.parent / file).is_file():
            raise UserError(f"{index}: lists {file}, which is not beside it; fetch all {len(files)} files")
        content[file], _ = _read_file(index.parent / file, entries)
    missing = next((name for name, file in places.items() if name not in content[file]), None)
    if missing is not None:
        raise UserError(f"{index}: {places[missing]} lacks {missing}; the files are of different downloads")
    return {name: content[file][name] for name, file in places.items()}


# --- parametrisations ---------------------------------------------------------------------------------------------

_PARAMETRISED = re.compile(r"(?P<layer>(?:.+\.)?)parametrizations\.(?P<leaf>\w+)\.(?P<rest>.+)")


def _folded(state: dict[str, np.ndarray], path: Path, args: Any) -> dict[str, np.ndarray]:
    """Replaces parametrised weights, which are stored as what makes them, by what is made.

    Known are torch's spectral norm and RADIO's spectral reparametrisation of it (Ranzinger et al. 2023), where the
    weight is scaled to a learned spectral norm, in parts for packed projections.
    """
    parts: dict[str, dict[str, np.ndarray]] = {}
    result = {}
    for name, array in state.items():
        match = _PARAMETRISED.fullmatch(name)
        if match:
            folded = match["layer"] + match["leaf"]
            parts.setdefault(folded, {})[match["rest"]] = array
            result[folded] = array  # its place in the order
        else:
            result[name] = array
    if parts:
        reparametrised = args.get("spectral_reparam") if isinstance(args, dict) else None
        epsilon = reparametrised.get("eps", 1e-12) if isinstance(reparametrised, dict) else 1e-6
        for name, tensors in parts.items():
            result[name] = _fold(name, dict(tensors), path, float(epsilon))
    return result


def _fold(name: str, tensors: dict[str, np.ndarray], path: Path, epsilon: float) -> np.ndarray:
    strange = UserError(f"{path}: {name} is parametrised in a way that is not known; save the weights themselves")
    weight = tensors.pop("original", None)
    vectors = [tensors.get(f"0.{part}_u") for part in ("", "parts.0.")]
    packed = vectors[0] is None
    first = vectors[packed]
    if weight is None or first is None or first.ndim != 1 or not first.size or len(weight) % first.size:
        raise strange
    pieces = []
    for number, piece in enumerate(np.split(weight.astype(np.float32), len(weight) // first.size)):
        prefix = f"0.parts.{number}." if packed else "0."
        own = {key: tensors.pop(prefix + key, None) for key in ("_u", "_v", "scale", "_sn_version")}
        if number and all(tensor is None for tensor in own.values()):
            pieces.append(piece)  # values, in a packed projection that scales queries and keys alone
            continue
        flat = piece.reshape(len(piece), -1)
        left, right = own["_u"], own["_v"]
        if left is None or right is None or (left.shape, right.shape) != ((flat.shape[0],), (flat.shape[1],)):
            raise strange
        norm = left.astype(np.float32) @ flat @ right.astype(np.float32)
        scale = np.float32(1)
        if own["scale"] is not None:
            norm = norm + np.float32(epsilon)
            # Files of sharded training repeat the scale to have four of it.
            scale = own["scale"].astype(np.float32).reshape(-1)[0]
            if own["_sn_version"] is not None and int(own["_sn_version"]) == 2:
                scale = np.maximum(scale, 0) + np.log1p(np.exp(-np.abs(scale))) + np.float32(0.05)  # softplus
        pieces.append(piece * (scale / norm))
    if tensors:
        raise strange
    return np.concatenate(pieces).astype(weight.dtype)


# --- filling ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the value of one Flax variable comes from.

    Attributes:
        keys: Names in the checkpoint; several are joined along their first axis.
        shape: Shape of the variable to that of what is joined.
        arrange: What is joined to the variable.
    """

    keys: tuple[str, ...]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    arrange: Callable[[np.ndarray], np.ndarray]


def same(*keys: str, shape: tuple[int, ...] | None = None) -> Source:
    """A variable stored as it is, or, with ``shape``, under another shape of as many elements."""
    return Source(keys, lambda own: own if shape is None else shape, lambda array: array)


def linear(*keys: str) -> Source:
    """A kernel (in, out) from weights (out, in), several side by side."""
    return Source(keys, lambda own: own[::-1], lambda array: array.T)


def convolution(key: str) -> Source:
    """A kernel (height, width, in, out) from a weight (out, in, height, width)."""
    return Source((key,), lambda own: (own[3], own[2], own[0], own[1]), lambda array: array.transpose(2, 3, 1, 0))


# Flax collection and leaf to what PyTorch calls it below the layer's name.
_NAMES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}


def torch_sources(expected: Any, layer: Callable[[str], str] = lambda name: name) -> dict[str, Source]:
    """Sources of a Flax model of plain convolutions, dense layers and normalisations.

    Args:
        expected: As :func:`fill`.
        layer: The dotted name of a Flax layer to what the checkpoint calls it.

    Returns:
        For each variable ``collection/layers/leaf`` its source.
    """
    sources = {}
    for path, leaf in _leaves(expected):
        collection, *layers, last = path.split("/")
        key = f"{layer('.'.join(layers))}.{_NAMES[collection, last]}"
        make = {2: linear, 4: convolution}.get(len(leaf.shape), same) if last == "kernel" else same
        sources[path] = make(key)
    return sources


def fill(
    expected: Any,
    state: Mapping[str, np.ndarray],
    sources: Mapping[str, Source],
    *,
    where: str | os.PathLike,
    network: str,
    skipped: Mapping[str, str] | None = None,
) -> Any:
    """Arranges a checkpoint's arrays as the variables of a Flax network.

    Args:
        expected: The network's variables or their shapes (``jax.ShapeDtypeStruct``), nested dicts.
        state: Name to array.
        sources: For each variable, as its path ``collection/layers/leaf``, where it comes from.
        where: The file, for messages.
        network: The network's name, for messages.
        skipped: Patterns of names (matched from their start) of what the file holds and the network has no use for,
            each with what that is.

    Returns:
        A tree of NumPy arrays of ``expected``'s structure, shapes and types. Every key of ``state`` is used or skipped.

    Raises:
        UserError: An array is lacking, left over, of another shape, no floating-point numbers or not finite; it names
            the first, and what the file looks like instead.
    """

    def refuse(what: str) -> UserError:
        return UserError(f"{where}: {what}; weights of {network} are expected, this looks like {looks_like(state)}")

    leaves = list(_leaves(expected))
    used = {key for path, _ in leaves for key in sources[path].keys}
    filled: dict = {}
    for path, leaf in leaves:
        source = sources[path]
        shape = source.shape(leaf.shape)
        for key in source.keys:
            if key not in state:
                raise refuse(f"lacks {key}" + (f" {shape}" if len(source.keys) == 1 else ""))
        arrays = [np.asarray(state[key]) for key in source.keys]
        found = arrays[0].shape
        if len(arrays) > 1:
            tails = {array.shape[1:] for array in arrays}
            odd = next(
                (k for k, a in zip(source.keys, arrays, strict=True) if a.shape[1:] != arrays[0].shape[1:]), None
            )
            if len(tails) > 1 or not arrays[0].ndim:
                raise refuse(f"{odd or source.keys[0]} does not fit beside {source.keys[0]} {found}")
            found = (sum(array.shape[0] for array in arrays), *arrays[0].shape[1:])
        if found != shape:
            raise refuse(f"{' + '.join(source.keys)} has shape {found}, {shape} is needed")
        strange = next((a for a in arrays if not _is_float(a)), None)
        if strange is not None:
            raise refuse(f"{source.keys[0]} holds {strange.dtype}, floating-point numbers are needed")
        joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        value = np.empty(leaf.shape, leaf.dtype)
        value[...] = source.arrange(joined).reshape(leaf.shape)
        if not np.isfinite(value).all():
            raise UserError(f"{where}: {source.keys[0]} holds values that are not finite; fetch the file again")
        *parents, last = path.split("/")
        place = filled
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    patterns = [re.compile(pattern) for pattern in skipped or {}]
    for key in state:
        if key not in used and not any(pattern.match(key) for pattern in patterns):
            raise refuse(f"holds {key} {state[key].shape}, which {network} does not have")
    return filled


def _is_float(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16


def _leaves(tree: Mapping, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


# --- recognising --------------------------------------------------------------------------------------------------


def looks_like(state: Mapping[str, np.ndarray]) -> str:
    """What network a checkpoint seems to be of, in words for a message."""

    def first(pattern: str) -> np.ndarray | None:
        return next((array for name, array in state.items() if re.search(pattern, name)), None)

    def has(pattern: str) -> bool:
        return first(pattern) is not None

    head = first(r"(^|\.)final_layers\.0\.weight$")
    if has(r"(^|\.)smirk_encoder\."):
        return "SMIRK"
    if head is not None and has(r"(^|\.)backbone\."):
        return {80: "3DDFA-V3", 156: "FaceVerse v4"}.get(head.shape[0], "a face regressor on a ResNet")
    if has(r"(^|\.)text_model\.") and not has(r"(^|\.)vision_model\."):
        return "the text tower of SigLIP or CLIP"
    kind = "a vision transformer"
    patches = first(r"(^|\.)embeddings\.patch_embedding\.weight$")
    if has(r"(^|\.)patch_generator\."):
        kind = "RADIO on DINOv2" if has(r"(^|\.)inner\.") else "RADIO"
    elif has(r"(^|\.)head\.probe$"):
        kind = "SigLIP2 NaFlex" if patches is not None and patches.ndim == 2 else "SigLIP"
        kind += " with its text tower" if has(r"(^|\.)text_model\.") else ""
    elif has(r"(^|\.)embeddings\.class_embedding$"):
        kind = "CLIP"
    elif has(r"(^|\.)(layer_scale1\.lambda1|ls1\.gamma)$"):
        kind = "DINOv2 with registers" if has(r"(^|\.)register_tokens$") else "DINOv2"
    elif not has(r"(^|\.)(blocks|layers?)\.0\.(norm1|layer_norm1)\.weight$"):
        for pattern, text in ((r"(^|\.)layer1\.0\.conv1\.weight$", "a ResNet"), (r"conv_stem\.weight$", "a MobileNet")):
            if has(pattern):
                return text
        return f"{len(state)} array{'s' * (len(state) != 1)} such as {next(iter(state), 'none')}"
    vision = {name: array for name, array in state.items() if not re.search(r"(^|\.)text_model\.", name)}
    blocks = [int(m[1]) for name in vision if (m := re.search(r"(?:^|\.)(?:blocks|layers?)\.(\d+)\.", name))]
    norm = next((a for n, a in vision.items() if re.search(r"\.0\.(norm1|layer_norm1)\.weight$", n)), None)
    width = f" of width {norm.shape[0]} and depth {max(blocks) + 1}" if norm is not None and norm.ndim == 1 else ""
    return kind + width
