r"""What a study's program would be on an accelerator that is not here: compiled ahead of time, not run.

    pip install "jax[cuda12]"  # in an environment of its own; libtpu for a TPU
    export JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1
    python benchmarks/ahead.py --target h100 --models fusion --members 100

JAX's compilers need a description of a device, and none of its kind. They tell whether a study compiles for it, what
memory it needs, how many kernels an epoch launches, and what each of them reads and writes. From these bytes and the
device's bandwidth follows what an epoch takes at least; what it does take only a run can tell. Products are not tuned,
for that is done by timing them. Bytes count operands and results of a kernel, a kernel that reads a part of an operand
is charged with all of it.
"""

import argparse
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from jax.experimental import topologies

from benchmarks.jobs import MODELS, Job, make_job
from mer_jax.cli import open_door
from mer_jax.errors import UserError
from mer_jax.models.registry import build_learner
from mer_jax.study.engine import MATMUL_PRECISIONS, make_programs
from mer_jax.study.memory import needed_bytes
from mer_jax.study.validation import input_channels

# NVIDIA's published figures, in the words of XLA's GpuTargetConfigProto.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84929347584
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}
_FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "after-all")


class Target(NamedTuple):
    """A device that need not be here.

    Attributes:
        platform: JAX's name of its kind.
        name: Of the topology, in the words of its compiler.
        options: Further options of the topology.
        bandwidth: Of its memory, in bytes a second, as its maker says.
    """

    platform: str
    name: str
    options: Mapping[str, str]
    bandwidth: float


TARGETS = {
    "h100": Target("cuda", "h100", {"target_config": _H100, "topology": "1x1x1"}, 3.35e12),
    "tpu_v5e": Target("tpu", "v5e:2x2", {}, 0.82e12),
}


class Kernel(NamedTuple):
    """One launch of a loop's body.

    Attributes:
        name: The compiler's.
        bytes: Of its operands and results.
        source: What of the program it is made of.
    """

    name: str
    bytes: int
    source: str


def target_device(target: Target) -> jax.Device:
    """The first device of a described topology.

    Raises:
        UserError: The plugin of the platform is not installed, or cannot do without a device.
    """
    try:
        return topologies.get_topology_desc(target.name, target.platform, **target.options).devices[0]
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"no compiler for {target.platform} ({str(error).splitlines()[0]}); install jax's build for it in an "
            "environment of its own, and set JAX_PLATFORMS=cpu and JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1"
        ) from error


def compile_for(device: jax.Device, job: Job, epochs: int) -> jax.stages.Compiled:
    """Compiles ``epochs`` epochs of a job's members, vectorised, for a device."""
    plan = job.plan
    place = jax.sharding.SingleDeviceSharding(device)
    channels, num_classes = input_channels(job.config), plan.data.clip_labels.shape[1]
    with jax.default_device(device):
        learner = build_learner(job.config.model, channels, num_classes, device.platform)
        programs = make_programs(learner, plan.recipe, plan.num_steps, plan.last_batch)
        arrays = jax.eval_shape(lambda tree: tree, plan.arrays)
        members = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(plan.inputs), *x.shape), x.dtype), plan.inputs[0])
        states = jax.eval_shape(programs.init, arrays, members)
        arguments = (arrays, members, states, jax.ShapeDtypeStruct((epochs,), np.int32))
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
        return programs.epochs.lower(*placed).compile()


def loops_of(program: str) -> dict[str, list[Kernel]]:
    """The kernels of each loop's body and of the entry, by the text of a compiled program."""
    within = set(re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", program))
    loops: dict[str, list[Kernel]] = {}
    types: dict[str, str] = {}
    kernels: list[Kernel] | None = None
    for line in program.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            types, kernels = {}, [] if header[1] not in within else None
            if kernels is not None:
                loops[header[1]] = kernels
        found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*?)\)", line)
        if found and kernels is not None:
            name, types[found[1]], kind, operands = found[1], found[2], found[3], found[4]
            if kind not in _FREE:
                moved = [found[2], *(types.get(each.strip().lstrip("%"), "") for each in operands.split(","))]
                source = re.search(r'op_name="([^"]*)"', line)
                kernels.append(Kernel(name, sum(map(_bytes, moved)), source[1] if source else ""))
    return {name: kernels for name, kernels in loops.items() if len(kernels) > 2}


def _bytes(types: str) -> int:
    sizes = re.findall(r"(\w+)\[([\d,]*)\]", types)
    return sum(_WIDTHS.get(kind, 0) * int(np.prod([int(n) for n in shape.split(",") if n])) for kind, shape in sizes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles what the command line asks for, and tells about it.

    Args:
        arguments: The command line without the program's name; the process's own unless given.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--target", default="h100", choices=TARGETS)
    parser.add_argument("--models", nargs="+", default=["fusion"], choices=MODELS)
    parser.add_argument("--members", nargs="+", type=int, default=[100])
    parser.add_argument("--epochs", type=int, default=5, help="epochs of a call (default: %(default)s)")
    parser.add_argument("--precision", default="float32", choices=list(MATMUL_PRECISIONS))
    parser.add_argument(
        "--top", type=int, default=8, help="kernels told of each loop, the largest (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    jax.config.update("jax_default_matmul_precision", MATMUL_PRECISIONS[given.precision])
    target = TARGETS[given.target]
    device = target_device(target)
    for name in given.models:
        for members in given.members:
            job = make_job(name, members, given.epochs)
            begun = time.perf_counter()
            compiled = compile_for(device, job, given.epochs)
            seconds, gib = time.perf_counter() - begun, needed_bytes(compiled) / 2**30
            print(
                f"{name}, {members} members on {device.device_kind}, not run: compiled in {seconds:.0f} s, "
                f"{gib:.2f} GiB; {job.plan.num_steps} updates an epoch",
                flush=True,
            )
            for loop, kernels in loops_of(compiled.as_text()).items():
                moved = sum(kernel.bytes for kernel in kernels)
                least = moved / target.bandwidth * 1e3
                print(f"  {loop}: {len(kernels)} kernels, {moved / 1e9:.2f} GB, at least {least:.2f} ms")
                for kernel in sorted(kernels, key=lambda each: -each.bytes)[: given.top]:
                    print(f"    {kernel.bytes / 1e6:9.1f} MB  {kernel.name}  {kernel.source[-80:]}")


if __name__ == "__main__":
    open_door(main)
