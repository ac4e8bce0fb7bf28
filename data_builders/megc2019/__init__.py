"""The MEGC2019 composite of CASME II, SAMM and SMIC as a TFDS data set of flow; see README.md in this folder."""

from data_builders.megc2019.building import (
    CONFIGS,
    DEFAULT_CROP,
    DEFAULT_FLOW,
    DEMO_CLIPS,
    RAW_DEFAULTS,
    SHEETS,
    SIZE,
    SOURCES,
    STORES,
    build,
)
from data_builders.megc2019.composite import DATABASES

__all__ = [
    "CONFIGS",
    "DATABASES",
    "DEFAULT_CROP",
    "DEFAULT_FLOW",
    "DEMO_CLIPS",
    "RAW_DEFAULTS",
    "SHEETS",
    "SIZE",
    "SOURCES",
    "STORES",
    "build",
]
