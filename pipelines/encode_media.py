"""What the encode job's CPU tasks do: find out what a file holds, and decode its parts.

Files are strangers': they are opened in a child process that is ended when one takes too long or
too much memory.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from functools import lru_cache
from itertools import groupby
from typing import Any

from ldm_core.errors import BadMedia
from ldm_core.media.clips import Clip
from ldm_core.media.guarded import GuardedDecoder
from ldm_core.media.held_parts import NotHeld, decode_held_parts
from ldm_core.media.parts import Part, Pixels, find_parts
from ldm_core.media.perceptual_hash import difference_hash
from pipelines.encode_files import Content, file_name, is_beginning, readable, with_content
from pipelines.encode_plan import Item, Job
from pipelines.encode_throughput import DECODE, READ, Throughput

Row = dict[str, Any]


def probe_entries(row: Row, job: Job) -> Row:
    """Find the parts of files.

    Args:
        row: "items" as JSON: id, uri, kind, captions, fingerprint of each file.
        job: says how big parts are.

    Returns:
        "items": a part each, with source, part, parts, bucket and, of videos, clip; or the file
        itself with stage, reason and detail.
    """
    entries: list[Item] = json.loads(row["items"])
    guard = _guard(find_parts, job.item_seconds, job.item_bytes)
    found: list[Item] = []
    for [entry], content in with_content([[entry] for entry in entries], job, beginnings=True):
        try:
            parts = _parts_in(guard, entry, content, job)
        except BadMedia as error:
            found.append({**entry, **only_part(entry), **reject_of(error)})
            continue
        of_file = [
            {**part_of(entry, part.clip), "part": k, "parts": len(parts), "bucket": part.bucket}
            for k, part in enumerate(parts)
        ]
        found += mirrored(of_file) if job.flip else of_file
    return {"items": json.dumps(found)}


def _parts_in(
    guard: GuardedDecoder, entry: Item, content: Content | BadMedia, job: Job
) -> Sequence[Part]:
    """By the file's beginning, if that is what was read; by all of it where that is not enough."""
    rule = (entry["kind"], job.geometry, job.clips, job.item_seconds)
    try:
        return guard.decode(readable(content), *rule)
    except BadMedia:
        if not is_beginning(entry, content):
            raise
    [(_, whole)] = with_content([[entry]], job)
    return guard.decode(readable(whole), *rule)


def only_part(entry: Item) -> Item:
    """What a file adds that is its own only part."""
    return {"source": entry["id"], "part": 0, "parts": 1}


def mirrored(parts: Sequence[Item]) -> list[Item]:
    """The parts of a file and, after them, their mirror images, all as parts of that file."""
    count = len(parts)
    some = [{**part, "parts": 2 * count} for part in parts]
    return some + [
        {**part, "part": part["part"] + count, "id": f"{part['id']}#mirrored", "mirrored": True}
        for part in some
    ]


def part_of(entry: Item, clip: Clip | None) -> Item:
    """A part as an item of its own: of a video's, the id names the clip."""
    if clip is None:
        return {**entry, "source": entry["id"]}
    id = f"{entry['id']}#{clip.name}"
    return {**entry, "source": entry["id"], "id": id, "clip": astuple(clip)}


def decode_shard(row: Row, job: Job) -> Row:
    """Read and decode a shard's parts; one that cannot be used goes on without pixels.

    Args:
        row: "shard", "bucket", and "items" as JSON, as `probe_entries` makes them; those of one
            file are neighbours. One with an "encoder" has captions, and passes as it is.
        job: says how long a file may take.

    Returns:
        The row with "items" completed (size, crop and hashes, or stage, reason, detail) and
        "pixels": (n, T, H, W, 3) uint8 of the n usable ones, in order; "work" is for `Throughput`.
    """
    if row.get("encoder"):
        return {**row, "pixels": b"", "work": ""}
    items: list[Item] = json.loads(row["items"])
    files = [list(group) for _, group in groupby(items, key=lambda item: item["source"])]
    guard = _guard(decode_held_parts, job.item_seconds, job.item_bytes)
    pixels, throughput = bytearray(), Throughput()
    for parts, content in throughput.each(READ, with_content(files, job)):
        clips = [Clip(*part["clip"]) if "clip" in part else None for part in parts]
        # of a part and its mirror image one; a shard may begin between a file's mirror images
        each = sorted(set(clips), key=lambda clip: clip.start_s if clip else 0.0)
        size = len(content.data) if isinstance(content, Content) else 0
        with throughput.timed(DECODE, len(parts), size):
            try:
                task = (parts[0]["kind"], each, row["bucket"], job.item_seconds)
                found = _decoded(guard, readable(content), file_name(parts[0]), *task)
                decoded = dict(zip(each, found, strict=True))
            except BadMedia as error:
                decoded = dict.fromkeys(each, error)
            found = [_turned(decoded[clip], part) for clip, part in zip(clips, parts, strict=True)]
            _complete(parts, found, content)
            pixels += b"".join(part.frames.tobytes() for part in found if isinstance(part, Pixels))
    done = {"items": json.dumps(items), "pixels": bytes(pixels), "work": throughput.tell()}
    return {**row, **done}


def _decoded(
    guard: GuardedDecoder, data: bytes, name: str, kind: str, *task: Any
) -> list[Pixels | BadMedia]:
    """A video is sent to the child only if it has not got it from the shard before."""
    if kind == "video":
        try:
            return guard.decode(None, name, kind, *task)
        except NotHeld:
            pass
    return guard.decode(data, name, kind, *task)


def _turned(part: Pixels | BadMedia, item: Item) -> Pixels | BadMedia:
    """The part, or its mirror image if the item is that."""
    if isinstance(part, BadMedia) or not item.get("mirrored"):
        return part
    return replace(part, frames=part.frames[:, :, ::-1])


def _complete(
    items: Sequence[Item], found: Sequence[Pixels | BadMedia], content: Content | BadMedia
) -> None:
    """Tell each item what became of it."""
    file: Item = {}
    if isinstance(content, Content):
        file = {"sha256": content.sha256, "bytes": len(content.data)}
    for item, part in zip(items, found, strict=True):
        if isinstance(part, BadMedia):
            item.update(reject_of(part))
        else:
            hash = difference_hash(part.frames[0])
            item.update(file, height=part.height, width=part.width, crop=part.crop, hash=hash)


@lru_cache(maxsize=2)
def _guard(function: Callable[..., Any], seconds: float, memory: int) -> GuardedDecoder:
    """One child of this process for each function, kept from shard to shard."""
    return GuardedDecoder(function, seconds, memory)


def reject_of(error: BadMedia) -> Item:
    """The fields by which an item is a reject."""
    return {"stage": error.stage, "reason": error.reason, "detail": error.detail}
