r"""Scores the published STSTNet weights, one file a left-out subject, without training and without PyTorch.

python scripts/import_checkpoint.py --config configs/megc2019.py:ststnet --weights STSTNet_Weights \
    --workdir runs/ststnet_published
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags
from ml_collections import config_flags

from mer_jax.cli import define_config, open_door, parse_config_flags
from mer_jax.errors import UserError

_CONFIG = define_config("Config file, such as configs/megc2019.py:ststnet.")
_WEIGHTS = flags.DEFINE_string("weights", None, "Folder of <subject>.pth files, one a left-out subject.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, which scripts/evaluate.py scores again.")
_ALLOW_MISSING = flags.DEFINE_bool(
    "allow-missing", False, "Leave out subjects without a file, instead of stopping there."
)


def main(argv: list[str]) -> None:
    """Flags to one function."""

    def run():
        if len(argv) > 1:
            raise UserError(f"unknown argument {argv[1]!r}; --help lists the flags")
        from mer_jax.study.imported import import_study

        overrides = config_flags.get_override_values(flags.FLAGS["config"])
        import_study(
            _CONFIG.value, _WEIGHTS.value, _WORKDIR.value, allow_missing=_ALLOW_MISSING.value, overrides=overrides
        )

    open_door(run)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "weights", "workdir"])
    app.run(main, flags_parser=parse_config_flags)
