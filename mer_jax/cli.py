"""What all doors in ``scripts/`` share: how they fail."""

import os
import re
import sys
from collections.abc import Callable

from absl import flags, logging

from mer_jax.errors import EXIT_USER_ERROR, UserError

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
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        status = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr, flush=True)
        status = EXIT_INTERRUPTED
    sys.exit(status or 0)


def parse_config_flags(argv: list[str]) -> list[str]:
    """The ``flags_parser`` of ``absl.app.run`` for doors with a ``--config``: what is wrong is one line, too.

    Args:
        argv: The command line.

    Returns:
        What is left of it, as ``absl`` does.
    """
    try:
        rest = flags.FLAGS(argv)
        # A config file that was not found says so only when it is first used.
        getattr(flags.FLAGS.config, "name", None)
        return rest
    except (AttributeError, KeyError) as error:
        message = _unknown_field(argv, str(error))
    except OSError as error:
        message = f"--config: {re.sub(r'^.*Errno [0-9]+. ', '', str(error).strip(), flags=re.DOTALL)}"
    except (UserError, flags.Error) as error:
        # An exception in a config file is told with its traceback, whose last line is the exception.
        message = str(error).strip().splitlines()[-1].strip()
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(EXIT_USER_ERROR)


def _unknown_field(argv: list[str], told: str) -> str:
    """Names the argument behind ``told``, ml_collections' words for a field that no config has."""
    field = (re.search(r"(?<=lookup: )[\w.]+", told) or re.search(r"\w+", told))[0]
    near = re.search(r'Did you mean "(\w+)"', told)
    fits = re.compile(rf"--(no)?config\.([\w.]+\.)?{re.escape(field)}\b")
    argument = next(filter(fits.match, argv), f"config.{field}")
    return f"{argument}: the config has no such field" + (f"; did you mean {near[1]}?" if near else "")
