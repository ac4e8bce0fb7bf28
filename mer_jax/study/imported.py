"""A study of weights that others trained: predicted, scored and reported like our own, without training."""

import functools
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mer_jax.errors import UserError
from mer_jax.extractors.pt_files import load_state_dict
from mer_jax.files import atomic_write_text, exclusive, read_json
from mer_jax.models.registry import build_learner
from mer_jax.models.torch_weights import flax_variables
from mer_jax.study import engine
from mer_jax.study.checkpoints import save_tree
from mer_jax.study.config import validate
from mer_jax.study.devices import select_devices
from mer_jax.study.results import FILENAME, OK, StudyResults
from mer_jax.study.summary import write_summary
from mer_jax.study.train import Plan, load_data, make_plan, planned_fields
from mer_jax.study.validation import input_channels, validate_study
from mer_jax.study.workdir import check_data, check_workdir, start_workdir, write_tables

SUFFIX = ".pth"
_RECORD = "weights.json"
# What the published weights were trained on; the folds are the left-out subjects, one file each.
_TRAINED_ON = {
    "model.name": "ststnet",
    "folds.scheme": "loso",
    "data.channels": ("strain", "v", "u"),
    "data.phases": ("onset_apex",),
    "data.normalise": "none",
}


def import_study(
    config: ConfigDict,
    weights: str | os.PathLike,
    workdir: str | os.PathLike,
    *,
    allow_missing: bool = False,
    overrides: Mapping | None = None,
) -> None:
    """Turns weights of left-out subjects into the work folder of a finished study, and reports it.

    Every fold holds one subject out and is predicted by the weights that were trained without this subject: one
    member a fold, no inner splits, no epochs to look back on. What the folder's config says of training is the
    config's, and nobody followed it here.

    Args:
        config: A config of STSTNet on the data set that the weights were trained on.
        weights: Folder of ``<subject>.pth`` files.
        workdir: Where the study goes; one that holds this very study is only reported again.
        allow_missing: Whether subjects without a file are left out.
        overrides: Fields given on the command line, for the record.

    Raises:
        UserError: The config, the data or the files do not fit each other; the message names which.
    """
    validate_study(config)
    workdir = Path(workdir)
    # One member a fold, which has seen all of the training fold.
    config.study.update(num_seeds=1, first_seed=0, num_inner=0, only_folds=())
    config.train.patience = 0
    config.study.num_candidates = 0
    for points in (config.grid, config.search):
        for name in points:
            points[name] = ()
    _require_published(config)
    validate(config)
    jax.config.update("jax_default_matmul_precision", "highest")
    device = select_devices(config.platform)[0]
    data = load_data(config)
    subjects = np.unique(data.clip_subject[data.training]).tolist()  # the order of the folds
    files, strange = find_weights(weights, subjects, allow_missing)
    if strange:
        _say(f"note: {_count(strange, 'file')} of subjects that the data set lacks: {_list(strange)}")
    if len(files) < len(subjects):
        left_out = [subject for subject in subjects if subject not in files]
        _say(f"note: {_count(left_out, 'subject')} without weights, not scored: {_list(left_out)}")
        config.study.only_folds = tuple(number for number, subject in enumerate(subjects) if subject in files)
    check_workdir(config, workdir)
    with exclusive(workdir, functools.partial(_refuse_busy, workdir)):
        record = {subject: _fingerprint(path) for subject, path in files.items()}
        _check_record(workdir, record)
        if not (workdir / FILENAME).is_file():
            plan = make_plan(config, data, {})
            learner = build_learner(config.model, input_channels(config), len(data.label_names), device.platform)
            one = jax.tree.map(lambda x: x[0, :1], plan.arrays.inputs)
            expected = jax.eval_shape(learner.init, jax.random.key(0), one)
            variables = [
                flax_variables(
                    load_state_dict(files[subjects[member.fold]]), expected, str(files[subjects[member.fold]])
                )
                for member in plan.members
            ]
            start_workdir(config, workdir, overrides or {})
            check_data(workdir, data)
            atomic_write_text(workdir / _RECORD, json.dumps(record, indent=2) + "\n")
            _write(workdir, plan, learner, variables, device)
        _report(workdir, demo=config.data.dataset.endswith("/demo"))


