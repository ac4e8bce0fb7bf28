"""Images in, features out: one compiled program, static batches, no device waiting for the host.

Every image has a *place*, its position in the list of all images of an extraction, finished or not. Place p lies in
slot p mod B of its group, so that the program, the slot and the image, which are all that a feature depends on, are the
same whether an extraction runs through or is interrupted and continued, and on however many devices.
"""

import contextlib
import dataclasses
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mer_jax.errors import UserError
from mer_jax.extractors.networks import Network

DTYPES = ("float32", "bfloat16")

# Beyond these a device is busy anyway, and a kill costs more.
_MOST_IMAGES = {"cpu": 8}
_MOST_IMAGES_ELSEWHERE = 64
_SHARE_OF_DEVICE_MEMORY = 0.8
_SHARE_OF_HOST_MEMORY = 0.4
_IN_FLIGHT = 2  # steps on the devices: one at work, one waiting


@dataclasses.dataclass(frozen=True)
class Program:
    """A network compiled for static batches.

    Attributes:
        name: Of the network.
        batch_size: B, the number of images per device.
        num_devices: N.
        image_shape: (h, w, 3) of an image.
        image_dtype: Of the images.
        bytes_per_device: Peak memory of one device in bytes, variables included, as the compiler tells.
        call: Images (N B, h, w, 3) on the host to features (N B, D) float32 on the devices, without waiting.
    """

    name: str
    batch_size: int
    num_devices: int
    image_shape: tuple[int, ...]
    image_dtype: np.dtype
    bytes_per_device: int
    call: Callable[[np.ndarray], jax.Array]


def local_devices() -> list[jax.Device]:
    """All devices of the best platform of this machine.

    Raises:
        UserError: JAX finds none, as it may where ``JAX_PLATFORMS`` names one that is absent.
    """
    try:
        return jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts where JAX_PLATFORMS names only what is absent
        reason = next(iter(str(error).strip().splitlines()), "JAX found none")
        raise UserError(
            f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r}: no such device on this machine ({reason}); "
            "install the jax build for it, or set JAX_PLATFORMS=cpu"
        ) from error


def compile_network(
    network: Network,
    variables: Any,
    image: jax.ShapeDtypeStruct,
    devices: Sequence[jax.Device],
    *,
    batch_size: int | None = None,
    dtype: str = "float32",
    memory: int | None = None,
) -> Program:
    """Compiles a network, data parallel over devices.

    Args:
        network: What to compile.
        variables: As ``network.load`` gives them; copied to every device.
        image: Shape (h, w, 3) and dtype of one image.
        devices: N devices of one kind.
        batch_size: B, images per device; None for as many as ``memory`` allows, within reason.
        dtype: ``'float32'`` multiplies in full precision, ``'bfloat16'`` computes in bfloat16.
        memory: Most bytes that one device may use; None for a share of what it has.

    Returns:
        The program.

    Raises:
        UserError: The device's memory does not suffice to compile it.
    """
    if dtype == "bfloat16":
        variables = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == np.float32 else x, variables)
    mesh = jax.make_mesh((len(devices),), ("batch",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
    whole, parted = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))
    # The devices' share of the batch is a program of its own, the same on any number of them.
    features = jax.jit(
        jax.shard_map(network.apply, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("batch")),
                      out_specs=PartitionSpec("batch"), check_vma=False)
    )  # fmt: skip
    memory = memory or device_memory(devices[0], len(devices))
    sizes = [batch_size] if batch_size else _sizes(_MOST_IMAGES.get(devices[0].platform, _MOST_IMAGES_ELSEWHERE))
    for size in sizes:
        with _out_of_memory(network.name, size):
            variables = jax.device_put(variables, whole)
            images = jax.ShapeDtypeStruct((size * len(devices), *image.shape), image.dtype, sharding=parted)
            with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
                compiled = features.lower(variables, images).compile()
        analysis = compiled.memory_analysis()
        used = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + analysis.output_size_in_bytes
        if used <= memory:
            break
    return Program(
        network.name,
        size,
        len(devices),
        image.shape,
        np.dtype(image.dtype),
        used,
        lambda batch: compiled(variables, jax.device_put(batch, parted)),
    )


