"""Tensors from ``.pt`` and arrays from pickled ``.npy`` files, without PyTorch and without running pickles.

A pickle is a program. The readers here give it a vocabulary of some harmless names (how a tensor or an array is
put together, and the plain containers and settings that stand beside weights) and refuse a file that asks for any
other, naming what it asked for. None of these names is the real thing: descriptions are collected first and turned
into arrays after bounds checks, so a damaged or hostile file can end only in a
:class:`~mer_jax.errors.UserError`.
"""

import contextlib
import dataclasses
import io
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, BinaryIO

import ml_dtypes
import numpy as np

from mer_jax.errors import UserError

# torch's storage classes and what one element is on disk (always little-endian).
_STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_TORCH_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


class _Damaged(Exception):
    """The file contradicts itself; the message says how."""


def read_pt(path: str | os.PathLike) -> Any:
    """Reads what ``torch.save`` wrote: a tensor, or dicts, lists and tuples of tensors and plain values.

    Args:
        path: A file of ``torch.save``, in the zip format (torch 1.6 and later) or the older stream format.

    Returns:
        The same structure with a NumPy array for each tensor: same shape, same bits, C-contiguous, writable;
        bfloat16 as ``ml_dtypes.bfloat16``. Tensors that share all of their elements in the file share them here.
        Parameters become arrays; ordered dicts, counters and ``argparse.Namespace`` become dicts; ``torch.dtype``,
        ``torch.device`` and paths become text.

    Raises:
        UserError: The file is missing, damaged, no ``torch.save`` file, or asks for anything but tensors.
    """
    path = Path(path)
    with _refusals(path, "a torch.save file"), open(path, "rb") as stream:
        return _read_zip(stream) if zipfile.is_zipfile(stream) else _read_legacy(stream)


