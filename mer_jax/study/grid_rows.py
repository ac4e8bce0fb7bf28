"""The rows of a grid of studies, and their list in the grid's folder."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from mer_jax.errors import UserError
from mer_jax.files import atomic_write_text

GRID_FILENAME = "grid.json"
MODALITIES = ("appearance", "geometry")


@dataclasses.dataclass(frozen=True)
class Row:
    """One study of a grid.

    Attributes:
        appearance: Name of its appearance features, ``''`` for none.
        geometry: Name of its geometry features, ``''`` for none.
        fusion: How the two are fused, ``''`` where there is only one.
    """

    appearance: str
    geometry: str
    fusion: str

    @property
    def name(self) -> str:
        """Stable, and a folder's: ``hog``, ``facemesh`` or ``hog+facemesh-gate``."""
        if self.fusion:
            return f"{self.appearance}+{self.geometry}-{self.fusion}"
        return self.appearance or self.geometry


def make_rows(appearance: Sequence[str], geometry: Sequence[str], fusions: Sequence[str]) -> list[Row]:
    """The rows in the order in which they are trained: single features, then all pairs fusion by fusion."""
    singles = [Row(name, "", "") for name in appearance] + [Row("", name, "") for name in geometry]
    return singles + [Row(a, g, fusion) for fusion in fusions for a in appearance for g in geometry]


def write_rows(workdir: Path, rows: Sequence[Row]) -> None:
    """Writes ``grid.json``, the list of a grid's rows in their order."""
    listed = [{"row": row.name, **dataclasses.asdict(row)} for row in rows]
    atomic_write_text(workdir / GRID_FILENAME, json.dumps({"rows": listed}, indent=1) + "\n")


def read_rows(workdir: Path) -> list[Row]:
    """The rows of the grid in a folder, in their order.

    Raises:
        UserError: There is no grid, or its list is damaged.
    """
    path = workdir / GRID_FILENAME
    try:
        listed = json.loads(path.read_text())["rows"]
        return [Row(**{field.name: entry[field.name] for field in dataclasses.fields(Row)}) for entry in listed]
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found; train the grid first (scripts/train.py --workdir={workdir})") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged; delete it and run scripts/train.py again to rewrite it") from error


def is_grid(workdir: str | os.PathLike) -> bool:
    """Whether a folder holds a grid rather than a study."""
    return (Path(workdir) / GRID_FILENAME).is_file()
