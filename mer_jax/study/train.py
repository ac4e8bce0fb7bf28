"""One command from a config to a report: prepares data, trains every member, writes what a reader needs."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax._src.compilation_cache import decompress_executable
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from mer_jax.errors import EXIT_USER_ERROR, UserError
from mer_jax.files import (
    TEMPORARY_SUFFIX,
    atomic_savez,
    atomic_write_bytes,
    atomic_write_text,
    exclusive,
    read_arrays,
    read_json,
)
from mer_jax.models import cpu_blocks, cpu_fusion
from mer_jax.models.registry import CONVOLUTIONAL, Learner, build_learner
from mer_jax.progress import Silent, progress, skip
from mer_jax.study import cpu_adam, engine, shown
from mer_jax.study.checkpoints import BlockCheckpoints, save_tree
from mer_jax.study.data import (
    MULTI_CLASS,
    FeatureMap,
    StudyData,
    load_dataset,
    prepare_features,
    prepare_flow,
)
from mer_jax.study.devices import worker_devices
from mer_jax.study.folds import inner_split, make_folds
from mer_jax.study.held_out import resolve_evaluation
from mer_jax.study.hosts import Group, LostProcess
from mer_jax.study.loops import MERGED, NOT_MERGED, OPTIONS, loops_are_merged
from mer_jax.study.members import HYPER_NAMES, Member, make_members, member_key
from mer_jax.study.memory import (
    MemoryPlan,
    compile_ends,
    compile_one,
    compiles_by_timing,
    free_bytes,
    is_out_of_memory,
    plan_memory,
)
from mer_jax.study.places import Places, over_parts
from mer_jax.study.results import FILENAME, StudyResults
from mer_jax.study.search import draw_candidates
from mer_jax.study.summary import write_summary
from mer_jax.study.validation import input_channels, uses_flow, validate_study
from mer_jax.study.workdir import check_data, check_workdir, start_workdir, write_tables

# On a CPU members take turns: one alone keeps its state in the cache. Small blocks keep all cores busy to the end.
_CPU_BLOCK = 2
_ACCELERATOR_BLOCK = 128
# A stopped run must be gone in 10 s; a worker that is inside a compilation cannot be asked to hurry.
_GRACE_SECONDS = 8.0
# Where another process was lost, nobody stands by: the call at work may end, and is saved.
_LOSS_GRACE_SECONDS = 60.0
# A file that another machine has written may stay unseen for as long as a network file system keeps its lists.
_SHARED_SECONDS = 90.0
# Share of an epoch's samples: a smaller last batch is a second copy of the step for the compiler, which takes as long.
_WORTH_COMPILING = 0.1
_MAPS = "feature_maps.npz"
_BLOCKS = "blocks.json"
PROGRAMS = "programs"
_HISTORY = ("train_loss", "inner_loss", "heldout_loss")


def train(
    config: ConfigDict, workdir: str | os.PathLike, overrides: Mapping | None = None, group: Group | None = None
) -> int:
    """Trains the study of a config, or goes on with it, and writes its report.

    Args:
        config: As made by a file of ``configs/``.
        workdir: Folder of the run; a finished run in it is only reported again, an unfinished one goes on.
        overrides: Fields given on the command line, for the record.
        group: The processes that train it together, each of which calls this function; the folder and the data set
            are on a file system that all of them see. By default this process alone.

    Returns:
        Exit status: 0, or 128 + the number of the signal that stopped the run after its checkpoints were saved.

    Raises:
        UserError: Bad config or data; the message names the field, clip or file. Or another process of the group was
            lost or has failed.
    """
    workdir = Path(workdir)
    group = group or Group()
    if "cross" in config:
        from mer_jax.study.grid import train_grid

        status = train_grid(config, workdir, overrides or {}, group)
    else:
        status = train_study(config, workdir, overrides or {}, functools.partial(_report, config), group=group)
        status = 0 if (workdir / FILENAME).is_file() else status
    if status:
        group.fail("was stopped")
    return status


def train_study(
    config: ConfigDict,
    workdir: Path,
    overrides: Mapping,
    report: Callable[[Path], None],
    data: StudyData | None = None,
    maps: Mapping[str, list[FeatureMap]] | None = None,
    group: Group | None = None,
    programs: Path | None = None,
) -> int:
    """Trains one study, or goes on with it.

    Args:
        config: The config.
        workdir: Folder of the run.
        overrides: Fields given on the command line, for the record.
        report: Called with the folder of the finished study, which is still locked.
        data: The data set where it is in memory; None to build or find it.
        maps: Modality to maps that another study fitted on the same training folds, for a run that has none yet.
        group: As in :func:`train`.
        programs: Folder that keeps what was compiled for GPUs, for studies that share it; the run's own by default.

    Returns:
        0, or 128 + the number of a signal that came; the study may be finished nonetheless.

    Raises:
        UserError: Bad config or data; the message names the field, clip or file. Or another process was lost.
    """
    group = group or Group()
    group.begin()
    validate_study(config)
    jax.config.update("jax_default_matmul_precision", engine.MATMUL_PRECISIONS[config.train.matmul_precision])
    if config.study.compile_cache:
        jax.config.update("jax_compilation_cache_dir", config.study.compile_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    programs = programs or workdir / PROGRAMS
    if not group.leads:
        return _train_along(config, workdir, group, data, programs)
    check_workdir(config, workdir)
    status = 0
    with exclusive(workdir, functools.partial(refuse_busy, workdir)):
        for stale in workdir.glob(f".*{TEMPORARY_SUFFIX}"):  # left by a kill
            stale.unlink()
        if not (workdir / FILENAME).is_file():
            devices = _training_devices(config)
            data = data or load_data(config)
            # Before any training: thresholds that do not suit the labels would be refused only after it.
            resolve_evaluation(config.evaluation.to_dict(), data.label_names, data.task == MULTI_CLASS)
            if (workdir / "config.json").is_file():
                check_data(workdir, data)
            plan = make_plan(config, data, {**(maps or {}), **_load_maps(workdir)})
            model = json.dumps(config.model.to_dict())
            learner = _learner(model, input_channels(config), len(data.label_names), devices[0].platform)
            # Only now: a first run that its input stopped binds the folder to nothing.
            start_workdir(config, workdir, overrides)
            check_data(workdir, data)
            status = _train_members(config, workdir, plan, learner, devices, group, programs)
        else:
            group.tell("ready", finished=True)
        if not status or (workdir / FILENAME).is_file():
            report(workdir)
            group.tell("finished")
    return status


def _train_along(config: ConfigDict, workdir: Path, group: Group, data: StudyData | None, programs: Path) -> int:
    """:func:`train_study` in all processes but the first, which prepares the folder and writes the results."""
    devices = _training_devices(config)
    _tell_devices(group, devices)
    if not group.wait("ready", [0])[0]["finished"]:
        _await_files(workdir, [workdir / "config.json", workdir / _BLOCKS])
        check_workdir(config, workdir)
        data = data or load_data(config)
        check_data(workdir, data)
        plan = make_plan(config, data, _load_maps(workdir))
        model = json.dumps(config.model.to_dict())
        learner = _learner(model, input_channels(config), len(data.label_names), devices[0].platform)
        status = _train_members(config, workdir, plan, learner, devices, group, programs)
        if status:
            return status
    group.wait("finished", [0])
    return 0


def _training_devices(config: ConfigDict) -> list[jax.Device]:
    """The device of every thread that trains; refuses what a CPU would pass over in silence."""
    devices, precision = worker_devices(config.platform), config.train.matmul_precision
    if devices[0].platform == "cpu" and precision != "float32":
        raise UserError(
            f"config.train.matmul_precision={precision!r}: a CPU multiplies in float32; set it to 'float32', or "
            "config.platform to an accelerator"
        )
    return devices


def _tell_devices(group: Group, devices: Sequence[jax.Device]) -> None:
    group.tell("devices", host=socket.gethostname(), platform=devices[0].platform, count=len(devices))


def _await_files(workdir: Path, paths: Sequence[Path]) -> None:
    """Waits until files of other processes can be seen here."""
    deadline = time.monotonic() + _SHARED_SECONDS
    while missing := [path for path in paths if not path.is_file()]:
        if time.monotonic() > deadline:
            raise UserError(
                f"{missing[0]}: written by another process, but not to be seen here; --workdir={workdir} must be on a "
                "file system that all processes share"
            )
        time.sleep(0.2)


# Studies of one process that differ in their data alone, such as rows of a grid, share what is traced and compiled.
@functools.lru_cache(maxsize=8)
def _learner(model: str, channels: tuple[str, ...], num_classes: int, platform: str) -> Learner:
    return build_learner(json.loads(model), channels, num_classes, platform)


_programs = functools.lru_cache(maxsize=8)(engine.make_programs)


def refuse_busy(workdir: Path) -> None:
    """Refuses a folder in which another process is training."""
    raise UserError(f"{workdir}: another process is training there; wait for it, or choose another --workdir")


def say(text: str) -> None:
    """Tells the user a line of progress."""
    with contextlib.suppress(OSError):  # a log file on a full disk must not end the training
        print(text, file=sys.stderr, flush=True)


def load_data(config: ConfigDict) -> StudyData:
    """Builds, or finds, the data set of a config and reads it."""
    from data_builders import ensure_dataset

    if uses_flow(config):
        from mer_jax.study.flow_data import load_flow_dataset

        return shuffle_labels(
            config,
            load_flow_dataset(
                ensure_dataset(config.data, ()),
                channels=tuple(config.data.channels),
                phases=tuple(config.data.phases),
                size=config.data.size or None,
            ),
        )
    extractors = {name: step["extractor"] for name, step in config.data.modalities.items()}
    version_dir = ensure_dataset(config.data, tuple(extractors.values()))
    return shuffle_labels(
        config, load_dataset(version_dir, extractors, num_frames=config.data.num_frames, short=config.data.short)
    )


def shuffle_labels(config: ConfigDict, data: StudyData) -> StudyData:
    """Deals the label vectors of training clips out at random where ``config.data.shuffle_labels`` asks for it."""
    if config.data.shuffle_labels:
        labels = data.clip_labels.copy()
        train = np.flatnonzero(data.training)
        labels[train] = labels[np.random.default_rng(config.seed).permutation(train)]
        data = dataclasses.replace(data, clip_labels=labels)
    return data


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything about a study that is settled before the first step.

    M members, C clips, N samples.

    Attributes:
        data: The data set.
        clip_fold: ``(C,)`` the fold that holds a clip out, -1 for test clips.
        members: The members, in the study's order.
        inputs: What tells each of them apart, as the engine takes it.
        inner: ``(M, N)`` bool, inner splits.
        arrays: What all members share, on the host.
        maps: What was fitted on training folds, one map a fold.
        recipe: The recipe.
        num_steps: Steps an epoch of the largest training fold.
        last_batch: Size of the last of them where it may be smaller than a batch; 0 for a full one.
    """

    data: StudyData
    clip_fold: np.ndarray  # (C,)
    members: list[Member]
    inputs: list[engine.MemberInputs]
    inner: np.ndarray  # (M, N) bool
    arrays: engine.Arrays  # on the host
    maps: dict[str, list[FeatureMap] | None]
    recipe: engine.Recipe
    num_steps: int
    last_batch: int


