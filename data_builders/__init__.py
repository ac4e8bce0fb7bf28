"""TFDS builders (array_record, no TensorFlow)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mer_jax.errors import UserError


def ensure_dataset(data: Mapping, extractors: Sequence[str]) -> Path:
    """Builds the data set that a config asks for, or finds it built.

    Args:
        data: ``config.data``: ``dataset`` (such as ``'four_dme/demo'``), ``data_dir``, ``workers``, and,
            where it must still be built, ``source``, ``test_source``, ``labels``, ``columns``, ``workbook``
            and ``features``.
        extractors: Extractors whose features the study needs.

    Returns:
        Folder of the built version.

    Raises:
        UserError: There is no such data set, or it cannot be built.
    """
    from data_builders import four_dme
    from mer_jax.extractors.base import EXTRACTORS

    family, _, name = data["dataset"].partition("/")
    if family != "four_dme" or name not in four_dme.CONFIGS:
        known = ", ".join(f"four_dme/{config}" for config in four_dme.CONFIGS)
        raise UserError(f"config.data.dataset={data['dataset']!r}: must be one of {known}")
    features = dict(_pair("features", text) for text in data["features"])
    unknown = [name for name in extractors if name not in EXTRACTORS and name not in features]
    if unknown and not four_dme.version_dir(name, data["data_dir"]).exists():
        raise UserError(
            f"config.data.modalities: nothing gives features {unknown[0]!r}; choose an extractor of "
            f"{', '.join(EXTRACTORS)}, or name the folder of these features in config.data.features"
        )
    return four_dme.build(
        name,
        data_dir=data["data_dir"],
        source=data["source"] or None,
        test_source=data["test_source"] or None,
        labels=data["labels"] or None,
        columns=dict(_pair("columns", text) for text in data["columns"]) or None,
        workbook=data["workbook"] or None,
        extractors=tuple(name for name in extractors if name in EXTRACTORS and name not in features),
        features=features or None,
        workers=data["workers"] or None,
    )


def _pair(field: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise UserError(f"config.data.{field}: {text!r} is not of the form name=value")
    return name, value
