"""Strict surroundings for every test: four CPU devices, rank promotion raises, warnings are errors."""

import importlib.metadata
import importlib.util
import os
import signal
from pathlib import Path

# Before JAX is first imported: the tests of several devices need them, and none may touch an accelerator. The tests
# compile many small programs and run each for a moment, so XLA is told to hurry, here and in the doors: its newer way
# to write loops alone takes as long as the rest of the compilation. A test that needs it runs itself in a process of
# its own. Later versions have no other way, and end the process at a flag that they do not know.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HURRIED_XLA"] = "--xla_backend_optimization_level=0" + (
    " --xla_cpu_use_fusion_emitters=false"
    if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11)
    else ""
)
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ["HURRIED_XLA"], os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=4"]
)
os.environ.setdefault("GLOG_minloglevel", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import pytest
from absl import flags

# A shell that starts the tests in its background has them ignore SIGINT, and so would the programs that they interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Some third-party modules read absl flags at import; pytest is no absl app and never parses them.
flags.FLAGS.mark_as_parsed()


# Folders whose files take long, the longest first.
LONG = ("cli", "data_builders", "study", "models", "extractors")


def pytest_configure(config):
    # pytest-xdist would start with the files of most tests and end with a single worker at a long one of few.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Long files start first, so that no worker has much to do when the others are done."""
    tests = Path(__file__).parent
    folders = {folder: place for place, folder in enumerate(LONG)}
    items.sort(key=lambda item: folders.get(item.path.relative_to(tests).parts[0], len(LONG)))


@pytest.fixture
def rng(request):
    """A NumPy generator whose seed is the test's own name, so that no test depends on another."""
    return np.random.default_rng(list(request.node.nodeid.encode()))


@pytest.fixture
def compiled():
    """A CPU's own code. Where there is a C++ compiler it must be had; without one there is none to test."""
    from mer_jax import compiled as code
    from mer_jax.models import cpu_blocks, cpu_fusion
    from mer_jax.study import cpu_adam

    if not code._compiler():
        pytest.skip("no C++ compiler here")
    assert cpu_blocks.version() and cpu_fusion.version() and cpu_adam.version()


@pytest.fixture(scope="session")
def make_cluster(tmp_path_factory):
    """Starts schedulers, to which tests start workers: ``make_cluster()``, see ``local_cluster.LocalCluster``."""
    spec = importlib.util.spec_from_file_location("local_cluster", Path(__file__).with_name("local_cluster.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = []

    def make():
        made.append(module.LocalCluster(tmp_path_factory.mktemp("cluster")))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


@pytest.fixture(scope="session")
def two_workers(make_cluster):
    """A cluster of two worker processes; a test may kill one, as another takes its place."""
    cluster = make_cluster()
    for _ in range(2):
        cluster.start_worker()
    cluster.await_workers(2)
    return cluster


@pytest.fixture
def cluster(two_workers, tmp_path):
    """A connection to those workers, for the folder ``tmp_path / "data"``."""
    from mer_jax.cluster import connect

    with connect(two_workers.address, tmp_path / "data") as connected:
        yield connected
