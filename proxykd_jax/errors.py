"""Two exceptions that are not program errors: a user's mistake, and a requested stop."""


class UserError(Exception):
    """Sentences that say what was wrong, what is allowed and what to do.

    Commands print the message without a traceback and exit with code 2.
    """


class Stopped(Exception):  # noqa: N818 (not an error)
    """The run was asked to stop (SIGTERM) and did so, after saving everything that a resume needs.

    Commands print the message and exit with code 75, which asks to run the same command again.
    """
