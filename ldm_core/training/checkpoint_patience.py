"""Storage that is away for longer than a single request to it waits (`patient_s3`)."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

ATTEMPTS, FIRST_PAUSE_S, LONGEST_PAUSE_S = 6, 1.0, 30.0  # of a minute each, on S3
_PASSING = (errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE)  # of network file systems

T = TypeVar("T")


def patiently(action: Callable[[], T]) -> T:
    """Run `action`, which may safely be repeated, until it succeeds or has failed too often.

    What will not mend itself is told at once: a file that is not there, a place that may not be
    written, a full disk.

    Raises:
        OSError: the last attempt's.
    """
    for attempt in range(ATTEMPTS - 1):
        try:
            return action()
        except OSError as error:
            passing = isinstance(error, (ConnectionError, TimeoutError))
            if not passing and error.errno not in _PASSING:
                raise
        time.sleep(min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S))
    return action()
