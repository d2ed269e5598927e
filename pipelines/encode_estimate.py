"""What an encode would take: measured on a few of its files, told for all of them.

The files are decoded and encoded in this process; nothing is written and no Ray is started.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from ldm_core.errors import UserError
from ldm_core.latents.schema import caption_digest
from ldm_core.latents.store import LatentStore, parquet_bytes
from ldm_core.media.buckets import Bucket
from ldm_core.media.manifest_sample import Sampled
from pipelines.encode_changes import listed_parts, media_to_do, shard_limit, shards_of
from pipelines.encode_groups import (
    group_of,
    group_sizes,
    lifted,
    reads_to_encode,
    reads_to_look,
)
from pipelines.encode_media import decode_shard, probe_entries
from pipelines.encode_plan import Item, Plan
from pipelines.encode_texts import missing_texts
from pipelines.encode_workers import EncodeMedia, EncodeTexts, Row, table_of
from pipelines.recipes.sections import EncodeSection

T = TypeVar("T")

_OF_MEDIA = ("samples", "decode_s", "encode_s", "media_bytes", "groups", "group_reads")
_OF_TEXTS = ("text_s", "text_bytes", "captions")


@dataclass(frozen=True)
class Estimate:
    """For all files and captions that are to be done.

    Attributes:
        files: of them.
        samples: their pictures and clips, as many a file as the measured have.
        decode_s: seconds of one CPU, with those it waits for row groups.
        encode_s, text_s: seconds of one worker.
        media_bytes, text_bytes: that the store grows by.
        captions: distinct ones that are to be embedded.
        measured: files it is drawn from.
        listed: rows of the source that were looked at; None is all.
        groups, group_reads: Parquet row groups that hold media, and how often any is read.
        read_s: seconds that takes each time.
        apart: whether CPU tasks beside the workers decode, as they do where workers have GPUs.
    """

    files: int
    samples: float
    decode_s: float
    encode_s: float
    text_s: float
    media_bytes: float
    text_bytes: float
    captions: float
    measured: int
    apart: bool = False
    listed: int | None = None
    groups: float = 0.0
    group_reads: float = 0.0
    read_s: float = 0.0

    @property
    def worker_hours(self) -> float:
        """Of the workers, who decode what they encode if nobody else does; divide by their number
        for the clock's."""
        return sum(self._seconds().values()) / 3600

    @property
    def bytes(self) -> float:
        """That the store grows by."""
        return self.media_bytes + self.text_bytes

    def of_all(self, sampled: Sampled) -> "Estimate":
        """For a whole source of which this tells of some rows: a caption that comes again is no
        work."""
        if sampled.whole:
            return self
        media, texts = sampled.times, sampled.caption_times
        larger = {name: media * getattr(self, name) for name in _OF_MEDIA}
        larger |= {name: texts * getattr(self, name) for name in _OF_TEXTS}
        return replace(self, **larger, files=round(media * self.files), listed=sampled.rows)

    def lines(self, section: EncodeSection) -> list[str]:
        """What a dry run tells."""
        shares = ", ".join(
            f"{name} {seconds / 36 / max(self.worker_hours, 1e-9):.0f} %"
            for name, seconds in self._seconds().items()
        )
        count, price = section.workers.count, section.worker_hour_price
        cost = f", {price * self.worker_hours:,.2f} at {price:g} each" if price else ""
        looked = f"; {self.listed:,} rows were looked at" if self.listed else ""
        most = "at most " if self.listed else ""
        told = f"{self.text_bytes:,.0f} for the embeddings of {most}{self.captions:,.0f} captions"
        beside = f"{self.decode_s / 3600:,.3g} of decoding, beside the workers"
        return [
            f"  takes    {'worker-hours':<12} {self.worker_hours:,.3g} ({shares}){cost}; "
            f"{self.worker_hours / count:,.3g} hours by {count} workers",
            *([f"  takes    {'CPU-hours':<12} {beside}"] if self.apart else []),
            f"  takes    {'bytes':<12} {self.bytes:,.0f} for {self.samples:,.0f} samples",
            f"  takes    {'of these':<12} {told}",
            *self._of_groups(most),
            f"  measured {'files':<12} {self.measured} of {self.files:,}, in this process{looked}",
        ]

    def _of_groups(self, most: str) -> list[str]:
        if not self.groups:
            return []
        share = 100 * self.group_reads * self.read_s / max(self.decode_s, 1e-9)
        return [
            f"  takes    {'row groups':<12} {most}{self.group_reads:,.0f} reads of "
            f"{self.groups:,.0f}, whole, to look in and for each shard with some of its rows; "
            f"{share:.0f} % of decoding"
        ]

    def _seconds(self) -> dict[str, float]:
        """Of workers, by what they do."""
        decode = {} if self.apart else {"decode": self.decode_s}
        return {**decode, "encode": self.encode_s, "captions": self.text_s}


def estimate(plan: Plan, store: LatentStore, section: EncodeSection, count: int) -> Estimate | None:
    """Measure `count` of the missing files and captions, evenly spread; None if nothing is missing.

    Raises:
        UserError: the workers have GPUs and this machine has none.
    """
    todo = media_to_do(plan, store)
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
    parts: Sequence[Item] = ()


def _measure_media(plan: Plan, entries: Sequence[Item], section: EncodeSection) -> _Media:
    if not entries:
        return _Media()
    parts, unknown = listed_parts(plan, entries)
    decode_s, probed = _probe(plan, unknown)
    parts += [part for part in probed if "reason" not in part]
    encoder = EncodeMedia(plan.job, section.workers.threads, section.workers.device)
    samples, encode_s, size = 0, 0.0, 0.0
    for k, shard in enumerate(shards_of(parts, section)):
        if not k:
            _warm_up(encoder, shard)
        seconds, decoded = _timed(decode_shard, shard, plan.job)
        decode_s += seconds
        seconds, (good, _) = _timed(encoder.rows, decoded)
        encode_s += seconds
        samples += len(good)
        size += _bytes("samples", good, shard_limit(shard["bucket"], section))
    return _Media(samples, decode_s, encode_s, size, parts)


def _probe(plan: Plan, entries: Sequence[Item]) -> tuple[float, list[Item]]:
    """Seconds and parts of files of which a listing does not tell all."""
    if not entries:
        return 0.0, []
    probe_entries({"items": json.dumps(entries[:1])}, plan.job)  # starts what looks into files
    seconds, probed = _timed(probe_entries, {"items": json.dumps(entries)}, plan.job)
    return seconds, json.loads(probed["items"])


def _warm_up(encoder: EncodeMedia, shard: Row) -> None:
    """Start what decodes, and have the autoencoder choose its algorithms, by one batch."""
    items = json.loads(shard["items"])[: encoder.at_once(Bucket.parse(shard["bucket"]))]
    encoder.rows(decode_shard({**shard, "items": json.dumps(items)}, encoder.job))


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
            spent, rows = _timed(encoder.rows, entry.name, some)
            seconds += len(mine) / len(some) * spent
            size += len(mine) / len(some) * _bytes("texts", rows, section.shard_size)
    return seconds, size


def _timed(work: Callable[..., T], *args: Any) -> tuple[float, T]:
    start = time.perf_counter()
    result = work(*args)
    return time.perf_counter() - start, result


def _bytes(table: str, rows: list[Row], limit: int) -> float:
    """What rows take in files of `limit` rows, each of which has some kB of its own."""
    whole, empty = (len(parquet_bytes(table_of(table, some, "estimate"))) for some in (rows, []))
    return whole - empty + empty * len(rows) / limit if rows else 0.0
