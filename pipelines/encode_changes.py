"""The latent store's tables brought up to date: the stale goes, the missing is made."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
from deltalake import DeltaTable

from ldm_core.files import exists, join
from ldm_core.latents.ledger import StoredRow, Todo, compare_files, cut, shard_name
from ldm_core.latents.lock import StoreLock
from ldm_core.latents.rewrite import delete_rows, replace_rows
from ldm_core.latents.schema import SAMPLES, TABLES, caption_rows, captions_digest
from ldm_core.latents.store import LatentStore
from ldm_core.media.buckets import Bucket
from pipelines.encode_ceiling import Ceiling
from pipelines.encode_media import Row, mirrored, only_part
from pipelines.encode_on_ray import encode_shards, probe_files
from pipelines.encode_plan import Item, Plan, as_they_lie
from pipelines.encode_results import parts_of, reject_row, written
from pipelines.encode_rounds import rounds
from pipelines.encode_texts import TEXT_KEY, by_first_use, text_shards, texts_to_do
from pipelines.encode_throughput import COMMIT, Throughput
from pipelines.progress import Progress
from pipelines.recipes.sections import EncodeSection
from pipelines.stage import Context

MEDIA = ("samples", "rejects")


@dataclass(frozen=True)
class Changes:
    """What a run did.

    Attributes:
        new, removed: rows of samples and rejects; changed ones count as both.
        renamed: rows whose captions alone were changed.
        texts: new embeddings.
    """

    new: int
    removed: int
    renamed: int
    texts: int


@dataclass(frozen=True)
class Writer:
    """The driver as the one committer.

    Attributes:
        lock: shown to be held before every commit.
        logs: the snapshots in which the rows to come were missing.
        throughput: of the workers and its own.
    """

    store: LatentStore
    lock: StoreLock
    logs: Mapping[str, DeltaTable]
    throughput: Throughput

    def commit(self, result: Row) -> int:
        """Commit a finished shard, exactly once; returns its rows."""
        parts = parts_of(result)
        rows = sum(part.rows for part in parts)
        self.throughput.add(result["work"])
        with self.throughput.timed(COMMIT, rows, sum(part.bytes for part in parts)):
            self.lock.check()
            for part in parts:
                seen = self.logs[part.table].transaction_version(result["shard"]) or 0
                self.store.commit(part.table, [part], result["shard"], seen + 1)
        return rows

    def delete_media(self, ids: Iterable[str]) -> None:
        """Remove samples and rejects."""
        gone = pa.Table.from_pylist([{"id": id} for id in ids])
        for name in MEDIA:
            self.lock.check()
            delete_rows(self.store, name, gone)


def media_to_do(plan: Plan, store: LatentStore, retry_rejects: bool = False) -> Todo:
    """What separates the tables, as they are now, from the plan; none is all of it."""
    if not exists(join(store.uri, MEDIA[0], "_delta_log")):
        return Todo(sorted(plan.fingerprints))
    logs = {name: store.open(name) for name in MEDIA}
    rows = _stored_rows(store, logs, retry_rejects)
    return compare_files(plan.fingerprints, plan.captions_digests, rows)


def update(
    plan: Plan, store: LatentStore, lock: StoreLock, context: Context, throughput: Throughput
) -> Changes:
    """Encode the files and embed the captions the store lacks, drop what is changed or gone.

    Raises:
        UserError: more rejects than the recipe allows, or somebody else took the lock.
    """
    logs = {name: store.open(name) for name in TABLES}
    todo = media_to_do(plan, store, context.options.retry_rejects)
    texts = texts_to_do(plan, store, logs["texts"])
    writer = Writer(store, lock, logs, throughput)
    writer.delete_media(todo.stale)
    gone = [dict(zip(TEXT_KEY, key, strict=True)) for key in texts.stale]
    lock.check()
    delete_rows(store, "texts", pa.Table.from_pylist(gone))
    lock.check()
    replace_rows(store, "samples", _new_captions(plan, store, todo.renamed))
    done = _in_rounds(plan, writer, todo, texts.missing, context)
    new = len(done.kept) - len(todo.kept)
    return Changes(new, len(todo.stale), len(todo.renamed), len(texts.missing))


def _in_rounds(
    plan: Plan, writer: Writer, todo: Todo, texts: list[tuple[str, str]], context: Context
) -> Todo:
    """Make what is missing, captions with the last files, whose order decides theirs; returns the
    rows that are there then."""
    entries = [plan.entries[id] for id in todo.missing if id in plan.entries]
    each = rounds(todo.missing, sorted(listed_parts(plan, entries)[1], key=as_they_lie))
    left, kept = len(todo.missing), len(todo.kept) - todo.rejects
    ceiling = Ceiling(context.recipe.encode.max_reject_share, kept, todo.rejects)
    for place, ids in enumerate(each, start=1):
        left -= len(ids)
        due = texts if place == len(each) else []
        now = replace(todo, missing=ids)
        todo = _make_missing(plan, writer, now, due, left, ceiling, context)
    return todo


def _make_missing(
    plan: Plan,
    writer: Writer,
    todo: Todo,
    texts: list[tuple[str, str]],
    left: int,
    ceiling: Ceiling,
    context: Context,
) -> Todo:
    """Returns the rows that are there then; so many files are left for later."""
    section, verbose = context.recipe.encode, context.options.verbose
    refused = [plan.rejects[id] for id in todo.missing if id in plan.rejects]
    entries = [plan.entries[id] for id in todo.missing if id in plan.entries]
    found = _parts(plan, entries, writer, ceiling, context)
    todo = _agreeing(writer, todo, found)
    missing = [part for part in found if part["id"] not in todo.kept]
    new = {item["id"] for item in (*refused, *missing)}
    refused += [part for part in missing if "reason" in part]
    good = [part for part in missing if "reason" not in part]
    places = todo.places | {(part["bucket"], part["source"]) for part in good}
    captions = by_first_use(texts, places, plan)
    rows = [*shards_of(good, section), *text_shards(plan, captions, section)]
    writer.throughput.shards += len(rows)
    encoded = encode_shards(rows, plan.job, section.workers, verbose)
    total = len(new) + len(todo.kept) + left
    results = ceiling.over(total, encoded, _refuse(writer.store, refused, section))
    with context.progress(len(new) + len(texts), "rows and captions") as bar:
        _commit_all(writer, results, bar)
    return replace(todo, kept=todo.kept | new, places=places, rejects=ceiling.rejects)


# Media: files -> parts of one bucket each -> shards


def listed_parts(plan: Plan, entries: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """The parts of files of which the listing tells all, and the other files."""
    buckets = [bucket for bucket in plan.job.geometry.buckets() if bucket.frames == 1]
    plain = [entry for entry in entries if entry["kind"] == "image" and len(buckets) == 1]
    known = [{**entry, **only_part(entry), "bucket": buckets[0].name} for entry in plain]
    if plan.job.flip:
        known = [part for one in known for part in mirrored([one])]
    return known, [entry for entry in entries if entry["kind"] != "image" or len(buckets) > 1]


def _parts(
    plan: Plan, entries: Sequence[Item], writer: Writer, ceiling: Ceiling, context: Context
) -> list[Item]:
    """The parts of files; only what a listing cannot tell is looked up in the files.

    Raises:
        UserError: too many of the files so far are rejects, which are committed.
    """
    known, unknown = listed_parts(plan, entries)
    section, verbose = context.recipe.encode, context.options.verbose
    rejects = list[Item]()
    with context.progress(len(unknown), "files", "probe") as bar:
        seen: set[str] = set()
        for part in probe_files(unknown, plan.job, section.workers, verbose):
            (rejects if "reason" in part else known).append(part)
            seen.add(part["source"])
            bar.update(len(seen))
            if error := ceiling.broken_by(len(seen), len(rejects)):
                for result in _refuse(writer.store, rejects, section):
                    writer.commit(result)
                raise error
    ceiling.add(len(rejects), len(rejects))
    return known + rejects


def _agreeing(writer: Writer, todo: Todo, found: Sequence[Item]) -> Todo:
    """Without the rows of files that were partly there and now give another number of rows: a film
    some of whose clips are in may be a reject today.
    """
    parts = {part["source"]: part["parts"] for part in found}
    others = [
        row
        for source, rows in todo.partial.items()
        for row in rows
        if parts.get(source, row.parts) != row.parts
    ]
    gone = {row.id for row in others}
    writer.delete_media(sorted(gone))
    places = {(row.bucket, row.source) for row in others}
    return replace(todo, kept=todo.kept - gone, places=todo.places - places)


def shards_of(parts: list[Item], section: EncodeSection) -> Iterator[Row]:
    """Parts of one bucket, those of one file side by side, cut so that their pixels have room."""
    parts.sort(key=lambda part: (part["bucket"], *as_they_lie(part), part["part"]))
    for name, group in itertools.groupby(parts, key=lambda part: part["bucket"]):
        for items in cut(list(group), shard_limit(name, section)):
            told = json.dumps(items)
            yield {"shard": _shard_of(items), "bucket": name, "encoder": "", "items": told}


def shard_limit(bucket: str, section: EncodeSection) -> int:
    """The most parts of a shard of a bucket."""
    size = Bucket.parse(bucket)
    pixels = 3 * size.frames * size.height * size.width
    return min(section.shard_size, max(1, section.shard_mib * 2**20 // pixels))


def _shard_of(items: Sequence[Item]) -> str:
    return shard_name([part for item in items for part in (item["id"], item["fingerprint"])])


def _refuse(store: LatentStore, items: list[Item], section: EncodeSection) -> Iterator[Row]:
    """Write what was refused before it could be decoded; no worker is needed for that."""
    for some in cut(items, section.shard_size):
        rejects = list(map(reject_row, some))
        yield written(store, _shard_of(some), Throughput(), COMMIT, rejects=rejects)


def _stored_rows(
    store: LatentStore, logs: Mapping[str, DeltaTable], retry_rejects: bool
) -> Iterator[StoredRow]:
    """Every row of the tables, as of these snapshots; rejects to be tried again are not current."""
    columns = ["id", "source_id", "parts", "fingerprint"]
    versions = {name: log.version() for name, log in logs.items()}
    more = ["captions_digest", "bucket"]
    samples = store.table("samples", versions["samples"], [*columns, *more])
    for row in samples.to_pylist():
        yield StoredRow(*row.values())
    for row in store.table("rejects", versions["rejects"], columns).to_pylist():
        fingerprint = "" if retry_rejects else row["fingerprint"]
        yield StoredRow(row["id"], row["source_id"], row["parts"], fingerprint, None)


def _new_captions(plan: Plan, store: LatentStore, ids: Sequence[str]) -> pa.Table:
    """The caption columns of rows that keep their latents."""
    wanted, rows = set(ids), []
    columns = ["id", "source_id", "digest"]
    stored = store.table("samples", columns=columns).to_pylist() if ids else []
    for row in stored:
        if row["id"] in wanted:
            captions = caption_rows(plan.entries[row["source_id"]]["captions"])
            told = captions_digest(captions)
            digest = row["digest"][: -len(told)] + told  # see sample_digest
            rows.append((row["id"], captions, told, digest))
    fields = [SAMPLES.field(name) for name in ("id", "captions", "captions_digest", "digest")]
    arrays = zip(fields, zip(*rows, strict=True) if rows else [[]] * 4, strict=True)
    return pa.table([pa.array(list(values), f.type) for f, values in arrays], pa.schema(fields))


def _commit_all(writer: Writer, results: Iterable[Row], bar: Progress) -> None:
    done = 0
    for result in results:
        done += writer.commit(result)
        bar.update(done)
