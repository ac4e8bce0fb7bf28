"""Blocks of a convolutional network on a CPU, by C++ that is compiled once on a machine (``cpu_blocks.cc``).

XLA's CPU backend writes each step over a large map to memory and reads it for the next, and its products of small
kernels do not come near the rate of large ones. The C++ convolves, sums up and pools a row at a time in the registers
and the cache of a core. It is compiled for the machine's own processor by the C++ compiler that the environment
variable ``CXX`` names, or the first of c++, g++ and clang++ there is, and kept in ``$XDG_CACHE_HOME/mer_jax`` (else
``~/.cache/mer_jax``). ``CXX=`` (empty) goes without.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mer_jax.models.convolution import Block, Implementation

_SOURCE = Path(__file__).with_suffix(".cc")
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-fno-fast-math", "-fPIC", "-shared")
_TARGETS = ("mer_jax_extremes", "mer_jax_forward", "mer_jax_backward", "mer_jax_sums")
_PLACES = np.uint16
_VECTOR_BYTES = 64  # the widest there are

_LOCK = threading.Lock()


def available() -> bool:
    """Whether this machine can do it."""
    return bool(version())


def version() -> str:
    """What was compiled, told apart by source, compiler and processor: on these last bits depend. Empty for nothing.

    The first call on a machine compiles, and one that cannot says so on stderr.
    """
    with _LOCK:  # threads that come first would compile each
        return _load()


@functools.cache
def _load() -> str:
    try:
        compiler = _compiler()
        if not compiler:
            return ""
        flags, processor = _for_this_processor(compiler)
        name = f"cpu_blocks-{hashlib.sha256(_SOURCE.read_bytes() + processor.encode()).hexdigest()[:16]}"
        library = _library(f"{name}-{importlib.metadata.version('jaxlib')}.so", [*compiler, *flags])
        handlers = {target: jax.ffi.pycapsule(getattr(library, target)) for target in _TARGETS}
    except (OSError, ValueError, AttributeError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)
        print(
            f"CXX={os.environ.get('CXX', shlex.join(_found()))!r}: {_SOURCE.name} cannot be compiled ({reason}), so "
            "that networks on flow train several times as slowly; set CXX to a C++17 compiler, or CXX= to go without",
            file=sys.stderr,
        )
        return ""
    for target, handler in handlers.items():
        jax.ffi.register_ffi_target(target, handler, platform="cpu")
    return name


def _found() -> list[str]:
    return [path] if (path := next(filter(None, map(shutil.which, _COMPILERS)), None)) else []


def _compiler() -> list[str]:
    """The command of a C++ compiler, empty for none."""
    return shlex.split(os.environ["CXX"]) if "CXX" in os.environ else _found()


def _for_this_processor(compiler: list[str]) -> tuple[list[str], str]:
    """Flags, and what the compiler takes itself and this processor for."""

    def told(native):
        flags = [*_FLAGS, native]
        return flags, _run([*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull])

    try:
        return told("-march=native")
    except subprocess.CalledProcessError:
        return told("-mcpu=native")  # as some compilers for ARM have it


def _library(name: str, command: list[str]) -> ctypes.CDLL:
    """The compiled library, kept in the user's folder for what can be made again, if there is one."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mer_jax")
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / name).is_file():
            try:
                return ctypes.CDLL(str(folder / name))
            except OSError:  # empty, or made where there are other libraries
                (folder / name).unlink()
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = _compile(command, Path(scratch, name))
            with made.open("rb") as stream:
                os.fsync(stream.fileno())  # a library that a lost machine cut short would end processes
            made.replace(folder / name)  # whole or not at all, whoever else compiles it at this moment
        return ctypes.CDLL(str(folder / name))
    except (OSError, RuntimeError):  # no home, or one that takes no files or runs none
        with tempfile.TemporaryDirectory() as scratch:
            return ctypes.CDLL(str(_compile(command, Path(scratch, name))))


