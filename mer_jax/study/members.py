"""Who trains in a study: the table of members and where their random numbers come from."""

import dataclasses
import hashlib
import itertools
import zlib
from collections.abc import Mapping, Sequence

import jax

HYPER_NAMES = ("learning_rate", "weight_decay", "dropout", "feature_dropout", "focal_gamma")


@dataclasses.dataclass(frozen=True)
class Member:
    """One training run.

    Attributes:
        fold: The held-out fold, from 0.
        seed: The run's seed: initial weights, batch order, dropout and inner split follow from it and the fold.
        hyper: Name (of ``HYPER_NAMES``) and value of every hyper-parameter.
        varied: Names of the hyper-parameters that differ between the points of a grid.
        candidate: Number of its candidate in a search; None without one.
    """

    fold: int
    seed: int
    hyper: tuple[tuple[str, float], ...]
    varied: tuple[str, ...] = ()
    candidate: int | None = None

    @property
    def id(self) -> str:
        """Stable name, such as ``fold0-seed3``, ``fold0-seed3-dropout=0.2`` or ``fold0-seed3-candidate7``."""
        if self.candidate is not None:
            return f"fold{self.fold}-seed{self.seed}-candidate{self.candidate}"
        suffix = "".join(f"-{name}={value:g}" for name, value in self.hyper if name in self.varied)
        return f"fold{self.fold}-seed{self.seed}{suffix}"


def make_members(
    folds: Sequence[int],
    seeds: Sequence[int],
    hyper: Mapping[str, float],
    grid: Mapping[str, Sequence[float]],
    candidates: Sequence[Mapping[str, float]] = (),
) -> list[Member]:
    """The product of folds, hyper-parameter points and seeds, fold-major and seed-minor.

    The config's own values are the first point of a search, and of a grid that has them.

    Args:
        folds: Held-out folds to train.
        seeds: Seeds to train.
        hyper: The value of every hyper-parameter that the grid does not vary.
        grid: Name to the values to try; an empty sequence varies nothing.
        candidates: Points of a search, each with a value of every hyper-parameter, in place of a grid.

    Returns:
        The members, in a fixed order.
    """
    if candidates:
        numbered = [(n, tuple((name, point[name]) for name in HYPER_NAMES)) for n, point in enumerate(candidates)]
        return [Member(fold, seed, point, (), n) for fold in folds for n, point in numbered for seed in seeds]
    varied = tuple(name for name in HYPER_NAMES if len(grid.get(name, ())) > 0)
    axes = [[float(value) for value in (grid[name] if name in varied else (hyper[name],))] for name in HYPER_NAMES]
    points = [tuple(zip(HYPER_NAMES, values, strict=True)) for values in itertools.product(*axes)]
    own = tuple((name, float(hyper[name])) for name in HYPER_NAMES)
    points.sort(key=lambda point: point != own)  # stable: the others keep their order
    return [Member(fold, seed, point, varied) for fold in folds for point in points for seed in seeds]


def member_key(root_seed: int, member: Member) -> jax.Array:
    """The member's random key: a function of root seed, fold and seed alone.

    Neither the position in the study nor the hyper-parameters enter, so a member's result does not depend on its
    neighbours, and members that differ only in a hyper-parameter share initial weights and batches (common random
    numbers make their comparison sharper).

    Args:
        root_seed: ``config.seed``.
        member: Whose key.

    Returns:
        A typed scalar key.
    """
    digest = hashlib.sha256(f"fold{member.fold}-seed{member.seed}".encode()).digest()
    return jax.random.fold_in(jax.random.key(root_seed), int.from_bytes(digest[:4], "little"))


def stream(key: jax.Array, name: str) -> jax.Array:
    """A named stream of random numbers below ``key``, so that a new use never shifts the others."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
