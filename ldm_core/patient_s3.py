"""S3 through s3fs, patiently: a bucket that is away for a while costs time and nothing else.

botocore gives up on a refused connection after some seconds, s3fs at once. A job of hours should
outlast the restart of a gateway, so every request is repeated for up to `PATIENCE_S`; what then
still fails is an OSError, whatever botocore makes of it. A conditional put that is repeated after
its answer was lost finds its own object: whoever asks for one compares what is there.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from botocore.exceptions import ClientError
from botocore.exceptions import ConnectionError as NoConnection
from fsspec.asyn import sync_wrapper
from s3fs.core import S3_RETRYABLE_ERRORS, S3FileSystem

PATIENCE_S = 60.0

_PASSING = (*S3_RETRYABLE_ERRORS, NoConnection, aiohttp.ClientError)
_PASSING_STATUS = frozenset((429, 500, 502, 503, 504))
_PASSING_CODES = frozenset(("RequestTimeout", "ConditionalRequestConflict"))

_log = logging.getLogger(__name__)


class PatientS3(S3FileSystem):
    """An S3 file system whose requests outlast an outage."""

    async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
        call = super()._call_s3
        return await _patiently(lambda: call(method, *args, **kwargs))

    async def _cat_file(self, path: str, *args: Any, **kwargs: Any) -> Any:
        cat = super()._cat_file  # of a large file it does not repeat a part that broke off
        return await _patiently(lambda: cat(path, *args, **kwargs))

    call_s3 = sync_wrapper(_call_s3)
    cat_file = sync_wrapper(_cat_file)


async def _patiently(action: Callable[[], Awaitable[Any]]) -> Any:
    """Repeat what may safely be repeated while it fails in ways that pass.

    Raises:
        ConnectionError: it still does.
    """
    deadline = 0.0
    while True:
        try:
            return await action()
        except Exception as error:
            if not _passes(error):
                raise
            if not deadline:
                deadline = time.monotonic() + PATIENCE_S
                _log.warning("S3 does not answer (%s); trying on for %.0f s", error, PATIENCE_S)
            elif time.monotonic() > deadline:
                gone = f"S3 did not answer for {PATIENCE_S:.0f} s: {error}"
                raise ConnectionError(gone) from error
        await asyncio.sleep(random.uniform(0.5, 2.0))  # jitter: workers should not come all at once


def _passes(error: Exception) -> bool:
    """Whether the same request may succeed later; s3fs keeps the server's answer as the cause."""
    if isinstance(error.__cause__, ClientError):
        answer = error.__cause__.response
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in _PASSING_STATUS or answer["Error"].get("Code") in _PASSING_CODES
    return isinstance(error, _PASSING)
