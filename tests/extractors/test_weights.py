"""Where weights come from, what is said when they do not, and that they are converted once."""

import dataclasses
import hashlib
import importlib.util
import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

from mer_jax.errors import UserError
from mer_jax.extractors import weights
from mer_jax.extractors.weights import find_weights, load_variables, weights_sha256

_spec = importlib.util.spec_from_file_location("tiny_networks", Path(__file__).parents[1] / "tiny_networks.py")
tiny_networks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_networks)
TINY = tiny_networks.TINY
NOWHERE = dataclasses.replace(TINY, hub="")


def write_parts(folder, names=("model-1.safetensors", "model-2.safetensors")):
    folder.mkdir()
    for number, name in enumerate(names):
        (folder / name).write_bytes(bytes([number]))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"w{number}": name for number, name in enumerate(names)}}))
    return index


def test_files_and_folders(tmp_path):
    path = tmp_path / "official.pth.tar"
    path.write_bytes(b"weights")
    assert find_weights(path, TINY) == find_weights(str(path), NOWHERE) == path
    index = write_parts(tmp_path / "parts")
    assert find_weights(tmp_path / "parts", TINY) == index
    (tmp_path / "parts" / "model.safetensors").write_bytes(b"whole")
    assert find_weights(tmp_path / "parts", TINY) == tmp_path / "parts" / "model.safetensors"


@pytest.mark.parametrize(
    "given, network, message",
    [
        ("absent.pt", TINY, r"^absent\.pt: no such file of weights; tiny takes its official checkpoint, on the hub as "
         r"tests/tiny \(licence: Test-1\.0\)$"),
        ("a/absent.safetensors", NOWHERE, r"^a/absent\.safetensors: no such file of weights; tiny takes its "
         r"official checkpoint \(licence: Test-1\.0\)$"),
        ("/absent/weights", TINY, r"^/absent/weights: no such file of weights"),
        (None, NOWHERE, r"^--weights: say where the official checkpoint of tiny is \(licence: Test-1\.0\); it is"),
    ],
)  # fmt: skip
def test_absent_files_are_one_line(given, network, message):
    with pytest.raises(UserError, match=message):
        find_weights(given, network)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(
        UserError, match=r"a folder without model\.safetensors or model\.safetensors\.index\.json; name"
    ):
        find_weights(tmp_path, TINY)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of folders: ``hub(id)`` makes one; what is asked for is noted."""
    asked = []

    def download(repo_id, filename):
        asked.append((repo_id, filename))
        if not (tmp_path / repo_id / filename).exists():
            raise huggingface_hub.errors.EntryNotFoundError(f"404 for {repo_id}/{filename}\nand much more")
        return str(tmp_path / repo_id / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_weights_of_the_hub(hub, tmp_path, capsys):
    (tmp_path / "tests" / "tiny").mkdir(parents=True)
    (tmp_path / "tests" / "tiny" / "model.safetensors").write_bytes(b"whole")
    for given in (None, "tests/tiny"):
        assert find_weights(given, TINY) == tmp_path / "tests" / "tiny" / "model.safetensors"
        assert capsys.readouterr().err == "taking tests/tiny from the Hugging Face hub (licence: Test-1.0)\n"
    index = write_parts(tmp_path / "tests" / "parted")
    assert find_weights("tests/parted", TINY) == index
    assert hub[-2:] == [("tests/parted", "model-1.safetensors"), ("tests/parted", "model-2.safetensors")]


def test_an_unreachable_hub_says_what_to_fetch_from_where(monkeypatch):
    message = (
        r"^tests/tiny: cannot be fetched from the Hugging Face hub \(.+\); fetch its model\.safetensors from "
        r"https://huggingface\.co/tests/tiny where the network allows \(licence: Test-1\.0\), and give the file with "
        r"--weights$"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message):
        find_weights(None, TINY)


def test_what_the_hub_lacks_is_said_with_its_reason(hub):
    with pytest.raises(UserError, match=r"^tests/none: cannot be .* \(404 for tests/none/model\.safetensors\); fetch"):
        find_weights("tests/none", TINY)


def test_the_hash_tells_all_parts(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"weights")
    assert weights_sha256(path) == hashlib.sha256(b"weights").hexdigest()
    index = write_parts(tmp_path / "parts")
    before = weights_sha256(index)
    (tmp_path / "parts" / "model-2.safetensors").write_bytes(b"other")
    assert weights_sha256(index) != before
    (tmp_path / "parts" / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-2\.safetensors: cannot be read \(No such file or directory\); fetch"):
        weights_sha256(index)
    index.write_text("[1]")
    with pytest.raises(UserError, match=r"index\.json: no index of weights in parts, or damaged; fetch it again"):
        weights_sha256(index)


@pytest.fixture
def counted():
    """The tiny network with a ``load`` that counts, and gives what no file has to hold."""
    loaded = []

    def load(path):
        loaded.append(path)
        return {"params": tiny_networks.random_state(), "batch_stats": {"deep": {"mean": np.ones(3, np.float32)}}}

    return dataclasses.replace(TINY, load=load), loaded


def test_weights_are_converted_once(counted, tmp_path, monkeypatch):
    network, loaded = counted
    cache = tmp_path / "weights"

    def get(sha256="0123456789abcdef" * 4, of=network):
        return load_variables(of, tmp_path / "file.pt", sha256, cache)

    first, again = get(), get()
    assert loaded == [tmp_path / "file.pt"]
    assert sorted(path.name for path in cache.iterdir()) == ["0123456789abcdef-tiny.npz", "lock"]
    assert list(again["params"]) == list(first["params"]) and list(again) == list(first)
    for name, value in first["params"].items():
        assert again["params"][name].dtype == np.float32
        np.testing.assert_array_equal(again["params"][name], value)
    np.testing.assert_array_equal(again["batch_stats"]["deep"]["mean"], np.ones(3))

    # Other weights, another network and another version of the library convert anew; so does a damaged file.
    get("f" * 64)
    get(of=dataclasses.replace(network, name="tiny2"))
    assert len(loaded) == 3
    kept = cache / "0123456789abcdef-tiny.npz"
    content = kept.read_bytes()
    for damaged in (content[: len(content) // 2], b"", content[:-300] + bytes(300)):
        kept.write_bytes(damaged)
        get()
        assert kept.read_bytes() == content
    assert len(loaded) == 6
    monkeypatch.setattr(weights, "__version__", "9.9")
    get()
    assert len(loaded) == 7


def test_a_bad_checkpoint_leaves_nothing_behind(tmp_path):
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(UserError, match=r"text\.pt: not a torch\.save file"):
        load_variables(TINY, tmp_path / "text.pt", "0" * 64, tmp_path / "weights")
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["lock"]


def test_a_full_disk_is_one_line(counted, tmp_path, monkeypatch):
    def full(*_unused, **_also):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights.np, "savez", full)
    with pytest.raises(UserError, match=r"-tiny\.npz: cannot be written \(No space left on device\); free space"):
        load_variables(counted[0], tmp_path / "file.pt", "0" * 64, tmp_path / "weights")
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["lock"]
