"""What is to do: the listed pictures against the rows the store already holds.

A row carries the fingerprint of everything that decided it: the source's size, its captions, the
autoencoder, the bucket, the code. It is current while the fingerprint is what it would be today;
there is no second record of what is done.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
