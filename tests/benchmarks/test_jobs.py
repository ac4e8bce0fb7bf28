"""What the benchmarks measure with."""

import jax
import jax.numpy as jnp

from benchmarks.jobs import operations_of


def test_operations_are_told_by_name_with_their_times_and_calls():
    @jax.jit
    def program(x):
        return jax.lax.fori_loop(0, 5, lambda _, y: jnp.tanh(y @ x), x)

    x = jnp.ones((64, 64))
    operations = operations_of(lambda: program(x).block_until_ready())
    assert max(calls for _, _, calls in operations) == 5  # of what the loop holds
    assert all(seconds >= 0 for _, seconds, _ in operations) and not any("while" in name for name, _, _ in operations)
    assert [seconds for _, seconds, _ in operations] == sorted((s for _, s, _ in operations), reverse=True)
