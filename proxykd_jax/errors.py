"""Two exceptions that stand for no fault of the program: a user's mistake, and a stop asked for."""


class UserError(Exception):
    """What was wrong, what is allowed and what to do, in sentences.

    Commands print the message and exit with code 2; no traceback is shown.
    """


class Stopped(Exception):  # noqa: N818 (no error)
    """The run was asked to stop (SIGTERM) and did, with everything saved that a resume needs.

    Commands print the message and exit with code 75, which asks for the same command again.
    """
