"""What all doors in ``scripts/`` share: how they fail."""

import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

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


def define_config(help_string: str) -> flags.FlagHolder:
    """Defines ``--config``; what is wrong in a config file is one line that names the file and the place.

    Args:
        help_string: What ``--help`` says.
    """
    holder = config_flags.DEFINE_config_file("config", None, help_string)
    flag = flags.FLAGS["config"]
    flag.parser = _ConfigFileParser(flag.parser)
    return holder


class _ConfigFileParser(flags.ArgumentParser):
    """Another parser of config files, whose exceptions it makes errors that a user can read."""

    def __init__(self, parser: flags.ArgumentParser):
        self._parser = parser

    def parse(self, argument: str) -> Any:
        try:
            config = self._parser.parse(argument)
            getattr(config, "lock", None)  # a config file that was not found says so only when it is first used
        except (UserError, OSError):
            raise
        except Exception as error:
            raise UserError(_wrong_in_file(argument, error)) from error
        if not isinstance(config, ConfigDict):
            raise UserError(
                f"{argument}: get_config() gives {type(config).__name__} instead of a ConfigDict; let it return what "
                "it made of mer_jax.study.config.base_config()"
            )
        return config

    def flag_type(self) -> str:
        return self._parser.flag_type()


def _wrong_in_file(argument: str, error: Exception) -> str:
    if str(error).startswith("Error whilst parsing config file"):  # ml_collections' own, around what was raised
        error = error.__context__ or error
    path, *variant = argument.split(":", 1)
    if isinstance(error, AttributeError) and error.name == "get_config":
        return f"{path}: has no get_config(); write one that returns a config, as the files of configs/ have it"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines = [error.lineno]
    if not lines and isinstance(error, TypeError):  # the call itself
        what = f"is called with {variant[0]!r}" if variant else f"gets its argument from --config={path}:ARGUMENT"
        return (
            f"{path}: get_config() {what}, which does not fit ({error}); let it take what follows the colon, or nothing"
        )
    place = f"{path}, line {lines[-1]}" if lines else path
    reason = " ".join(str(error.args[0] if error.args else error).split())
    return f"{place}: {type(error).__name__}: {reason}; correct the file"


def parse_config_flags(argv: list[str]) -> list[str]:
    """The ``flags_parser`` of ``absl.app.run`` for doors with a ``--config``: what is wrong is one line, too.

    Args:
        argv: The command line.

    Returns:
        What is left of it, as ``absl`` does.
    """
    logging.set_verbosity(logging.ERROR)  # what ml_collections warns of is an error here
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:
        message = _unknown_field(argv, str(error))
    except OSError as error:
        reason = re.sub(r"^.*Errno [0-9]+. ", "", str(error).strip(), flags=re.DOTALL)
        message = f"--config: {reason}; give the path of a config file from {os.getcwd()}"
    except (UserError, flags.Error) as error:
        message = str(error).strip().splitlines()[-1].strip()
    except ValueError as error:  # '--config.', a field without a name
        message = f"a --config.NAME=VALUE is wrong: {' '.join(str(error).split())}; --help lists the flags"
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(EXIT_USER_ERROR)


def _unknown_field(argv: list[str], told: str) -> str:
    """Names the argument behind ``told``, ml_collections' words for a field that no config has."""
    field = (re.search(r"(?<=lookup: )[\w.]+", told) or re.search(r"\w+", told))[0]
    near = re.search(r'Did you mean "(\w+)"', told)
    fits = re.compile(rf"--(no)?config\.([\w.]+\.)?{re.escape(field)}\b")
    argument = next(filter(fits.match, argv), f"config.{field}")
    return f"{argument}: the config has no such field" + (f"; did you mean {near[1]}?" if near else "")
