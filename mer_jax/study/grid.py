"""A grid of studies on the same folds and seeds: every pair of features, every single one, every way to fuse them.

Each row is an ordinary study in a folder of its own, ``<workdir>/<row>/``, bound to its own config and data; the grid
adds the list of its rows (``grid.json``) and what can be said of all of them together
(:mod:`mer_jax.study.grid_summary`).
"""

import dataclasses
import functools
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from mer_jax.errors import UserError
from mer_jax.files import TEMPORARY_SUFFIX, exclusive
from mer_jax.models.fusion import FUSIONS
from mer_jax.study.data import FeatureMap, StudyData, load_dataset
from mer_jax.study.grid_rows import GRID_FILENAME, MODALITIES, Row, make_rows, read_rows, write_rows
from mer_jax.study.hosts import Group
from mer_jax.study.results import FILENAME
from mer_jax.study.summary import write_summary
from mer_jax.study.train import PROGRAMS, _load_maps, _show_clips, refuse_busy, say, shuffle_labels, train_study
from mer_jax.study.validation import validate_study
from mer_jax.study.workdir import check_data, check_workdir, start_workdir

_REPORT = "report.html"


def row_config(config: ConfigDict, row: Row) -> ConfigDict:
    """The config of a row: a grid's, with the row's features and fusion in their places and ``cross`` gone."""
    made = ConfigDict(config.to_dict())
    del made["cross"]
    made.name = row.name
    made.model.fusion = row.fusion or FUSIONS[0]  # without effect on one modality
    for modality in MODALITIES:
        extractor = getattr(row, modality)
        if extractor:
            made.data.modalities[modality].extractor = extractor
        else:
            del made.data.modalities[modality]
            del made.model.num_queries[modality]
    return made


def train_grid(config: ConfigDict, workdir: Path, overrides: Mapping, group: Group) -> int:
    """Trains all rows of a grid, or goes on with them, and writes the report of the whole.

    Rows that are finished are not trained again. Where the data set has gained features since, a grid that takes all
    gains their rows.

    Args:
        config: A config with ``cross``, as made by ``configs/fusion_grid.py``.
        workdir: Folder of the grid.
        overrides: Fields given on the command line, for the record.
        group: The processes that train it together, row by row.

    Returns:
        Exit status: 0, or 128 + the number of the signal that stopped it after its checkpoints were saved.

    Raises:
        UserError: Bad config or data; the message names the field, clip or file.
    """
    group.begin()
    _validate(config)
    if not group.leads:
        return _train_along(config, workdir, group)
    check_workdir(config, workdir)
    with exclusive(workdir, functools.partial(refuse_busy, workdir)):
        for stale in workdir.glob(f".*{TEMPORARY_SUFFIX}"):  # left by a kill
            stale.unlink()
        rows, version_dir = _settle_rows(config, workdir)
        configs = {row: row_config(config, row) for row in rows}
        for row, of_row in configs.items():
            validate_study(of_row)
            if (workdir / row.name).exists():
                check_workdir(of_row, workdir / row.name)
        data = None
        if not all((workdir / row.name / FILENAME).is_file() for row in rows):
            data = _load(config, rows, version_dir)
            for row in rows:
                if (workdir / row.name / "data.json").is_file():
                    check_data(workdir / row.name, _of_row(data, row))
        # Only now: a first run that its input stopped binds the folder to nothing.
        start_workdir(config, workdir, overrides)
        write_rows(workdir, rows)
        todo = [row for row in rows if not _is_done(workdir / row.name)]
        fields = [dataclasses.asdict(row) for row in rows]
        group.tell("rows", rows=fields, todo=[rows.index(row) for row in todo], version_dir=data and str(version_dir))
        status = _train_rows(configs, todo, workdir, overrides, data, group)
        if status:
            return status
        _report(workdir, demo=config.data.dataset.endswith("/demo"))
    group.tell("grid finished")
    return 0


def _train_along(config: ConfigDict, workdir: Path, group: Group) -> int:
    """:func:`train_grid` in all processes but the first."""
    told = group.wait("rows", [0])[0]
    rows = [Row(**fields) for fields in told["rows"]]
    data = _load(config, rows, Path(told["version_dir"])) if told["version_dir"] else None
    configs = {row: row_config(config, row) for row in rows}
    status = _train_rows(configs, [rows[number] for number in told["todo"]], workdir, {}, data, group)
    if not status:
        group.wait("grid finished", [0])
    return status


def _validate(config: ConfigDict) -> None:
    validate_study(config)
    named = [name for modality in MODALITIES for name in config.cross[modality]]
    twice = next((name for name in named if named.count(name) > 1), None)
    if twice:
        raise UserError(f"config.cross names the features {twice!r} twice; name them once, in one modality")


