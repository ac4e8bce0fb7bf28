r"""Trains the networks on optical flow as a PyTorch user would, one member after another, and as a study does.

    python benchmarks/micro_attnet.py
    python benchmarks/micro_attnet.py --models ststnet --repeats 9

``ststnet`` is leave-one-subject-out on 442 samples of 68 subjects, 28 x 28 pixels, batches of 256; ``micro_attnet`` is
three folds by four seeds on 400 samples, 64 x 64 pixels, batches of 32. Data are random numbers of these shapes. Both
ways train the same folds with the same number of steps, dropout, optimiser and a look at the held-out fold after every
epoch, in turns within one process, so that whatever else the machine does meets both; compilation is told apart. Peak
memory is that of a process of its own for each way. ``benchmarks/study.py`` has more ways, models and counts.
"""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np
import torch

from benchmarks.jobs import make_job, own_peak_gib, peak_gib_of, study_way, take_turns
from benchmarks.peers import pytorch_way
from mer_jax.cli import open_door
from mer_jax.parallel import available_processors
from mer_jax.study.devices import worker_devices

MEMBERS = {"micro_attnet": 12, "ststnet": 68}
WAYS = {"pytorch": pytorch_way, "study": study_way}


def measure(name: str, given: argparse.Namespace) -> None:
    """Prints one model's row."""
    members = given.members or MEMBERS[name]
    job = make_job(name, members, given.epochs)
    first, taken = take_turns({way: make(job) for way, make in WAYS.items()}, given.repeats)
    times = {way: np.array(values) / job.member_steps * 1e3 for way, values in taken.items()}
    ratios = times["pytorch"] / times["study"]
    peak = {
        way: peak_gib_of(
            __file__, ["--models", name, "--members", str(members), "--epochs", str(given.epochs), "--only", way]
        )
        for way in WAYS
    }
    print(f"{name}: {len(job.plan.members)} members, {job.member_steps} member-steps a turn, {given.repeats} turns")
    for way in WAYS:
        print(
            f"  {way:8s} {np.median(times[way]):6.1f} ms a member-step, {min(times[way]):.1f} to {max(times[way]):.1f},"
            f" peak memory {peak[way]:.2f} GiB"
        )
    print(
        f"  the study is {np.median(ratios):.2f} times as fast ({ratios.min():.2f} to {ratios.max():.2f}); it compiled "
        f"for {first['study'] - np.median(taken['study']):.0f} s before",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the command line asks for.

    Args:
        arguments: The command line without the program's name; the process's own unless given.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--models", nargs="+", default=list(MEMBERS), choices=MEMBERS)
    parser.add_argument("--members", type=int, default=0, help=f"members that take part (default: {MEMBERS})")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of a member in a turn (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way (default: %(default)s)")
    parser.add_argument("--only", choices=WAYS, help="train one way once and print the peak memory as JSON")
    given = parser.parse_args(arguments)
    jax.config.update("jax_default_matmul_precision", "highest")
    if given.only:
        name = given.models[0]
        WAYS[given.only](make_job(name, given.members or MEMBERS[name], given.epochs))()
        print(json.dumps({"peak_gib": own_peak_gib()}))
        return
    device = worker_devices("")[0]
    print(
        f"{available_processors()} processors ({platform.processor() or platform.machine()}), JAX {jax.__version__} on "
        f"{device.device_kind}, PyTorch {torch.__version__} with {torch.get_num_threads()} threads"
    )
    for name in given.models:
        measure(name, given)


if __name__ == "__main__":
    open_door(main)
