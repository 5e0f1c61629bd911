"""The exceptions that a user's input, files or environment can cause."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError


class GraftError(Exception):
    """A problem the user can act on; the message says where, found, expected and what to do.

    The command line prints it as one line and exits with `exit_status`, without a traceback.
    """

    exit_status = 1


class UsageError(GraftError):
    """An option's value that means nothing, whatever the files and the machine are."""

    exit_status = 2


def in_words(error: Exception) -> str:
    """Say what an exception of reading a file, or an answer, means; for people, in one phrase."""
    match error:
        case json.JSONDecodeError():
            where = f"column {error.colno}"
            if "\n" in error.doc:
                where = f"line {error.lineno}, {where}"
            return f"not JSON: {error.msg.lower()} at {where}"
        case UnicodeDecodeError():
            return "not text in UTF-8"
        case ValidationError():
            first = error.errors()[0]
            if first["type"] == "json_invalid":
                return f"not JSON: {first['ctx']['error'].lower()}"
            place = ".".join(map(str, first["loc"]))
            return f"{place}: {first['msg'].lower()}" if place else first["msg"].lower()
        case OSError():
            return str(error.strerror or error).lower()
        case KeyError():
            return f"has no {error}"
        case TypeError() | AttributeError() | IndexError():
            return "JSON of another structure"
        case _:
            return str(error)


@contextmanager
def translated(what: str, *kinds: type[Exception], then: str = "") -> Iterator[None]:
    """Turn exceptions of these kinds into GraftError: `what`, what they mean, and `then`."""
    try:
        yield
    except kinds as error:
        raise GraftError(f"{what} ({in_words(error)}){then}") from error
