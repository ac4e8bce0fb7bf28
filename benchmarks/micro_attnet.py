r"""Trains the networks on optical flow as a PyTorch user would, one member after another, and as a study does.

    python benchmarks/micro_attnet.py
    python benchmarks/micro_attnet.py --models ststnet --repeats 9

``ststnet`` is leave-one-subject-out on 442 samples of 68 subjects, 28 x 28 pixels, batches of 256; ``micro_attnet`` is
five folds by seeds on 400 samples, 64 x 64 pixels, batches of 32. Data are random numbers of these shapes. Both ways
train the same folds with the same number of steps, dropout, optimiser and a look at the held-out fold after every
epoch, in turns within one process, so that whatever else the machine does meets both; compilation is told apart. Peak
memory is that of a process of its own for each way.
"""

import argparse
import dataclasses
import json
import platform
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from configs import megc2019, micro_attnet
from mer_jax.cli import open_door
from mer_jax.models.registry import build_learner
from mer_jax.parallel import available_processors
from mer_jax.study.data import MULTI_CLASS, MULTI_LABEL, StudyData
from mer_jax.study.devices import select_devices
from mer_jax.study.engine import make_programs, stack_members
from mer_jax.study.train import Plan, block_size, input_channels, make_plan

MODELS = ("micro_attnet", "ststnet")
WAYS = ("pytorch", "study")


