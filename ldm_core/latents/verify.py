"""Whether a published version is what it says: every file, every row, and the manifest over them.

The rows go by piece by piece. What stays in memory is the names and 16 bytes of each sample, and
the digests of the distinct captions. The manifest has no digest of the embeddings: a change of
theirs that leaves them finite is found only by the checksums of Parquet pages, where a file has
them.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake.exceptions import DeltaError

from ldm_core.autoencoders.autoencoder import AutoencoderFacts
from ldm_core.files import filesystem, join
from ldm_core.latents.manifest import LatentStatistics, Manifest, close
from ldm_core.latents.schema import LATER, TABLES
from ldm_core.latents.store import StoreVersion
from ldm_core.latents.tally import Check, Tally, differs
from ldm_core.latents.verify_ids import COLUMNS, Identities
from ldm_core.latents.verify_samples import SampleChecks
from ldm_core.latents.verify_texts import TextChecks

ROWS = 128  # decoded at a time

# What a damaged file makes pyarrow raise; a text of damaged bytes is no UTF-8.
_UNREADABLE = (OSError, pa.ArrowException, UnicodeDecodeError)


def verify(
    version: StoreVersion,
    autoencoder: AutoencoderFacts | None,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Check]:
    """Check every row of a version.

    Args:
        version: what to check.
        autoencoder: what is at the manifest's URI; None if nothing is. The manifest may have its
            statistics instead of measured ones.
        progress: gets the number of rows done so far.

    Returns:
        A check for each rule, failed or not.
    """
    manifest = version.manifest
    files = _Files(version, progress)
    texts = TextChecks(manifest)
    for rows in files.rows("texts"):
        for row in rows:
            texts.take(row)
    samples, names = SampleChecks(manifest, texts.known), Identities()
    for rows in files.rows("samples"):
        samples.take(rows)
        names.take("samples", rows)
    reasons: Counter[str] = Counter()
    for rows in files.rows("rejects", [*COLUMNS, "reason"]):
        reasons.update(row["reason"] for row in rows)
        names.take("rejects", rows)
    counts = {"samples": samples.count, "texts": texts.count, "rejects": reasons.total()}
    found = {
        "counts": counts,
        "buckets": dict(samples.buckets),
        "rejects": dict(reasons),
        "bytes": {"of all files": files.bytes},
    }
    return [
        *files.checks(),
        *texts.checks(),
        *samples.checks(),
        *names.checks(),
        _as_in_manifest(manifest, found),
        _content(manifest, samples),
        _rounding(manifest, texts),
        _autoencoder(manifest, autoencoder),
        _statistics(manifest, samples.statistics(), autoencoder),
    ]


class _Files:
    """The pinned files of a version, read row by row; what cannot be read is counted and left."""

    def __init__(self, version: StoreVersion, progress: Callable[[int], None]) -> None:
        self.bytes = 0
        self._version, self._progress = version, progress
        self._done = 0
        self._whole = Tally("files are there, whole and readable")
        self._schema = Tally("files have the schema's columns")

    def checks(self) -> list[Check]:
        return [self._whole.check(), self._schema.check()]

    def rows(self, table: str, columns: list[str] | None = None) -> Iterator[list[dict[str, Any]]]:
        """The table's rows, `ROWS` at a time."""
        store, pinned = self._version.store, self._version.manifest.tables[table]
        fs, root = filesystem(join(store.uri, table))
        try:
            log = pa.table(store.open(table, pinned).get_add_actions())
            there = {_last(each["name"]): each["size"] for each in fs.ls(root, detail=True)}
        except (DeltaError, OSError) as error:
            self._whole.ask(f"{table} at its version {pinned}", _one_line(error))
            return
        sizes = zip(log["path"].to_pylist(), log["size_bytes"].to_pylist(), strict=True)
        for path, size in sorted(sizes):
            self.bytes += size
            shown = f"{table}/{path}"
            if there.get(path) != size:
                problem = f"{there[path]} bytes, not {size}" if path in there else "it is missing"
                self._whole.ask(shown, problem)
                continue
            yield from self._read(fs, join(root, path), shown, table, columns)

    def _read(
        self, fs: Any, path: str, shown: str, table: str, columns: list[str] | None
    ) -> Iterator[list[dict[str, Any]]]:
        problem = ""
        try:
            with fs.open(path, "rb") as stream:
                file = pq.ParquetFile(stream, page_checksum_verification=True)
                if self._schema.ask(shown, _schema_problem(file.schema, TABLES[table])):
                    for batch in file.iter_batches(batch_size=ROWS, columns=columns):
                        rows = batch.to_pylist()
                        self._done += len(rows)
                        self._progress(self._done)
                        yield rows
        except _UNREADABLE as error:
            problem = _one_line(error)
        self._whole.ask(shown, problem)


