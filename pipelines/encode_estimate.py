"""What an encode would take: measured on a few of its files, told for all of them.

The files are decoded and encoded in this process; nothing is written and no Ray is started.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ldm_core.latents.ledger import Todo
from ldm_core.latents.store import parquet_bytes
from pipelines.encode_changes import shard_limit, shards_of
from pipelines.encode_media import decode_shard, probe_entries
from pipelines.encode_plan import Item, Plan
from pipelines.encode_workers import EncodeMedia, EncodeTexts, Row, table_of
from pipelines.recipes.sections import EncodeSection

T = TypeVar("T")


@dataclass(frozen=True)
class Estimate:
    """For all files that are to be done.

    Attributes:
        files: of them.
        samples: their pictures and clips, as many a file as the measured have.
        decode_s, encode_s, text_s: seconds of one worker.
        bytes: that the store grows by.
        measured: files it is drawn from.
    """

    files: int
    samples: float
    decode_s: float
    encode_s: float
    text_s: float
    bytes: float
    measured: int

    @property
    def worker_hours(self) -> float:
        """Of workers that decode what they encode; divide by their number for the clock's."""
        return (self.decode_s + self.encode_s + self.text_s) / 3600

    def lines(self, section: EncodeSection) -> list[str]:
        """What a dry run tells."""
        parts = {"decode": self.decode_s, "encode": self.encode_s, "captions": self.text_s}
        shares = ", ".join(
            f"{name} {seconds / 36 / self.worker_hours:.0f} %" for name, seconds in parts.items()
        )
        count, price = section.workers.count, section.worker_hour_price
        cost = f", {price * self.worker_hours:,.2f} at {price:g} each" if price else ""
        return [
            f"  takes    {'worker-hours':<12} {self.worker_hours:,.3g} ({shares}){cost}; "
            f"{self.worker_hours / count:,.3g} hours by {count} workers",
            f"  takes    {'bytes':<12} {self.bytes:,.0f} for {self.samples:,.0f} samples",
            f"  measured {'files':<12} {self.measured} of {self.files}, in this process",
        ]


def estimate(plan: Plan, todo: Todo, section: EncodeSection, count: int) -> Estimate | None:
    """Measure `count` of the missing files, evenly spread; None where there are none."""
    missing = [plan.entries[id] for id in todo.missing if id in plan.entries]
    if not missing:
        return None
    some = missing[:: max(1, len(missing) // count)][:count]
    media = _measure_media(plan, some, section)
    captions = _distinct(some)
    text_s, text_bytes = _measure_texts(plan, captions, section)
    scale, text_scale = len(missing) / len(some), len(_distinct(missing)) / len(captions)
    return Estimate(
        files=len(missing),
        samples=scale * media.samples,
        decode_s=scale * media.decode_s,
        encode_s=scale * media.encode_s,
        text_s=text_scale * text_s,
        bytes=scale * media.bytes + text_scale * text_bytes,
        measured=len(some),
    )


@dataclass(frozen=True)
class _Media:
    samples: int
    decode_s: float
    encode_s: float
    bytes: float


def _measure_media(plan: Plan, entries: Sequence[Item], section: EncodeSection) -> _Media:
    asked = {"items": json.dumps(entries)}
    probe_entries({"items": json.dumps(entries[:1])}, plan.job)  # starts what decodes
    decode_s, probed = _timed(probe_entries, asked, plan.job)
    parts = [part for part in json.loads(probed["items"]) if "reason" not in part]
    encoder = EncodeMedia(plan.job, section.workers.threads, section.workers.device)
    samples, encode_s, size = 0, 0.0, 0.0
    for shard in shards_of(parts, section):
        seconds, decoded = _timed(decode_shard, shard, plan.job)
        decode_s += seconds
        seconds, (good, _) = _timed(encoder.rows, decoded)
        encode_s += seconds
        samples += len(good)
        size += _bytes("samples", good, shard_limit(shard["bucket"], section))
    return _Media(samples, decode_s, encode_s, size)


def _distinct(entries: Iterable[Item]) -> list[str]:
    return sorted({text for entry in entries for text, _ in entry["captions"]})


def _measure_texts(plan: Plan, captions: list[str], section: EncodeSection) -> tuple[float, float]:
    """Seconds and bytes of captions."""
    encoder = EncodeTexts(plan.job, section.workers.threads, section.workers.device)
    seconds, size = 0.0, 0.0
    for entry in plan.texts:
        encoder.rows(entry.name, captions[:1])  # loads it
        spent, rows = _timed(encoder.rows, entry.name, captions)
        seconds += spent
        size += _bytes("texts", rows, section.shard_size)
    return seconds, size


def _timed(work: Callable[..., T], *args: Any) -> tuple[float, T]:
    start = time.perf_counter()
    result = work(*args)
    return time.perf_counter() - start, result


def _bytes(table: str, rows: list[Row], limit: int) -> float:
    """What rows take in files of `limit` rows, each of which has some kB of its own."""
    whole, empty = (len(parquet_bytes(table_of(table, some, "estimate"))) for some in (rows, []))
    return whole - empty + empty * len(rows) / limit if rows else 0.0
