"""Several arrays from one loop: an option of XLA's that a CPU leaves off, and that an update of Adam gains from.

Without it the new parameters and both new moments of a kernel take a loop each, and each loop reads anew from memory
what the others read. It is an option of the whole process: loops over the maps of convolutions take up to twice as long
with it, and iterations of optical flow have no end. So a library's function must not ask for it. ``scripts/train.py``
does, whose process trains one model and does nothing else; a program of one's own may before it uses JAX.
"""

import functools
import os
import re

import jax
from ml_collections import ConfigDict

from mer_jax.models.registry import CONVOLUTIONAL
from mer_jax.study.devices import current_platform

OPTIONS = "xla_backend_extra_options"
MERGED = "xla_cpu_use_multi_output_fusion"
# Any value of the option merges, and LLVM refuses an unknown or empty name, but for those that begin with xla_.
NOT_MERGED = "xla_none"


def choose_loops(config: ConfigDict) -> None:
    """Asks XLA for merged loops where the model of a config gains from them, in a process for this training alone."""
    if config.model.name not in CONVOLUTIONAL:
        merge_loops()


def merge_loops() -> None:
    """Asks XLA for merged loops in this process, unless JAX is running already or XLA_FLAGS has its own such options.

    A version of XLA that does not know the option passes it over.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if OPTIONS not in flags and not _jax_is_running():
        os.environ["XLA_FLAGS"] = f"{flags} --{OPTIONS}={MERGED}".strip()


def _jax_is_running() -> bool:
    before = jax.config.jax_num_cpu_devices
    try:
        jax.config.update("jax_num_cpu_devices", before + 2)  # refused from then on
    except RuntimeError:
        return True
    jax.config.update("jax_num_cpu_devices", before)
    return False


@functools.cache
def loops_are_merged() -> bool:
    """Whether a CPU's compiler does so in this process: it is asked for a program of two outputs and looked at."""
    if current_platform() != "cpu":
        return False
    numbers = jax.ShapeDtypeStruct((64, 64), "float32")
    program = jax.jit(lambda x, y: (2.0 * x + y, 3.0 * x - y)).lower(numbers, numbers).compile().as_text()
    return re.search(r" = \(f32\[64,64\][^=]* fusion\(", program) is not None
