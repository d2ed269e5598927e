"""The latent store: Delta tables of plain Parquet files under one URI, and published versions.

```
<uri>/samples/  texts/  rejects/      Parquet files named <shard>-<attempt>, and a Delta log each
<uri>/versions/00000001.json          a version: all three tables pinned (see manifest.py)
```

Workers write files, which nobody sees; one committer adds them to the logs, shard by shard; what
the tables hold is the only record of what is done. Readers open a published version and keep it.
S3 settings come from the `AWS_*` variables.
"""

import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
from deltalake import DeltaTable, Transaction
from deltalake.transaction import AddAction

from ldm_core.errors import UserError
from ldm_core.files import absolute, filesystem, is_remote, join, read_bytes, write_bytes
from ldm_core.latents.commit import append_once, put_if_absent, retry
from ldm_core.latents.manifest import FORMAT, Manifest
from ldm_core.latents.schema import TABLES
from ldm_core.latents.table_files import dataset_of, live_files

# A published version reads old files of the log's past: neither is ever cleaned up by itself.
_KEEP = {
    "delta.logRetentionDuration": "interval 5200 weeks",
    "delta.deletedFileRetentionDuration": "interval 5200 weeks",
}

# Left alone, delta-rs gives up on a server that is away after two to six seconds.
_PATIENCE = {"max_retries": "1000", "retry_timeout": "60s"}  # it waits at least 0.1 s


@dataclass(frozen=True)
class PartFile:
    """A Parquet file that is written but not committed; `path` is relative to its table."""

    table: str
    path: str
    bytes: int
    rows: int


def storage_options(uri: str) -> dict[str, str] | None:
    """What delta-rs needs to reach the URI; None on a local disk."""
    if not is_remote(uri):
        return None
    options = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
    options |= _PATIENCE
    options.setdefault("AWS_REGION", options.get("AWS_DEFAULT_REGION", "us-east-1"))
    if options.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        options["AWS_ALLOW_HTTP"] = "true"  # else a bare "Generic S3 error"
    return options


