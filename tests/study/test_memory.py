"""The memory planner: what a program needs, what fits, and that it needs no second look."""

import jax
import numpy as np
import pytest

from mer_jax.models.registry import Learner
from mer_jax.study import engine, memory
from mer_jax.study.memory import MemoryPlan, free_bytes, plan_memory

SAMPLES, WIDTH = 12, 300
RECIPE = engine.Recipe(
    epochs=2,
    batch_size=4,
    optimiser="adamw",
    schedule="constant",
    warmup_fraction=0.0,
    exclusive=False,
    focal_gamma=0.0,
    balanced=False,
    patience=0,
)


def _init(key, inputs):
    return {"params": {"weight": jax.random.normal(key, (inputs["x"].shape[-1], 2))}}


def _apply(variables, inputs, sample_mask, train, hyper, dropout_key):
    del sample_mask, train, hyper, dropout_key
    return inputs["x"] @ variables["params"]["weight"], {}, {}


@pytest.fixture(scope="module")
def study():
    x = np.random.default_rng(0).normal(size=(1, SAMPLES, WIDTH)).astype(np.float32)
    arrays = engine.Arrays(inputs={"x": x}, labels=np.ones((SAMPLES, 2), np.float32))
    inner = np.arange(SAMPLES) < 3
    member = engine.member_inputs(
        jax.random.key(0), 0, {"learning_rate": 0.1, "weight_decay": 0.0}, ~inner, inner, np.zeros(SAMPLES, bool), 3
    )
    return engine.make_programs(Learner(_init, _apply), RECIPE, 3), arrays, member


def plan(study, wanted, free) -> MemoryPlan:
    return plan_memory(*study, 2, jax.devices()[:1], wanted, free)


@pytest.fixture(scope="module")
def unlimited(study):
    """Plans of 8, 16 and 24 members where memory has no limit."""
    return {together: plan(study, together, None) for together in (8, 16, 24)}


def test_members_cost_what_the_compiler_says_and_no_less_than_their_state(study, unlimited):
    assert [(each.together, each.free) for each in unlimited.values()] == [(8, None), (16, None), (24, None)]
    state = 4 * WIDTH * 2 * 4  # weights, two moments and the best weights, in float32
    needs = {together: each.needed for together, each in unlimited.items()}
    assert needs[8] > 8 * state + study[1].inputs["x"].nbytes
    slope = (needs[16] - needs[8]) / 8
    assert state <= slope < 4 * state
    assert needs[24] == pytest.approx(needs[16] + 8 * slope, rel=0.02)


def test_as_many_as_fit(study, unlimited):
    assert plan(study, 8, unlimited[8].needed).together == 8
    limit = unlimited[24].needed // 2
    less = plan(study, 24, limit)
    assert 10 <= less.together < 13 and less.needed <= limit < less.needed + unlimited[8].needed // 4
    assert plan(study, 8, 1).together == 1  # whatever it takes


def test_the_planned_program_is_the_one_that_trains(study):
    programs, arrays, member = study
    planned = plan_memory(*study, 2, jax.devices()[1:2], 3, None)
    assert list(planned.epochs) == jax.devices()[1:2]
    for device in jax.devices()[1:2]:
        data, members = jax.device_put((arrays, engine.stack_members([member] * 3)), device)
        numbers = jax.device_put(np.array([1, 2], np.int32), device)
        ours, _ = planned.epochs[device](data, members, programs.init(data, members), numbers)
        theirs, _ = programs.epochs(data, members, programs.init(data, members), numbers)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_compiler_that_runs_out_of_memory_is_asked_for_half(study, monkeypatch):
    asked, compile_epochs = [], memory.compile_epochs

    def refuse(programs, arrays, member, epochs, devices, together):
        asked.append(together)
        if together > 3:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.")
        return compile_epochs(programs, arrays, member, epochs, devices, together)

    monkeypatch.setattr(memory, "compile_epochs", refuse)
    assert plan(study, 9, 10**12).together == 3 and asked == [9, 5, 3]

    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(memory, "compile_epochs", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        plan(study, 9, 10**12)


class _Device:
    def __init__(self, platform, stats):
        self.platform, self._stats = platform, stats

    def memory_stats(self):
        return self._stats


def test_free_memory_is_the_devices_own_or_a_share_of_the_machines(monkeypatch):
    assert free_bytes(_Device("gpu", {"bytes_limit": 1000, "bytes_in_use": 250}), 4) == 600
    assert free_bytes(_Device("gpu", None), 4) is None
    monkeypatch.setattr(memory, "_machine_free", lambda: 8000)
    monkeypatch.setattr(memory, "_cgroup_free", lambda: None)
    assert free_bytes(_Device("cpu", None), 4) == 1600
    monkeypatch.setattr(memory, "_cgroup_free", lambda: 4000)
    assert free_bytes(_Device("cpu", None), 4) == 800


def test_what_a_machine_and_a_container_leave(tmp_path):
    info = tmp_path / "meminfo"
    info.write_text("MemTotal:  100 kB\nMemFree:  1 kB\nMemAvailable:   60 kB\n")
    assert memory._machine_free(info) == 60 * 1024
    assert memory._machine_free(tmp_path / "absent") > 2**28  # a machine without that file
    assert memory._cgroup_free(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._cgroup_free(tmp_path) is None
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("3000\n")
    assert memory._cgroup_free(tmp_path) == 2000
    (tmp_path / "memory.current").write_text("6000\n")
    assert memory._cgroup_free(tmp_path) == 0


def test_the_kind_of_error():
    assert memory.is_out_of_memory(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"))
    assert not memory.is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: x"))
    assert not memory.is_out_of_memory(ValueError("RESOURCE_EXHAUSTED"))
