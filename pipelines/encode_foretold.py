"""What a dry run tells of an encode: hours, cost, bytes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ldm_core.media.manifest_sample import Sampled
from pipelines.recipes.sections import EncodeSection

_OF_MEDIA = ("samples", "decode_s", "encode_s", "media_bytes", "groups", "group_reads")
_OF_TEXTS = ("text_s", "text_bytes", "captions")
# What a run of any size waits for Ray, its workers and the commits, measured on two cores by
# `make bench-encode`: of a cluster's hours it is hardly any.
ONCE_S = 30


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
        rejects: of these, by reason.
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
    rejects: Mapping[str, int]
    apart: bool = False
    listed: int | None = None
    groups: float = 0.0
    group_reads: float = 0.0
    read_s: float = 0.0

    @property
    def worker_hours(self) -> float:
        """Of the workers, who decode what they encode if nobody else does."""
        return sum(self._seconds().values()) / 3600

    def hours(self, workers: int) -> float:
        """By the clock, starting Ray and its workers included."""
        return self.worker_hours / workers + ONCE_S / 3600

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
            f"{self.hours(count):,.3g} hours by {count} workers, with about {ONCE_S} s to start",
            *([f"  takes    {'CPU-hours':<12} {beside}"] if self.apart else []),
            f"  takes    {'bytes':<12} {self.bytes:,.0f} for {self.samples:,.0f} samples",
            f"  takes    {'of these':<12} {told}",
            *self._of_groups(most),
            f"  measured {'files':<12} {self.measured} of {self.files:,} that are new or changed, "
            f"in this process{looked}{self._unusable()}",
        ]

    def _unusable(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.rejects.items()))
        return f"; {sum(self.rejects.values())} of them are rejects: {reasons}" if reasons else ""

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
