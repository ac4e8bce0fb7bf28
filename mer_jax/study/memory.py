"""How many members fit on a device: what their compiled program asks for, against what the device has."""

import concurrent.futures
import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from mer_jax.study import engine

# Of what is free: the rest is for batches of predictions, checkpoints on their way out, and fragments.
_SHARE = 0.8
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
_BY_TIMING = ("gpu",)
_COMPILING, _KEEPING = threading.Lock(), threading.Lock()
# Rows of a grid ask for one program again and again.
_compiled: dict[tuple, jax.stages.Compiled] = {}
_MOST_COMPILED = 64


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """How many members a device trains together, and why.

    Attributes:
        together: Members in one compiled call.
        needed: Bytes that the call needs on a device, the data included.
        free: Bytes that a device may use; None where that is unknown.
        epochs: Device to its compiled ``Programs.epochs`` of so many members.
    """

    together: int
    needed: int
    free: int | None
    epochs: Mapping[jax.Device, Callable]


def free_bytes(device: jax.Device, sharing: int) -> int | None:
    """What a study may use of a device's memory, in bytes; None where that cannot be known.

    Args:
        device: The device.
        sharing: Number of CPU devices that share the machine's memory; without effect on others, which have their own.
    """
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(_SHARE * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
    if device.platform != "cpu":
        return None
    free = [value for value in (_machine_free(), _cgroup_free()) if value is not None]
    return int(_SHARE * min(free) / sharing) if free else None


def _machine_free(path: Path = Path("/proc/meminfo")) -> int | None:
    if path.is_file():
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024  # given in KiB
    try:  # macOS: only all of it is known
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _cgroup_free(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's or a job's limit leaves; None without a limit."""
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        for folder in (root, root / "memory"):
            try:
                most = (folder / limit).read_text().strip()
                if most.isdigit() and int(most) < 1 << 60:  # version 1 says "no limit" by a number beyond all machines
                    return max(0, int(most) - int((folder / used).read_text()))
            except OSError:
                continue
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or its compiler refused for want of memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and _OUT_OF_MEMORY in str(error)


def compiles_by_timing(platform: str) -> bool:
    """Whether a platform's compiler times several ways of a product: which one wins, with its last bits, is chance."""
    return platform in _BY_TIMING


def plan_memory(
    programs: engine.Programs,
    arrays: engine.Arrays,
    member: engine.MemberInputs,
    epochs_per_call: int,
    devices: Sequence[jax.Device],
    wanted: int,
    free: int | None,
) -> MemoryPlan:
    """Compiles a study's training program for as many members as fit.

    The need of a program is what its compiler says: arguments, results and temporaries, without what it donates. It
    grows linearly with the members, so one look at a program that is too large gives the number that fits. The
    compiled programs are those that training calls then: where the wanted number fits, planning costs nothing.

    Args:
        programs: The programs.
        arrays: What members share, on the host.
        member: Any member.
        epochs_per_call: Epochs of a call.
        devices: Devices of one kind; the program is compiled for all of them at once.
        wanted: Most members in one call.
        free: Bytes that each device may use, or None for whatever it takes.

    Returns:
        The plan; at least one member, even where the compiler says that it does not fit.
    """
    shared = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    together = wanted
    while True:
        try:
            epochs = compile_epochs(programs, arrays, member, epochs_per_call, devices, together)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error) or together == 1:
                raise
            together = -(-together // 2)
            continue
        needed = max(needed_bytes(compiled) for compiled in epochs.values())
        if free is None or needed <= free or together == 1:
            return MemoryPlan(together, needed, free, epochs)
        fitting = int((free - shared) / max(1.0, (needed - shared) / together))
        together = min(together - 1, max(1, fitting))


def compile_epochs(
    programs: engine.Programs,
    arrays: engine.Arrays,
    member: engine.MemberInputs,
    epochs_per_call: int,
    devices: Sequence[jax.Device],
    together: int,
) -> dict[jax.Device, jax.stages.Compiled]:
    """Compiles the training call of ``together`` members for all ``devices`` at once; arguments as above."""
    arguments = (*_shapes(programs, arrays, member, together), jax.ShapeDtypeStruct((epochs_per_call,), np.int32))
    with concurrent.futures.ThreadPoolExecutor(len(devices)) as pool:
        compiled = pool.map(lambda device: compile_one(programs.epochs, device, arguments), devices)
        return dict(zip(devices, compiled, strict=True))


def _shapes(programs: engine.Programs, arrays: engine.Arrays, member: engine.MemberInputs, together: int) -> tuple:
    """The data, ``together`` members and their states as shapes and types."""
    data = jax.eval_shape(lambda tree: tree, arrays)  # in the types that a device has
    members = jax.tree.map(lambda x: jax.ShapeDtypeStruct((together, *x.shape), x.dtype), member)
    return data, members, jax.eval_shape(programs.init, data, members)


def compile_one(program: Callable, device: jax.Device, arguments: tuple) -> jax.stages.Compiled:
    """Compiles a jitted function for a device, or finds what was compiled for such arguments before.

    Where a compiler chooses by timing, one thread at a time has it compile, so that the next one takes the same choice
    from the folder that keeps programs, and members have the same bits on every device.

    Args:
        program: The function.
        device: Where it is to run.
        arguments: Trees of arrays, or of their shapes and types.
    """
    leaves, structure = jax.tree.flatten(arguments)
    described = (structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
    key = (program, device, jax.config.jax_default_matmul_precision, *described)
    made = _compiled.get(key)
    if made is None:  # who only calls what is there waits for nobody
        with _COMPILING if compiles_by_timing(device.platform) else contextlib.nullcontext():
            made = _compiled.get(key) or _compile(program, device, *described)
            with _KEEPING:
                _compiled[key] = made
                while len(_compiled) > _MOST_COMPILED:
                    del _compiled[next(iter(_compiled))]
    return made


def _compile(program: Callable, device: jax.Device, structure, leaves: tuple) -> jax.stages.Compiled:
    place = jax.sharding.SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in leaves]
    with jax.default_device(device):
        return program.lower(*jax.tree.unflatten(structure, arguments)).compile()


def compile_ends(
    programs: engine.Programs, arrays: engine.Arrays, member: engine.MemberInputs, device: jax.Device, together: int
) -> None:
    """Compiles what a block of ``together`` members begins and ends with; arguments as of :func:`plan_memory`."""
    data, members, states = _shapes(programs, arrays, member, together)
    compile_one(programs.init, device, (data, members))
    compile_one(programs.finish, device, (data, members, states))


def needed_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes that a call of a program needs on its device, by its compiler's own account; 0 where it gives none."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return 0
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )
