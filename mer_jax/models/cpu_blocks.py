"""Blocks of a convolutional network on a CPU, by C++ that is compiled once on a machine (``cpu_blocks.cc``).

XLA's CPU backend writes each step over a large map to memory and reads it for the next, and its products of small
kernels do not come near the rate of large ones. The C++ convolves, sums up and pools a row at a time in the registers
and the cache of a core. It is compiled for the machine's own processor by the C++ compiler that the environment
variable ``CXX`` names, or the first of c++, g++ and clang++ there is. ``CXX=`` (empty) leaves it alone.
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
from pathlib import Path

import jax
import numpy as np

from mer_jax.models.convolution import Block, Implementation

_SOURCE = Path(__file__).with_suffix(".cc")
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared")
_PLACES = np.uint16
_TARGETS = ("mer_jax_extremes", "mer_jax_forward", "mer_jax_backward")


@functools.cache
def available() -> bool:
    """Whether this machine can do it; the first call on a machine compiles, and says on stderr where that fails."""
    compiler = _compiler()
    if not compiler:
        return False
    try:
        library = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        print(
            f"{shlex.join(compiler)} cannot compile {_SOURCE.name} ({reason[0] if reason else 'no reason given'}): "
            "networks on flow train several times as slowly; set CXX to a C++17 compiler, or CXX= to go without",
            file=sys.stderr,
        )
        return False
    for target in _TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    return True


def _compiler() -> list[str]:
    """The command of a C++ compiler, empty for none."""
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"])
    return [path] if (path := next(filter(None, map(shutil.which, _COMPILERS)), None)) else []


def _built(compiler: list[str]) -> Path:
    """The compiled library, from an earlier time if nothing has changed: source, compiler, processor and JAX."""
    # What the compiler takes this processor for: a home folder may be shared by machines of several kinds.
    target = _run([*compiler, *_FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    headers = Path(jax.ffi.include_dir())
    told = "\n".join([shlex.join(compiler), *_FLAGS, importlib.metadata.version("jaxlib"), target]).encode()
    name = hashlib.sha256(_SOURCE.read_bytes() + told).hexdigest()[:16]
    folder = _cache_folder()
    path = folder / f"cpu_blocks-{name}.so"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch, path.name)
            _run([*compiler, *_FLAGS, "-isystem", str(headers), str(_SOURCE), "-o", str(made)])
            made.replace(path)  # whole or not at all, whoever else compiles it at this moment
    return path


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout


def _cache_folder() -> Path:
    """The user's folder for what can be made again."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # no home
        home = Path(tempfile.gettempdir(), f"cache-{os.getuid()}")
    return Path(home) / "mer_jax"


def _call(target: str, block: Block, results: list[jax.ShapeDtypeStruct], *arrays: jax.Array):
    call = jax.ffi.ffi_call(target, results, vmap_method="sequential")
    return call(
        *arrays,
        padding=np.int64(block.padding),
        window=np.int64(block.window),
        pool_padding=np.int64(block.pool_padding),
        rectify=block.rectify,
    )


def _pooled(block: Block, x: jax.Array, kernel: jax.Array, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((kernel.shape[-1], *block.pooled_sides(x, kernel), x.shape[-1]), dtype)


def _extremes(block, x, kernel, bias, scale):
    (extreme,) = _call("mer_jax_extremes", block, [_pooled(block, x, kernel, x.dtype)], x, kernel, bias, scale)
    return extreme


def _forward(block, x, kernel, bias, scale, sample_mask):
    pooled = [_pooled(block, x, kernel, dtype) for dtype in (x.dtype, _PLACES)]
    results = [*pooled, jax.typeof(bias), jax.typeof(bias)]
    return *_call("mer_jax_forward", block, results, x, kernel, bias, scale, sample_mask), None


def _backward(block, x, kernel, bias, sample_mask, gradient, place, factor, constant, slope, kept, to_x):
    del kept  # the maps are made again
    results = [jax.typeof(each) for each in ((kernel, bias, x) if to_x else (kernel, bias))]
    given = x, kernel, bias, sample_mask, gradient, place, factor, constant, slope
    of_kernel, of_bias, *of_x = _call("mer_jax_backward", block, results, *given)
    return of_kernel, of_bias, of_x[0] if to_x else None


IMPLEMENTATION = Implementation(_extremes, _forward, _backward)
