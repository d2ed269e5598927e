"""What an encode would take: measured on a few of its files, told for all of them.

The files are decoded and encoded in this process, encoded by as many threads at once as there are
workers; nothing is written and no Ray is started.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ldm_core.errors import UserError
from ldm_core.latents.schema import caption_digest
from ldm_core.latents.store import LatentStore, parquet_bytes
from ldm_core.media.buckets import Bucket
from pipelines.encode_captions import EncodeTexts
from pipelines.encode_changes import listed_parts, media_to_do, shard_limit, shards_of
from pipelines.encode_foretold import Estimate
from pipelines.encode_groups import (
    group_of,
    group_sizes,
    lifted,
    reads_to_encode,
    reads_to_look,
)
from pipelines.encode_media import Row, decode_shard, probe_entries
from pipelines.encode_plan import Item, Plan
from pipelines.encode_results import table_of
from pipelines.encode_texts import missing_texts
from pipelines.encode_workers import EncodeMedia
from pipelines.recipes.sections import EncodeSection, Workers

T = TypeVar("T")
MOST_AT_ONCE = 8  # each holds a batch of its own, and an autoencoder


def estimate(
    plan: Plan, store: LatentStore, section: EncodeSection, count: int, retry_rejects: bool = False
) -> Estimate | None:
    """Measure `count` of the missing files and captions, evenly spread; None if nothing is missing.

    Args:
        plan: of the whole source.
        store: that it is for.
        section: of the recipe.
        count: of files, and of captions of each encoder.
        retry_rejects: whether the store's rejects are missing.

    Raises:
        UserError: the workers have GPUs and this machine has none.
    """
    todo = media_to_do(plan, store, retry_rejects)
    missing = [plan.entries[id] for id in todo.missing if id in plan.entries]
    texts = missing_texts(plan, store)
    if not missing and not texts:
        return None
    _check_device(section)
    some = evenly(missing, count)
    scale = len(missing) / max(len(some), 1)
    with lifted(some) as (files, read_s):
        media = _measure_media(plan, files, section)
    sizes = group_sizes(missing)
    reads = _group_reads(plan, missing, some, media.parts, section)
    text_s, text_bytes = _measure_texts(plan, texts, section, count)
    return Estimate(
        files=len(missing),
        samples=scale * media.samples,
        decode_s=scale * media.decode_s + reads * read_s,
        encode_s=scale * media.encode_s,
        text_s=text_s,
        media_bytes=scale * media.bytes,
        text_bytes=text_bytes,
        captions=len({digest for _, digest in texts}),
        measured=len(some),
        rejects=media.rejects,
        apart=section.workers.gpus > 0,
        groups=len(sizes),
        group_reads=reads,
        read_s=read_s,
    )


def _group_reads(
    plan: Plan,
    missing: Sequence[Item],
    some: Sequence[Item],
    parts: Sequence[Item],
    section: EncodeSection,
) -> float:
    """How often row groups are read for the missing files, of some of which these are the parts."""
    inside = {entry["id"] for entry in some if group_of(entry)[0]}
    mine = [part for part in parts if part["source"] in inside]
    counts = Counter(part["bucket"] for part in mine)
    files = Counter(bucket for bucket, _ in {(part["bucket"], part["source"]) for part in mine})
    sizes = group_sizes(missing)
    times = sizes.total() / max(len(inside), 1)
    shards = {name: times * count / shard_limit(name, section) for name, count in counts.items()}
    shares = {name: count / len(inside) for name, count in files.items()}
    unknown = group_sizes(listed_parts(plan, missing)[1])
    return reads_to_look(unknown) + reads_to_encode(sizes, shares, shards)


def evenly(items: Sequence[T], count: int) -> list[T]:
    """So many of the items, or all there are, from the first to near the last."""
    most = min(count, len(items))
    return [items[k * len(items) // most] for k in range(most)]


def _check_device(section: EncodeSection) -> None:
    if section.workers.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"a dry run measures on this machine, which has no GPU, and encode.workers.gpus is "
            f"{section.workers.gpus:g}: run it on one of the machines that are to encode, or see "
            "what CPUs would take with --set encode.workers.gpus=0"
        )


@dataclass(frozen=True)
class _Media:
    samples: int = 0
    decode_s: float = 0.0
    encode_s: float = 0.0
    bytes: float = 0.0
    rejects: Mapping[str, int] = field(default_factory=dict)
    parts: Sequence[Item] = ()


def _measure_media(plan: Plan, entries: Sequence[Item], section: EncodeSection) -> _Media:
    if not entries:
        return _Media()
    parts, unknown = listed_parts(plan, entries)
    decode_s, probed = _probe(plan, unknown)
    parts += [part for part in probed if "reason" not in part]
    rejects = Counter(part["reason"] for part in probed if "reason" in part)
    workers = section.workers  # an autoencoder of videos keeps frames: each has its own
    encoders = [EncodeMedia(plan.job, workers.threads, workers.device) for _ in at_once(workers)]
    samples, encode_s, size = 0, 0.0, 0.0
    for k, shard in enumerate(shards_of(parts, section)):
        if not k:
            _warm_up(encoders, shard)
        seconds, decoded = _timed(decode_shard, shard, plan.job)
        decode_s += seconds
        seconds, (good, bad) = _timed_each([encoder.rows for encoder in encoders], decoded)
        rejects.update(row["reason"] for row in bad)
        encode_s += seconds
        samples += len(good)
        size += _bytes("samples", good, shard_limit(shard["bucket"], section))
    return _Media(samples, decode_s, encode_s, size, rejects, parts)


def _probe(plan: Plan, entries: Sequence[Item]) -> tuple[float, list[Item]]:
    """Seconds and parts of files of which a listing does not tell all."""
    if not entries:
        return 0.0, []
    probe_entries({"items": json.dumps(entries[:1])}, plan.job)  # starts what looks into files
    seconds, probed = _timed(probe_entries, {"items": json.dumps(entries)}, plan.job)
    return seconds, json.loads(probed["items"])


def _warm_up(encoders: Sequence[EncodeMedia], shard: Row) -> None:
    """Start what decodes, and have autoencoders choose their algorithms, by one batch."""
    items = json.loads(shard["items"])[: encoders[0].at_once(Bucket.parse(shard["bucket"]))]
    decoded = decode_shard({**shard, "items": json.dumps(items)}, encoders[0].job)
    for encoder in encoders:
        encoder.rows(decoded)


def _measure_texts(
    plan: Plan, missing: Sequence[tuple[str, str]], section: EncodeSection, count: int
) -> tuple[float, float]:
    """Seconds and bytes of all the missing captions, by `count` of each encoder's."""
    encoder = EncodeTexts(plan.job, section.workers.threads, section.workers.device)
    captions = {caption_digest(caption): caption for caption in plan.captions}
    seconds, size = 0.0, 0.0
    for entry in plan.texts:
        mine = [captions[digest] for name, digest in missing if name == entry.name]
        some = evenly(mine, count)
        if some:
            encoder.rows(entry.name, some[:1])  # loads it
            each = [encoder.rows for _ in at_once(section.workers)]
            spent, rows = _timed_each(each, entry.name, some)
            seconds += len(mine) / len(some) * spent
            size += len(mine) / len(some) * _bytes("texts", rows, section.shard_size)
    return seconds, size


def _timed(work: Callable[..., T], *args: Any) -> tuple[float, T]:
    start = time.perf_counter()
    result = work(*args)
    return time.perf_counter() - start, result


def _timed_each(each: Sequence[Callable[..., T]], *args: Any) -> tuple[float, T]:
    """Seconds of one of some that do the same at once, and a result: busy cores share caches and
    memory, and slow each other."""
    with ThreadPoolExecutor(len(each)) as pool:
        tasks = [pool.submit(_timed, work, *args) for work in each]
        done = [task.result() for task in tasks]
    return sum(seconds for seconds, _ in done) / len(done), done[0][1]


def at_once(workers: Workers) -> range:
    """The workers that this machine has cores for; of those with GPUs each has its own."""
    room = min(workers.count, MOST_AT_ONCE, len(os.sched_getaffinity(0)) // workers.threads)
    return range(1 if workers.gpus else max(1, room))


def _bytes(table: str, rows: list[Row], limit: int) -> float:
    """What rows take in files of `limit` rows, each of which has some kB of its own."""
    whole, empty = (len(parquet_bytes(table_of(table, some, "estimate"))) for some in (rows, []))
    return whole - empty + empty * len(rows) / limit if rows else 0.0
