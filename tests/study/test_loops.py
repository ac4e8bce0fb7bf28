"""Merged loops are an option of a whole process, so that what has them runs in a process of its own."""

import os
import subprocess
import sys

from mer_jax.study.loops import MERGED, NOT_MERGED, OPTIONS, loops_are_merged, merge_loops

PROGRAM = """
import os
import jax, jax.numpy as jnp, numpy as np, optax
from mer_jax.study.adam import OPTIMISERS, adam_update, init_adam
from mer_jax.study.loops import loops_are_merged, merge_loops

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
merge_loops()
merge_loops()
assert os.environ["XLA_FLAGS"].split() == [
    "--xla_force_host_platform_device_count=2", "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion"
]
assert len(jax.devices()) == 2 and loops_are_merged()
rng = np.random.default_rng(0)
params = {"kernel": jnp.asarray(rng.normal(size=(50, 30)), jnp.float32), "bias": jnp.ones(30)}
for optimiser in OPTIMISERS:
    peer = optax.adamw(1e-2, weight_decay=0.05)
    if optimiser == "adam":
        peer = optax.chain(optax.add_decayed_weights(0.05), optax.adam(1e-2))
    step = jax.jit(
        lambda params, gradients, state, update: adam_update(
            params, gradients, state, optimiser=optimiser, rate=jnp.float32(1e-2), weight_decay=jnp.float32(0.05),
            update=update,
        )
    )
    ours, state, theirs, their_state = params, init_adam(params), params, peer.init(params)
    for scale in (1.0, 1e-6, 1e2, 1e-3):
        gradients = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * scale, jnp.float32), params)
        ours, state = step(ours, gradients, state, jnp.bool_(True))
        updates, their_state = peer.update(gradients, their_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    jax.tree.map(np.testing.assert_array_equal, step(ours, broken, state, jnp.bool_(False)), (ours, state))
    program = step.lower(ours, gradients, state, jnp.bool_(True)).compile().as_text()
    assert "(f32[50,30]{1,0}, f32[50,30]{1,0}, f32[50,30]{1,0}" in program, "parameters and moments in one loop"
print("held")
"""


def test_updates_in_merged_loops_are_optaxs():
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"CXX": ""}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=kept)
    assert done.returncode == 0 and done.stdout == "held\n", done.stderr


def test_a_running_jax_is_left_alone():
    before = os.environ["XLA_FLAGS"]
    loops_are_merged()  # JAX is running from here on
    merge_loops()
    assert os.environ["XLA_FLAGS"] == before and not loops_are_merged()


def test_the_remedies_for_a_run_of_other_loops_are_flags_that_xla_takes():
    told = "from mer_jax.study.loops import loops_are_merged, merge_loops; merge_loops(); print(loops_are_merged())"
    for value, merged in ((NOT_MERGED, "False\n"), (MERGED, "True\n")):
        flags = {"XLA_FLAGS": f"--{OPTIONS}={value}"}
        done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, env=os.environ | flags)
        assert done.stdout == merged, done.stderr
