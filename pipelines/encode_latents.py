"""Stage 2: a folder of captioned pictures -> a published version of the latent store.

    list -> compare with the store's rows -> decode and encode new pictures -> embed new captions
         -> publish a version that pins it all

Only what is new or changed is encoded, and every shard is committed as it is finished: after a
kill the same command goes on where it was. A bad file becomes a row of `rejects` with its reason.
"""

import itertools
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable

from ldm_core.errors import UserError
from ldm_core.latents.describe import describe
from ldm_core.latents.ledger import compare, cut, fingerprint, shard_name
from ldm_core.latents.manifest import EncoderEntry, LatentStatistics, Manifest
from ldm_core.latents.schema import caption_digest
from ldm_core.latents.store import LatentStore, StoreVersion
from pipelines.encode_on_ray import embed_captions, encode_pictures
from pipelines.encode_plan import Item, Plan, describe_autoencoder, make_plan, missing_tiny_encoders
from pipelines.encode_workers import Row, parts_of, reject_row, result_row, write_parts
from pipelines.progress import Progress
from pipelines.recipes.schema import Recipe
from pipelines.stage import Context, Options, Record, forget_record, run_stage, say_verdict

REJECTS_SHOWN = 10


def encode(recipe: Recipe, options: Options) -> Record | None:
    """Bring the recipe's latent store up to date with its folder, and publish a version.

    Raises:
        UserError: no usable pictures, no autoencoder, or a size the autoencoder cannot take.
    """
    recipe = recipe.located()
    autoencoder = describe_autoencoder(recipe)
    if options.dry_run and missing_tiny_encoders(recipe):
        say_verdict("encode", "would run, and build the tiny text encoders")
        return None
    plan = make_plan(recipe, autoencoder)
    inputs = {
        "data": fingerprint(sorted(plan.rows().items()))[:16],
        "autoencoder": plan.autoencoder.digest,
        **{entry.name: entry.digest for entry in plan.texts},
    }
    sections = {"size": recipe.size, "max_tokens": recipe.text.max_tokens}
    work = partial(_work, plan)
    return run_stage(recipe, "encode", plan.job.store, sections, inputs, work, options)


def _work(plan: Plan, context: Context) -> dict[str, Any]:
    """The stage itself; returns the summary for the record."""
    store = LatentStore(plan.job.store)
    store.create()
    start = time.monotonic()
    new_rows, removed_rows = _update_images(plan, store, context)
    seconds = time.monotonic() - start
    _check_images(plan, store)
    new_texts = _update_texts(plan, store, context)
    manifest = _describe(plan, store)
    version = _publish_if_new(store, manifest, new_rows, removed_rows)
    _warn_of_rejects(store.open_version(version))
    context.run.metrics({f"rejects/{reason}": n for reason, n in manifest.rejects.items()})
    return {
        "version": version,
        "rows": manifest.counts["samples"] + manifest.counts["rejects"],
        **manifest.counts,
        "rejects_by_reason": manifest.rejects,
        "new_rows": new_rows,
        "removed_rows": removed_rows,
        "new_texts": new_texts,
        "images_per_second": new_rows / seconds,
        "bytes": manifest.bytes,
        "content": manifest.content,
    }


# Each table: what is wanted against what is there; the stale goes, the missing is made


def _update_images(plan: Plan, store: LatentStore, context: Context) -> tuple[int, int]:
    """Encode the pictures the store lacks, drop changed or vanished ones.

    Returns:
        How many rows are new and how many were removed; a changed picture counts as both.
    """
    logs = {name: store.open(name) for name in ("samples", "rejects")}
    difference = compare(plan.rows(), _stored_rows(store, logs))
    gone = [{"id": id} for id in difference.stale]
    for name in logs:
        store.delete(name, pa.Table.from_pylist(gone))
    refused = [plan.rejects[id] for id in difference.missing if id in plan.rejects]
    pictures = [plan.images[id] for id in difference.missing if id in plan.images]
    section, verbose = context.recipe.encode, context.options.verbose
    rows = [_image_shard(items) for items in cut(pictures, section.shard_size)]
    encoded = encode_pictures(rows, plan.job, section.workers, verbose)
    results = itertools.chain(_refuse(store, refused), encoded)
    with context.progress(len(difference.missing), "images") as bar:
        _commit_all(store, logs, results, bar)
    return len(difference.missing), len(difference.stale)


def _update_texts(plan: Plan, store: LatentStore, context: Context) -> int:
    """Embed the captions the store lacks, drop those nobody has any more; returns how many new."""
    log = store.open("texts")
    columns = ["encoder", "caption_digest", "encoder_digest"]
    stored = store.table("texts", log.version(), columns).to_pylist()
    difference = compare(
        plan.text_rows(),
        (((row["encoder"], row["caption_digest"]), row["encoder_digest"]) for row in stored),
    )
    gone = [dict(zip(columns, key, strict=False)) for key in difference.stale]
    store.delete("texts", pa.Table.from_pylist(gone))
    section, verbose = context.recipe.encode, context.options.verbose
    rows = list(_text_shards(plan, difference.missing, section.shard_size))
    results = embed_captions(rows, plan.job, section.workers, verbose)
    with context.progress(len(difference.missing), "embeddings", "captions") as bar:
        _commit_all(store, {"texts": log}, results, bar)
    return len(difference.missing)


