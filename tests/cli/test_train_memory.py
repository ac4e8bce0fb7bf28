"""A device that runs out of memory in the middle of a study costs time, and no bit of any result."""

import dataclasses
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import mer_jax.study.train as train_module
from mer_jax.errors import UserError

FUSION = Path(__file__).resolve().parents[2] / "configs" / "fusion.py"
FIVE = {
    "study.only_folds": (0,),
    "study.num_seeds": 5,
    "study.members_together": 5,
    "study.checkpoint_seconds": 0,
    "train.epochs": 5,
    "evaluation.thresholds": "fixed",
}


@pytest.fixture
def trained(challenge, finished, tmp_path, monkeypatch, capsys):
    """Trains five members in this process, in ``workdir``; some calls of the block fail."""
    del finished  # has built the data set
    names = ("jax_default_matmul_precision", "jax_compilation_cache_dir", "jax_default_device")
    kept = {name: getattr(jax.config, name) for name in names}
    plan_memory, make_programs = train_module.plan_memory, train_module._programs

    def run(workdir, failing=(), **overrides):
        calls = []

        def scarce(function):
            def call(arrays, members, *others):
                calls.append(len(members.fold))
                if len(calls) in failing:
                    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nMore")
                return function(arrays, members, *others)

            call.lower = getattr(function, "lower", None)
            return call

        def planned(*arguments):
            plan = plan_memory(*arguments)
            return dataclasses.replace(plan, epochs={device: scarce(call) for device, call in plan.epochs.items()})

        def made(*arguments):
            programs = make_programs(*arguments)
            return programs._replace(epochs=scarce(programs.epochs))

        config = runpy.run_path(str(FUSION))["get_config"]()
        config.update_from_flattened_dict(challenge.overrides | FIVE | overrides)
        with monkeypatch.context() as patch:
            patch.setattr(train_module, "plan_memory", planned)
            patch.setattr(train_module, "_programs", made)
            patch.setattr(train_module, "_report", lambda *_, **__: None)
            assert train_module.train(config, tmp_path / workdir) == 0
        return calls, capsys.readouterr().err

    yield run
    for name, value in kept.items():
        jax.config.update(name, value)


def bits(workdir):
    with np.load(workdir / "predictions.npz") as archive:
        return {name: archive[name].tobytes() for name in archive.files}


def test_out_of_memory_halves_the_members_and_goes_on_from_the_checkpoint(trained, tmp_path):
    calls, told = trained("enough")
    assert calls == [5] * 5
    assert "5 members (1 folds x 5), 5 in turn in one program, on 1 cpu device (" in told and "GiB each)" in told
    calls, told = trained("scarce", failing=(4,))
    # Three epochs of five, then the rest in two parts, the second of which is filled up.
    assert calls == [*[5] * 4, *[3, 3] * 2]
    (line,) = [line for line in told.splitlines() if "too little memory" in line]
    assert "too little memory for 5 members together; goes on from the last checkpoint with 3" in line
    assert bits(tmp_path / "scarce") == bits(tmp_path / "enough")
    lines = (tmp_path / "scarce" / "metrics.jsonl").read_text()
    assert lines == (tmp_path / "enough" / "metrics.jsonl").read_text()


def test_out_of_memory_for_one_member_is_one_line(trained):
    with pytest.raises(UserError, match=r"too little memory for a single member \(RESOURCE_EXHAUSTED: .* 9 bytes.\); "):
        trained("nothing", failing=(1,), **{"study.num_seeds": 1})


@pytest.mark.slow
def test_out_of_memory_again_and_again(request, trained, tmp_path):
    older, newer = (f"--xla_cpu_use_fusion_emitters={value}" for value in ("false", "true"))
    if older in os.environ["XLA_FLAGS"] and newer not in os.environ["XLA_FLAGS"]:
        # The older way to write loops, quicker to compile, gives a program of one member other last bits.
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-m", "slow", request.node.nodeid],
            cwd=request.config.rootpath,
            env=kept | {"XLA_FLAGS": newer},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
        return
    trained("enough")
    calls, _ = trained("scarce", failing=(2, 4, 7))
    # The second part of three fails, too, so that its epoch is trained again by twos, and at last one by one.
    assert calls == [5, 5, 3, 3, 2, 2, 2, *[1] * 5 * 4]
    assert bits(tmp_path / "scarce") == bits(tmp_path / "enough")
