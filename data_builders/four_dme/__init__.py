"""4DME and 4DMR as a TFDS data set of per-frame features; see README.md in this folder."""

from data_builders.four_dme.building import CONFIGS, DEMO_CLIPS, build, default_crop, version_dir

__all__ = ["CONFIGS", "DEMO_CLIPS", "build", "default_crop", "version_dir"]
