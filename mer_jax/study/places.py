"""The places of a compiled call, and who takes them: members that have stopped or diverged leave theirs.

A CPU's members take turns, and one that has stopped takes none. An accelerator's are vectorised: one that stands still
takes as long as one that trains. So the members of a block close ranks between two calls as soon as half as many places
do, and go on in a narrower program. When that happens depends on the members alone, so a resumed run does the same.
"""

from collections.abc import Callable

import jax
import numpy as np

from mer_jax.study.engine import MemberInputs, MemberState, Watch

# Each narrower program is one more to compile.
_FEWEST_PLACES = 8


def over_parts(together: int, device: jax.Device, function: Callable, *trees):
    """Calls ``function`` with ``together`` members at a time.

    Args:
        together: The number.
        device: Where.
        function: From trees with a leading member axis to such a tree; it may donate its last argument.
        *trees: Of all members.

    Returns:
        The result for all members: on the device where they were called at once, on the host otherwise, for then the
        device has room for those alone that are at work.
    """
    size = len(jax.tree.leaves(trees)[0])
    if together >= size:
        return function(*trees)
    parts = []
    for start in range(0, size, together):
        index = np.minimum(np.arange(start, start + together), size - 1)  # the last part is filled up
        part = jax.device_put(jax.tree.map(lambda x, index=index: x[index], trees), device)
        kept = min(together, size - start)
        parts.append(jax.tree.map(lambda x, kept=kept: x[:kept], jax.device_get(function(*part))))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def goes_on(state: MemberState) -> np.ndarray:
    """Which members have neither stopped nor diverged, ``(b,)`` bool."""
    return ~np.asarray(state.stopped) & (np.asarray(state.diverged_at) < 0)


def places_for(count: int, together: int, fewest: int) -> int:
    """How many places ``count`` members take.

    Args:
        count: Number of members that go on.
        together: Most in one call.
        fewest: A program has no fewer places, unless ``together`` is less.

    Returns:
        A multiple of ``together`` or, where one call will do, what halving it leaves that is not too narrow.
    """
    if count > together:
        return -(-count // together) * together
    places = together
    while (half := -(-places // 2)) < places and half >= max(count, fewest):
        places = half
    return places


class Places:
    """The members of a block in their places, until the last one stands still.

    Args:
        members: Of the whole block, on its device.
        state: Theirs.
        together: Most members in one call.
        device: Where.
        in_turn: Whether the program trains one member after another, so that those that stand still cost nothing.
    """

    def __init__(self, members: MemberInputs, state: MemberState, together: int, device: jax.Device, in_turn: bool):
        self._members, self._state, self._together, self._device = members, state, together, device
        self._fewest = together if in_turn else _FEWEST_PLACES
        self._rows = np.arange(len(members.fold))  # of the block, a member each; copies may fill places up behind them
        self._left: list[tuple[np.ndarray, MemberState]] = []

    def train(
        self, call: Callable[[int, MemberInputs, MemberState], tuple[MemberState, Watch]]
    ) -> tuple[np.ndarray, Watch] | None:
        """Trains those that go on.

        Args:
            call: Trains as many members as its first argument says; donates the last.

        Returns:
            Rows of the block and what was seen of them, in this order; None once nobody goes on.
        """
        if not goes_on(self._state).any():
            return None
        self._close_ranks()
        width = min(len(self._members.fold), self._together)
        self._state, watch = over_parts(
            width, self._device, lambda *trees: call(width, *trees), self._members, self._state
        )
        return self._rows, jax.tree.map(lambda x: np.asarray(x)[: len(self._rows)], watch)

    def _close_ranks(self) -> None:
        going = goes_on(self._state)  # copies are stopped
        places = places_for(int(going.sum()), self._together, self._fewest)
        if places >= places_for(len(going), self._together, self._fewest):
            return
        stay = np.flatnonzero(going)
        gone = np.flatnonzero(~going[: len(self._rows)])
        state = jax.device_get(self._state)
        self._left.append((self._rows[gone], jax.tree.map(lambda x: x[gone], state)))
        self._rows = self._rows[stay]
        filled = np.resize(stay, places)  # the rest again from the first
        state = jax.tree.map(lambda x: x[filled], state)
        state = state.replace(stopped=state.stopped | (np.arange(places) >= len(stay)))
        self._members = jax.tree.map(lambda x: x[filled], self._members)
        self._state = jax.device_put(state, self._device) if places <= self._together else state

    def joined(self) -> MemberState:
        """The states of the whole block, in its order; on the host where places were left or members come in parts."""
        if not self._left:
            return self._state
        here = jax.tree.map(lambda x: x[: len(self._rows)], jax.device_get(self._state))
        rows, states = zip(*self._left, (self._rows, here), strict=True)
        order = np.argsort(np.concatenate(rows))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[order], *states)
