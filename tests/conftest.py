"""Strict surroundings for every test: four CPU devices, rank promotion raises, warnings are errors."""

import os
import signal

# Before JAX is first imported: the tests of several devices need them, and none may touch an accelerator. The tests
# compile many small programs and run each for a moment, so LLVM is told to hurry.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4 --xla_backend_optimization_level=1"
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


@pytest.fixture
def rng(request):
    """A NumPy generator whose seed is the test's own name, so that no test depends on another."""
    return np.random.default_rng(list(request.node.nodeid.encode()))
