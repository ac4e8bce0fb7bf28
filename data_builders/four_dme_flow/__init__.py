"""4DME as optical flow: crops by the largest face box, the apex, and the flow of both phases, as a TFDS data set."""

from data_builders.four_dme_flow.building import CONFIGS, DEFAULT_CROP, build

__all__ = ["CONFIGS", "DEFAULT_CROP", "build"]