def _compile(command: list[str], path: Path) -> Path:
    _run([*command, "-isystem", jax.ffi.include_dir(), str(_SOURCE), "-o", str(path)])
    return path


def _run(command: list[str]) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
    ).stdout


def _call(target: str, block: Block, results: list[jax.ShapeDtypeStruct], *arrays: jax.Array):
    call = jax.ffi.ffi_call(target, results, vmap_method="sequential")
    return call(
        *arrays,
        padding=np.int64(block.padding),
        window=np.int64(block.window),
        pool_padding=np.int64(block.pool_padding),
        rectify=block.rectify,
        batch_first=block.batch_first,
    )


def _promoted(*arrays: jax.Array) -> list[jax.Array]:
    """Arrays of one type, of the two that there is code for."""
    dtype = jnp.result_type(*arrays)
    if dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"arrays of {dtype}: a CPU's convolutions take float32 and float64")
    return [each.astype(dtype) for each in arrays]


def _pooled(block: Block, x: jax.Array, kernel: jax.Array, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((kernel.shape[-1], *block.pooled_sides(x, kernel), block.samples(x)), dtype)


def _places(pooled: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """In an order of the C++'s own, and of full vectors."""
    *maps, batch = pooled.shape
    lanes = _VECTOR_BYTES // pooled.dtype.itemsize
    return jax.ShapeDtypeStruct((-(-batch // lanes) * lanes, *maps), _PLACES)


def _spoilt(block: Block, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """The kernel, not a number where the bias is none: what the ReLU compares with must not just lose."""
    return kernel + 0.0 * bias[None, None, None] if block.rectify else kernel


def _extremes(block, x, kernel, bias, scale):
    x, kernel, bias, scale = _promoted(x, _spoilt(block, kernel, bias), bias, scale)
    (extreme,) = _call("mer_jax_extremes", block, [_pooled(block, x, kernel, x.dtype)], x, kernel, bias, scale)
    return extreme


def _forward(block, x, kernel, bias, scale, sample_mask):
    given = _promoted(x, _spoilt(block, kernel, bias), bias, scale, sample_mask)
    moment = jax.ShapeDtypeStruct(bias.shape, given[0].dtype)
    pooled = _pooled(block, x, kernel, given[0].dtype)
    return *_call("mer_jax_forward", block, [pooled, _places(pooled), moment, moment], *given), None


def _backward(block, x, kernel, bias, sample_mask, gradient, place, factor, constant, slope, kept, to_x):
    if to_x and block.batch_first:
        turned, block = x.transpose(3, 1, 2, 0), block._replace(batch_first=False)  # to (C, H, W, B)
        others = kernel, bias, sample_mask, gradient, place, factor, constant, slope, kept, to_x
        of_kernel, of_bias, of_x = _backward(block, turned, *others)
        return of_kernel, of_bias, of_x.transpose(3, 1, 2, 0)
    *given, factor, constant, slope = _promoted(x, kernel, bias, sample_mask, gradient, factor, constant, slope)
    wanted = (kernel, bias, x) if to_x else (kernel, bias)
    results = [jax.ShapeDtypeStruct(each.shape, given[0].dtype) for each in wanted]
    gradients = _call("mer_jax_backward", block, results, *given, place, factor, constant, slope)
    of_kernel, of_bias, *of_x = (each.astype(like.dtype) for each, like in zip(gradients, wanted, strict=True))
    return of_kernel, of_bias, of_x[0] if to_x else None


def _sums(gradient, extreme, mean, sample_mask):
    given = _promoted(gradient, extreme, mean, sample_mask)
    result = jax.ShapeDtypeStruct(mean.shape, given[0].dtype)
    return jax.ffi.ffi_call("mer_jax_sums", [result, result], vmap_method="sequential")(*given)


IMPLEMENTATION = Implementation(_extremes, _forward, _backward, _sums, batch_first=True)