def _stored_rows(store: LatentStore, logs: Mapping[str, DeltaTable]) -> Iterator[tuple[str, str]]:
    """(id, fingerprint) of every row of the tables, as of these snapshots."""
    for name, log in logs.items():
        for row in store.table(name, log.version(), ["id", "fingerprint"]).to_pylist():
            yield row["id"], row["fingerprint"]


def _image_shard(items: Iterable[Item]) -> Row:
    items = list(items)
    shard = shard_name([part for item in items for part in (item["id"], item["fingerprint"])])
    return {"shard": shard, "items": json.dumps(items)}


def _text_shards(plan: Plan, missing: list[tuple[str, str]], size: int) -> Iterator[Row]:
    """The missing captions, encoder by encoder, as rows for `EncodeTexts`."""
    captions = {caption_digest(caption): caption for caption in plan.captions}
    for entry in plan.texts:
        for keys in cut([digest for name, digest in missing if name == entry.name], size):
            texts = json.dumps([captions[digest] for digest in keys])
            shard = shard_name([entry.name, entry.digest, *keys])
            yield {"shard": shard, "encoder": entry.name, "items": texts}


# On the driver: the one committer


def _refuse(store: LatentStore, items: list[Item]) -> Iterator[Row]:
    """Write what the listing refused; no worker is needed for that."""
    if items:
        shard = _image_shard(items)["shard"]
        yield result_row(shard, write_parts(store, shard, rejects=list(map(reject_row, items))))


def _commit_all(
    store: LatentStore, logs: Mapping[str, DeltaTable], results: Iterable[Row], bar: Progress
) -> None:
    """Commit each finished shard; `logs` are the snapshots in which its rows were missing."""
    done = 0
    for result in results:
        for part in parts_of(result):
            seen = logs[part.table].transaction_version(result["shard"]) or 0
            store.commit(part.table, [part], result["shard"], seen + 1)
            done += part.rows
        bar.update(done)


def _check_images(plan: Plan, store: LatentStore) -> None:
    """Every listed picture is in exactly one row, and some are usable."""
    logs = {name: store.open(name) for name in ("samples", "rejects")}
    difference = compare(plan.rows(), _stored_rows(store, logs))
    if difference.missing or difference.stale:
        raise UserError(
            f"{store.uri} changed while it was encoded: {len(difference.missing)} rows missing, "
            f"{len(difference.stale)} too many. One job at a time may write a store; run "
            "`ldm encode` again when the other has ended"
        )
    if store.dataset("samples").count_rows() == 0:
        reasons = Counter(store.table("rejects", columns=["reason"])["reason"].to_pylist())
        raise UserError(
            f"none of the {len(plan.rows())} files could be used: {_list(reasons)}. The table "
            f"{store.uri}/rejects has a row for each; mend them and run again"
        )


def _describe(plan: Plan, store: LatentStore) -> Manifest:
    auto = plan.autoencoder
    mean, std = auto.latents_mean, auto.latents_std
    return describe(
        store,
        EncoderEntry(name="autoencoder", uri=plan.job.autoencoder, digest=auto.digest),
        plan.texts,
        plan.job.max_tokens,
        auto.downsampling,
        LatentStatistics(mean=mean, std=std) if mean and std else None,
    )


def _publish_if_new(
    store: LatentStore, manifest: Manifest, new_rows: int, removed_rows: int
) -> int:
    """Publish unless the newest version says the same; returns the version that stands."""
    counts = f"{manifest.counts['samples']} samples, {manifest.counts['texts']} caption embeddings"
    known = store.versions()
    if known and manifest.says_the_same(store.open_version(known[-1]).manifest):
        print(f"[encode] nothing new: version {known[-1]} stands, {counts}", flush=True)
        return known[-1]
    forget_record(store.uri)
    version = store.publish(manifest)
    rows = f"{new_rows} rows new, {removed_rows} of changed or vanished files removed"
    print(f"[encode] version {version}: {counts}, {rows}", flush=True)
    return version


def _warn_of_rejects(version: StoreVersion) -> None:
    manifest = version.manifest
    if not manifest.rejects:
        return
    rejected = manifest.counts["rejects"]
    total = manifest.counts["samples"] + rejected
    print(f"[encode] warning: {rejected} of {total} files rejected: {_list(manifest.rejects)}")
    rows = version.table("rejects", ["id", "reason", "detail"]).sort_by("id").to_pylist()
    for row in rows[:REJECTS_SHOWN]:
        detail = " ".join(row["detail"].split())
        print(f"  {row['id']}: {row['reason']}" + (f" ({detail})" if detail else ""), flush=True)
    if len(rows) > REJECTS_SHOWN:
        more = len(rows) - REJECTS_SHOWN
        print(f"  and {more} more, in the Delta table {version.store.uri}/rejects", flush=True)


def _list(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
