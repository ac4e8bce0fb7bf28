"""The restricted readers against torch.save and numpy.save themselves, and against files that mean harm."""

import argparse
import io
import os
import pickle
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch

from mer_jax.errors import UserError
from mer_jax.extractors.pt_files import load_state_dict, read_npy, read_pt

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def assert_same_bits(array, tensor):
    tensor = tensor.detach().contiguous()
    assert isinstance(array, np.ndarray)
    assert array.shape == tuple(tensor.shape)
    assert array.dtype.name == str(tensor.dtype).removeprefix("torch.")
    assert array.tobytes() == tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else True
    assert array.flags.writeable and array.flags.c_contiguous


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_bitwise(tmp_path, dtype, zipped):
    tensor = (torch.arange(-12, 12).reshape(4, 6) * 1.3).to(dtype)
    torch.save(tensor, tmp_path / "t.pt", _use_new_zipfile_serialization=zipped)
    assert_same_bits(read_pt(tmp_path / "t.pt"), tensor)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "take",
    [
        lambda t: t,
        lambda t: t[0, 0],
        lambda t: t[0, 0, 0],
        lambda t: t[2:, 1],
        lambda t: t.permute(2, 0, 1),
        lambda t: t[..., ::3],
        lambda t: t[:1, :1, :1].expand(5, 4, 3),
        lambda t: t[:0],
        lambda t: torch.nn.Parameter(t),
        lambda t: t.clone().requires_grad_(),
    ],
)
def test_shapes_and_strides_bitwise(tmp_path, zipped, take):
    tensor = take(torch.arange(4 * 5 * 7, dtype=torch.float32).reshape(4, 5, 7))
    torch.save(tensor, tmp_path / "t.pt", _use_new_zipfile_serialization=zipped)
    assert_same_bits(read_pt(tmp_path / "t.pt"), tensor)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_state_dict_with_shared_storage(tmp_path, zipped):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = module.state_dict()
    state["tied"] = state["0.weight"].t()
    torch.save({"state": state, "epoch": 3, "names": ["a", ("b", 1.5, None)]}, tmp_path / "s.pt",
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    read = read_pt(tmp_path / "s.pt")
    assert list(read["state"]) == list(state)
    for key, tensor in state.items():
        assert_same_bits(read["state"][key], tensor)
    assert (read["epoch"], read["names"]) == (3, ["a", ("b", 1.5, None)])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_what_training_leaves_beside_weights(tmp_path, zipped):
    teachers = [{"name": "clip", "use_summary": True}, {"name": "sam", "use_summary": False}]
    settings = argparse.Namespace(teachers=teachers, dtype=torch.bfloat16, device=torch.device("cuda", 1), inner=None)
    settings.inner = argparse.Namespace(lr=1e-3)
    checkpoint = {
        "args": settings,
        "milestones": Counter({30: 1, 60: 1}),
        "metric": np.float32(0.5),
        "history": np.arange(6.0).reshape(2, 3),
        "weight": torch.ones(2),
        "frozen": ({1, 2}, frozenset({"a"})),
        "output": [PurePosixPath("/runs/a"), PurePosixPath("runs/b.pth")],
        "plain": [2 + 3j, bytearray(b"ab"), b"cd"],
        "marked": torch.nn.Parameter(torch.arange(3.0)),
    }
    checkpoint["marked"].no_weight_decay = True
    torch.save(checkpoint, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    read = read_pt(tmp_path / "c.pth")
    assert read["args"] == {"teachers": teachers, "dtype": "bfloat16", "device": "cuda:1", "inner": {"lr": 1e-3}}
    assert read["milestones"] == {30: 1, 60: 1} and type(read["milestones"]) is dict
    assert read["frozen"] == ({1, 2}, frozenset({"a"})) and read["output"] == ["/runs/a", "runs/b.pth"]
    assert read["plain"] == [2 + 3j, bytearray(b"ab"), b"cd"]
    np.testing.assert_array_equal(read["marked"], [0, 1, 2])
    assert read["metric"] == 0.5 and read["metric"].dtype == np.float32
    np.testing.assert_array_equal(read["history"], checkpoint["history"])


def test_weights_are_not_copied_and_views_do_not_share_memory(tmp_path):
    whole = torch.arange(24.0).reshape(2, 3, 4)
    torch.save({"whole": whole, "tied": whole, "part": whole[1], "turned": whole.permute(2, 0, 1)}, tmp_path / "c.pth")
    read = read_pt(tmp_path / "c.pth")
    assert np.shares_memory(read["whole"], read["tied"])
    assert not np.shares_memory(read["whole"], read["part"]) and not np.shares_memory(read["whole"], read["turned"])
    np.testing.assert_array_equal(read["turned"], whole.permute(2, 0, 1).numpy())


@pytest.mark.parametrize(
    "stream",
    [
        b"cargparse\nNamespace\n(dX\x05\x00\x00\x00stateNsb.",  # BUILD on the class itself
        b"cargparse\nNamespace\n.",  # the class as a value
        b"cargparse\nNamespace\n)\x81K\x03b.",  # attributes that are no dict
        b"cargparse\nNamespace\nK\x03\x85\x81.",  # arguments
        b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00rot\x86R.",
        b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",  # two gigabytes
    ],
)
def test_stand_ins_cannot_be_abused(tmp_path, stream):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + stream)
    with pytest.raises(UserError, match=r"a\.pt: not a torch\.save file, or damaged"):
        read_pt(tmp_path / "a.pt")
    torch.save(argparse.Namespace(x=1), tmp_path / "ok.pt")
    assert read_pt(tmp_path / "ok.pt") == {"x": 1}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: dict(state),
        lambda state: {"state_dict": state, "epoch": 800, "args": ["--lr", 5e-5]},
        lambda state: OrderedDict((f"module.{name}", value) for name, value in state.items()),
        lambda state: {"state_dict": {f"module.{name}": torch.nn.Parameter(v, False) for name, v in state.items()}},
    ],
    ids=["plain", "dict", "checkpoint", "parallel", "both"],
)
def test_load_state_dict_of_a_network(tmp_path, zipped, wrap):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.ReLU(), torch.nn.BatchNorm2d(5))
    network(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))  # moves the running statistics
    state = network.state_dict()
    # One storage under two names, and halves of one storage, as tied and packed weights are saved.
    state["tied"] = state["0.weight"].permute(1, 0, 3, 2)
    packed = torch.arange(12).to(torch.bfloat16)
    state["first"], state["second"] = packed[:5], packed[5:].reshape(7, 1)
    torch.save(wrap(state), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    read = load_state_dict(tmp_path / "w.pth")
    assert list(read) == list(state)
    assert read["2.num_batches_tracked"].dtype == np.int64 and read["2.num_batches_tracked"] == 1
    for name, tensor in state.items():
        assert_same_bits(read[name], tensor)


@pytest.mark.parametrize(
    "value, told",
    [
        (torch.zeros(3), "holds no state dict"),
        ({}, "holds no state dict"),
        ({1: torch.zeros(3)}, "holds no state dict"),
        ([torch.zeros(3)], "holds no state dict"),
        ({"weight": torch.zeros(3), "epoch": 3}, "no state dict, its entry 'epoch' is no tensor"),
    ],
)
def test_what_is_no_state_dict_is_told(tmp_path, value, told):
    torch.save(value, tmp_path / "w.pth")
    with pytest.raises(UserError, match=rf"w\.pth: {told}; write it with torch\.save\(network\.state_dict"):
        load_state_dict(tmp_path / "w.pth")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_whole_network_is_refused_and_its_class_named(tmp_path, zipped):
    with warnings.catch_warnings():
        # The older format wants to keep a class's source beside it, and cannot find that of compiled classes.
        warnings.simplefilter("ignore")
        torch.save(torch.nn.Linear(2, 3), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"w\.pth: refused, its pickle asks for 'torch\.nn\.modules\.linear\.Linear'"):
        load_state_dict(tmp_path / "w.pth")


class Harm:
    """Runs a command when a careless reader loads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pt_with_code_is_refused_and_named(tmp_path, zipped):
    torch.save({"x": torch.zeros(2), "y": Harm(tmp_path / "pwned")}, tmp_path / "h.pt",
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    with pytest.raises(UserError, match=r"h\.pt: refused, its pickle asks for 'posix\.mkdir'"):
        read_pt(tmp_path / "h.pt")
    assert not (tmp_path / "pwned").exists()


def test_npy_with_code_is_refused_and_named(tmp_path):
    np.save(tmp_path / "h.npy", {"coeffs": Harm(tmp_path / "pwned")}, allow_pickle=True)
    with pytest.raises(UserError, match=r"h\.npy: refused, its pickle asks for 'posix\.mkdir'"):
        read_npy(tmp_path / "h.npy")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["numpy.ndarray", "numpy._core.multiarray.scalar", "numpy.dtype"])
def test_a_pickle_cannot_change_the_reader(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    # GLOBAL, then BUILD with a state for __dict__ and one for setattr.
    stream = f"c{module}\n{attribute}\n".encode() + pickle.dumps(({"x": 1}, {"resolve": 2}), 0)[:-1] + b"b."
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": ()})
    (tmp_path / "b.npy").write_bytes(header.getvalue() + stream)
    with pytest.raises(UserError, match=r"b\.npy"):
        read_npy(tmp_path / "b.npy")
    np.save(tmp_path / "ok.npy", {"coeffs": np.arange(3)}, allow_pickle=True)
    np.testing.assert_array_equal(read_npy(tmp_path / "ok.npy")["coeffs"], [0, 1, 2])


@pytest.mark.parametrize("core", ["core", "_core"])
def test_pickled_dict_of_numpy_1_and_2(tmp_path, rng, core):
    coeffs = rng.normal(size=(1, 621)).astype(np.float32)
    value = {"coeffs": coeffs, "big": coeffs.astype(">f8").T, "id": np.float64(2.5), "n": [1, "a", None]}
    np.save(tmp_path / "d.npy", value, allow_pickle=True)
    if core == "core":
        # As NumPy 1 wrote it: the old module path (protocol 3, in whose stream names may change their
        # length).
        raw = (tmp_path / "d.npy").read_bytes()
        pickled = pickle.dumps(np.array(value, dtype=object), protocol=3)
        pickled = pickled.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        (tmp_path / "d.npy").write_bytes(raw[: raw.index(b"\x80")] + pickled)
    read = read_npy(tmp_path / "d.npy")
    assert set(read) == set(value)
    assert read["coeffs"].tobytes() == coeffs.tobytes() and read["coeffs"].shape == (1, 621)
    np.testing.assert_array_equal(read["big"], value["big"])
    assert read["id"] == 2.5 and read["n"] == value["n"]


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8", "<i8", "u1", "?", "<c8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_plain_npy_bitwise(tmp_path, rng, dtype, order):
    array = np.asarray(rng.normal(size=(3, 4)) * 10, order=order).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    read = read_npy(tmp_path / "a.npy")
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


def test_object_array_keeps_its_shape(tmp_path):
    array = np.empty((2, 2), object)
    array[:] = [[1, "b"], [None, 2.0]]
    np.save(tmp_path / "o.npy", array, allow_pickle=True)
    read = read_npy(tmp_path / "o.npy")
    assert read.shape == (2, 2) and read.tolist() == array.tolist()


@pytest.mark.parametrize("read, name", [(read_pt, "a.pt"), (read_npy, "a.npy")])
@pytest.mark.parametrize("content", [b"", b"\x80", b"hello", b"PK\x03\x04broken", b"\x93NUMPY\x07\x00"])
def test_nonsense_is_one_line(tmp_path, read, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: not .* or damaged \(.+\)") as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [read_pt, read_npy])
def test_missing_file(tmp_path, read):
    with pytest.raises(UserError, match=r"absent: no such file"):
        read(tmp_path / "absent")


def test_every_truncation_and_flipped_byte_is_survived(tmp_path, rng):
    """No damage gets past the reader as anything but a UserError (or a readable file)."""
    torch.save({"a": torch.arange(6.0), "b": torch.zeros(2, 3)}, tmp_path / "legacy",
               _use_new_zipfile_serialization=False)  # fmt: skip
    np.save(tmp_path / "dict", {"coeffs": np.zeros((1, 5), np.float32)}, allow_pickle=True)
    torch.save({"a": torch.arange(6.0), "b": torch.zeros(2, 3)}, tmp_path / "zip")
    sources = (
        (load_state_dict, tmp_path / "legacy"),
        (load_state_dict, tmp_path / "zip"),
        (read_npy, tmp_path / "dict.npy"),
    )
    for read, source in sources:
        whole = source.read_bytes()
        damaged = tmp_path / "damaged"
        positions = rng.choice(len(whole), 150, replace=False)
        cuts = [whole[:position] for position in positions]
        flips = [whole[:p] + bytes([rng.integers(256)]) + whole[p + 1 :] for p in positions]
        for content in cuts + flips:
            damaged.write_bytes(content)
            with warnings.catch_warnings():
                # NumPy warns about some headers it can still read.
                warnings.simplefilter("ignore")
                try:
                    read(damaged)
                except UserError as error:
                    assert str(error).startswith(f"{damaged}: ")


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    torch.save(torch.arange(6.0).reshape(2, 3), tmp_path / "t.pt")
    with zipfile.ZipFile(tmp_path / "t.pt") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in content if name.endswith("data.pkl"))
    # BININT1 3, BININT1 1: the stride (3, 1) becomes (9, 1).
    assert content[pickled].count(b"K\x03K\x01\x86") == 1
    content[pickled] = content[pickled].replace(b"K\x03K\x01\x86", b"K\x09K\x01\x86")
    with zipfile.ZipFile(tmp_path / "t.pt", "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    with pytest.raises(UserError, match="a tensor reaches beyond its storage"):
        read_pt(tmp_path / "t.pt")
