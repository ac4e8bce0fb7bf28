"""What a config's fields may hold, and the one line that names the field that does not."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from mer_jax.errors import UserError

MANY = 10**6
"""More epochs, members or units than anybody means, and few enough for 32 bits and for lists."""


class Kind(NamedTuple):
    """What a field may hold.

    Attributes:
        holds: Whether a value is of the kind; it is asked about any object.
        wanted: What the value must be, for people.
        required: Whether the field must be there.
    """

    holds: Callable[[Any], bool]
    wanted: str
    required: bool = True


Kinds = Mapping[str, "Kind | Kinds"]
"""Name to what a field may hold, or to the fields of a section below."""


def one_of(allowed: Collection[str]) -> Kind:
    """One of some names."""
    return Kind(lambda value: isinstance(value, str) and value in allowed, f"one of {', '.join(map(repr, allowed))}")


def whole(least: int, most: int = MANY) -> Kind:
    """A whole number."""
    return Kind(lambda value: _is_whole(value) and least <= value <= most, f"a whole number from {least} to {most}")


def number(least: float = 0, below: float = math.inf) -> Kind:
    """A finite number of at least ``least`` and below ``below``."""
    wanted = f"a number of at least {least}" if below == math.inf else f"a number in [{least}, {below})"
    return Kind(lambda value: is_number(value) and least <= value < below, wanted)


def numbers(least: float = 0, below: float = math.inf) -> Kind:
    """A tuple of such numbers, perhaps empty."""
    each = number(least, below)
    wanted = f"numbers of at least {least}" if below == math.inf else f"numbers in [{least}, {below})"
    return several(each, f"{wanted}, in a tuple")


def several(each: Kind, wanted: str) -> Kind:
    """A tuple or list of things of a kind, perhaps empty."""
    return Kind(lambda value: isinstance(value, tuple | list) and all(map(each.holds, value)), wanted)


FLAG = Kind(lambda value: isinstance(value, bool), "True or False")
TEXT = Kind(lambda value: isinstance(value, str), "a text, '' for none")
TEXTS = several(TEXT, "texts, in a tuple")
SECTION = Kind(lambda value: isinstance(value, Mapping | ConfigDict), "a section with fields of its own")


def settings_of(cls: type) -> Kinds:
    """The fields of a dataclass of settings by the types of their defaults; it checks ranges itself, and all may miss.

    Args:
        cls: A dataclass whose fields have defaults.
    """
    kinds = {
        bool: FLAG,
        int: Kind(_is_whole, "a whole number"),
        float: Kind(is_number, "a number"),
        str: TEXT,
    }
    return {field.name: kinds[type(field.default)]._replace(required=False) for field in dataclasses.fields(cls)}


def check_fields(section: Any, where: str, kinds: Kinds, begin: str, others: Collection[str] = ()) -> None:
    """Checks a section of a config: every field is there, holds what it may, and none has a name that nobody reads.

    Args:
        section: The section.
        where: Its name, such as ``'config.train'``.
        kinds: Its fields.
        begin: How to get a config that has them all, for the messages.
        others: Fields that may be there, too.

    Raises:
        UserError: Naming the field, its value and what it can be.
    """
    if not SECTION.holds(section):
        raise UserError(f"{where}={shown(section)}: must be {SECTION.wanted} ({', '.join(kinds)}); {begin}")
    for name, kind in kinds.items():
        field, nested = f"{where}.{name}", not isinstance(kind, Kind)
        if name not in section:
            if nested or kind.required:
                raise UserError(f"{field} is missing; {begin}")
        elif nested:
            check_fields(section[name], field, kind, begin)
        elif not kind.holds(section[name]):
            raise UserError(f"{field}={shown(section[name])}: must be {kind.wanted}")
    for name in section:
        if name not in kinds and name not in others:
            raise UserError(
                f"{where}.{name}: there is no such field, so that it would change nothing{_near(name, kinds)}"
            )


def shown(value: Any) -> str:
    """A value of a config in one line."""
    text = " ".join(repr(value.to_dict() if isinstance(value, ConfigDict) else value).split())
    return text if len(text) <= 200 else f"{text[:200]}..."


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, which True is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _near(name: Any, known: Collection[str]) -> str:
    near: Sequence[str] = difflib.get_close_matches(str(name), known, 1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
