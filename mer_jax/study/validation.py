"""The whole config of a study or a grid, checked before anything is built, read or chosen by its fields."""

from ml_collections import ConfigDict

from mer_jax.clips.flow import CHANNELS
from mer_jax.errors import UserError
from mer_jax.fields import FLAG, SECTION, TEXT, TEXTS, Kind, Kinds, check_fields, is_number, one_of, whole
from mer_jax.models.fusion import FUSIONS
from mer_jax.models.registry import check_model
from mer_jax.study.config import SHARED, validate
from mer_jax.study.data import FLOW_NORMALISATIONS, NORMALISATIONS, REFERENCES
from mer_jax.study.grid_rows import MODALITIES
from mer_jax.study.results import PHASES

_BEGIN = "begin a config with get_config() of a file of configs/"
_NAME = Kind(lambda value: isinstance(value, str) and value.strip(". ") and "/" not in value, "the name of a folder")
_SIDE = whole(0, 4096)


def _some_of(allowed: tuple[str, ...]) -> Kind:
    each = one_of(allowed)
    return Kind(
        lambda value: (
            isinstance(value, tuple | list) and value and all(map(each.holds, value)) and len(set(value)) == len(value)
        ),
        f"some of {', '.join(map(repr, allowed))}, each once",
    )


_CROSS: Kinds = {"appearance": TEXTS, "geometry": TEXTS, "fusions": _some_of(FUSIONS)}
_FLOW: Kinds = {
    "channels": _some_of(CHANNELS),
    "phases": _some_of(PHASES),
    "size": _SIDE,
    "normalise": one_of(FLOW_NORMALISATIONS),
    "flip": Kind(lambda value: is_number(value) and 0 <= value <= 1, "in [0, 1]"),
    "shift": _SIDE,
    "shuffle_labels": FLAG,
}
_FEATURES: Kinds = {
    "num_frames": whole(1, 10**4),
    "short": one_of(("repeat", "mask")),
    "modalities": SECTION,
    "shuffle_labels": FLAG,
}
_MODALITY: Kinds = {
    "extractor": TEXT,
    "reference": one_of(REFERENCES),
    "normalise": one_of(NORMALISATIONS),
    "reduce": whole(0),
}


def uses_flow(config: ConfigDict) -> bool:
    """Whether a study's samples are flow fields rather than features of frames."""
    return "channels" in config.data


def input_channels(config: ConfigDict) -> tuple[str, ...]:
    """What the model fuses, in order: channels of flow, or modalities of features."""
    return tuple(config.data.channels if uses_flow(config) else config.data.modalities)


def validate_study(config: ConfigDict) -> None:
    """Checks the fields of a study, or those that the rows of a grid share.

    Raises:
        UserError: Naming the field, its value and what it can be.
    """
    validate(config)
    grid = "cross" in config
    known = {**SHARED, "name": _NAME, "model": SECTION} | ({"cross": _CROSS} if grid else {})
    check_fields(config, "config", known, _BEGIN)
    _validate_data(config.data, grid)
    model = config.model.to_dict()
    check_model({"fusion": FUSIONS[0], **model} if grid else model, input_channels(config), uses_flow(config))


def _validate_data(data: ConfigDict, grid: bool) -> None:
    from data_builders import data_fields, family_of

    flow = "channels" in data
    if not flow and "modalities" not in data:
        raise UserError(
            "config.data has neither modalities, as a study of features has, nor channels, as one of flow; begin a "
            "config with get_config() of configs/fusion.py, configs/micro_attnet.py or configs/megc2019.py"
        )
    check_fields(data, "config.data", {"dataset": TEXT}, _BEGIN, others=data)
    kinds, begin = data_fields(family_of(data, flow))
    check_fields(data, "config.data", kinds | (_FLOW if flow else _FEATURES), begin)
    if flow:
        return
    step = _MODALITY | {"extractor": TEXT._replace(required=not grid)}
    modalities = dict.fromkeys(MODALITIES if grid else data.modalities, step)
    check_fields(data.modalities, "config.data.modalities", modalities, begin)
    if not len(data.modalities):
        raise UserError("config.data.modalities is empty; name at least one modality and its extractor")
