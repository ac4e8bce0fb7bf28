"""Hyper-parameters drawn at random from the ranges of a config: the candidates of a search.

A candidate is a function of the config's seed, its ranges and the candidate's number alone, never of how many there
are, and a hyper-parameter's draws do not depend on which others are searched: a wider search goes on where a narrower
one ended. (Random points rather than a grid: Bergstra and Bengio, 2012.)
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mer_jax.errors import UserError
from mer_jax.fields import is_number
from mer_jax.study.members import HYPER_NAMES

UNIFORM = "uniform"
LOG_UNIFORM = "log_uniform"
CHOICE = "choice"
KINDS = (UNIFORM, LOG_UNIFORM, CHOICE)
RANGES = "('uniform', low, high), ('log_uniform', low, high) or ('choice', first, second, ...)"
# A value is what its table shows: draws are rounded to so many significant digits.
_DIGITS = 4
# Draws a candidate before ranges count as used up.
_MOST_DRAWS = 100


def searched(config: ConfigDict) -> dict[str, tuple]:
    """Name to range of the hyper-parameters that a config searches, in the order of ``HYPER_NAMES``."""
    return {name: tuple(config.search[name]) for name in HYPER_NAMES if len(config.search[name])}


def validate_search(config: ConfigDict) -> None:
    """Checks ``config.search`` and ``config.study.num_candidates``.

    Raises:
        UserError: Naming the field, its value and what it can be.
    """
    ranges, wanted = searched(config), config.study.num_candidates
    for name, values in ranges.items():
        _validate_range(name, values)
    if wanted < 0 or wanted == 1:
        raise UserError(
            f"config.study.num_candidates={wanted}: must be 0, or at least 2 (the first are the config's own values)"
        )
    if ranges and not wanted:
        raise UserError(
            f"config.search gives ranges of {', '.join(ranges)}: set config.study.num_candidates to 2 or more"
        )
    if wanted and not ranges:
        raise UserError(
            f"config.study.num_candidates={wanted} needs ranges to draw from, such as "
            "config.search.learning_rate=('log_uniform', 1e-4, 1e-2)"
        )
    if not ranges:
        return
    if any(len(values) for values in config.grid.values()):
        raise UserError("config.grid and config.search are two ways to try values: leave one of them empty")
    if config.study.num_inner == 0:
        raise UserError("config.search is chosen from on inner splits: set config.study.num_inner to 2 or more")


def _validate_range(name: str, values: Sequence) -> None:
    most = 1 if "dropout" in name else math.inf
    allowed = "in [0, 1)" if most == 1 else "of at least 0"
    kind, numbers = values[0], values[1:]

    def require(holds, wanted):
        if not holds:
            raise UserError(f"config.search.{name}={values!r}: must be {wanted}")

    require(kind in KINDS, RANGES)
    require(
        all(is_number(v) and 0 <= v < most for v in numbers),
        f"{kind!r} and numbers {allowed}",
    )
    if kind == CHOICE:
        distinct = len(set(np.float32(numbers).tolist())) == len(numbers) >= 2
        require(distinct, "'choice' and at least 2 numbers, each once")
        return
    require(len(numbers) == 2 and numbers[0] < numbers[1], f"{kind!r}, the lowest and the highest number")
    if kind == LOG_UNIFORM:
        require(numbers[0] > 0, "'log_uniform' and numbers above 0")


def draw_candidates(config: ConfigDict, own: Mapping[str, float]) -> list[dict[str, float]]:
    """The points of a search.

    Args:
        config: Gives ``seed``, ``search`` and ``study.num_candidates``.
        own: The config's own value of every hyper-parameter.

    Returns:
        ``num_candidates`` distinct points, each a value of every hyper-parameter: the config's own values, then draws.
        Empty without a search.

    Raises:
        UserError: The ranges do not hold so many points.
    """
    ranges, wanted = searched(config), config.study.num_candidates
    if not ranges:
        return []
    points = [dict(own)]
    seen = {_as_stored(own)}
    for number in range(1, wanted * _MOST_DRAWS):
        if len(points) == wanted:
            break
        drawn = {name: _draw(values, _uniform(config.seed, number, name)) for name, values in ranges.items()}
        point = {**own, **drawn}
        if _as_stored(point) not in seen:
            seen.add(_as_stored(point))
            points.append(point)
    if len(points) < wanted:
        raise UserError(
            f"config.study.num_candidates={wanted}: config.search holds only {len(points)} different points; set fewer "
            "candidates or wider ranges"
        )
    return points


def _as_stored(point: Mapping[str, float]) -> tuple[float, ...]:
    """What tells two points apart in a study's files."""
    return tuple(np.float32(value).item() for value in point.values())


def _uniform(seed: int, number: int, name: str) -> float:
    """A number in [0, 1) of draw ``number`` of hyper-parameter ``name``."""
    digest = hashlib.sha256(f"search-{seed}-{number}-{name}".encode()).digest()
    return int.from_bytes(digest[:6], "little") / 2**48


def _draw(values: Sequence[Any], position: float) -> float:
    """The value of a range at ``position`` in [0, 1)."""
    kind, numbers = values[0], [float(value) for value in values[1:]]
    if kind == CHOICE:
        return numbers[int(position * len(numbers))]
    low, high = numbers
    value = low + position * (high - low) if kind == UNIFORM else low * (high / low) ** position
    return min(max(float(f"{value:.{_DIGITS}g}"), low), high)
