"""The exceptions that a user's input, files or environment can cause."""


class GraftError(Exception):
    """A problem the user can act on; the message says where, found, expected and what to do.

    The command line prints it as one line and exits with `exit_status`, without a traceback.
    """

    exit_status = 1


class UsageError(GraftError):
    """An option's value that means nothing, whatever the files and the machine are."""

    exit_status = 2
