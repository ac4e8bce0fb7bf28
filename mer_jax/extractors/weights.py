"""Where a network's weights come from: a file, or the Hugging Face hub; converted once and kept."""

import hashlib
import json
import os
import re
import sys
import uuid
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mer_jax import __version__
from mer_jax.errors import UserError
from mer_jax.extractors.networks import Network
from mer_jax.files import TEMPORARY_SUFFIX, exclusive

_INDEX = ".index.json"
_FILES = ("model.safetensors", f"model.safetensors{_INDEX}")  # what a repository on the hub, or a copy of it, holds
_SUFFIXES = (".safetensors", ".json", ".pth", ".pt", ".tar", ".bin", ".npz", ".ckpt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_weights(weights: str | os.PathLike | None, network: Network) -> Path:
    """Finds a checkpoint, and fetches it from the hub where it must.

    Args:
        weights: A file in the official format, a folder that holds a ``model.safetensors``, whole or in parts, or
            the id of one on the Hugging Face hub; None for the network's own place on the hub.
        network: Whose weights they are.

    Returns:
        The file to load; for weights in parts, their index.

    Raises:
        UserError: There is no such file, or the hub cannot be reached; the message says what to fetch from where,
            and under which licence.
    """
    if weights is None and not network.hub:
        raise UserError(
            f"--weights: say where the official checkpoint of {network.name} is (licence: {network.licence}); "
            "it is on no hub"
        )
    text = os.fspath(weights) if weights is not None else network.hub
    path = Path(text)
    if path.is_file():
        return path
    if path.is_dir():
        found = [path / name for name in _FILES if (path / name).is_file()]
        if not found:
            raise UserError(f"{path}: a folder without {' or '.join(_FILES)}; name the file of weights itself")
        return found[0]
    if _HUB_ID.fullmatch(text) and not text.endswith(_SUFFIXES):
        return _fetch(text, network)
    where = f", on the hub as {network.hub}" if network.hub else ""
    raise UserError(
        f"{path}: no such file of weights; {network.name} takes its official checkpoint{where} "
        f"(licence: {network.licence})"
    )


def weights_sha256(path: Path) -> str:
    """The SHA-256 of a checkpoint, in hexadecimal; of weights in parts, that of the parts' own and the index's.

    Raises:
        UserError: A file is missing or cannot be read.
    """
    parts = [path, *_parts(path)]
    digests = []
    for part in parts:
        try:
            with open(part, "rb") as stream:
                digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
        except OSError as error:
            raise UserError(f"{part}: cannot be read ({error.strerror}); fetch the weights again") from error
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def load_variables(network: Network, checkpoint: Path, sha256: str, folder: Path) -> dict[str, Any]:
    """Loads a network's variables, converted before or now.

    Args:
        network: The network.
        checkpoint: Its official checkpoint.
        sha256: The checkpoint's, see :func:`weights_sha256`.
        folder: Where converted weights are kept, one file per checkpoint and network.

    Returns:
        Nested dicts of float32 NumPy arrays.

    Raises:
        UserError: The checkpoint is damaged or another network's, or the folder cannot be written.
    """
    from flax.traverse_util import flatten_dict, unflatten_dict

    kept = folder / f"{sha256[:16]}-{network.name}.npz"
    told = json.dumps({"network": network.name, "sha256": sha256, "version": __version__})

    def read() -> dict[str, Any] | None:
        try:
            # NumPy leaves a damaged file open if it opened it itself.
            with open(kept, "rb") as stream, np.load(stream) as stored:
                if str(stored["told"]) == told:
                    return unflatten_dict({name: stored[name] for name in stored.files if name != "told"}, sep="/")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # not converted yet, or not to its end
        return None  # or by another version

    found = read()
    if found is None:
        with exclusive(folder, lambda: None):
            found = read()
            if found is None:
                found = network.load(checkpoint)
                _write(kept, {"told": np.array(told), **flatten_dict(found, sep="/")})
    return found


def _fetch(hub: str, network: Network) -> Path:
    import huggingface_hub

    print(f"taking {hub} from the Hugging Face hub (licence: {network.licence})", file=sys.stderr)
    reasons = []
    for name in _FILES:
        try:
            path = Path(huggingface_hub.hf_hub_download(hub, name))
            for part in _parts(path):
                huggingface_hub.hf_hub_download(hub, part.name)
            return path
        # The network, permissions, names: whatever its client raises has one remedy.
        except Exception as error:
            reasons.append(next(iter(str(error).strip().splitlines()), type(error).__name__))
    raise UserError(
        f"{hub}: cannot be fetched from the Hugging Face hub ({reasons[0]}); fetch its {_FILES[0]} from "
        f"https://huggingface.co/{hub} where the network allows (licence: {network.licence}), and give the file with "
        "--weights"
    )


def _parts(path: Path) -> Sequence[Path]:
    """The files that an index names, beside it; none where ``path`` is no index."""
    if not path.name.endswith(_INDEX):
        return ()
    try:
        names = set(json.loads(path.read_text())["weight_map"].values())
        return sorted(path.with_name(name) for name in names)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: no index of weights in parts, or damaged; fetch it again") from error


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    # Array by array: weights may be as large as half the memory.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".{path.name}.*{TEMPORARY_SUFFIX}"):
            stale.unlink(missing_ok=True)
        with open(temporary, "xb") as stream:
            np.savez(stream, **arrays)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); free space or give another --data_dir, then run "
            "the same command again"
        ) from error
