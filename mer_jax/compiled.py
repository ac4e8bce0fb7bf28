"""C++ that a CPU's own compiler turns into operations of XLA.

What XLA makes of a few parts of training takes several times as long as it must: it writes to memory what the next
operation reads again. These parts are C++ sources beside the modules that call them. They are compiled for the
machine's own processor by the C++ compiler that the environment variable ``CXX`` names, or the first of c++, g++ and
clang++ there is, and kept in ``$XDG_CACHE_HOME/mer_jax`` (else ``~/.cache/mer_jax``). ``CXX=`` (empty) goes without.
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

_COMPILERS = ("c++", "g++", "clang++")
# Without errno a square root is an instruction.
_FLAGS = ("-std=c++17", "-O3", "-fno-fast-math", "-fno-math-errno", "-fPIC", "-shared")

_LOCK = threading.Lock()


def version(source: Path, targets: tuple[str, ...]) -> str:
    """Compiles a source, or takes what was compiled, and has XLA know its operations.

    The first call on a machine compiles, and one that cannot says so on stderr.

    Args:
        source: The ``.cc`` file.
        targets: Names of its operations.

    Returns:
        What was compiled, told apart by source, compiler and processor: on these last bits depend. Empty for nothing.
    """
    with _LOCK:  # threads that come first would compile each
        return _load(source, targets)


@functools.cache
def _load(source: Path, targets: tuple[str, ...]) -> str:
    try:
        compiler = _compiler()
        if not compiler:
            return ""
        flags, processor = _for_this_processor(compiler)
        name = f"{source.stem}-{hashlib.sha256(source.read_bytes() + processor.encode()).hexdigest()[:16]}"
        library = _library(source, f"{name}-{importlib.metadata.version('jaxlib')}.so", [*compiler, *flags])
        handlers = {target: jax.ffi.pycapsule(getattr(library, target)) for target in targets}
    except (OSError, ValueError, AttributeError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)
        print(
            f"CXX={os.environ.get('CXX', shlex.join(_found()))!r}: {source.name} cannot be compiled ({reason}), so "
            "that training on a CPU takes longer, networks on flow several times as long; set CXX to a C++17 "
            "compiler, or CXX= to go without",
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


def _library(source: Path, name: str, command: list[str]) -> ctypes.CDLL:
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
            made = _compile(source, command, Path(scratch, name))
            with made.open("rb") as stream:
                os.fsync(stream.fileno())  # a library that a lost machine cut short would end processes
            made.replace(folder / name)  # whole or not at all, whoever else compiles it at this moment
        return ctypes.CDLL(str(folder / name))
    except (OSError, RuntimeError):  # no home, or one that takes no files or runs none
        with tempfile.TemporaryDirectory() as scratch:
            return ctypes.CDLL(str(_compile(source, command, Path(scratch, name))))


def _compile(source: Path, command: list[str], path: Path) -> Path:
    _run([*command, "-isystem", jax.ffi.include_dir(), str(source), "-o", str(path)])
    return path


def _run(command: list[str]) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
    ).stdout
