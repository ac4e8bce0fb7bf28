"""What the benchmarks of training train, and how this software does it; PyTorch's ways are in ``peers.py``.

Data are random numbers of the shapes of a data set; folds, inner splits, members, recipe and programs are those of a
study of the config. A *way* is a function of no arguments that trains a job's members once; such *turns* are timed.
"""

import dataclasses
import json
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import fusion, megc2019, micro_attnet
from mer_jax.models.registry import Learner, build_learner
from mer_jax.study.data import MULTI_CLASS, MULTI_LABEL, StudyData
from mer_jax.study.devices import worker_devices
from mer_jax.study.engine import Arrays, MemberInputs, Programs, make_programs, stack_members
from mer_jax.study.train import Plan, block_size, make_plan
from mer_jax.study.validation import input_channels

MODELS = ("fusion", "fusion_frame", "micro_attnet", "micro_attnet_224", "ststnet")
WIDTHS = {"appearance": 1536, "geometry": 171}
"""Values a frame: RADIO and FaceVerse, as in the fusion paper."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained, by whichever way.

    Attributes:
        name: One of ``MODELS``.
        plan: Members, folds and data.
        config: The config it was made from.
        epochs: Epochs of a member in one turn.
    """

    name: str
    plan: Plan
    config: ConfigDict
    epochs: int

    @property
    def member_steps(self) -> int:
        """Updates in one turn, over all members."""
        sizes = [int(np.sum(member.train_mask)) for member in self.plan.inputs]
        return sum(-(-size // self.plan.recipe.batch_size) for size in sizes) * self.epochs

    def first(self, count: int) -> "Job":
        """The same with at most ``count`` members, the first of every fold before the second of any."""
        order = sorted(range(len(self.plan.members)), key=lambda row: (self.plan.members[row].seed, row))
        rows = sorted(order[:count])
        plan = dataclasses.replace(
            self.plan,
            members=[self.plan.members[row] for row in rows],
            inputs=[self.plan.inputs[row] for row in rows],
            inner=self.plan.inner[rows],
        )
        return dataclasses.replace(self, plan=plan)


def make_job(name: str, members: int, epochs: int) -> Job:
    """Random data of the shapes of a data set, and the folds and members of its study.

    ``fusion`` is the fusion paper's: 100 clips in two views, 18 frames of 1536 + 171 values, d_k 256, 8 queries a
    modality, batches of 16, three folds; ``fusion_frame`` the same with a dropout mask for every frame.
    ``micro_attnet``: 400 samples of 64 x 64 pixels, batches of 32, three folds; ``micro_attnet_224`` the same of
    224 x 224. ``ststnet``: 442 samples of 28 x 28 pixels and 68 subjects, one left out at a time, batches of 256.

    Args:
        name: One of ``MODELS``.
        members: How many members take part, spread over the folds; 0 for one a fold.
        epochs: Epochs of a member in one turn.
    """
    rng = np.random.default_rng(0)
    clips, views, phases = 100, ("l", "r"), ("",)
    subject = np.arange(clips) % 24
    if name == "ststnet":
        config, clips, views, phases = megc2019.get_config("ststnet"), 442, ("c",), ("onset_apex",)
        subject = np.sort(np.concatenate([np.arange(68), rng.integers(0, 68, clips - 68)]))
        labels = np.eye(3, dtype=np.int8)[rng.choice(3, clips, p=[0.57, 0.25, 0.18])]
        features = {"flow": rng.uniform(0, 255, (clips, 28, 28, 3)).astype(np.float32)}
    else:
        labels = (rng.random((clips, 5)) < (0.4, 0.2, 0.2, 0.3, 0.2)).astype(np.int8)
        if name.startswith("micro_attnet"):
            config, phases = micro_attnet.get_config(), ("onset_apex", "apex_offset")
            side = 224 if name == "micro_attnet_224" else 64
            features = {"flow": rng.standard_normal((clips * 4, side, side, 3), np.float32)}
        else:
            config = fusion.get_config()
            config.data.num_frames = 18
            for modality in WIDTHS:
                config.data.modalities[modality].reduce = 0
            config.model.key_dim = config.model.hidden_dim = 256
            config.model.feature_dropout_kind = "frame" if name == "fusion_frame" else "clip"
            features = {
                modality: rng.normal(size=(clips * 2, 18, width)).astype(np.float32)
                for modality, width in WIDTHS.items()
            }
    config.train.epochs = epochs
    num_folds = 68 if name == "ststnet" else config.folds.num
    config.study.num_seeds = max(1, -(-members // num_folds))
    samples = [(clip, view, phase) for clip in range(clips) for view in views for phase in phases]
    data = StudyData(
        label_names=tuple("abcde")[: labels.shape[1]],
        task=MULTI_CLASS if labels.shape[1] == 3 else MULTI_LABEL,
        clip_name=np.array([f"clip_{n}" for n in range(clips)]),
        clip_id=np.arange(clips),
        clip_subject=np.array([f"s{n:02d}" for n in subject]),
        clip_database=np.array([""] * clips),
        clip_split=np.array(["train"] * clips),
        clip_labels=labels,
        sample_clip=np.array([clip for clip, _, _ in samples], np.int32),
        sample_view=np.array([view for _, view, _ in samples]),
        sample_phase=np.array([phase for _, _, phase in samples]),
        face_found=np.ones(len(samples), bool),
        features=features,
        frame_mask=None if "flow" in features else np.ones((len(samples), 18), bool),
    )
    job = Job(name, make_plan(config, data, {}), config, epochs)
    return job.first(members or num_folds)


def study_way(job: Job, together: int = 0) -> Callable[[], None]:
    """A turn of the study's engine: blocks of members in compiled programs, a thread a core or a device each.

    Args:
        job: What to train.
        together: Members in one compiled call; 0 for as many as a study takes.
    """
    return _engine_way(job, together, one_member=False)


def single_way(job: Job) -> Callable[[], None]:
    """A turn of the engine with one member a call, one call after another: all cores work on each."""
    return _engine_way(job, 1, one_member=True)


@dataclasses.dataclass(frozen=True)
class Engine:
    """A job as the study's engine takes it.

    Attributes:
        learner: The model.
        programs: Its compiled programs.
        one_by_one: Whether a block's members take turns.
        devices: That of each thread that takes blocks.
        arrays: The data on each device.
        blocks: The members, stacked; the last block is filled up with copies.
    """

    learner: Learner
    programs: Programs
    one_by_one: bool
    devices: list[jax.Device]
    arrays: dict[jax.Device, Arrays]
    blocks: list[MemberInputs]


def prepare_engine(job: Job, together: int = 0, *, one_member: bool = False) -> Engine:
    """Lays a job out as a study does, or with ``one_member`` a call and one call after another."""
    plan = job.plan
    devices = worker_devices("")
    platform = devices[0].platform
    learner = build_learner(job.config.model, input_channels(job.config), plan.data.clip_labels.shape[1], platform)
    one_by_one = platform == "cpu"
    if one_member:
        devices = devices[:1]
    size = block_size(len(plan.members), len(devices), platform, 1 if one_member else together)
    blocks = []
    for start in range(0, len(plan.inputs), size):
        members = plan.inputs[start : start + size]
        blocks.append(stack_members([*members, *members[:1] * (size - len(members))]))
    devices = devices[: len(blocks)]
    return Engine(
        learner,
        make_programs(learner, plan.recipe, plan.num_steps, plan.last_batch, one_by_one),
        one_by_one,
        devices,
        {device: jax.device_put(plan.arrays, device) for device in set(devices)},
        blocks,
    )


def _engine_way(job: Job, together: int, one_member: bool) -> Callable[[], None]:
    engine = prepare_engine(job, together, one_member=one_member)
    numbers = np.arange(1, job.epochs + 1, dtype=np.int32)

    def turn():
        waiting: queue.SimpleQueue = queue.SimpleQueue()
        for block in engine.blocks:
            waiting.put(block)

        def work(device):
            arrays = engine.arrays[device]
            with jax.default_device(device):
                while True:
                    try:
                        members = jax.device_put(waiting.get_nowait(), device)
                    except queue.Empty:
                        return
                    states = engine.programs.init(arrays, members)
                    jax.block_until_ready(
                        engine.programs.epochs(arrays, members, states, jax.device_put(numbers, device))
                    )

        on_threads(work, engine.devices)

    return turn


def on_threads(work: Callable, arguments: Sequence) -> None:
    """Calls ``work`` with each argument in a thread of its own, and waits for all."""
    threads = [threading.Thread(target=work, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def seconds(turn: Callable[[], None]) -> float:
    """Wall time of a call."""
    begun = time.perf_counter()
    turn()
    return time.perf_counter() - begun


def operations_of(turn: Callable[[], object]) -> list[tuple[str, float, int]]:
    """What the device did in a turn, by JAX's profiler: a compiled operation's name, its seconds and calls.

    Loops and branches are left out, for what they hold stands for itself. The longest comes first.
    """
    spent: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            turn()
        (path,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
        for plane in profile.planes:
            for line in plane.lines:
                for event in line.events:
                    name = dict(event.stats).get("hlo_op", "")
                    if name and not event.name.startswith("end: ") and not name.startswith(("while", "cond", "call")):
                        spent.setdefault(name, []).append(event.duration_ns * 1e-9)
    return sorted(((name, sum(each), len(each)) for name, each in spent.items()), key=lambda each: -each[1])


def take_turns(ways: Mapping[str, Callable[[], None]], repeats: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Times the ways in turns, so that whatever else the machine does meets all of them.

    Args:
        ways: Name to a turn.
        repeats: Turns of each, after one that is told apart: it compiles.

    Returns:
        Seconds of the first turn of each way, and of the others.
    """
    first = {name: seconds(turn) for name, turn in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, turn in ways.items():
            times[name].append(seconds(turn))
    return first, times


def own_peak_gib() -> float:
    """The most memory that this process has held so far, in GiB (Linux)."""
    # Not getrusage: it begins with what the parent process had.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20


def peak_gib_of(script: str, arguments: Sequence[str]) -> float:
    """The same of a script that ends with a line of JSON ``{"peak_gib": ...}``."""
    command = [sys.executable, script, *arguments]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(told.splitlines()[-1])["peak_gib"]
