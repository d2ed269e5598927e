"""Whether anything listens where Ray is to be: Ray itself would try for minutes, without a word."""

import os
import socket
from urllib.parse import urlsplit

from ldm_core.errors import UserError

TIMEOUT_S = 5


def knock(address: str) -> None:
    """Open and close a connection to `host:port` or `scheme://host:port`.

    What has no port, such as "auto" and "local", is Ray's to find.

    Raises:
        OSError: nothing answers there.
        ValueError: the port is no number.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.port is not None:
        socket.create_connection((parts.hostname, parts.port), TIMEOUT_S).close()


def check_cluster() -> None:
    """Refuse a RAY_ADDRESS where nothing answers.

    Raises:
        UserError: it does not.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    try:
        knock(address)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no Ray answers at RAY_ADDRESS={address} ({error}): start that cluster, name another, "
            "or unset RAY_ADDRESS to run on this machine"
        ) from error
