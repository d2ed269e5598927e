"""What is different between two versions of a store, by the digests of their rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm_core.latents.store import StoreVersion


@dataclass(frozen=True)
class Changes:
    """Names that are new, that are gone, and that stand for something else now; sorted."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]

    @property
    def none(self) -> bool:
        """Whether there are no changes."""
        return not (self.added or self.removed or self.changed)


@dataclass(frozen=True)
class VersionDifference:
    """The second of two versions against the first.

    Attributes:
        samples: ids.
        latents: of the changed ids, those whose latents are others.
        captions: of the changed ids, those whose captions are others.
        texts: "encoder: caption"; changed is one that another encoder of this name embedded.
        rejects: ids; changed is one with another reason.
    """

    samples: Changes
    latents: tuple[str, ...]
    captions: tuple[str, ...]
    texts: Changes
    rejects: Changes

    @property
    def none(self) -> bool:
        """Whether the two hold the same."""
        return self.samples.none and self.texts.none and self.rejects.none


def difference(before: StoreVersion, after: StoreVersion) -> VersionDifference:
    """Compare two versions; digests are enough, no latents are read."""
    pair = (before, after)
    old, new = (_values(each, "samples", ["id"], ["digest"]) for each in pair)
    samples = _changes(old, new)
    changed = {id: _halves(old[id], new[id]) for id in samples.changed}
    texts = (_values(each, "texts", ["encoder", "caption"], ["encoder_digest"]) for each in pair)
    rejects = (_values(each, "rejects", ["id"], ["stage", "reason"]) for each in pair)
    return VersionDifference(
        samples=samples,
        latents=tuple(id for id, (latents, _) in changed.items() if latents),
        captions=tuple(id for id, (_, captions) in changed.items() if captions),
        texts=_changes(*texts),
        rejects=_changes(*rejects),
    )


def _halves(old: tuple[str], new: tuple[str]) -> tuple[bool, bool]:
    """Whether the latents' half of a sample's digest is another, and the captions' half."""
    (here,), (there,) = old, new
    half = len(there) // 2
    return here[:half] != there[:half], here[half:] != there[half:]


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Changes:
    both = before.keys() & after.keys()
    return Changes(
        added=tuple(sorted(after.keys() - both)),
        removed=tuple(sorted(before.keys() - both)),
        changed=tuple(sorted(name for name in both if before[name] != after[name])),
    )


def _values(
    version: StoreVersion, table: str, keys: list[str], values: list[str]
) -> dict[str, tuple[Any, ...]]:
    """Some columns by others, joined to a name."""
    return {
        ": ".join(row[key] for key in keys): tuple(row[value] for value in values)
        for batch in version.batches(table, [*keys, *values])
        for row in batch.to_pylist()
    }