def own_values(config: ConfigDict) -> dict[str, float]:
    """The hyper-parameters that a config gives to all members but those that its grid or search gives others."""
    own = {name: float(config.train[name]) for name in HYPER_NAMES}
    return own if config.train.loss == "focal" else own | {"focal_gamma": 0.0}  # cross-entropy


def make_plan(config: ConfigDict, data: StudyData, maps: Mapping[str, list[FeatureMap]]) -> Plan:
    """Deals out folds and inner splits and prepares the data.

    Args:
        config: The config.
        data: The data set.
        maps: What was fitted before and is used as it is; empty in a new run.

    Raises:
        UserError: The data set is too small, or the config names a fold that there is not.
    """
    scheme = "loso" if config.folds.scheme == "loso" else config.folds.group or config.folds.scheme
    train_clips = np.flatnonzero(data.training)
    clip_fold = np.full(len(data.clip_name), -1, np.int32)
    clip_fold[train_clips] = make_folds(
        data.clip_labels[train_clips],
        data.clip_subject[train_clips],
        scheme=scheme,
        num_folds=config.folds.num,
        seed=config.folds.seed,
    )
    num_folds = int(clip_fold.max()) + 1
    folds = tuple(config.study.only_folds) or tuple(range(num_folds))
    if not set(folds) <= set(range(num_folds)):
        raise UserError(f"config.study.only_folds={folds}: the folds are 0 to {num_folds - 1}")
    seeds = range(config.study.first_seed, config.study.first_seed + config.study.num_seeds)
    own = own_values(config)
    members = make_members(folds, seeds, own, config.grid, draw_candidates(config, own))
    twice, count = collections.Counter(member.id for member in members).most_common(1)[0]
    if count > 1:
        raise UserError(f"config.grid and config.study.only_folds make two members {twice}; name each value once")

    device_maps = {}
    if uses_flow(config):
        flow, maps = prepare_flow(data, clip_fold, num_folds, config.data.normalise, maps)
        inputs = {"flow": flow[None]}
        if maps["flow"]:
            device_maps["flow"] = tuple(
                np.stack([getattr(m, name) for m in maps["flow"]]) for name in ("mean", "scale")
            )
    else:
        steps = {name: dict(step) for name, step in config.data.modalities.items()}
        prepared, maps = prepare_features(data, clip_fold, num_folds, steps, maps)
        inputs = {"features": prepared, "frame_mask": data.frame_mask[None]}
    labels = np.maximum(data.clip_labels, 0)[data.sample_clip].astype(np.float32)  # (N, L)

    sample_fold = clip_fold[data.sample_clip]  # (N,)
    inner = np.zeros((len(members), len(sample_fold)), bool)
    splits: dict[tuple[int, int], np.ndarray] = {}
    for row, member in enumerate(members):
        if (member.fold, member.seed) not in splits:
            rest = train_clips[clip_fold[train_clips] != member.fold]
            clip_inner = np.zeros(len(clip_fold), bool)
            clip_inner[rest] = inner_split(
                data.clip_labels[rest],
                data.clip_subject[rest],
                scheme=scheme,
                num_inner=config.study.num_inner,
                fold=member.fold,
                seed=member.seed,
            )
            splits[member.fold, member.seed] = clip_inner[data.sample_clip]
        inner[row] = splits[member.fold, member.seed]
    heldout = np.stack([sample_fold == member.fold for member in members])  # (M, N)
    train_mask = (sample_fold >= 0) & ~heldout & ~inner  # (M, N)
    num_watched = int((inner | heldout).sum(axis=1).max())
    recipe = engine.Recipe(
        epochs=config.train.epochs,
        batch_size=config.train.batch_size,
        optimiser=config.train.optimiser,
        schedule=config.train.schedule,
        warmup_fraction=config.train.warmup_fraction,
        exclusive=data.task == MULTI_CLASS,
        focal_gamma=None if config.train.loss == "focal" else 0.0,
        balanced=config.train.class_weights == "balanced",
        patience=config.train.patience,
        **(
            {
                "flip": config.data.flip,
                "shift": config.data.shift,
                "mirrored": tuple(channel == "u" for channel in config.data.channels),
            }
            if uses_flow(config)
            else {}
        ),
    )
    most = int(train_mask.sum(axis=1).max())
    num_steps = -(-most // recipe.batch_size)
    last_batch = -(-(most - (num_steps - 1) * recipe.batch_size) // 8) * 8  # vectors of eight samples
    saved = (recipe.batch_size - last_batch) / (num_steps * recipe.batch_size)
    return Plan(
        data=data,
        clip_fold=clip_fold,
        members=members,
        inputs=[
            engine.member_inputs(
                member_key(config.seed, member),
                member.fold,
                dict(member.hyper),
                train_mask[row],
                inner[row],
                heldout[row],
                num_watched,
            )
            for row, member in enumerate(members)
        ],
        inner=inner,
        arrays=engine.Arrays(inputs=inputs, labels=labels, maps=device_maps),
        maps=maps,
        recipe=recipe,
        num_steps=num_steps,
        last_batch=last_batch if uses_flow(config) and saved >= _WORTH_COMPILING else 0,
    )


def planned_fields(plan: Plan) -> dict[str, np.ndarray]:
    """What a study's results say of its data and members, whatever came of them: fields of :class:`StudyResults`."""
    data, members = plan.data, plan.members
    return {
        "label_name": np.array(data.label_names, dtype=np.str_),
        "task": np.array(data.task),
        "clip_name": data.clip_name,
        "clip_id": data.clip_id,
        "clip_subject": data.clip_subject,
        "clip_split": data.clip_split,
        "clip_database": data.clip_database,
        "clip_labels": data.clip_labels,
        "clip_fold": plan.clip_fold,
        "sample_clip": data.sample_clip,
        "sample_view": data.sample_view,
        "sample_phase": data.sample_phase,
        "member_id": np.array([member.id for member in members]),
        "member_fold": np.array([member.fold for member in members], np.int32),
        "member_seed": np.array([member.seed for member in members], np.int32),
        "inner": plan.inner,
    }


def block_size(num_members: int, num_devices: int, device_kind: str, wanted: int) -> int:
    """How many members one compiled call trains.

    On a CPU it does not depend on the number of devices, so neither does any result, to the last bit. Other devices
    share the members evenly, in as few calls as do: a place that is filled up costs as much as one that trains.

    Args:
        num_members: Members of the study.
        num_devices: Devices at hand.
        device_kind: ``'cpu'`` or another platform.
        wanted: ``config.study.members_together``; 0 to choose.

    Returns:
        The number, at most ``num_members``; blocks are of nearly equal size.
    """
    if wanted:
        return min(wanted, num_members)
    if device_kind == "cpu":
        blocks = -(-num_members // _CPU_BLOCK)
        return -(-num_members // blocks)
    rounds = -(-num_members // (num_devices * _ACCELERATOR_BLOCK))
    return -(-num_members // (num_devices * rounds))


def _compiled_code(model: str) -> str:
    """What C++ a CPU trains a model with, '' for none."""
    versions = (cpu_blocks if model in CONVOLUTIONAL else cpu_fusion).version(), cpu_adam.version()
    return ", ".join(filter(None, versions))


def _settled_block_size(workdir: Path, chosen: int | None, platform: str, compiled: str) -> int:
    """The block size that the run began with: a resumed run cuts its members into the same blocks.

    Args:
        workdir: Folder of the run.
        chosen: What a new run settles; None in a process that follows another.
        platform: Of the devices.
        compiled: The version of a CPU's compiled code, '' for none.

    Returns:
        The number of members of a block.

    Raises:
        UserError: The run began on another kind of device, or with other loops or compiled code: results differ
                in their last bits.
    """
    path = workdir / _BLOCKS
    merged = loops_are_merged()
    if chosen is not None and not path.is_file():
        settled = {
            "members_together": chosen,
            "platform": platform,
            "merged_loops": merged,
            "compiled": compiled,
        }
        atomic_write_text(path, json.dumps(settled) + "\n")
    again = "delete it and run the same command again, which settles it anew"
    settled = read_json(path, again)
    if not isinstance(settled.get("members_together"), int) or "platform" not in settled:
        raise UserError(f"{path}: lacks members_together or platform; {again}")
    if settled["platform"] != platform:
        raise UserError(
            f"{workdir} holds a study that began on {settled['platform']} and would go on on {platform}; set "
            f"config.platform={settled['platform']!r}, or choose another --workdir"
        )
    if settled.get("merged_loops", merged) != merged:
        began, goes_on, option = ("without", "with", NOT_MERGED) if merged else ("with", "without", MERGED)
        raise UserError(
            f"{workdir} holds a study that began {began} XLA's merged loops and would go on {goes_on} them; add "
            f"--{OPTIONS}={option} to XLA_FLAGS before JAX starts, or choose another --workdir"
        )
    if (began := settled.get("compiled", "")) != compiled:
        remedy = "set CXX to the C++ compiler that it began with" if began else "set CXX= to go without"
        raise UserError(
            f"{workdir} holds a study that began with {began or 'no'} compiled C++ and would go on with "
            f"{compiled or 'none'}; {remedy}, on the same kind of CPU and with the same version of this software, or "
            "choose another --workdir"
        )
    return settled["members_together"]


class _Stopped(Exception):
    """A signal asked to stop; the block's checkpoint is saved."""


@contextlib.contextmanager
def _kept_programs(folder: Path, platform: str, leads: bool) -> Iterator[None]:
    """Keeps what is compiled where a compiler chooses by chance: a resumed run, and every device, takes the same.

    A folder that the user has chosen, by the config or by JAX's own options, keeps them as well, and stays.
    """
    if not compiles_by_timing(platform):
        yield
        return
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    chosen = before["jax_compilation_cache_dir"]
    if leads:  # alone: another may be writing later on
        _drop_cut_programs(folder)
    jax.config.update("jax_compilation_cache_dir", chosen or str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()  # which may have opened another folder, or found none
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def _drop_cut_programs(folder: Path) -> None:
    """Removes what a kill cut short: JAX neither reads nor replaces it, so that every start would compile anew."""
    for path in folder.glob("*-cache"):
        with contextlib.suppress(OSError):
            content = path.read_bytes()
            try:
                whole = bool(decompress_executable(content))
            except Exception:  # of the one or the other library that compresses
                whole = False
            if not whole:
                path.unlink()


def _train_members(
    config: ConfigDict,
    workdir: Path,
    plan: Plan,
    learner: Learner,
    devices: Sequence[jax.Device],
    group: Group,
    programs: Path,
) -> int:
    with _kept_programs(programs, devices[0].platform, group.leads):
        return _train_on(devices, config, workdir, plan, learner, group)


def _train_on(
    devices: Sequence[jax.Device], config: ConfigDict, workdir: Path, plan: Plan, learner: Learner, group: Group
) -> int:
    platform, num_members = devices[0].platform, len(plan.members)
    one_by_one = platform == "cpu"
    compiled = _compiled_code(config.model.name) if one_by_one else ""
    if group.leads:
        _tell_devices(group, devices)
    told = group.wait("devices")
    if {each["platform"] for each in told} != {platform}:
        kinds = ", ".join(f"{each['platform']} on {each['host']}" for each in told)
        raise UserError(f"the processes are of different kinds ({kinds}); set config.platform to one that all have")
    sharing = sum(each["count"] for each in told if each["host"] == socket.gethostname()) - told[group.index]["count"]
    programs = _programs(learner, plan.recipe, plan.num_steps, plan.last_batch, one_by_one)

    def fit(wanted: int) -> MemoryPlan:
        used = devices[: -(-num_members // wanted)]
        return plan_memory(
            programs,
            plan.arrays,
            plan.inputs[0],
            config.study.epochs_per_call,
            sorted(set(used), key=lambda device: device.id),
            wanted,
            free_bytes(used[0], sharing + len(used)),
        )

    memory = None
    if group.leads:
        write_tables(workdir, plan.data, plan.clip_fold, plan.members)
        _save_maps(workdir, plan.maps)
        total = sum(each["count"] for each in told)
        wanted = block_size(num_members, total, platform, config.study.members_together)
        if not (config.study.members_together or (workdir / _BLOCKS).is_file()):
            memory = fit(wanted)
            wanted = memory.together
        size = _settled_block_size(workdir, wanted, platform, compiled)
        blocks = _blocks(num_members, size)
        _gather_metrics(workdir, plan, blocks)
        if compiles_by_timing(platform):
            memory = fit(size)  # before the other processes, which take what it has compiled
            compile_ends(programs, plan.arrays, plan.inputs[0], devices[0], memory.together)
        group.tell("ready", finished=False)
    else:
        size = _settled_block_size(workdir, None, platform, compiled)
        blocks = _blocks(num_members, size)
    devices = devices[: len(blocks)]
    if memory is None or memory.together != size:
        memory = fit(size)
    folds = len({member.fold for member in plan.members})
    used = len(set(devices))
    say(
        f"{config.name}: {num_members} members ({folds} folds x {num_members // folds}), {memory.together} "
        f"{'in turn' if one_by_one else 'together'} in one program, on {used} {platform} "
        f"device{'s' if used > 1 else ''}"
        f"{f' of process {group.index} of {group.count}' if group.count > 1 else ''} ({_memory_use(memory)})"
    )
    stop = threading.Event()
    show = progress if group.leads else Silent
    with show(total=num_members * plan.recipe.epochs, desc="training", unit="member-epochs") as bar:
        runner = _BlockRunner(config, workdir, plan, programs, size, one_by_one, stop, bar, group)
        runner.together.update(dict.fromkeys(devices, memory.together))
        runner.epochs.update(memory.epochs)
        own, dealt = _first_blocks([each["count"] for each in told], group.index)
        signum = _run_on_devices(runner, blocks, devices, stop, group, own, dealt)
    if signum and not all(block_path(workdir, number).is_file() for number in range(len(blocks))):
        name = signal.Signals(signum).name
        group.fail(f"was stopped by {name}")
        say(f"stopped by {name}; checkpoints are in {workdir / 'checkpoints'}; run the same command again to go on")
        return 128 + signum
    if group.leads:
        _await_files(workdir, [block_path(workdir, number) for number in range(len(blocks))])
        _assemble(workdir, plan, blocks, learner)
    return 128 + signum if signum else 0


def _blocks(num_members: int, size: int) -> list[range]:
    return [range(start, min(start + size, num_members)) for start in range(0, num_members, size)]


def _first_blocks(counts: Sequence[int], index: int) -> tuple[list[int], int]:
    """Deals the first blocks out, one a device, round the processes; the rest goes to whoever is free.

    Args:
        counts: Number of devices of each process.
        index: This process.

    Returns:
        The first block of each of its devices, and the number of blocks that are dealt out so.
    """
    places = sorted((device, process) for process, count in enumerate(counts) for device in range(count))
    return [places.index((device, index)) for device in range(counts[index])], len(places)


def _memory_use(memory: MemoryPlan) -> str:
    needed = f"{memory.needed / 2**30:.2g} GiB"
    return f"{needed} of {memory.free / 2**30:.3g} GiB each" if memory.free else f"{needed} each"


def _run_on_devices(runner, blocks, devices, stop: threading.Event, group: Group, own: list[int], dealt: int) -> int:
    """One thread a device, each taking its own block, then the group's next; returns a stopping signal's number, or 0.

    All processes of the group leave together, so that each learns of what happens to another.
    """
    received: list[int] = []

    def on_signal(signum, frame):
        del frame
        received.append(signum)
        stop.set()

    def work(device, number):
        with jax.default_device(device):
            while not stop.is_set():
                number = dealt + group.claim() if number is None else number
                if number >= len(blocks):
                    return
                runner.run(number, blocks[number], device)
                number = None

    main_thread = threading.current_thread() is threading.main_thread()
    handled = (signal.SIGTERM, signal.SIGINT) if main_thread else ()
    previous = {signum: signal.signal(signum, on_signal) for signum in handled}
    pool = concurrent.futures.ThreadPoolExecutor(len(devices), thread_name_prefix="device")
    failure = None
    try:
        first = itertools.chain(own, itertools.repeat(None))
        futures = [pool.submit(work, device, number) for device, number in zip(devices, first, strict=False)]
        pending, deadline, trained, ended = set(futures), None, False, False
        while pending or not (ended or stop.is_set() or failure):
            done, pending = concurrent.futures.wait(pending, timeout=0.2)
            for future in done:
                error = future.exception()
                if error is not None and not isinstance(error, _Stopped):
                    failure = failure or error
                    stop.set()  # the other devices save and stop
            if not pending and not stop.is_set():
                if not trained:
                    group.tell("trained")
                    trained = True
                ended = group.told("trained") is not None
                if not ended:
                    time.sleep(0.2)
            runner.show_others()
            try:
                group.check()
            except LostProcess as error:
                failure = failure or error
                stop.set()
            if received or isinstance(failure, LostProcess):
                grace = _GRACE_SECONDS if received else _LOSS_GRACE_SECONDS
                deadline = deadline or time.monotonic() + grace
            if deadline and time.monotonic() > deadline:
                what = f"stopped by {signal.Signals(received[0]).name}" if received else f"error: {failure}"
                say(
                    f"{what} in the middle of a long call; the last checkpoints are kept; run the same command again "
                    "to go on"
                )
                os._exit(128 + received[0] if received else EXIT_USER_ERROR)
    finally:
        pool.shutdown(wait=True)
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    if failure is not None:
        raise failure
    return received[0] if received else 0


class _BlockRunner:
    """Trains one block of members at a time on one device; blocks share nothing but the compiled programs."""

    def __init__(self, config, workdir, plan, programs, size, in_turn, stop, bar, group):
        self._config, self._workdir, self._plan = config, workdir, plan
        self._programs, self._size, self._in_turn = programs, size, in_turn
        self._stop, self._bar, self._group = stop, bar, group
        self.together: dict[jax.Device, int] = {}  # members in one call
        self.epochs: dict[jax.Device, Callable] = {}  # compiled for so many
        self._lock = threading.Lock()
        self._arrays: dict[jax.Device, engine.Arrays] = {}  # the data, once on each device
        self._counted: dict[int, int] = {}  # member-epochs of each block
        self._others = 0

    def run(self, number: int, rows: range, device: jax.Device) -> None:
        """Trains members ``rows``, from their newest checkpoint where there is one.

        Where the device has too little memory after all, it goes on from there with half of the members in a call.

        Raises:
            _Stopped: A signal came; what was reached is saved.
            UserError: Results cannot be written, or the device has too little memory for one member.
        """
        while True:
            together = self.together[device]
            try:
                return self._run(number, rows, device)
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).strip().splitlines()[0][:200]
            # Only here: the exception holds on to the arrays of the call that failed.
            if together == 1:
                raise UserError(
                    f"{device}: too little memory for a single member ({reason}); end what else uses this device, or "
                    "set a smaller config.train.batch_size, with another --workdir"
                )
            with self._lock:
                self.together[device] = min(self.together[device], -(-together // 2))
                self.epochs.pop(device, None)
            say(
                f"{device}: too little memory for {together} members together; goes on from the last checkpoint with "
                f"{self.together[device]}"
            )

    def _run(self, number: int, rows: range, device: jax.Device) -> None:
        plan, epochs = self._plan, self._plan.recipe.epochs
        checkpoints = BlockCheckpoints(self._workdir / "checkpoints" / f"block_{number:04d}")
        if block_path(self._workdir, number).is_file():
            checkpoints.remove()  # a kill may have come before they were
            self._count(number, len(rows) * epochs, trained=False)
            return
        if device not in self._arrays:
            self._arrays[device] = jax.device_put(plan.arrays, device)
        arrays = self._arrays[device]
        # The last block is filled up with copies of its first member, so that all blocks run the same program.
        padded = [*rows, *[rows[0]] * (self._size - len(rows))]
        members = jax.device_put(engine.stack_members([plan.inputs[row] for row in padded]), device)
        together = self.together[device]
        planned = self.epochs.get(device, self._compiled(self._programs.epochs, device))
        in_parts = functools.partial(over_parts, together, device)
        history = _empty_history(self._size, epochs, plan)
        epoch = 0
        if checkpoints.latest():
            state = jax.eval_shape(self._programs.init, arrays, members)
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), {"state": state, **history})
            epoch, saved = checkpoints.restore(abstract, say)
            state = saved.pop("state")
            if together >= self._size:
                state = jax.device_put(state, device)
            history = {name: np.array(values) for name, values in saved.items()}
        else:
            state = in_parts(functools.partial(self._compiled(self._programs.init, device), arrays), members)
            copies = np.arange(self._size) >= len(rows)
            state = state.replace(stopped=state.stopped | copies)  # they take no time
        self._forget_after([plan.members[row].id for row in rows], epoch)
        self._count(number, len(rows) * epoch, trained=False)
        saved_at = time.monotonic()
        stride = self._config.study.epochs_per_call
        places = Places(members, state, together, device, self._in_turn)
        del state
        while epoch < epochs:
            # Beyond the last they do nothing.
            numbers = jax.device_put(np.arange(epoch + 1, epoch + 1 + stride, dtype=np.int32), device)

            def call(width, members, state, numbers=numbers):
                train_epochs = planned if width == together else self._compiled(self._programs.epochs, device)
                return train_epochs(arrays, members, state, numbers)

            trained = places.train(call)
            if trained is None:
                break
            count = min(stride, epochs - epoch)
            _record(history, *trained, epoch, count)
            epoch += count
            self._log(rows, history, epoch - count, epoch)
            self._count(number, len(rows) * epoch, trained=True)
            if self._stop.is_set():
                checkpoints.save(epoch, {"state": jax.device_get(places.joined()), **history})
                raise _Stopped
            if epoch < epochs and time.monotonic() - saved_at >= self._config.study.checkpoint_seconds:
                saved_at = time.monotonic()
                with _kept_going():
                    checkpoints.save(epoch, {"state": jax.device_get(places.joined()), **history})
        state = places.joined()
        self._count(number, len(rows) * epochs, trained=False)
        finish = functools.partial(self._compiled(self._programs.finish, device), arrays)
        results = in_parts(finish, members, state)
        self._save_block(number, rows, results, state, history)
        checkpoints.remove()

    def _compiled(self, program: Callable, device: jax.Device) -> Callable:
        """The program, compiled before its call where one thread must not compile beside another."""
        if not compiles_by_timing(device.platform):
            return program
        return lambda *arguments: compile_one(program, device, arguments)(*arguments)

    def _save_block(self, number, rows, results, state, history) -> None:
        results = {name: np.asarray(value)[: len(rows)] for name, value in results.items()}
        for row, step in zip(rows, results["diverged_at"], strict=True):
            if step >= 0:
                name = self._plan.members[row].id
                say(f"warning: member {name} diverged at step {step} and was frozen; the others go on")
        variables = jax.tree.map(lambda x: np.asarray(x)[: len(rows)], state.best_variables)
        save_tree(self._workdir / "params" / f"block_{number:04d}", variables)
        atomic_savez(
            block_path(self._workdir, number),
            **results,
            **{f"curve_{name}": values[: len(rows)] for name, values in history.items()},
            best_epoch=np.asarray(state.best_epoch)[: len(rows)],
        )

    def _count(self, number: int, reached: int, trained: bool) -> None:
        """Shows that a block has come to ``reached`` member-epochs; what needed no training is not taken for speed."""
        with self._lock:
            count = reached - self._counted.get(number, 0)
            self._counted[number] = reached
            if trained:
                self._bar.update(count)
            else:
                skip(self._bar, count)
            self._group.tell_done(sum(self._counted.values()))

    def show_others(self) -> None:
        """Shows what the other processes have done."""
        with self._lock:
            done = self._group.done_by_others()
            if done != self._others:
                self._bar.update(done - self._others)
                self._others = done

    def _forget_after(self, ids: Sequence[str], epoch: int) -> None:
        """Drops lines of epochs that are about to be trained again, and one that a kill cut short."""
        path = _metrics_path(self._workdir, self._group.index)
        with self._lock:
            if path.is_file():
                atomic_write_text(path, "".join(_metrics_until([path], dict.fromkeys(ids, epoch))))

    def _log(self, rows, history, first, last) -> None:
        """Appends one line a member and epoch."""
        lines = _metric_lines([self._plan.members[row].id for row in rows], history, first, last)
        path = _metrics_path(self._workdir, self._group.index)
        with self._lock, _kept_going():
            try:
                with path.open("a") as stream:
                    stream.write("".join(lines))
            except OSError as error:
                raise UserError(f"{path}: cannot be written ({error.strerror}); free space there") from error


def _metrics_path(workdir: Path, index: int) -> Path:
    """Where process ``index`` tells about epochs: no two of them append to one file."""
    return workdir / (f"metrics.{index}.jsonl" if index else "metrics.jsonl")


def _all_metrics(workdir: Path) -> list[Path]:
    return [workdir / "metrics.jsonl", *sorted(workdir.glob("metrics.*.jsonl"))]


def _metrics_until(paths: Sequence[Path], epochs: Mapping[str, int]) -> list[str]:
    """Lines of members up to their epoch in ``epochs`` (all of them, without one); a line that was cut short is out."""
    kept = []
    for line in itertools.chain.from_iterable(
        path.read_text(errors="replace").splitlines(keepends=True) for path in paths
    ):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            if row["epoch"] <= epochs.get(row["member"], row["epoch"]):
                kept.append(line)
    return kept


def _gather_metrics(workdir: Path, plan: Plan, blocks: Sequence[range]) -> None:
    """Brings together what the processes of an earlier start told, without what their checkpoints do not hold."""
    paths = [path for path in _all_metrics(workdir) if path.is_file()]
    if not paths:
        return
    reached = {}
    for number, rows in enumerate(blocks):
        if not block_path(workdir, number).is_file():
            epoch = BlockCheckpoints(workdir / "checkpoints" / f"block_{number:04d}").latest() or 0
            reached.update({plan.members[row].id: epoch for row in rows})
    atomic_write_text(workdir / "metrics.jsonl", "".join(_metrics_until(paths, reached)))
    for path in paths:
        if path.name != "metrics.jsonl":
            path.unlink()


@contextlib.contextmanager
def _kept_going():
    """Makes a failure to write a warning: what is in memory is worth more than an early end, and writing is retried."""
    try:
        yield
    except UserError as error:
        say(f"warning: {error}; training goes on and tries again")


def block_path(workdir: Path, number: int) -> Path:
    """Where a finished block keeps its predictions until all blocks are joined."""
    return workdir / "blocks" / f"block_{number:04d}.npz"


def _empty_history(size: int, epochs: int, plan: Plan) -> dict[str, np.ndarray]:
    watched = plan.inputs[0].watched.shape[0]
    history = {name: np.full((size, epochs), np.nan, np.float32) for name in _HISTORY}
    history["probabilities"] = np.full((size, epochs, watched, plan.data.clip_labels.shape[1]), np.nan, np.float32)
    return history


def _record(history: dict[str, np.ndarray], rows: np.ndarray, watch: engine.Watch, epoch: int, count: int) -> None:
    for name, values in history.items():
        seen = getattr(watch, name)  # (r, E, ...)
        values[rows, epoch : epoch + count] = seen[:, :count]


def _metric_lines(ids: Sequence[str], history: Mapping[str, np.ndarray], first: int, last: int) -> list[str]:
    lines = []
    for epoch in range(first, last):
        for row, member in enumerate(ids):
            values = {name: float(history[name][row, epoch]) for name in _HISTORY}
            if all(np.isnan(value) for value in values.values()):
                continue  # the member had stopped
            values = {name: round(value, 6) if np.isfinite(value) else None for name, value in values.items()}
            lines.append(json.dumps({"member": member, "epoch": epoch + 1, **values}) + "\n")
    return lines


def _save_maps(workdir: Path, maps: Mapping[str, list[FeatureMap] | None]) -> None:
    """Keeps what was fitted on training folds: a resumed run must not depend on fitting it to the same bits again."""
    arrays = {}
    for modality, fitted in maps.items():
        for fold, feature_map in enumerate(fitted or ()):
            for field in dataclasses.fields(feature_map):
                value = getattr(feature_map, field.name)
                if value is not None:
                    arrays[f"{modality}/{fold}/{field.name}"] = value
    atomic_savez(workdir / _MAPS, **arrays)


def _load_maps(
    workdir: Path, remedy: str = "delete it and run the same command again, which fits it anew"
) -> dict[str, list[FeatureMap]]:
    """What :func:`_save_maps` kept; nothing in a new folder."""
    path = workdir / _MAPS
    if not path.is_file():
        return {}
    fields: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    for key, values in read_arrays(path, remedy).items():
        modality, fold, field = key.rsplit("/", 2)
        fields.setdefault(modality, {}).setdefault(int(fold), {"projection": None})[field] = values
    return {modality: [FeatureMap(**folds[fold]) for fold in range(len(folds))] for modality, folds in fields.items()}


def _assemble(workdir: Path, plan: Plan, blocks: Sequence[range], learner: Learner) -> None:
    """Joins the blocks into ``predictions.npz`` and ``metrics.jsonl``, members in the study's order."""
    parts = []
    for number, rows in enumerate(blocks):
        path, again = block_path(workdir, number), "delete it and run the same command again, which trains its members"
        parts.append(read_arrays(path, again))
        if len(parts[-1]["probabilities"]) != len(rows):
            raise UserError(f"{path}: is not of the {len(rows)} members that it should be of; {again}")
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    members = plan.members
    watched = np.stack([np.asarray(member.watched) for member in plan.inputs])
    heldout = np.stack([np.asarray(member.watched_heldout) for member in plan.inputs])
    rows = int(heldout.sum(axis=1).max())  # held-out samples stand first
    diverged = joined["diverged_at"] >= 0
    hyper = {
        name: np.array([dict(member.hyper)[name] for member in members], np.float32) for name, _ in members[0].hyper
    }
    results = StudyResults(
        **planned_fields(plan),
        member_status=np.where(diverged, "diverged", "ok"),
        member_stop_epoch=joined["best_epoch"],
        probabilities=joined["probabilities"],
        curve_epoch=np.arange(1, plan.recipe.epochs + 1, dtype=np.int32),
        **{f"curve_{name}": joined[f"curve_{name}"] for name in _HISTORY},
        curve_sample=np.where(heldout, watched, -1)[:, :rows],
        curve_probabilities=joined["curve_probabilities"][:, :, :rows],
        gate=joined.get("gate", np.zeros((len(members), 0), np.float32)),
        gate_name=np.array(learner.gate_names, dtype=np.str_),
        stream_name=np.array(learner.stream_names, dtype=np.str_),
        hyper=hyper,
        attention={
            name.removeprefix("attention_"): values[:, :rows]
            for name, values in joined.items()
            if name.startswith("attention_")
        },
    )
    lines = _metric_lines(
        [member.id for member in members],
        {name: joined[f"curve_{name}"] for name in _HISTORY},
        0,
        plan.recipe.epochs,
    )
    atomic_write_bytes(workdir / "metrics.jsonl", "".join(lines).encode())
    results.save(workdir / FILENAME)
    for path in _all_metrics(workdir)[1:]:
        path.unlink()
    shutil.rmtree(block_path(workdir, 0).parent, ignore_errors=True)


def _show_clips(config: ConfigDict, workdir: Path) -> None:
    """Keeps frames of a few clips for the report, or takes them away, as the config wants it."""
    pictures, demo = config.report.pictures, config.data.dataset.endswith("/demo")
    if pictures == "never" or (pictures == "demo" and not demo):
        (workdir / shown.FILENAME).unlink(missing_ok=True)
        return
    results = StudyResults.load(workdir)
    if uses_flow(config) or not results.attention:
        return
    try:
        shown.keep_shown(config.data.to_dict(), results, workdir)
    except UserError as error:
        kept = "those of before are kept" if (workdir / shown.FILENAME).is_file() else "there are none in the report"
        say(f"warning: no pictures of clips could be made, {kept}: {error}")


def _report(config: ConfigDict, workdir: Path) -> None:
    from mer_jax.report.html import write_report
    from mer_jax.report.tables import terminal_table

    _show_clips(config, workdir)
    print(terminal_table(write_summary(workdir)))
    if config.data.dataset.endswith("/demo"):
        print("These are rendered demo clips: the numbers show that the software works and are no benchmark.")
    print(f"report: {write_report(workdir)}")