class TorchSTSTNet(nn.Module):
    """STSTNet (Liong et al. 2019) as its authors' description has it."""

    def __init__(self, dropout: float):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, features, 3, padding=2) for features in (3, 5, 8)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(features) for features in (3, 5, 8)])
        self.pool, self.average = nn.MaxPool2d(3, 3, 1), nn.AvgPool2d(2, 2)
        self.dropout, self.fc = nn.Dropout(dropout), nn.Linear(400, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, 3, 28, 28)`` to logits ``(B, 3)``."""
        streams = [
            self.dropout(self.pool(norm(torch.relu(conv(x)))))
            for conv, norm in zip(self.convs, self.norms, strict=True)
        ]
        return self.fc(self.average(torch.cat(streams, 1)).flatten(1))


class TorchMicroAttNet(nn.Module):
    """MicroAttNet (Nguyen et al. 2026, section 3.5) with the sizes of our config."""

    def __init__(self, model, size: int, dropout: float, feature_dropout: float):
        super().__init__()
        self.pools = model.pools
        widths = (1, *model.features)

        def stage(block):
            convs = [
                nn.Conv2d(widths[block], widths[block + 1], model.kernels[block], padding=model.kernels[block] // 2)
                for _ in range(3)
            ]
            return nn.ModuleList([nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels)) for conv in convs])

        def attend(block):
            hidden = model.attention_hidden
            return nn.Sequential(
                nn.Linear(3 * widths[block + 1], hidden, bias=False), nn.ReLU(), nn.Linear(hidden, 3, bias=False)
            )

        self.stages = nn.ModuleList([stage(0), stage(1)])
        self.attention = nn.ModuleList([attend(0), attend(1)])
        squeezed = widths[2] // model.se_reduction
        self.excitation = nn.Sequential(
            nn.Linear(widths[2], squeezed, bias=False), nn.ReLU(), nn.Linear(squeezed, widths[2], bias=False)
        )
        side = size // model.pools[0] // model.pools[1]
        self.hidden = nn.Linear(3 * widths[2] * side * side, model.hidden_dim)
        self.norm, self.logits = nn.BatchNorm1d(model.hidden_dim), nn.Linear(model.hidden_dim, 5)
        self.dropout, self.channel_dropout = nn.Dropout(dropout), nn.Dropout2d(feature_dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, 3, H, W)`` to logits ``(B, 5)``."""
        streams = list(x.split(1, dim=1))
        for block, (stage, attention) in enumerate(zip(self.stages, self.attention, strict=True)):
            streams = [
                functional.max_pool2d(self.channel_dropout(torch.relu(layers(stream))), self.pools[block])
                for layers, stream in zip(stage, streams, strict=True)
            ]
            if block == 1:
                gate = torch.sigmoid(self.excitation(streams[2].mean((2, 3))))
                streams[2] = streams[2] * gate[:, :, None, None]
            weights = torch.softmax(attention(torch.cat([stream.mean((2, 3)) for stream in streams], 1)), 1)
            streams = [stream * weights[:, n, None, None, None] for n, stream in enumerate(streams)]
        flat = torch.cat([stream.flatten(1) for stream in streams], 1)
        return self.logits(self.dropout(torch.relu(self.norm(self.hidden(flat)))))


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained, by either way.

    Attributes:
        name: One of ``MODELS``.
        plan: Members, folds and data.
        config: The config it was made from.
        epochs: Epochs of a member in one turn.
    """

    name: str
    plan: Plan
    config: object
    epochs: int

    @property
    def member_steps(self) -> int:
        """Updates in one turn, over all members."""
        sizes = [int(np.sum(member.train_mask)) for member in self.plan.inputs]
        return sum(-(-size // self.plan.recipe.batch_size) for size in sizes) * self.epochs


def make_job(name: str, members: int, epochs: int) -> Job:
    """Random data of the shapes of a data set, and the folds and members of its study.

    Args:
        name: One of ``MODELS``.
        members: How many of the study's members take part; 0 for all.
        epochs: Epochs of a member in one turn.
    """
    rng = np.random.default_rng(0)
    if name == "ststnet":
        config, clips, views, size = megc2019.get_config("ststnet"), 442, 1, 28
        subject = np.sort(np.concatenate([np.arange(68), rng.integers(0, 68, clips - 68)]))
        labels = np.eye(3, dtype=np.int8)[rng.choice(3, clips, p=[0.57, 0.25, 0.18])]
        flow = rng.uniform(0, 255, (clips, size, size, 3)).astype(np.float32)
    else:
        config, clips, views, size = micro_attnet.get_config(), 100, 4, 64  # two views of two phases
        subject = np.arange(clips) % 24
        labels = (rng.random((clips, 5)) < (0.4, 0.2, 0.2, 0.3, 0.2)).astype(np.int8)
        flow = rng.normal(size=(clips * views, size, size, 3)).astype(np.float32)
        config.study.num_seeds = 4
    config.train.epochs = epochs
    samples = clips * views
    data = StudyData(
        label_names=tuple("abcde")[: labels.shape[1]],
        task=MULTI_CLASS if labels.shape[1] == 3 else MULTI_LABEL,
        clip_name=np.array([f"clip_{n}" for n in range(clips)]),
        clip_id=np.arange(clips),
        clip_subject=np.array([f"s{n:02d}" for n in subject]),
        clip_database=np.array([""] * clips),
        clip_split=np.array(["train"] * clips),
        clip_labels=labels,
        sample_clip=np.repeat(np.arange(clips, dtype=np.int32), views),
        sample_view=np.array((["c"] if views == 1 else ["l", "l", "r", "r"]) * clips),
        sample_phase=np.array((["onset_apex"] if views == 1 else ["onset_apex", "apex_offset"] * 2) * clips),
        face_found=np.ones(samples, bool),
        features={"flow": flow},
        frame_mask=None,
    )
    plan = make_plan(config, data, {})
    if members:
        plan = dataclasses.replace(plan, members=plan.members[:members], inputs=plan.inputs[:members])
    return Job(name, plan, config, epochs)


def pytorch_way(job: Job) -> Callable[[], None]:
    """A turn of the idiomatic loop: one member after another, all of PyTorch's threads on each."""
    recipe, config = job.plan.recipe, job.config
    flow, labels = job.plan.arrays.inputs["flow"][0], torch.tensor(job.plan.arrays.labels)
    maps = job.plan.arrays.maps.get("flow")
    folds = {}
    for member in job.plan.inputs:
        fold = int(member.fold)
        if fold not in folds:
            prepared = flow if maps is None else (flow - maps[0][fold]) * maps[1][fold]
            folds[fold] = torch.tensor(prepared.transpose(0, 3, 1, 2).copy())  # (N, H, W, C) -> (N, C, H, W)

    def loss_of(logits, wanted):
        if recipe.exclusive:
            return functional.cross_entropy(logits, wanted)
        entropy = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        return ((1 - torch.exp(-entropy)) ** config.train.focal_gamma * entropy).mean()

    def turn():
        for number, member in enumerate(job.plan.inputs):
            torch.manual_seed(number)
            x = folds[int(member.fold)]
            if job.name == "ststnet":
                model = TorchSTSTNet(config.train.dropout)
            else:
                model = TorchMicroAttNet(config.model, x.shape[-1], config.train.dropout, config.train.feature_dropout)
            optimiser = torch.optim.Adam(model.parameters(), config.train.learning_rate)
            train = torch.tensor(np.flatnonzero(np.asarray(member.train_mask)))
            watched = np.asarray(member.watched)
            watched = torch.tensor(watched[np.asarray(member.watched_heldout | member.watched_inner)])
            for _ in range(job.epochs):
                model.train()
                for batch in train[torch.randperm(len(train))].split(recipe.batch_size):
                    optimiser.zero_grad()
                    loss_of(model(x[batch]), labels[batch]).backward()
                    optimiser.step()
                model.eval()
                with torch.no_grad():
                    loss_of(model(x[watched]), labels[watched]).item()

    return turn


