"""The one kind of error that a user is meant to read."""

EXIT_USER_ERROR = 2  # status of a process that one has ended


class UserError(Exception):
    """Bad input or surroundings: one line that names the file, clip or field and says what to do.

    The doors in ``scripts/`` print it as ``error: <message>`` and exit with status 2; anything else that escapes
    is a defect of the library and keeps its traceback.
    """


class WorkerDied(UserError):
    """A process died of the task that it was given."""
