"""Which devices a study uses."""

import contextlib
import os

import jax

from mer_jax.errors import UserError
from mer_jax.parallel import available_processors


def current_platform() -> str:
    """The kind of device that programs are compiled for here: that of JAX's default device where one is set."""
    device = jax.config.jax_default_device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def select_devices(platform: str, *, divided: bool = True) -> list[jax.Device]:
    """The devices to work on.

    Args:
        platform: ``'cpu'``, ``'gpu'`` or ``'tpu'`` to insist on one, '' for the best there is.
        divided: Whether a CPU becomes one device a core, unless XLA_FLAGS already says how many it is: independent
            work then runs side by side, which serves small models better than many threads on one matrix product.

    Returns:
        Local devices, at least one.

    Raises:
        UserError: The wanted platform is not there, or its devices are tied to those of other hosts.
    """
    if divided and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # Refused where JAX is running already, with as many devices as it has.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", available_processors())
    try:
        devices = jax.local_devices(backend=platform or None)
    except (RuntimeError, AssertionError) as error:  # JAX asserts where JAX_PLATFORMS names only what is absent
        wanted = (
            f"config.platform={platform!r}" if platform else f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r}"
        )
        reason = next(iter(str(error).strip().splitlines()), "JAX found none")
        raise UserError(
            f"{wanted}: no such device on this machine ({reason}); install the jax build for it, or set "
            "config.platform='cpu'"
        ) from error
    if jax.process_count() > 1:  # a TPU pod joins its hosts by itself; orbax would save in the first of them alone
        raise UserError(
            f"JAX joins the devices of {jax.process_count()} hosts into one, but each host trains on its own; on a TPU "
            "pod set TPU_PROCESS_BOUNDS=1,1,1 and TPU_CHIPS_PER_PROCESS_BOUNDS to the chips of one host"
        )
    # Small arrays that are made before training belong there too, not on an accelerator that was not asked for.
    jax.config.update("jax_default_device", devices[0])
    return devices


def worker_devices(platform: str) -> list[jax.Device]:
    """The device of every thread that trains blocks of members; arguments and errors as of :func:`select_devices`.

    A program is compiled for each device apart, and a CPU device runs one for several threads at a time: without
    XLA_FLAGS that divide the CPU, its threads, one a core, share one device.
    """
    devices = select_devices(platform, divided=False)
    if devices[0].platform == "cpu" and len(devices) == 1:
        return devices * available_processors()
    return devices