def study_way(job: Job) -> Callable[[], None]:
    """A turn of the study's engine: blocks of members in compiled programs, a thread a core or a device each."""
    plan, channels = job.plan, input_channels(job.config)
    devices = select_devices("")
    platform_ = devices[0].platform
    learner = build_learner(job.config.model, channels, plan.data.clip_labels.shape[1], platform_)
    one_by_one = learner.one_by_one and platform_ == "cpu"
    if one_by_one and len(devices) == 1:
        devices = list(devices) * available_processors()
    size = block_size(len(plan.members), len(devices), platform_, 0, one_by_one)
    programs = make_programs(learner, plan.recipe, plan.num_steps, plan.last_batch, one_by_one)
    arrays = {device: jax.device_put(plan.arrays, device) for device in set(devices)}
    blocks = []
    for start in range(0, len(plan.inputs), size):
        members = plan.inputs[start : start + size]
        blocks.append(stack_members([*members, *members[:1] * (size - len(members))]))
    numbers = jnp.arange(1, job.epochs + 1)

    def turn():
        waiting: queue.SimpleQueue = queue.SimpleQueue()
        for block in blocks:
            waiting.put(block)

        def work(device):
            with jax.default_device(device):
                while True:
                    try:
                        members = jax.device_put(waiting.get_nowait(), device)
                    except queue.Empty:
                        return
                    states = programs.init(arrays[device], members)
                    jax.block_until_ready(programs.epochs(arrays[device], members, states, numbers))

        threads = [threading.Thread(target=work, args=(device,)) for device in devices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return turn


def _seconds(turn: Callable[[], None]) -> float:
    begun = time.perf_counter()
    turn()
    return time.perf_counter() - begun


def _peak_gib(arguments: Sequence[str]) -> float:
    command = [sys.executable, __file__, *arguments]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(told.splitlines()[-1])["peak_gib"]


def measure(name: str, given: argparse.Namespace) -> None:
    """Prints one model's row."""
    job = make_job(name, given.members, given.epochs)
    ways = {"pytorch": pytorch_way(job), "study": study_way(job)}
    first = {way: _seconds(turn) for way, turn in ways.items()}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(given.repeats):
        for way, turn in ways.items():
            times[way].append(_seconds(turn) / job.member_steps * 1e3)
    ratios = np.array(times["pytorch"]) / np.array(times["study"])
    peak = {
        way: _peak_gib(
            ["--models", name, "--members", str(given.members), "--epochs", str(given.epochs), "--only", way]
        )
        for way in WAYS
    }
    compiled = first["study"] - np.median(times["study"]) * job.member_steps / 1e3
    print(f"{name}: {len(job.plan.members)} members, {job.member_steps} member-steps a turn, {given.repeats} turns")
    for way in WAYS:
        print(
            f"  {way:8s} {np.median(times[way]):6.1f} ms a member-step, {min(times[way]):.1f} to {max(times[way]):.1f},"
            f" peak memory {peak[way]:.2f} GiB"
        )
    print(
        f"  the study is {np.median(ratios):.2f} times as fast ({ratios.min():.2f} to {ratios.max():.2f}); it compiled "
        f"for {compiled:.0f} s before",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the command line asks for.

    Args:
        arguments: The command line without the program's name; the process's own unless given.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--members", type=int, default=0, help="members that take part (default: all)")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of a member in a turn (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way (default: %(default)s)")
    parser.add_argument("--only", choices=WAYS, help="train one way once and print the peak memory as JSON")
    given = parser.parse_args(arguments)
    jax.config.update("jax_default_matmul_precision", "highest")
    if given.only:
        job = make_job(given.models[0], given.members, given.epochs)
        {"pytorch": pytorch_way, "study": study_way}[given.only](job)()
        # Not getrusage: it begins with what the parent process had.
        status = Path("/proc/self/status").read_text()
        print(json.dumps({"peak_gib": int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20}))
        return
    device = select_devices("")[0]
    print(
        f"{available_processors()} processors ({platform.processor() or platform.machine()}), JAX {jax.__version__} on "
        f"{device.device_kind}, PyTorch {torch.__version__} with {torch.get_num_threads()} threads"
    )
    for name in given.models:
        measure(name, given)


if __name__ == "__main__":
    open_door(main)