def load_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the weights of a network: what ``torch.save(network.state_dict(), path)`` wrote.

    A state dict that is an entry ``'state_dict'`` of a larger checkpoint is found, and the prefix ``module.`` that
    data-parallel training leaves before every name is taken off.

    Args:
        path: A file of ``torch.save``, in either format.

    Returns:
        Name to array, in the file's order.

    Raises:
        UserError: As :func:`read_pt`, or the file holds no state dict.
    """
    state = read_pt(path)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path}: holds no state dict; write it with torch.save(network.state_dict(), ...)")
    strange = next((name for name, value in state.items() if not isinstance(value, np.ndarray)), None)
    if strange is not None:
        raise UserError(
            f"{path}: no state dict, its entry {strange!r} is no tensor; write it with "
            "torch.save(network.state_dict(), ...)"
        )
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def read_npy(path: str | os.PathLike) -> Any:
    """Reads a ``.npy`` file: an array of numbers, or a pickled dict, list or array of objects of such arrays.

    Args:
        path: A file of ``numpy.save``, of NumPy 1 or 2.

    Returns:
        The array; for a zero-dimensional object array (``numpy.save(path, {...})``) the object in it.

    Raises:
        UserError: The file is missing, damaged, no ``.npy`` file, or its pickle asks for anything but arrays.
    """
    path = Path(path)
    with _refusals(path, "a .npy file"), open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise _Damaged(f"format version {version[0]}.{version[1]} is not supported")
        shape, fortran_order, dtype = read_header(stream)
        if dtype.hasobject:
            return _resolve(_ArrayUnpickler(stream).load())
        count = math.prod(shape)
        if count * dtype.itemsize > size - stream.tell():
            raise _Damaged(f"its header promises {count} values of {dtype}, the file holds fewer")
        array = np.frombuffer(stream.read(count * dtype.itemsize), dtype, count)
        return array.reshape(shape, order="F" if fortran_order else "C").copy(order="C")


@contextlib.contextmanager
def _refusals(path: Path, kind: str) -> Iterator[None]:
    """Turns whatever a damaged file can provoke into one line that names it."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except _Forbidden as error:
        raise UserError(
            f"{path}: refused, its pickle asks for '{error}' and could run code; save plain tensors or arrays instead"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    # Pickle bytes that are not what they seem to be can raise nearly anything inside the unpickler.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: not {kind}, or damaged ({reason}); fetch it or write it again") from error


class _Forbidden(Exception):
    """A pickle asked for a name outside the vocabulary."""


class _Sealed:
    """What a pickle may use but not change: without this, its BUILD opcode could set our attributes."""

    __slots__ = ()

    def __setstate__(self, state):
        raise _Damaged("an attempt to change what cannot be changed")


class _Maker(_Sealed):
    """A callable of the vocabulary."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]):
        self._make = make

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)


class _Vocabulary(pickle.Unpickler):
    """An unpickler that knows only the names it is given."""

    names: Mapping[tuple[str, str], _Sealed] = MappingProxyType({})

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.names[module, name]
        except KeyError:
            raise _Forbidden(f"{module}.{name}") from None


# --- NumPy --------------------------------------------------------------------------------------------------


class _Dtype:
    """Stands for ``numpy.dtype`` in a pickle: a type code and, from its state, a byte order."""

    def __init__(self, code, *_unused):
        self.code, self.order = code, "|"

    def __setstate__(self, state):
        self.order = state[1]

    def resolve(self) -> np.dtype:
        if not isinstance(self.code, str) or self.order not in ("|", "<", ">", "="):
            raise _Damaged("an array of unknown type")
        dtype = np.dtype(self.code)
        if dtype.kind not in "biufcOSU" or dtype.names is not None:
            raise _Damaged(f"an array of type {dtype}")
        return dtype.newbyteorder(self.order)


class _Array:
    """Stands for ``numpy.ndarray`` in a pickle: its state, unopened."""

    state: Any = None

    def __setstate__(self, state):
        self.state = state

    def resolve(self) -> Any:
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            raise _Damaged("an array without content")
        _, shape, dtype, fortran_order, content = self.state
        if not isinstance(dtype, _Dtype) or any(type(n) is not int or n < 0 for n in shape):
            raise _Damaged("an array of unknown type or shape")
        dtype, order = dtype.resolve(), "F" if fortran_order else "C"
        if dtype.kind != "O":
            return np.frombuffer(content, dtype, math.prod(shape)).reshape(shape, order=order).copy(order="C")
        if len(content) != math.prod(shape):
            raise _Damaged("an array of objects of another length than its shape")
        array = np.empty(len(content), object)
        array[:] = [_resolve(item) for item in content]
        return array.reshape(shape, order=order)[()]


class _Scalar(_Sealed):
    """Stands for a NumPy scalar."""

    def __init__(self, dtype, content):
        self.dtype, self.content = dtype, content

    def resolve(self) -> Any:
        return np.frombuffer(self.content, self.dtype.resolve(), 1)[0]


def _reconstruct(*_unused) -> _Array:
    return _Array()


# NumPy 2 moved its private modules from numpy.core to numpy._core; the files name either.
_ARRAY_NAMES = {
    ("numpy", "ndarray"): _Maker(_reconstruct),
    ("numpy", "dtype"): _Maker(_Dtype),
    ("collections", "OrderedDict"): _Maker(OrderedDict),
    **{
        (f"numpy.{core}.multiarray", name): _Maker(stand_in)
        for core in ("core", "_core")
        for name, stand_in in (("_reconstruct", _reconstruct), ("scalar", _Scalar))
    },
}


class _ArrayUnpickler(_Vocabulary):
    """Rebuilds the structure of a pickled array with stand-ins in the places of arrays, types and scalars."""

    names = MappingProxyType(_ARRAY_NAMES)


# --- torch --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Storage(_Sealed):
    """One run of elements; a legacy file tells its bytes only after the tensors that use it."""

    dtype: np.dtype
    count: int
    data: np.ndarray | None = None  # bytes


@dataclasses.dataclass
class _Tensor(_Sealed):
    """A strided window on a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def to_array(self) -> np.ndarray:
        numbers = (self.offset, *self.shape, *self.strides)
        if any(type(number) is not int or number < 0 for number in numbers):
            raise _Damaged("a tensor's offset, size or stride is not a natural number")
        if len(self.shape) != len(self.strides):
            raise _Damaged("a tensor has another number of sizes than of strides")
        data = self.storage.data
        if data is None or len(data) != self.storage.count * self.storage.dtype.itemsize:
            raise _Damaged("a tensor's bytes are missing")
        if 0 in self.shape:
            return np.zeros(self.shape, self.storage.dtype)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        # Broadcast (stride 0) dimensions may legitimately repeat elements, but never a file's worth of them.
        if last >= self.storage.count or math.prod(self.shape) > max(2**26, self.storage.count):
            raise _Damaged("a tensor reaches beyond its storage")
        elements = data.view(self.storage.dtype)
        if last + 1 == elements.size == math.prod(self.shape) and self._is_contiguous():
            # A checkpoint's usual tensor; a copy would double the memory of the largest networks.
            return elements.reshape(self.shape)
        elements = elements[self.offset :]
        strides = [stride * elements.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(elements, self.shape, strides, writeable=False).copy(order="C")

    def _is_contiguous(self) -> bool:
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True


def _rebuild_tensor(storage, offset, size, stride, *_unused) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise _Damaged("a tensor without storage")
    return _Tensor(storage, offset, tuple(size), tuple(stride))


def _rebuild_parameter(data, *_unused) -> Any:
    return data


@dataclasses.dataclass(frozen=True)
class _StorageType(_Sealed):
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _TorchDtype(_Sealed):
    name: str


class _Namespace:
    """Stands for ``argparse.Namespace`` in a pickle: its attributes."""

    state: Any = None

    def __setstate__(self, state):
        self.state = state

    def resolve(self) -> dict:
        if not isinstance(self.state, dict):
            raise _Damaged("a Namespace without attributes")
        return _resolve(self.state)


def _device(*parts) -> str:
    return ":".join(map(str, parts))


def _path(*parts) -> str:
    return "/".join(map(str, parts)).replace("//", "/")


def _bytearray(content=b"", *encoding) -> bytearray:
    # A number would ask for as many bytes.
    if encoding not in ((), ("latin-1",)) or not isinstance(content, str if encoding else bytes):
        raise _Damaged("bytes of unknown content")
    return bytearray(content, *encoding)


def _latin1(text, encoding) -> bytes:
    """How bytes are written in the pickle protocol of torch.save."""
    if not isinstance(text, str) or encoding != "latin1":
        raise _Damaged("bytes of unknown encoding")
    return text.encode("latin1")


class _TensorUnpickler(_Vocabulary):
    """Rebuilds the structure of a ``torch.save`` pickle with descriptions in the places of tensors."""

    names = MappingProxyType(
        {
            ("torch._utils", "_rebuild_tensor"): _Maker(_rebuild_tensor),
            ("torch._utils", "_rebuild_tensor_v2"): _Maker(_rebuild_tensor),
            ("torch._utils", "_rebuild_parameter"): _Maker(_rebuild_parameter),
            ("torch._utils", "_rebuild_parameter_with_state"): _Maker(_rebuild_parameter),
            ("torch", "Size"): _Maker(tuple),
            **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGES.items()},
            # Beside the weights: what a training run was told, and how far it came.
            **{("torch", name): _TorchDtype(name) for name in _TORCH_DTYPES},
            **_ARRAY_NAMES,
            ("_codecs", "encode"): _Maker(_latin1),
            ("torch", "device"): _Maker(_device),
            ("collections", "Counter"): _Maker(dict),
            ("argparse", "Namespace"): _Namespace,
            **{("pathlib", name): _Maker(_path) for name in _PATHS},
            # Protocol 2, which torch.save takes, knows these as names of Python 2.
            **{
                (module, name): _Maker(make)
                for module in ("__builtin__", "builtins")
                for name, make in (
                    ("set", set),
                    ("frozenset", frozenset),
                    ("complex", complex),
                    ("bytearray", _bytearray),
                )
            },
        }
    )

    def __init__(self, stream: BinaryIO, storage: Callable[[str, np.dtype, int], _Storage]):
        super().__init__(stream, encoding="utf-8")
        self._storage = storage

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise _Damaged("a reference that is no tensor storage")
        _, kind, key, _, count, *view = pid
        if not isinstance(kind, _StorageType) or type(count) is not int or count < 0:
            raise _Damaged("a storage of unknown type")
        if any(part is not None for part in view):
            raise _Damaged("a storage that is a view of another (torch before 0.4)")
        return self._storage(str(key), kind.dtype, count)


def _read_bytes(stream: IO[bytes], size: int) -> np.ndarray:
    """Reads into memory of its own, which tensors may keep; of less than ``size`` bytes if the stream ends."""
    data = np.empty(size, np.uint8)
    done = 0
    while done < size and (more := stream.readinto(memoryview(data)[done : done + 2**24])):
        done += more
    return data[:done]


def _read_zip(stream: BinaryIO) -> Any:
    with zipfile.ZipFile(stream) as archive:
        names = archive.namelist()
        roots = [name.removesuffix("data.pkl") for name in names if name.count("/") == 1]
        roots = [root for root in roots if f"{root}data.pkl" in names]
        if len(roots) != 1:
            raise _Damaged("no data.pkl inside")
        (root,) = roots
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise _Damaged("written on a big-endian machine")
        storages: dict[str, _Storage] = {}

        def storage(key: str, dtype: np.dtype, count: int) -> _Storage:
            if key not in storages:
                if archive.getinfo(f"{root}data/{key}").file_size != count * dtype.itemsize:
                    raise _Damaged("a storage has another size than announced")
                with archive.open(f"{root}data/{key}") as member:
                    storages[key] = _Storage(dtype, count, _read_bytes(member, count * dtype.itemsize))
            return storages[key]

        pickled = io.BytesIO(archive.read(f"{root}data.pkl"))
        return _resolve(_TensorUnpickler(pickled, storage).load())


def _read_legacy(stream: BinaryIO) -> Any:
    size = os.fstat(stream.fileno()).st_size
    storages: dict[str, _Storage] = {}

    def storage(key: str, dtype: np.dtype, count: int) -> _Storage:
        return storages.setdefault(key, _Storage(dtype, count))

    def load() -> Any:
        return _TensorUnpickler(stream, storage).load()

    stream.seek(0)
    if load() != _LEGACY_MAGIC or load() != _LEGACY_PROTOCOL:
        raise _Damaged("neither a zip nor the older format of torch.save")
    if load().get("little_endian") is not True:
        raise _Damaged("written on a big-endian machine")
    structure = load()
    for key in load():
        if key not in storages:
            raise _Damaged("a storage that no tensor uses")
        found = storages[key]
        announced = stream.read(8)
        count = int.from_bytes(announced, "little")
        if len(announced) < 8 or count != found.count or count * found.dtype.itemsize > size - stream.tell():
            raise _Damaged("a storage is shorter than announced")
        found.data = _read_bytes(stream, count * found.dtype.itemsize)
    return _resolve(structure)


def _resolve(value: Any) -> Any:
    """Replaces every description in a structure by its array."""
    if isinstance(value, _Tensor):
        return value.to_array()
    if isinstance(value, (_Array, _Scalar, _Dtype, _Namespace)):
        return value.resolve()
    if isinstance(value, _TorchDtype):
        return value.name
    if isinstance(value, dict):
        return {_resolve(key): _resolve(item) for key, item in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(_resolve(item) for item in value)
    if isinstance(value, (_Storage, _StorageType)) or callable(value):
        raise _Damaged("something that is no tensor")
    return value
