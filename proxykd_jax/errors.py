"""The one exception that stands for a mistake of the user's."""


class UserError(Exception):
    """What was wrong, what is allowed and what to do, in sentences.

    Commands print the message and exit with code 2; no traceback is shown.
    """