def _last(path: str) -> str:
    """The last part of a path."""
    return path.rsplit("/", 1)[-1]


def _schema_problem(found: pq.ParquetSchema, wanted: pa.Schema) -> str:
    """What of a table's columns a file lacks or has in another type.

    Parquet's own types: the Arrow types that writers note beside them differ from one to the next.
    """
    here, there = _leaves(found), _leaves(_parquet(wanted))
    lacking = [f"no column {column}" for column in there if column not in {*here, *LATER}]
    others = [
        f"{column} is {here[column]}, not {kind}"
        for column, kind in there.items()
        if here.get(column, kind) != kind
    ]
    return ", ".join(lacking + others)


def _leaves(schema: pq.ParquetSchema) -> dict[str, str]:
    columns = (schema.column(i) for i in range(len(schema)))
    return {each.path: f"{each.physical_type} ({each.logical_type})" for each in columns}


def _parquet(schema: pa.Schema) -> pq.ParquetSchema:
    """The Parquet schema an Arrow schema is written as."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    return pq.ParquetFile(sink.getvalue()).schema


def _as_in_manifest(manifest: Manifest, found: Mapping[str, Mapping[str, int]]) -> Check:
    tally = Tally("counts, buckets, rejects and bytes are the manifest's")
    stated: dict[str, Mapping[str, int]] = {
        "counts": manifest.counts,
        "buckets": manifest.buckets,
        "rejects": manifest.rejects,
        "bytes": {"of all files": manifest.bytes},
    }
    for what, numbers in found.items():
        for key in sorted({*numbers, *stated[what]}):
            tally.ask(f"{what} {key}", differs(numbers.get(key, 0), stated[what].get(key, 0)))
    return tally.check()


def _content(manifest: Manifest, samples: SampleChecks) -> Check:
    tally = Tally("the content is the manifest's")
    tally.ask("content", differs(samples.content(), manifest.content))
    return tally.check()


def _rounding(manifest: Manifest, texts: TextChecks) -> Check:
    tally = Tally("the rounding of embeddings is the manifest's")
    found, stated = texts.rounding.result(), manifest.rounding
    for name in texts.known:
        tally.ask(name, differs(found.get(name), stated.get(name)))
    return tally.check()


def _autoencoder(manifest: Manifest, autoencoder: AutoencoderFacts | None) -> Check:
    entry = manifest.autoencoder
    tally = Tally("the autoencoder at its URI is the manifest's")
    if autoencoder is None:
        return tally.check(f"not checked: no autoencoder at {entry.uri}")
    tally.ask(entry.uri, differs(f"digest {autoencoder.digest}", f"digest {entry.digest}"))
    return tally.check()


def _statistics(
    manifest: Manifest, measured: LatentStatistics | None, autoencoder: AutoencoderFacts | None
) -> Check:
    """The manifest's are measured, or the autoencoder's own, which only its directory can tell."""
    tally = Tally("channel statistics are the manifest's")
    stated = manifest.statistics
    known = autoencoder is not None and autoencoder.digest == manifest.autoencoder.digest
    if autoencoder and known and autoencoder.latents_mean and autoencoder.latents_std:
        own = LatentStatistics(mean=autoencoder.latents_mean, std=autoencoder.latents_std)
        if own == stated:
            tally.ask("all", "")
            return tally.check("the autoencoder's own, not measured")
    if measured is None:
        return tally.check("not checked: no usable sample")
    names = [f"{what} of channel {i}" for what in ("mean", "std") for i in range(len(stated.mean))]
    pairs = zip(names, (*measured.mean, *measured.std), (*stated.mean, *stated.std), strict=True)
    for channel, here, there in pairs:
        tally.ask(channel, "" if close(here, there) else differs(here, there))
    check = tally.check()
    if check.failed and not known:
        return Tally(tally.rule).check(
            f"not checked: they are not the measured ones ({check.first[0]}), and the autoencoder "
            "they may be from is not there"
        )
    return check


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
