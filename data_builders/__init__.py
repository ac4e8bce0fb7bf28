"""TFDS builders (array_record, no TensorFlow)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mer_jax.errors import UserError
from mer_jax.fields import TEXT, TEXTS, Kinds, one_of, settings_of, whole

_FLOW_FAMILIES = ("four_dme_flow", "megc2019")
_FEATURE_FAMILIES = ("four_dme",)
_BEGIN = {
    "four_dme": "begin a config with get_config() of configs/fusion.py",
    "four_dme_flow": "begin a config with get_config() of configs/micro_attnet.py",
    "megc2019": "begin a config with get_config() of configs/megc2019.py",
}


def family_of(data: Mapping, flow: bool) -> str:
    """The family of the data set that a config names, such as ``'four_dme'``.

    Args:
        data: ``config.data``, of which ``dataset`` is read.
        flow: Whether it must be one of flow.

    Raises:
        UserError: There is no such family.
    """
    family = data["dataset"].partition("/")[0]
    families = _FLOW_FAMILIES if flow else _FEATURE_FAMILIES
    if family not in families:
        known = ", ".join(f"'{each}/...'" for each in families)
        raise UserError(
            f"config.data.dataset={data['dataset']!r}: a study of {'flow' if flow else 'features'} needs {known}"
        )
    return family


def data_fields(family: str) -> tuple[Kinds, str]:
    """The fields of ``config.data`` that building and finding a data set takes, and where to begin a config with them.

    Args:
        family: As :func:`family_of` gives it.
    """
    from mer_jax.clips.apex import ApexConfig
    from mer_jax.clips.crops import CropConfig
    from mer_jax.clips.flow import FlowConfig

    texts, tuples, sections = ("dataset", "data_dir", "source", "labels"), (), {}
    if family == "megc2019":
        from data_builders import megc2019

        texts += tuple(megc2019.SOURCES)
        sections["raw"] = {
            "crop": settings_of(CropConfig) | {"rule": TEXT},
            "apex": settings_of(ApexConfig) | {"rule": one_of(("half_way", "motion"))},
            "flow": settings_of(FlowConfig),
            "size": whole(1),
            "store": TEXT,
        }
    else:
        texts, tuples = (*texts, "test_source", "workbook"), ("columns",)
    if family == "four_dme_flow":
        sections |= {"crop": settings_of(CropConfig), "apex": settings_of(ApexConfig), "flow": settings_of(FlowConfig)}
    if family == "four_dme":
        tuples += ("features",)
    kinds = dict.fromkeys(texts, TEXT) | dict.fromkeys(tuples, TEXTS) | {"workers": whole(0, 1024)} | sections
    return kinds, _BEGIN[family]


def ensure_dataset(data: Mapping, extractors: Sequence[str] | None) -> Path:
    """Builds the data set that a config asks for, or finds it built.

    Args:
        data: ``config.data``: ``dataset`` (such as ``'four_dme/demo'``), ``data_dir``, ``workers``, and what the
            builder of that data set takes, where it must still be built.
        extractors: Extractors whose features the study needs; none for a study of flow. None: those that the data set
            holds, or, where it must still be built, the embedded ones.

    Returns:
        Folder of the built version.

    Raises:
        UserError: There is no such data set, or it cannot be built.
    """
    builders = {"four_dme_flow": _four_dme_flow, "megc2019": _megc2019, "four_dme": _four_dme}
    name = data["dataset"].partition("/")[2]
    return builders[family_of(data, "channels" in data)](name, data, extractors)


def held_features(data: Mapping) -> dict[str, str] | None:
    """The features that a data set of features holds.

    Args:
        data: ``config.data``, of which ``dataset`` and ``data_dir`` are read.

    Returns:
        Name of each to ``'appearance'``, ``'geometry'`` or, where neither the data set nor its name tells, ``''``;
        None while the data set is not built.

    Raises:
        UserError: There is no such data set, or what is there is none.
    """
    family, name = family_of(data, flow=False), data["dataset"].partition("/")[2]
    from data_builders import four_dme
    from data_builders.tfds_files import read_metadata
    from mer_jax.extractors.base import EXTRACTORS, get_extractor
    from mer_jax.extractors.networks import NETWORKS, get_network

    _known(family, name, four_dme.CONFIGS)
    told = read_metadata(four_dme.version_dir(name, data["data_dir"]), ("extractors",))
    if told is None:
        return None
    modalities = {}
    for extractor, facts in told["extractors"].items():
        modality = facts["modality"]
        if modality not in ("appearance", "geometry"):  # features from elsewhere, perhaps of a network that we know
            get = get_extractor if extractor in EXTRACTORS else get_network if extractor in NETWORKS else None
            modality = get(extractor).modality if get else ""
        modalities[extractor] = modality
    return modalities


def _known(family: str, name: str, configs: Sequence[str]) -> None:
    if name not in configs:
        known = ", ".join(f"{family}/{config}" for config in configs)
        raise UserError(f"config.data.dataset='{family}/{name}': must be one of {known}")


def _told(data: Mapping, *fields: str) -> dict:
    """Fields of a config as arguments of a builder; what is empty was not said."""
    return {field: data[field] or None for field in fields}


def _four_dme_flow(name: str, data: Mapping, extractors: Sequence[str] | None) -> Path:
    del extractors
    from data_builders import four_dme_flow
    from mer_jax.clips.apex import ApexConfig
    from mer_jax.clips.crops import CropConfig
    from mer_jax.clips.flow import FlowConfig

    _known("four_dme_flow", name, four_dme_flow.CONFIGS)
    return four_dme_flow.build(
        name,
        data_dir=data["data_dir"],
        columns=dict(_pair("columns", text) for text in data["columns"]) or None,
        crop=CropConfig(**dict(data["crop"])),
        apex=ApexConfig(**dict(data["apex"])),
        flow=FlowConfig(**dict(data["flow"])),
        **_told(data, "source", "test_source", "labels", "workbook", "workers"),
    )


def _megc2019(name: str, data: Mapping, extractors: Sequence[str] | None) -> Path:
    del extractors
    from data_builders import megc2019

    _known("megc2019", name, megc2019.CONFIGS)
    options = raw_options(data)
    if name != "raw":
        unused = [field for field, value in options.items() if value != megc2019.RAW_DEFAULTS[field]]
        if unused:
            raise UserError(f"config.data.raw.{unused[0]}: not used by megc2019/{name}; leave it as it is")
        options = {}
    return megc2019.build(
        name,
        data_dir=data["data_dir"],
        **_told(data, "source", "labels", *megc2019.SOURCES, "workers"),
        **options,
    )


def raw_options(data: Mapping) -> dict[str, Any]:
    """How the config of a study of the composite makes flow of frames.

    Args:
        data: ``config.data`` of ``configs/megc2019.py``, of which ``raw`` is read.

    Returns:
        ``crop``, ``apex``, ``flow``, ``size`` and ``store`` as :func:`data_builders.megc2019.build` takes them.

    Raises:
        UserError: A field has no meaning.
    """
    from mer_jax.clips.apex import ApexConfig
    from mer_jax.clips.crops import RULES, CropConfig
    from mer_jax.clips.flow import FlowConfig

    raw = data["raw"]
    apex = dict(raw["apex"])
    rule = apex.pop("rule")
    if rule not in ("half_way", "motion"):
        raise UserError(f"config.data.raw.apex.rule={rule!r}: must be 'half_way' or 'motion'")
    if rule == "half_way" and not apex["use_annotated"]:
        raise UserError("config.data.raw.apex.use_annotated=False: needs config.data.raw.apex.rule='motion'")
    if raw["crop"]["rule"] not in (*RULES, "whole"):
        known = ", ".join(map(repr, (*RULES, "whole")))
        raise UserError(f"config.data.raw.crop.rule={raw['crop']['rule']!r}: must be one of {known}")
    return {
        "crop": "whole" if raw["crop"]["rule"] == "whole" else CropConfig(**dict(raw["crop"])),
        "apex": ApexConfig(**apex) if rule == "motion" else "half_way",
        "flow": FlowConfig(**dict(raw["flow"])),
        "size": raw["size"],
        "store": raw["store"],
    }


def _four_dme(name: str, data: Mapping, extractors: Sequence[str] | None) -> Path:
    from data_builders import four_dme
    from mer_jax.extractors.base import EMBEDDED, EXTRACTORS
    from mer_jax.extractors.networks import NETWORKS

    _known("four_dme", name, four_dme.CONFIGS)
    features = dict(_pair("features", text) for text in data["features"])
    known = {*EXTRACTORS, *NETWORKS}
    built = four_dme.version_dir(name, data["data_dir"]).exists()
    if extractors is None:
        extractors = () if built else EMBEDDED
    unknown = [name for name in extractors if name not in known and name not in features]
    if unknown and not built:
        raise UserError(
            f"config.data.modalities: nothing gives features {unknown[0]!r}; choose an extractor of "
            f"{', '.join(EXTRACTORS)} or scripts/extract_features.py, or name the folder of these features in "
            "config.data.features"
        )
    return four_dme.build(
        name,
        data_dir=data["data_dir"],
        source=data["source"] or None,
        test_source=data["test_source"] or None,
        labels=data["labels"] or None,
        columns=dict(_pair("columns", text) for text in data["columns"]) or None,
        workbook=data["workbook"] or None,
        extractors=tuple(name for name in extractors if name in known and name not in features),
        features=features or None,
        workers=data["workers"] or None,
    )


def _pair(field: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise UserError(f"config.data.{field}: {text!r} is not of the form name=value")
    return name, value
