"""S3 through s3fs, patiently: a bucket that is away for a while costs time and nothing else.

botocore gives up on a refused connection after some seconds, s3fs at once. A job of hours should
outlast the restart of a gateway, so every request is repeated for up to `PATIENCE_S`; what then
still fails is an OSError, whatever botocore makes of it, and so is what botocore raises before it
asks anybody. A conditional put that is repeated after its answer was lost finds its own object:
whoever asks for one compares what is there.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    MetadataRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import ConnectionError as NoConnection
from fsspec.asyn import sync_wrapper
from s3fs.core import S3_RETRYABLE_ERRORS, S3FileSystem

PATIENCE_S = 60.0

_PASSING = (
    *S3_RETRYABLE_ERRORS,
    NoConnection,
    aiohttp.ClientError,
    CredentialRetrievalError,  # keys that expire come from a server, too
    MetadataRetrievalError,
)
_PASSING_STATUS = frozenset((429, 500, 502, 503, 504))
_PASSING_CODES = frozenset(("RequestTimeout", "ConditionalRequestConflict"))

_log = logging.getLogger(__name__)


class PatientS3(S3FileSystem):
    """An S3 file system whose requests outlast an outage of `patience_s`, by default PATIENCE_S.

    With `in_all`, that is the time of a request with all its repetitions; else it begins when a
    request fails, for one of a large file may take long to come so far.
    """

    def __init__(
        self, *args: Any, patience_s: float | None = None, in_all: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.patience_s, self.in_all = patience_s, in_all

    async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
        call = super()._call_s3
        return await _patiently(lambda: call(method, *args, **kwargs), self.patience_s, self.in_all)

    async def _cat_file(self, path: str, *args: Any, **kwargs: Any) -> Any:
        cat = super()._cat_file  # of a large file it does not repeat a part that broke off
        return await _patiently(lambda: cat(path, *args, **kwargs), self.patience_s, self.in_all)

    call_s3 = sync_wrapper(_call_s3)
    cat_file = sync_wrapper(_cat_file)


def reach(uri: str, patience_s: float) -> None:
    """Make sure that somebody answers for a bucket, with the patience of a person who waits.

    What the answer says is no matter: who then reads or writes there is told of it.

    Raises:
        ConnectionError: nobody does.
    """
    quick = {
        "connect_timeout": patience_s,
        "read_timeout": patience_s,
        "retries": {"mode": "standard", "total_max_attempts": 1},
    }
    fs = PatientS3(
        patience_s=patience_s, in_all=True, config_kwargs=quick, skip_instance_cache=True
    )
    fs.retries = 1  # s3fs' own
    bucket, prefix, _ = fs.split_path(uri)
    with suppress(FileNotFoundError, PermissionError):
        fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)


async def _patiently(
    action: Callable[[], Awaitable[Any]], patience_s: float | None, in_all: bool = False
) -> Any:
    """Repeat what may safely be repeated while it fails in ways that pass.

    Raises:
        ConnectionError: it still does.
        OSError: botocore failed in another way; PermissionError for want of keys.
    """
    patience = PATIENCE_S if patience_s is None else patience_s
    deadline = time.monotonic() + patience if in_all else 0.0
    while True:
        try:
            return await action()
        except Exception as error:
            if not _passes(error):
                if isinstance(error, BotoCoreError):
                    raise _as_oserror(error) from error
                raise
            if not deadline:
                deadline = time.monotonic() + patience
                _log.warning("S3 does not answer (%s); trying on for %.0f s", error, patience)
            elif time.monotonic() > deadline:
                gone = f"S3 did not answer for {patience:.0f} s: {error}"
                raise ConnectionError(gone) from error
        await asyncio.sleep(random.uniform(0.5, 2.0))  # jitter: workers should not come all at once


def _as_oserror(error: BotoCoreError) -> OSError:
    keyless = isinstance(error, NoCredentialsError | PartialCredentialsError)
    return (PermissionError if keyless else OSError)(f"S3: {error}")


def _passes(error: Exception) -> bool:
    """Whether the same request may succeed later; s3fs keeps the server's answer as the cause."""
    if isinstance(error.__cause__, ClientError):
        answer = error.__cause__.response
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in _PASSING_STATUS or answer["Error"].get("Code") in _PASSING_CODES
    return isinstance(error, _PASSING)