def run(program: Program, arrivals: Iterable[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
    """Maps images to features while further images are still being read.

    Args:
        program: The compiled network.
        arrivals: Places and images: (p, (m, h, w, 3)) are the images at p, p + 1, ..., p + m - 1. Places ascend, and
            may leave gaps.

    Yields:
        (p, (m, D)): the float32 features of the images at p, ..., p + m - 1, ascending, each place once.

    Raises:
        UserError: A device runs out of memory.
    """
    sent: deque[tuple[list[_Group], jax.Array]] = deque()
    for step in _steps(program, arrivals):
        with _out_of_memory(program.name, program.batch_size):
            sent.append((step, program.call(_batch(program, step))))
        # While these features are waited for, the next step is at work already.
        if len(sent) == _IN_FLIGHT:
            yield from _taken(program, *sent.popleft())
    while sent:
        yield from _taken(program, *sent.popleft())


def device_memory(device: jax.Device, num_devices: int) -> int:
    """How many bytes an extraction may use on one of ``num_devices`` devices; CPU devices share the host's."""
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            return int(_SHARE_OF_DEVICE_MEMORY * stats["bytes_limit"])
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):
        host = min(host, int(Path("/sys/fs/cgroup/memory.max").read_text()))  # what a container may use of it
    return int(_SHARE_OF_HOST_MEMORY * host) // num_devices


@dataclasses.dataclass
class _Group:
    """The images of B neighbouring places, those that arrived; the other slots are zero."""

    number: int
    images: np.ndarray
    arrived: np.ndarray


def _groups(program: Program, arrivals: Iterable[tuple[int, np.ndarray]]) -> Iterator[_Group]:
    size, group = program.batch_size, None
    for place, images in arrivals:
        while len(images):
            number, slot = divmod(place, size)
            if group is None or group.number != number:
                if group is not None:
                    yield group
                shape = (size, *program.image_shape)
                group = _Group(number, np.zeros(shape, program.image_dtype), np.zeros(size, bool))
            count = min(size - slot, len(images))
            group.images[slot : slot + count] = images[:count]
            group.arrived[slot : slot + count] = True
            place, images = place + count, images[count:]
    if group is not None:
        yield group


def _steps(program: Program, arrivals: Iterable[tuple[int, np.ndarray]]) -> Iterator[list[_Group]]:
    """Groups, one per device, fewer in the last step."""
    groups = _groups(program, arrivals)
    while step := list(itertools.islice(groups, program.num_devices)):
        yield step


def _batch(program: Program, step: Sequence[_Group]) -> np.ndarray:
    """The groups of one step, filled up for the devices that have none: (N B, h, w, 3)."""
    images = [group.images for group in step]
    if len(images) == program.num_devices == 1:
        return images[0]
    missing = program.num_devices - len(images)
    return np.concatenate([*images, *[np.zeros_like(images[0])] * missing])


def _taken(program: Program, step: Sequence[_Group], features: jax.Array) -> Iterator[tuple[int, np.ndarray]]:
    """The features of one step, waited for, as runs of neighbouring places."""
    with _out_of_memory(program.name, program.batch_size):
        rows = np.asarray(features)  # (N B, D)
    for index, group in enumerate(step):
        size = len(group.arrived)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], group.arrived.astype(np.int8), [0]])))
        for start, stop in edges.reshape(-1, 2):
            yield group.number * size + int(start), rows[index * size + start : index * size + stop]


def _sizes(most: int) -> Iterator[int]:
    """``most`` and its halves down to 1."""
    while most:
        yield most
        most //= 2


@contextlib.contextmanager
def _out_of_memory(name: str, batch_size: int) -> Iterator[None]:
    """Says in one line that a device's memory is exhausted."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        smaller = f"--batch_size below {batch_size}" if batch_size > 1 else "a device with more memory"
        raise UserError(
            f"{name}: the device's memory does not suffice for {batch_size} images at once; take {smaller}, or "
            "--dtype bfloat16"
        ) from error
