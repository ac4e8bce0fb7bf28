"""Samples of a data set that stay where they lie until something reads them."""

from typing import NamedTuple

import jax


class Stored(NamedTuple):
    """Some samples of an array of many.

    Attributes:
        data: ``(F or 1, N, ...)``, prepared for each held-out fold or the same for all.
        fold: int32 scalar, the held-out fold.
        index: ``(B,)`` int32, the samples, within ``N``.
    """

    data: jax.Array
    fold: jax.Array
    index: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """``(B, ...)``, what :meth:`fetch` gives."""
        return self.index.shape + self.data.shape[2:]

    def fetch(self) -> jax.Array:
        """The samples, ``(B, ...)``."""
        # Without a look whether the index lies within: it is our own.
        fold = self.fold if self.data.shape[0] > 1 else 0
        return self.data.at[fold, self.index].get(mode="promise_in_bounds")


def fetched(samples: jax.Array | Stored) -> jax.Array:
    """The samples as an array ``(B, ...)``."""
    return samples.fetch() if isinstance(samples, Stored) else samples
