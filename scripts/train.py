"""Trains a study and writes its report: ``python scripts/train.py --config configs/fusion.py``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags
from ml_collections import config_flags

from mer_jax.cli import define_config, open_door, parse_config_flags
from mer_jax.errors import UserError

_CONFIG = define_config("Config file, such as configs/fusion.py:geometry.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; runs/<name of config and overrides> by default.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "All processes of this job train one study; JAX finds them (SLURM, Kubernetes, Cloud TPU)."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, where JAX does not find it.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes, beside --coordinator.", 1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process's number from 0, beside --coordinator.", 0)


def main(argv: list[str]) -> None:
    """Flags to one function."""

    def run():
        if len(argv) > 1:
            raise UserError(f"unknown argument {argv[1]!r}; --help lists the flags")
        from mer_jax.study.hosts import open_group
        from mer_jax.study.loops import choose_loops
        from mer_jax.study.train import train
        from mer_jax.study.validation import validate_study
        from mer_jax.study.workdir import default_workdir

        validate_study(_CONFIG.value)  # its fields choose what comes next
        overrides = config_flags.get_override_values(flags.FLAGS["config"])
        choose_loops(_CONFIG.value)
        workdir = _WORKDIR.value or default_workdir(_CONFIG.value, overrides)
        with open_group(_DISTRIBUTED.value, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value) as group:
            return train(_CONFIG.value, workdir, overrides, group)

    open_door(run)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config"])
    app.run(main, flags_parser=parse_config_flags)
