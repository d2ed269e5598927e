"""Captions: which the store lacks, and in which order and shards they are embedded."""

import json
from collections.abc import Iterable, Iterator, Set

from deltalake import DeltaTable

from ldm_core.files import exists, join
from ldm_core.latents.ledger import Difference, compare, cut, shard_name
from ldm_core.latents.schema import caption_digest
from ldm_core.latents.store import LatentStore
from pipelines.encode_media import Row
from pipelines.encode_plan import Plan, as_they_lie
from pipelines.recipes.sections import EncodeSection

TEXT_KEY = ("encoder", "caption_digest")

Place = tuple[str, str]  # bucket and file, by which samples are sorted


def texts_to_do(plan: Plan, store: LatentStore, log: DeltaTable) -> Difference[tuple[str, str]]:
    """What separates the table, in this snapshot, from the plan; keys are `TEXT_KEY`."""
    columns = [*TEXT_KEY, "encoder_digest"]
    stored = store.table("texts", log.version(), columns).to_pylist()
    return compare(
        plan.text_rows(),
        (((row["encoder"], row["caption_digest"]), row["encoder_digest"]) for row in stored),
    )


def missing_texts(plan: Plan, store: LatentStore) -> list[tuple[str, str]]:
    """What the table, as it is now, lacks; none is all of it."""
    if not exists(join(store.uri, "texts", "_delta_log")):
        return sorted(plan.text_rows())
    return texts_to_do(plan, store, store.open("texts")).missing


def by_first_use(
    missing: Iterable[tuple[str, str]], places: Set[Place], plan: Plan
) -> list[tuple[str, str]]:
    """Captions as the samples come that have them: who reads those finds these side by side.

    The empty caption is the first of each encoder; those that only rejects have are the last.

    Args:
        missing: encoder and digest of each.
        places: of all samples, stored and to come, so that a run that goes on where another was
            ended has the other's order.
        plan: knows the files' captions.
    """
    rank = {caption_digest(""): -1}
    for _, source in sorted(places, key=lambda at: (at[0], *as_they_lie(plan.entries[at[1]]))):
        for text, _ in plan.entries[source]["captions"]:
            rank.setdefault(caption_digest(text), len(rank))
    return sorted(missing, key=lambda pair: (pair[0], rank.get(pair[1], len(rank)), pair[1]))


def text_shards(
    plan: Plan, missing: list[tuple[str, str]], section: EncodeSection
) -> Iterator[Row]:
    """The missing captions, encoder by encoder, as rows of the columns that media have; cut so that
    their embeddings have room in encode.shard_mib."""
    captions = {caption_digest(caption): caption for caption in plan.captions}
    for entry in plan.texts:
        room = section.shard_mib * 2**20 // plan.token_bytes.get(entry.name, 1)
        size = min(section.shard_size, max(1, room))
        for keys in cut([digest for name, digest in missing if name == entry.name], size):
            texts = json.dumps([captions[digest] for digest in keys])
            shard = shard_name([entry.name, entry.digest, *keys])
            yield {"shard": shard, "bucket": "", "encoder": entry.name, "items": texts}
