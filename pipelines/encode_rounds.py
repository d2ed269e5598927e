"""Files in rounds: some are looked into and encoded before the next are looked into.

A listing tells neither the shape of a picture nor the length of a video, so these are looked up in
the files, and nothing of what is found is kept but the rows that are made of it. Where nodes live
shorter than looking into all the files takes, a job that did so first would never come to a row.
So it begins with some thousands of files, and takes twice as many each time: the start of a
round's workers is soon a small part of its time, and a job that is ended has not spent much more
on looking in vain than on what it has finished.
"""

from collections.abc import Iterable, Iterator, Sequence

from pipelines.encode_plan import Item

FIRST_FILES = 8192
FIRST_BYTES = 16 << 30  # videos are read whole


def rounds(missing: Sequence[str], unknown: Iterable[Item]) -> list[list[str]]:
    """Ids of the missing files, of each round; at least one, if it is empty.

    Args:
        missing: ids of all.
        unknown: those that are to be looked into, in the order in which they are read; all others
            go with the first of them.
    """
    first, *more = [[entry["id"] for entry in some] for some in _doubling(unknown)] or [[]]
    looked_into = {id for some in (first, *more) for id in some}
    return [[id for id in missing if id not in looked_into] + first, *more]


def _doubling(entries: Iterable[Item]) -> Iterator[list[Item]]:
    """Consecutive files: at first so many, of so many bytes, then twice as many; at least one."""
    files, most, held = FIRST_FILES, FIRST_BYTES, 0
    some: list[Item] = []
    for entry in entries:
        size = entry["size"] or 0
        if some and (len(some) == files or held + size > most):
            yield some
            files, most, held, some = 2 * files, 2 * most, 0, []
        some.append(entry)
        held += size
    if some:
        yield some