class LatentStore:
    """The store at a URI, for the job that writes it and whoever wants its present state."""

    def __init__(self, uri: str) -> None:
        self.uri = absolute(uri).rstrip("/")

    def create(self) -> None:
        """Make the empty tables; those that exist stay as they are."""
        for name, schema in TABLES.items():
            make = partial(
                DeltaTable.create,
                join(self.uri, name),
                schema,
                mode="ignore",
                configuration=_KEEP,
                storage_options=storage_options(self.uri),
            )
            retry(f"create table {name} in {self.uri}", make)

    def open(self, table: str, version: int | None = None) -> DeltaTable:
        """The Delta table as its log is now, or was at a Delta version."""
        uri = join(self.uri, table)
        return DeltaTable(uri, version=version, storage_options=storage_options(uri))

    def dataset(self, table: str, version: int | None = None) -> pyarrow.dataset.Dataset:
        """The table's files as a pyarrow dataset with the schema of `schema.py`."""
        files = live_files(self.open(table, version))
        return dataset_of(self.uri, table, sorted(file.path for file in files))

    def table(
        self, name: str, version: int | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """A table, or some columns of it, in memory.

        Raises:
            UserError: a file of it is gone.
        """
        try:
            return self.dataset(name, version).to_table(columns=list(columns) if columns else None)
        except FileNotFoundError as error:
            raise UserError(
                f"a file of the table {name} of {self.uri} is gone ({error}): `ldm store "
                f"{self.uri} --verify` names all that are, and what to do"
            ) from error

    def bytes(self, table: str, version: int | None = None) -> int:
        """Size of the files a table consists of."""
        return sum(file.bytes for file in live_files(self.open(table, version)))

    def write_part(self, table: str, rows: pa.Table, shard: str) -> PartFile:
        """Write rows as a file of their own; any worker may, and an abandoned file harms nobody."""
        assert rows.schema.equals(TABLES[table]), f"{table}: {rows.schema} is not the schema"
        data = parquet_bytes(rows)
        path = f"{shard}-{uuid.uuid4().hex[:8]}.parquet"  # a repeated attempt is another file
        write_bytes(join(self.uri, table, path), data)
        return PartFile(table, path, len(data), rows.num_rows)

    def commit(self, table: str, parts: Sequence[PartFile], shard: str, version: int = 1) -> None:
        """Add files to the table, exactly once for each (shard, version).

        Args:
            table: the files' table.
            parts: what workers wrote for the shard.
            shard: names the transaction.
            version: one more than `open(table).transaction_version(shard)` was in the snapshot
                that did not hold the rows: rows deleted since may then come back.
        """
        files = [_add_action(part) for part in parts]
        append_once(lambda: self.open(table), files, Transaction(shard, version))

    def publish(self, manifest: Manifest) -> int:
        """Make the manifest the newest version and return its number.

        The file appears complete or not at all, and two publishers never share a number.
        """
        number = max(self.versions(), default=0) + 1
        stamp = {"publication": uuid.uuid4().hex, "created": datetime.now(UTC).isoformat()}
        while True:
            stamped = manifest.model_copy(update={**stamp, "number": number})
            data = (stamped.model_dump_json(indent=2) + "\n").encode()
            try:
                put_if_absent(self._version_uri(number), data)
                return number
            except FileExistsError:
                if read_bytes(self._version_uri(number)) == data:
                    return number  # our own put, acknowledged too late and repeated
                number += 1

    def versions(self) -> list[int]:
        """Numbers of the published versions, oldest first."""
        fs, folder = filesystem(join(self.uri, "versions"))
        try:
            names = [path.rsplit("/", 1)[-1] for path in fs.ls(folder, detail=False)]
        except FileNotFoundError:
            return []
        stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
        return sorted(int(stem) for stem in stems if stem.isdigit())

    def open_version(self, number: int | None = None) -> "StoreVersion":
        """A published version, the newest if none is named.

        Raises:
            UserError: nothing is published there, or not this version.
        """
        known = self.versions()
        if not known:
            raise UserError(
                f"{self.uri} has no published version of a latent store; make one with "
                "`ldm encode`, or name the folder that has one, in a recipe's root `latents`"
            )
        if number is not None and number not in known:
            raise UserError(f"{self.uri} has no version {number}, only {known}: choose one")
        text = read_bytes(self._version_uri(known[-1] if number is None else number))
        written = json.loads(text).get("format")
        if written != FORMAT:
            raise UserError(
                f"{self.uri} is written in format {written}, this program reads {FORMAT}: "
                "use the program that wrote it, or encode again into another place"
            )
        return StoreVersion(self, Manifest.model_validate_json(text))

    def version_of(self, content: str) -> "StoreVersion":
        """The newest published version whose content digest begins with `content`.

        Raises:
            UserError: there is none.
        """
        known = self.versions()
        for number in reversed(known):
            version = self.open_version(number)
            if version.manifest.content.startswith(content):
                return version
        raise UserError(
            f"{self.uri} has no version of the content {content} in its versions {known}: it was "
            "made anew or cleaned up since. Encode the same pictures with the same encoders again, "
            "or begin with `ldm train` on what is there"
        )

    def _version_uri(self, number: int) -> str:
        return join(self.uri, "versions", f"{number:08d}.json")


@dataclass(frozen=True)
class StoreVersion:
    """A published version: what it holds never changes."""

    store: LatentStore
    manifest: Manifest

    @property
    def number(self) -> int:
        """The version's number."""
        return self.manifest.number

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A table of the version, or some of its columns, in memory."""
        return self.store.table(name, self.manifest.tables[name], columns)

    def batches(self, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The table piece by piece."""
        dataset = self.store.dataset(name, self.manifest.tables[name])
        yield from dataset.to_batches(columns=list(columns))


def parquet_bytes(rows: pa.Table) -> bytes:
    """Rows as the file that `LatentStore.write_part` writes."""
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(rows, sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue().to_pybytes())


def _add_action(part: PartFile) -> AddAction:
    return AddAction(
        path=part.path,
        size=part.bytes,
        partition_values={},
        modification_time=int(time.time() * 1000),
        data_change=True,
        stats=json.dumps({"numRecords": part.rows}),
    )