def _settle_rows(config: ConfigDict, workdir: Path) -> tuple[list[Row], Path | None]:
    """The grid's rows, and the data set's folder; None where all rows are finished and the data are gone."""
    from data_builders import ensure_dataset, held_features

    earlier = read_rows(workdir) if (workdir / GRID_FILENAME).is_file() else []
    held = held_features(config.data)
    if held is None and earlier and all((workdir / row.name / FILENAME).is_file() for row in earlier):
        return earlier, None
    told = {modality: tuple(config.cross[modality]) for modality in MODALITIES}
    _refuse_unknown(config, told, held or {})
    named = tuple(name for names in told.values() for name in names)
    # What is named may have to be added; embedded extractors stand in only where nothing is built.
    asked = named if all(told.values()) else None
    version_dir = ensure_dataset(config.data, asked)
    if named and asked is None:
        version_dir = ensure_dataset(config.data, named)
    held = held_features(config.data)
    found = {}
    for modality, names in told.items():
        missing = [name for name in names if name not in held]
        if missing:
            raise UserError(
                f"config.cross.{modality}: {missing[0]!r} is not in the data set in {version_dir}, which holds "
                f"{', '.join(sorted(held))}"
            )
        # Features of rows that are there stay, so that a grid only grows.
        kept = {getattr(row, modality) for row in earlier} - {""}
        found[modality] = names or sorted(
            {name for name, of in held.items() if of == modality and name not in named} | kept
        )
    unknown = [name for name, modality in held.items() if not modality and name not in named]
    if unknown and not asked:
        raise UserError(
            f"the data set in {version_dir} does not say whether its features {unknown[0]!r} are of appearance or "
            "geometry; name the features of both in config.cross.appearance and config.cross.geometry"
        )
    for modality, names in found.items():
        if not names:
            raise UserError(
                f"the data set in {version_dir} holds no features of {modality} (it holds {', '.join(sorted(held))}); "
                f"extract some with scripts/extract_features.py, or name those that are in config.cross.{modality}"
            )
        for name in names:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise UserError(
                    f"features {name!r}: a row's folder is called after them; build the data set with a name of "
                    "letters, digits, '.', '_' and '-'"
                )
    return make_rows(found["appearance"], found["geometry"], tuple(config.cross.fusions)), version_dir


def _refuse_unknown(config: ConfigDict, told: Mapping[str, Sequence[str]], held: Mapping[str, str]) -> None:
    """Refuses names that nothing gives before a data set is built for them."""
    from mer_jax.extractors.base import EXTRACTORS
    from mer_jax.extractors.networks import NETWORKS

    elsewhere = {text.partition("=")[0] for text in config.data.features}
    for modality, names in told.items():
        for name in names:
            if name not in {*EXTRACTORS, *NETWORKS, *held, *elsewhere}:
                raise UserError(
                    f"config.cross.{modality}: nothing gives features {name!r}; choose from "
                    f"{', '.join(sorted({*EXTRACTORS, *held, *elsewhere}))} or scripts/extract_features.py, or name "
                    "the folder of these features in config.data.features"
                )


def _load(config: ConfigDict, rows: Sequence[Row], version_dir: Path) -> StudyData:
    """The data set with the features of all rows, by their names."""
    names = dict.fromkeys(name for row in rows for name in (row.appearance, row.geometry) if name)
    data = load_dataset(
        version_dir, {name: name for name in names}, num_frames=config.data.num_frames, short=config.data.short
    )
    return shuffle_labels(config, data)


def _of_row(data: StudyData, row: Row) -> StudyData:
    """The data set as a row's study sees it."""
    of_row = {modality: getattr(row, modality) for modality in MODALITIES}
    return dataclasses.replace(data, features={m: data.features[name] for m, name in of_row.items() if name})


def _train_rows(
    configs: Mapping[Row, ConfigDict],
    todo: Sequence[Row],
    workdir: Path,
    overrides: Mapping,
    data: StudyData | None,
    group: Group,
) -> int:
    told = {key: value for key, value in overrides.items() if not key.startswith("cross.")}
    seconds: list[float] = []
    for row in todo:
        left = len(todo) - len(seconds)
        eta = f", about {_duration(left * float(np.mean(seconds)))} to go" if seconds else ""
        if group.leads:
            say(f"row {list(configs).index(row) + 1} of {len(configs)}, {left} left{eta}: {row.name}")
        began = time.monotonic()
        status = train_study(
            configs[row],
            workdir / row.name,
            told,
            functools.partial(_report_row, configs[row]),
            data and _of_row(data, row),
            _maps_of_others(workdir, row, configs),
            group,
            workdir / PROGRAMS,
        )
        if status:
            return status
        seconds.append(time.monotonic() - began)
    return 0


def _is_done(folder: Path) -> bool:
    return (folder / FILENAME).is_file() and (folder / _REPORT).is_file()


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _maps_of_others(workdir: Path, row: Row, rows: Sequence[Row]) -> dict[str, list[FeatureMap]]:
    """Maps of the row's features that another row has fitted on the same folds: principal components take seconds."""
    maps = {}
    for modality in MODALITIES:
        name = getattr(row, modality)
        for other in rows:
            if name and other != row and getattr(other, modality) == name and (workdir / other.name).is_dir():
                fitted = _load_maps(workdir / other.name).get(modality)
                if fitted:
                    maps[modality] = fitted
                    break
    return maps


def _report_row(config: ConfigDict, workdir: Path) -> None:
    from mer_jax.report.html import write_report

    try:
        _show_clips(config, workdir)
        write_summary(workdir)
        write_report(workdir)
    except UserError as error:  # such as all seeds diverged: no reason to lose the other rows
        say(f"warning: row {workdir.name} has no report: {error}")


def _report(workdir: Path, demo: bool) -> None:
    from mer_jax.report.grid_html import write_grid_report
    from mer_jax.report.grid_tables import terminal_tables
    from mer_jax.study.grid_summary import write_grid_summary

    print(terminal_tables(write_grid_summary(workdir)))
    if demo:
        print("These are rendered demo clips: the numbers show that the software works and are no benchmark.")
    print(f"report: {write_grid_report(workdir)}")
