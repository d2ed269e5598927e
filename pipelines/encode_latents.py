"""Stage 2: captioned pictures and videos -> a published version of the latent store.

    list -> compare with the store's rows -> find the parts of new files -> decode and encode them,
         embed new captions -> publish a version that pins it all

Only what is new or changed is encoded, and every shard is committed as it is finished: after a
kill the same command goes on where it was. A bad file becomes a row of `rejects` with its reason.

Workers hold a few shards at a time, whatever the set's size. The command itself holds the listing:
about 2 kB a file that is to be done, 2 GB for a million.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import pyarrow as pa

from ldm_core.autoencoders.autoencoder import AutoencoderFacts
from ldm_core.errors import UserError
from ldm_core.files import reach
from ldm_core.latents.card import keep_card, write_card
from ldm_core.latents.describe import describe
from ldm_core.latents.ledger import fingerprint
from ldm_core.latents.lock import locked
from ldm_core.latents.manifest import EncoderEntry, LatentStatistics, Manifest
from ldm_core.latents.store import LatentStore, StoreVersion
from ldm_core.media.manifest_sample import Sampled
from ldm_core.media.sources import look_at
from pipelines.encode_ceiling import BrokenData
from pipelines.encode_changes import Changes, media_to_do, update
from pipelines.encode_duplicates import report_duplicates
from pipelines.encode_estimate import estimate
from pipelines.encode_plan import (
    Plan,
    describe_autoencoder,
    make_plan,
    missing_tiny_encoders,
    with_tiny_encoders,
)
from pipelines.encode_texts import texts_to_do
from pipelines.encode_throughput import Throughput
from pipelines.recipes.schema import Recipe
from pipelines.stage import Context, Options, Record, forget_record, run_stage, say_verdict

REJECTS_SHOWN = 10
_OF_REJECTS = ["id", "reason", "detail"]
MOST_LISTED = 100_000  # rows of manifests: of more, a dry run looks at so many at most
MEASURED = 32  # files that a dry run encodes to know what all would take


def encode(recipe: Recipe, options: Options) -> Record | None:
    """Bring the recipe's latent store up to date with its folder, and publish a version.

    Raises:
        UserError: no usable pictures, no autoencoder, or a size the autoencoder cannot take.
    """
    recipe = recipe.located()
    looked = _look(recipe) if options.dry_run else None
    autoencoder = describe_autoencoder(recipe)
    if looked:
        plan = _told(recipe, autoencoder, looked, options.retry_rejects)
    else:
        plan = make_plan(recipe, autoencoder)
    if plan is None:
        return None
    inputs = {
        "data": fingerprint(
            sorted(plan.fingerprints.items()), sorted(plan.captions_digests.items())
        )[:16],
        "autoencoder": plan.autoencoder.digest,
        **{entry.name: entry.digest for entry in plan.texts},
    }
    sections = {"size": recipe.size, "max_tokens": recipe.text.max_tokens}
    work = partial(_work, plan)
    return run_stage(recipe, "encode", plan.job.store, sections, inputs, work, options)


def _look(recipe: Recipe) -> Sampled:
    """What there is, told; of very many rows a part."""
    for place in (recipe.data, recipe.root):
        reach(place)
    found = look_at(recipe.data, MOST_LISTED)
    kinds = Counter(entry.kind for entry in found.listing.entries)
    told = f"{kinds['image']} pictures, {kinds['video']} videos"
    about = "about " if found.about else ""
    among = "" if found.whole else f"; of {found.rows:,} among {about}{found.total:,} rows"
    rejects = Counter(reject.reason for reject in found.listing.rejects)
    unusable = f"and {rejects.total()} unusable" + (f" ({_list(rejects)})" if rejects else "")
    print(f"  takes    {'files':<12} {told}, {unusable}{among}", flush=True)
    return found


def _told(
    recipe: Recipe, autoencoder: AutoencoderFacts, looked: Sampled, retry_rejects: bool
) -> Plan | None:
    """Tell what it would take; None if not all is known that decides whether it would run."""
    if missing_tiny_encoders(recipe):
        with tempfile.TemporaryDirectory() as folder:
            measured = with_tiny_encoders(recipe, looked.listing, folder)
            _tell_estimate(make_plan(measured, autoencoder, looked.listing), recipe, looked, False)
        say_verdict("encode", "would run, and build the tiny text encoders")
        return None
    plan = make_plan(recipe, autoencoder, looked.listing)
    _tell_estimate(plan, recipe, looked, retry_rejects)
    if looked.whole:
        return plan
    say_verdict("encode", "would run, unless nothing is new: not all rows were looked at")
    return None


def _tell_estimate(plan: Plan, recipe: Recipe, looked: Sampled, retry_rejects: bool) -> None:
    store = LatentStore(plan.job.store)
    found = estimate(plan, store, recipe.encode, MEASURED, retry_rejects)
    for line in found.of_all(looked).lines(recipe.encode) if found else ():
        print(line, flush=True)


def _work(plan: Plan, context: Context) -> dict[str, Any]:
    """The stage itself; returns the summary for the record."""
    store = LatentStore(plan.job.store)
    with locked(store.uri, wait=True) as lock:
        store.create()
        start, throughput = time.monotonic(), Throughput()
        try:
            changes = update(plan, store, lock, context, throughput)
        except BrokenData:
            _tell_rejects(store, store.table("rejects", columns=_OF_REJECTS))
            raise
        seconds = time.monotonic() - start
        _check_tables(plan, store)
        manifest = _describe(plan, store)
        lock.check()
        version = _publish_if_new(store, manifest, changes, context.options.retry_rejects)
        duplicates = report_duplicates(store.open_version(version))
    _warn_of_rejects(store.open_version(version), context.options.retry_rejects)
    context.run.metrics({f"rejects/{reason}": n for reason, n in manifest.rejects.items()})
    _tell_throughput(throughput, seconds, context)
    return {
        "version": version,
        "rows": manifest.counts["samples"] + manifest.counts["rejects"],
        **manifest.counts,
        "rejects_by_reason": manifest.rejects,
        "new_rows": changes.new,
        "removed_rows": changes.removed,
        "renamed_rows": changes.renamed,
        "new_texts": changes.texts,
        "duplicates": duplicates,
        "images_per_second": changes.new / seconds,
        "bytes": manifest.bytes,
        "content": manifest.content,
    }


def _tell_throughput(throughput: Throughput, seconds: float, context: Context) -> None:
    """Of the workers and of the committer, if there was anything to do."""
    if throughput.kinds:
        workers = context.recipe.encode.workers
        count = min(workers.count, throughput.shards)
        waiting = throughput.waiting(seconds, count, decoding=not workers.gpus)
        throughput.print(waiting)
        context.run.metrics({**throughput.metrics(), "throughput/waiting_share": waiting})


def _check_tables(plan: Plan, store: LatentStore) -> None:
    """Every listed file is there, each of its parts in exactly one row, some are usable, and every
    caption is embedded once."""
    media = media_to_do(plan, store)
    texts = texts_to_do(plan, store, store.open("texts"))
    missing = {"files": len(media.missing), "caption embeddings": len(texts.missing)}
    astray = len(media.stale) + len(media.renamed) + len(texts.stale)
    if astray or any(missing.values()):
        raise UserError(
            f"{store.uri} changed while it was encoded: {_list_missing(missing)}, "
            f"{astray} rows that do not belong there. Run `ldm encode` again"
        )
    if store.dataset("samples").count_rows() == 0:
        rejects = store.table("rejects", columns=_OF_REJECTS)
        reasons = Counter(rejects["reason"].to_pylist())
        _tell_rejects(store, rejects)
        raise UserError(
            f"none of the {len(plan.fingerprints)} files could be used: {_list(reasons)}. The "
            f"table {store.uri}/rejects has a row for each; mend them and run again"
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
        plan.job.unusual,
    )


def _publish_if_new(store: LatentStore, manifest: Manifest, changes: Changes, retried: bool) -> int:
    """Publish unless the newest version says the same; returns the version that stands."""
    counts = f"{manifest.counts['samples']} samples, {manifest.counts['texts']} caption embeddings"
    known = store.versions()
    stands = store.open_version(known[-1]) if known else None
    if stands and _the_same(store, manifest, stands, retried):
        keep_card(store, stands.manifest)
        print(f"[encode] nothing new: version {known[-1]} stands, {counts}", flush=True)
        return known[-1]
    forget_record(store.uri)
    version = store.publish(manifest)
    write_card(store, store.open_version(version).manifest)
    rows = f"{changes.new} rows new, {changes.removed} of changed or vanished files removed"
    if retried:
        rows = f"{changes.new} rows made, {changes.removed} removed, those tried again among them"
    renamed = f", {changes.renamed} with new captions" if changes.renamed else ""
    print(f"[encode] version {version}: {counts}, {rows}{renamed}", flush=True)
    return version


def _the_same(store: LatentStore, manifest: Manifest, stands: StoreVersion, retried: bool) -> bool:
    """Whether a version would tell nothing new: rejects that were tried again and are rejects for
    the same reasons are other rows of the table, and nothing new."""
    if manifest.says_the_same(stands.manifest):
        return True
    now = {"tables": stands.manifest.tables, "bytes": stands.manifest.bytes}
    if not retried or not manifest.model_copy(update=now).says_the_same(stands.manifest):
        return False
    tables = store.table("rejects", columns=_OF_REJECTS), stands.table("rejects", _OF_REJECTS)
    one, other = (table.sort_by("id") for table in tables)
    return bool(one.equals(other))


def _warn_of_rejects(version: StoreVersion, retried: bool) -> None:
    manifest = version.manifest
    if not manifest.rejects:
        return
    rejected = manifest.counts["rejects"]
    total = manifest.counts["samples"] + rejected
    still = "still " if retried else ""
    again = "" if retried else "; `--retry-rejects` tries them again"
    told = f"{rejected} of {total} {still}rejected: {_list(manifest.rejects)}{again}"
    print(f"[encode] warning: {told}", flush=True)
    _tell_rejects(version.store, version.table("rejects", _OF_REJECTS))


def _tell_rejects(store: LatentStore, rejects: pa.Table) -> None:
    """The first of them, each with its reason."""
    rows = rejects.sort_by("id").to_pylist()
    for row in rows[:REJECTS_SHOWN]:
        detail = " ".join(row["detail"].split())
        print(f"  {row['id']}: {row['reason']}" + (f" ({detail})" if detail else ""), flush=True)
    if len(rows) > REJECTS_SHOWN:
        more = len(rows) - REJECTS_SHOWN
        print(f"  and {more} more, in the Delta table {store.uri}/rejects", flush=True)


def _list_missing(counts: Mapping[str, int]) -> str:
    return " and ".join(f"{count} {what}" for what, count in counts.items()) + " missing"


def _list(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
