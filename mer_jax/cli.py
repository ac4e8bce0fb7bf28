"""What all doors in ``scripts/`` share: how they fail."""

import sys
from collections.abc import Callable

from absl import logging

from mer_jax.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def open_door(main: Callable[..., int | None], *args, **kwargs) -> None:
    """Runs ``main`` and ends the process: 0, ``main``'s own status, 2 with one line for a :class:`UserError`.

    Args:
        main: The library function behind the door.
        *args: Handed to ``main``.
        **kwargs: Handed to ``main``.
    """
    logging.set_verbosity(logging.WARNING)  # JAX and TFDS tell their inner steps at INFO
    try:
        status = main(*args, **kwargs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        status = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr, flush=True)
        status = EXIT_INTERRUPTED
    sys.exit(status or 0)
