"""A group of processes: two of them in one, each with a sentinel of its own."""

import socket
import threading
import time

import pytest

import mer_jax.study.hosts as hosts
from mer_jax.errors import UserError
from mer_jax.study.hosts import Group, LostProcess, join, open_group


def address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def together(count=2):
    """``count`` groups that have found each other."""
    where, found = address(), [None] * count

    def enter(index):
        found[index] = join(where, count, index, timeout=60)

    threads = [threading.Thread(target=enter, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(group.index, group.count) for group in found] == [(index, count) for index in range(count)]
    for group in found:
        group.begin()
    return found


def trouble(group, seconds=20):
    deadline = time.monotonic() + seconds
    while group.trouble() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return group.trouble()


def test_alone():
    with Group() as group:
        assert group.leads and group.count == 1 and group.trouble() is None
        group.begin()
        assert [group.claim() for _ in range(3)] == [0, 1, 2]
        assert group.told("ready") is None
        group.tell("ready", finished=True)
        assert group.wait("ready") == [{"finished": True}]
        group.begin()
        assert group.claim() == 0 and group.told("ready") is None  # another study


def test_two_share_stages_claims_and_progress_and_part_in_peace():
    first, second = together()
    assert first.leads and not second.leads
    second.tell("devices", count=3)
    assert first.wait("devices", [1]) == [{"count": 3}] and first.told("devices") is None
    first.tell("devices", count=2)
    assert second.wait("devices") == [{"count": 2}, {"count": 3}]
    claims = [group.claim() for _ in range(4) for group in (first, second)]
    assert sorted(claims) == list(range(8))
    second.tell_done(7, every=0)
    while first.done_by_others() != 7:
        first.check()
    for group in (first, second):
        group.begin()
    assert first.told("devices") is None and {first.claim(), second.claim()} == {0, 1} and second.done_by_others() == 0
    leaving = threading.Thread(target=second.__exit__, args=(None, None, None))
    leaving.start()
    first.__exit__(None, None, None)
    leaving.join()
    assert first._sentinel._process.returncode == second._sentinel._process.returncode == 0


def test_the_failure_of_one_is_told_by_all_and_its_followers_are_not_named():
    first, second, third = together(3)
    with pytest.raises(UserError), second:
        raise UserError("data.npz: damaged")
    assert trouble(first).endswith("failed (data.npz: damaged)")
    with pytest.raises(LostProcess), first:
        first.check()
    while "ended with the others" not in str(third._sentinel.states[0]):
        time.sleep(0.05)
    with pytest.raises(
        LostProcess, match=r"process 1 of 3 \(.*\) failed \(data.npz: damaged\); what was saved is kept"
    ):
        third.wait("never")
    third.__exit__(LostProcess, LostProcess("x"), None)


def test_a_process_that_is_gone_without_a_word_is_lost():
    first, second = together()
    second._sentinel.close(peacefully=False)  # what the kernel does for a process that is killed
    assert "process 1 of 2 (" in trouble(first) and first.trouble().endswith("was lost")
    with pytest.raises(LostProcess):
        first.wait("ready")
    first.__exit__(LostProcess, LostProcess("x"), None)


def test_the_loss_of_the_machine_where_all_meet():
    first, second = together()
    first._sentinel._process.kill()
    assert trouble(second).endswith("at which the others meet, cannot be reached")
    with pytest.raises(LostProcess):
        second.claim()
    for group in (first, second):
        group.__exit__(LostProcess, LostProcess("x"), None)


@pytest.mark.slow
def test_a_silent_machine_is_lost_within_its_heartbeat(monkeypatch):
    monkeypatch.setattr(hosts, "HEARTBEAT_SECONDS", 10)
    first, second = together()
    second._sentinel._process.send_signal(19)  # SIGSTOP: it neither speaks nor hangs up
    assert trouble(first, 30) == "process 1 of 2 has been silent for 10 s"
    second._sentinel._process.kill()
    for group in (first, second):
        group.__exit__(LostProcess, LostProcess("x"), None)


@pytest.mark.slow
def test_nobody_comes():
    where = address()
    with pytest.raises(UserError, match=rf"--coordinator={where}: the processes did not find each other \(.+\); start"):
        join(where, 2, 0, timeout=2)


def test_no_cluster_to_be_found(monkeypatch):
    for name in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"--distributed: JAX finds no cluster here \(SLURM, .* say --coordinator="):
        open_group(distributed=True)


def test_slurm_is_found_by_jax(monkeypatch):
    port = address().rpartition(":")[2]
    names = {"JOB_ID": "1", "STEP_NODELIST": "localhost", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}
    for name, value in names.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", port)
    with open_group(distributed=True) as group:
        assert (group.index, group.count) == (0, 1)


@pytest.mark.parametrize(
    "told, message",
    [
        ({"process_id": 1, "num_processes": 2}, "--coordinator: missing beside the other flags"),
        ({"coordinator": "a:1"}, "--num_processes and --process_id: missing"),
        ({"coordinator": "node1", "num_processes": 2, "process_id": 1}, "--coordinator=node1: must be host:port"),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
            r"--process_id=2: must be from 0 to --num_.* \(1\)",
        ),
    ],
)
def test_flags_that_do_not_fit(told, message):
    with pytest.raises(UserError, match=message):
        open_group(**told)


def test_without_flags_there_is_no_group():
    assert open_group().count == 1 and open_group()._sentinel is None
