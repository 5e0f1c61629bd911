"""Telling a service manager that the server is ready, as systemd's `Type=notify` expects it."""

import os
import socket

from mtp_graft.errors import GraftError


def notify(state: str) -> None:
    """Send `state` (such as READY=1) to the socket that NOTIFY_SOCKET names, if it names one.

    The protocol is sd_notify(3)'s: one datagram; a leading @ is an abstract socket. Raises
    GraftError if nobody listens there.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    path = "\0" + address[1:] if address.startswith("@") else address
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.connect(path)
            manager.sendall(state.encode())
    except OSError as error:
        raise GraftError(
            f"NOTIFY_SOCKET={address}: cannot tell the service manager {state} ({error.strerror}); "
            "unset it where there is none"
        ) from error
