"""Writes that happen exactly once, though an acknowledgement may be lost on its way.

A commit to a Delta log can succeed and still raise: the answer of the object store got lost, or a
step after the commit failed. Repeated blindly it would add the same rows twice. So every commit
carries an application transaction, and before each try the log is read anew and asked for it.
"""

import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.exceptions import (
    DeltaError,
    DeltaProtocolError,
    SchemaMismatchError,
    TableNotFoundError,
)
from deltalake.transaction import AddAction

from ldm_core.files import filesystem, is_remote

ATTEMPTS = 8
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0

# delta-rs reports conflicts as DeltaError and everything of the object store as OSError.
TRANSIENT = (DeltaError, OSError)
PERMANENT = (PermissionError, SchemaMismatchError, DeltaProtocolError, TableNotFoundError)


class CommitFailed(RuntimeError):
    """The table could not be reached or written for as long as we tried; nothing is half done."""


def retry(what: str, action: Callable[[], object]) -> None:
    """Run `action`, which may safely be repeated, until it returns.

    Raises:
        CommitFailed: it failed `ATTEMPTS` times; says how, and that the command can be repeated.
    """
    last: Exception | None = None
    for attempt in range(ATTEMPTS):
        try:
            action()
            return
        except PERMANENT:
            raise
        except TRANSIENT as error:
            last = error
        pause = min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S)
        time.sleep(pause * random.uniform(0.5, 1.0))  # jitter: two writers should not meet again
    raise CommitFailed(
        f"could not {what} in {ATTEMPTS} attempts; the last: {last}. What is committed stays: "
        "run the same command again when the storage answers"
    ) from last


def append_once(
    open_table: Callable[[], DeltaTable], files: list[AddAction], transaction: Transaction
) -> None:
    """Add files to a table in one commit, exactly once.

    Args:
        open_table: loads the log anew; a handle that was open before knows nothing of the others.
        files: already written, under the table's folder.
        transaction: names this commit; a later one of the same `app_id` has a higher `version`.

    Raises:
        CommitFailed: the storage did not answer; the files may or may not be in.
    """

    def attempt() -> None:
        table = open_table()
        found = table.transaction_version(transaction.app_id)
        if found is not None and found >= transaction.version:
            return
        table.create_write_transaction(
            list(files),
            mode="append",
            schema=table.schema(),
            commit_properties=CommitProperties(app_transactions=[transaction]),
        )

    retry(f"commit {len(files)} files of shard {transaction.app_id}", attempt)


def put_if_absent(uri: str, data: bytes) -> None:
    """Create a file with its whole content, or not at all.

    Locally by a hard link, which appears at once and never replaces; on S3 by a conditional put
    (If-None-Match), which must stay one request: multipart uploads do not honour the condition.

    Raises:
        FileExistsError: somebody was first.
    """
    fs, path = filesystem(uri)
    if is_remote(uri):
        try:
            fs.pipe_file(path, data, mode="create")
        except OSError as error:
            # s3fs knows this answer as AWS words it; Ceph does not say which condition failed.
            if "(PreconditionFailed)" not in str(error.__cause__):
                raise
            raise FileExistsError(uri) from error
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".part-") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        os.chmod(file.name, 0o644)  # temporary files are private by default
        os.link(file.name, target)
