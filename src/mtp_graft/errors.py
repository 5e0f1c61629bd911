"""The one exception that a user's input, files or environment can cause."""


class GraftError(Exception):
    """A problem the user can act on; the message says where, found, expected and what to do.

    The command line prints it as one line and exits with status 1, without a traceback.
    """
