"""The `mtp-graft` command: parse, call, print; one module a group of commands.

What the commands do is in `pipeline`, `serving` and `bench`.
"""

import sys

# Importing them registers their commands.
from mtp_graft.cli import bench, pipeline, serve  # noqa: F401
from mtp_graft.cli.app import app
from mtp_graft.cli.output import note
from mtp_graft.errors import GraftError


def main() -> None:
    """Run the command line; a GraftError is one line on standard error and its exit status."""
    try:
        app()
    except GraftError as error:
        note("error: " + " ".join(str(error).split()))
        sys.exit(error.exit_status)
    except OSError as error:  # a path that cannot be used, or a disk that is full
        note(f"error: {error.filename or 'input/output'}: {error.strerror or error}")
        sys.exit(1)
