"""What is to do: the listed files against the rows the store already holds.

A row carries the fingerprint of everything that decided its latents: the source's bytes, the
autoencoder, the geometry, the code. It is current while the fingerprint is what it would be today;
there is no second record of what is done. Captions have a digest of their own: where they alone
have changed, the row gets the new ones and keeps its latents.

A picture is one row, a video one for each of its clips, and each says of how many. A file is done
when all of them are there. Rows that do not agree on how many all go: a video that once gave three
clips, of which two were committed, may be a single reject at the next attempt.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Key = str | tuple[str, str]
K = TypeVar("K", bound=Key)
T = TypeVar("T")


@dataclass(frozen=True)
class Difference(Generic[K]):
    """What separates the store's rows from the wanted ones; keys, sorted.

    Attributes:
        missing: wanted, and not there or there no longer current.
        stale: there, and not current: changed, gone from the source, or there twice.
        kept: number of current rows.
    """

    missing: list[K]
    stale: list[K]
    kept: int


@dataclass(frozen=True)
class StoredRow:
    """A row of `samples`; or of `rejects`, whose captions are None and which has no bucket."""

    id: str
    source: str
    parts: int
    fingerprint: str
    captions: str | None
    bucket: str = ""


@dataclass(frozen=True)
class Todo:
    """What separates the store's rows from the wanted files.

    Attributes:
        missing: ids of files that are not all there, sorted.
        kept: ids of rows that stay.
        stale: ids of rows that go, sorted: of changed or vanished files, there twice, or of a file
            whose rows disagree about their number.
        renamed: ids of rows that stay but for their captions, sorted.
        places: bucket and file of the samples that stay.
        rejects: number of the rejects that stay.
        partial: rows that stay of files that are not all there, by file.
    """

    missing: list[str]
    kept: set[str] = field(default_factory=set)
    stale: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    places: set[tuple[str, str]] = field(default_factory=set)
    rejects: int = 0
    partial: dict[str, list[StoredRow]] = field(default_factory=dict)


def compare_files(
    wanted: Mapping[str, str], captions: Mapping[str, str], stored: Iterable[StoredRow]
) -> Todo:
    """The difference between wanted files and stored rows.

    Args:
        wanted: fingerprint by file id.
        captions: digest of the captions by file id.
        stored: every row of `samples` and `rejects`.
    """
    rows = list(stored)
    occurrences = Counter(row.id for row in rows)
    good: dict[str, list[StoredRow]] = defaultdict(list)
    for row in rows:
        if wanted.get(row.source) == row.fingerprint and occurrences[row.id] == 1:
            good[row.source].append(row)
    good = {source: group for source, group in good.items() if _agree(group)}
    staying = [row for group in good.values() for row in group]
    kept = {row.id for row in staying}
    samples = [row for row in staying if row.captions is not None]
    return Todo(
        missing=sorted(id for id in wanted if not _complete(good.get(id, []))),
        kept=kept,
        stale=sorted(occurrences.keys() - kept),
        renamed=sorted(row.id for row in samples if row.captions != captions[row.source]),
        places={(row.bucket, row.source) for row in samples},
        rejects=len(staying) - len(samples),
        partial={id: group for id, group in good.items() if not _complete(group)},
    )


def _agree(rows: Sequence[StoredRow]) -> bool:
    return len({row.parts for row in rows}) == 1


def _complete(rows: Sequence[StoredRow]) -> bool:
    return bool(rows) and rows[0].parts == len(rows)


def fingerprint(*decisive: object) -> str:
    """32 hex digits over JSON-like values that decide a row."""
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:32]


def compare(wanted: Mapping[K, str], stored: Iterable[tuple[K, str]]) -> Difference[K]:
    """The difference between wanted and stored rows.

    Args:
        wanted: fingerprint by key: a sample's id, or (encoder, caption digest) of a text.
        stored: (key, fingerprint) of every row.
    """
    rows = list(stored)
    occurrences = Counter(key for key, _ in rows)
    current = {key for key, mark in rows if wanted.get(key) == mark and occurrences[key] == 1}
    return Difference(
        missing=sorted(wanted.keys() - current),
        stale=sorted(occurrences.keys() - current),
        kept=len(current),
    )


def cut(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive shards of at most `size`.

    Committed shards leave whole gaps in the sorted list, so what a killed job left undone is cut
    into the shards that job would have made.
    """
    return [items[start : start + size] for start in range(0, len(items), size)]


def shard_name(fingerprints: Iterable[str]) -> str:
    """16 hex digits: the same work has the same name, in whichever attempt."""
    return fingerprint(*fingerprints)[:16]
