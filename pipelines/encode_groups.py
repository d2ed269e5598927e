"""How often Parquet row groups that hold media are read: a reader takes the whole of one at a time.

Looking in takes one read of a group. Encoding takes one for each shard that has some of its rows,
as shards are of one bucket each and their workers share nothing: with one bucket about one read,
with many buckets one for each that the group has pictures of.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby

from ldm_core.files import filesystem
from ldm_core.latents.ledger import cut
from ldm_core.media.locators import MediaReader, cell_place
from pipelines.encode_plan import Item, as_they_lie

PROBED_AT_ONCE = 64  # files of a task
PROBED_OF_GROUP = 4096  # rows of a task: a longer group is read for each so many

Group = tuple[str, int]  # file and number; "" and 0 of what is in none


def probe_tasks(entries: Iterable[Item]) -> Iterator[list[Item]]:
    """Consecutive files for each task: row groups as a whole, but for very long ones.

    Args:
        entries: as they lie.
    """
    some: list[Item] = []
    for (file, _), group in groupby(entries, key=group_of):
        for files in cut(list(group), PROBED_OF_GROUP if file else PROBED_AT_ONCE):
            if some and len(some) + len(files) > PROBED_AT_ONCE:
                yield some
                some = []
            some = [*some, *files]
    if some:
        yield some


def group_of(entry: Item) -> Group:
    """The row group a file is in."""
    return cell_place(entry["uri"])[:2]


def group_sizes(entries: Iterable[Item]) -> Counter[Group]:
    """Rows by row group, of files that are in one."""
    return Counter(group for group in map(group_of, entries) if group[0])


def reads_to_look(sizes: Mapping[Group, int]) -> int:
    """Of row groups of so many rows."""
    return sum(-(-rows // PROBED_OF_GROUP) for rows in sizes.values())


def reads_to_encode(
    sizes: Mapping[Group, int], files: Mapping[str, float], shards: Mapping[str, float]
) -> float:
    """About how many of row groups of so many rows, if their buckets are mixed.

    A group of n rows has some of a bucket with share p of all with probability 1 - (1 - p)^n, and
    each end of a shard within a group is another read.

    Args:
        sizes: rows by group.
        files: shares of the files that have parts of a bucket, by bucket.
        shards: of each bucket.
    """
    alike = Counter(sizes.values())
    return sum(
        sum(count * (1 - (1 - share) ** rows) for rows, count in alike.items())
        + max(shards[bucket] - 1, 0)
        for bucket, share in files.items()
    )


@contextmanager
def lifted(entries: Sequence[Item]) -> Iterator[tuple[list[Item], float]]:
    """Files, those in row groups as files in memory meanwhile; and seconds to read such a group.

    What is measured on a few files would else read a group for each, as the job does not.
    """
    reader, found, seconds = MediaReader(), list[Item](), dict[Group, float]()
    fs, folder = filesystem("memory://ldm-lifted")
    for k, entry in enumerate(sorted(entries, key=as_they_lie)):
        start, group = time.perf_counter(), group_of(entry)
        try:
            data = reader.read(entry["uri"]) if group[0] else None
        except OSError:  # so it is a reject, as it will be
            data = None
        if data is not None:
            seconds.setdefault(group, time.perf_counter() - start)
            fs.pipe_file(f"{folder}/{k}", data)
            entry = {**entry, "uri": f"memory:/{folder}/{k}"}
        found.append(entry)
    try:
        yield found, sum(seconds.values()) / max(len(seconds), 1)
    finally:
        if fs.exists(folder):
            fs.rm(folder, recursive=True)
