"""4DME and 4DMR as a TFDS data set of per-frame features; see README.md in this folder."""

from data_builders.four_dme.building import CONFIGS, DEMO_CLIPS, build, default_crop, version_dir
from data_builders.four_dme.feature_building import DTYPES, STORES, extract_features

__all__ = ["CONFIGS", "DEMO_CLIPS", "DTYPES", "STORES", "build", "default_crop", "extract_features", "version_dir"]
