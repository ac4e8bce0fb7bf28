"""The hyper-parameters that the fusion paper leaves unsaid, searched for and chosen on inner splits alone.

    python scripts/train.py --config configs/fusion_search.py

A study of ``configs/fusion.py`` with 24 candidates: its own values, then random draws from the ranges below. Folds x
candidates x seeds train as members of one compiled program. Each held-out fold gets the candidate of the best average
precision on the inner splits of its own training clips, and what is reported is the score of this whole procedure on
clips that no choice has seen; beside it, the config's own values, and what choosing on the held-out clips would have
claimed. Variants: ``configs/fusion_search.py:appearance``, ``:geometry``, ``:concat`` and ``:mean`` search those of
``configs/fusion.py``.

Ranges are changed as other fields are, ``--config.search.dropout="('uniform', 0.0, 0.3)"``, or left out by ``"()"``. A
grid of given values is ``config.grid`` instead.
"""

from ml_collections import ConfigDict

from configs.fusion import get_config as fusion_config
from mer_jax.errors import UserError

VARIANTS = ("fusion_search", "appearance", "geometry", "concat", "mean")


def get_config(variant: str = "fusion_search") -> ConfigDict:
    """The config of one of ``VARIANTS``."""
    if variant not in VARIANTS:
        raise UserError(f"configs/fusion_search.py:{variant}: no such variant; there are {', '.join(VARIANTS)}")
    config = fusion_config("fusion" if variant == "fusion_search" else variant)
    config.name = variant if variant == "fusion_search" else f"fusion_search_{variant}"
    config.study.num_seeds = 5  # with num_inner = 5 they take turns at all training clips of a fold
    config.study.num_candidates = 24

    config.train.loss = "focal"
    config.train.focal_gamma = 0.0  # the cross-entropy of configs/fusion.py, as the candidate that all is compared with
    config.search.learning_rate = ("log_uniform", 1e-4, 1e-2)
    config.search.weight_decay = ("log_uniform", 1e-3, 1.0)
    config.search.dropout = ("uniform", 0.0, 0.6)
    config.search.feature_dropout = ("uniform", 0.0, 0.8)
    config.search.focal_gamma = ("choice", 0, 1, 2)
    return config