def find_weights(
    weights: str | os.PathLike, subjects: Sequence[str], allow_missing: bool = False
) -> tuple[dict[str, Path], list[str]]:
    """Finds the file of each left-out subject, ``<subject>.pth``.

    Args:
        weights: The folder.
        subjects: All subjects of the data set.
        allow_missing: Whether subjects may be without a file.

    Returns:
        Subject to file, in the order of ``subjects``; and the names of files of subjects that the data set lacks.

    Raises:
        UserError: There is no such folder, it holds no weights of these subjects, or not of all of them.
    """
    folder = Path(weights)
    if not folder.is_dir():
        raise UserError(f"--weights={folder}: no such folder; it must hold a file <subject>{SUFFIX} a left-out subject")
    visible = (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))
    files = {path.stem.strip(): path for path in visible if path.suffix == SUFFIX}
    found = {subject: files[subject] for subject in subjects if subject in files}
    if not found:
        there = f"the {SUFFIX} files there are {_list(sorted(files))}" if files else f"there are no {SUFFIX} files"
        raise UserError(
            f"--weights={folder}: no weights of the data set's subjects, such as {subjects[0]}{SUFFIX}; {there}"
        )
    missing = [subject for subject in subjects if subject not in files]
    if missing and not allow_missing:
        raise UserError(
            f"--weights={folder}: no weights for {_count(missing, 'subject')} ({_list(missing)}); restore the files, "
            "or give --allow-missing to score the other subjects alone"
        )
    return found, sorted(set(files) - set(subjects))


def _require_published(config: ConfigDict) -> None:
    for field, expected in _TRAINED_ON.items():
        found = config
        for part in field.split("."):
            found = found.get(part)
        found = tuple(found) if isinstance(expected, tuple) and found is not None else found
        if found != expected:
            raise UserError(
                f"config.{field}={found!r}: the published weights were trained with {expected!r}; use "
                "configs/megc2019.py:ststnet"
            )


def _refuse_busy(workdir: Path) -> None:
    raise UserError(f"{workdir}: another process is at work there; wait for it, or choose another --workdir")


def _fingerprint(path: Path) -> dict[str, str]:
    try:
        return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _check_record(workdir: Path, record: Mapping) -> None:
    """Lets a folder hold one set of weights only."""
    path = workdir / _RECORD
    if path.is_file():
        if read_json(path, "choose another --workdir, or delete this one to start afresh") != record:
            raise UserError(f"{workdir} holds a study of other weights; choose another --workdir")
    elif (workdir / FILENAME).is_file():
        raise UserError(f"{workdir} holds a study that was trained; choose another --workdir")


def _write(workdir: Path, plan: Plan, learner, variables: Sequence, device: jax.Device) -> None:
    """Predicts with every member and leaves what a trained study leaves."""
    with jax.default_device(device):
        arrays = jax.device_put(plan.arrays, device)
        predict = jax.jit(functools.partial(_predict, learner, plan.recipe, arrays))
        outcome = [np.asarray(predict(m.fold, own)) for m, own in zip(plan.inputs, variables, strict=True)]  # (N, L)
    save_tree(workdir / "params" / "block_0000", jax.tree.map(lambda *leaves: np.stack(leaves), *variables))
    atomic_write_text(
        workdir / "blocks.json", json.dumps({"members_together": len(variables), "platform": device.platform}) + "\n"
    )
    write_tables(workdir, plan.data, plan.clip_fold, plan.members)
    _results(plan, np.stack(outcome)).save(workdir / FILENAME)


def _predict(learner, recipe, arrays, fold, variables) -> jax.Array:
    """``(N, L)`` probabilities of one member."""
    everything = jnp.arange(arrays.labels.shape[0], dtype=jnp.int32)
    logits, _ = engine.predict_samples(learner, variables, arrays, fold, everything, recipe.batch_size)
    return engine.class_probabilities(recipe, logits)


def _results(plan: Plan, probabilities: np.ndarray) -> StudyResults:
    count, num_labels = len(plan.members), len(plan.data.label_names)
    heldout = np.stack([np.asarray(member.watched_heldout) for member in plan.inputs])  # (M, V)
    rows = np.where(heldout, np.stack([np.asarray(member.watched) for member in plan.inputs]), -1)
    no_curve = np.zeros((count, 0), np.float32)
    return StudyResults(
        **planned_fields(plan),
        member_status=np.full(count, OK),
        member_stop_epoch=np.zeros(count, np.int32),
        probabilities=probabilities,
        curve_epoch=np.zeros(0, np.int32),
        curve_train_loss=no_curve,
        curve_inner_loss=no_curve,
        curve_heldout_loss=no_curve,
        curve_sample=rows.astype(np.int32),
        curve_probabilities=np.zeros((count, 0, rows.shape[1], num_labels), np.float32),
        gate=np.zeros((count, 0), np.float32),
        gate_name=np.zeros(0, np.str_),
        stream_name=np.zeros(0, np.str_),
    )


def _report(workdir: Path, demo: bool) -> None:
    from mer_jax.report.html import write_report
    from mer_jax.report.tables import terminal_table

    summary = write_summary(workdir)
    print(terminal_table(summary))
    # With all four digits of the published figures.
    pooled = {name: summary["honest"][name]["pooled"]["mean"] for name in ("macro_f1", "uar")}
    print(f"{summary['study']['clips']} clips: UF1 {pooled['macro_f1']:.4f}, UAR {pooled['uar']:.4f}")
    if demo:
        print("These are rendered demo clips: the numbers show that the software works and are no benchmark.")
    print(f"report: {write_report(workdir)}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _list(names: Sequence[str]) -> str:
    """Names, at most ten of them."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _count(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}{'s' if len(names) != 1 else ''}"
