"""Every pair of appearance and geometry features, every single one, and all ways to fuse them, as one study.

    python scripts/train.py --config configs/fusion_grid.py

This is Tables 2 and 3 of the hybrid fusion paper (Le Cong Thuong et al. 2025), on all features that the data set holds.
Each row is a study of ``configs/fusion.py`` on the same folds and seeds, in a folder of its own below the grid's.
"""

from ml_collections import ConfigDict

from configs.fusion import get_config as fusion_config
from mer_jax.errors import UserError

VARIANTS = ("fusion_grid",)


def get_config(variant: str = "fusion_grid") -> ConfigDict:
    """The config of the grid: that of its rows, less what differs between them."""
    if variant not in VARIANTS:
        raise UserError(f"configs/fusion_grid.py:{variant}: no such variant; there is {VARIANTS[0]} only")
    config = fusion_config()
    config.name = "fusion_grid"
    for modality in config.data.modalities.values():
        del modality["extractor"]
    del config.model.fusion

    cross = config.cross = ConfigDict()
    # Names of features, each in the field of its modality; () for all of this modality that the data set holds.
    cross.appearance = ()
    cross.geometry = ()
    cross.fusions = ("gate", "mean", "concat")  # the first makes the pairs of Table 2
    return config
