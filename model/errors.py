"""The base of all errors that end a command with one line instead of a traceback. Nothing here imports torch."""


class PowernapError(ValueError):
    """A mistake or an obstacle that its message explains in one line: the field or file, and what to write instead.

    Errors of tasks and other extensions derive from it as well: the command line prints their message and exits with
    `exit_code`, whatever module they come from. As a ValueError it may be raised by a field's validator.
    """

    exit_code = 2  # powernap.parallel.liveness.exit_codes.WRONG_USE
