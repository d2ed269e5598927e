"""How the encode job's workers read files: some ahead, and those that cannot be read as rejects."""

import errno
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from ldm_core.errors import BadMedia, UserError
from ldm_core.media.locators import DamagedRowGroup, MediaReader, cell_place
from pipelines.encode_plan import Item, Job
from pipelines.encode_storage import storage

READS_IN_FLIGHT = 16  # a bucket answers each in tens of ms
READ_AHEAD = 256 << 20  # bytes of the files held while one is decoded; a larger one is held alone
HEAD_BYTES = 64 << 10  # hold the size of nearly all JPEGs, and how they are turned
JPEG = b"\xff\xd8"  # begins with these; what turns a PNG may be its last chunk
NEIGHBOURS = 3  # files of a shard that are asked for when another cannot be read

_AWAY = (ConnectionError, TimeoutError)
# What this machine lacks is no fault of a file.
_OUR_OWN = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_REASONS = {
    FileNotFoundError: "file missing",
    PermissionError: "not allowed",
    DamagedRowGroup: "damaged row group",
}


@dataclass(frozen=True)
class Content:
    """What was read of a file: all of it, or its beginning."""

    data: bytes

    @cached_property
    def sha256(self) -> str:
        """Hex digits."""
        return hashlib.sha256(self.data).hexdigest()


# The video that this process read last: its next clips are another shard, and likely the next.
_last_video: dict[str, Content] = {}


def with_content(
    files: Sequence[list[Item]], job: Job, beginnings: bool = False
) -> Iterator[tuple[list[Item], Content | BadMedia]]:
    """Each file's items with what is read of it, or with why it is not; a few are read ahead.

    The last one is kept if it is a video: who asks for its other clips next reads it no more.

    Args:
        files: the items of each.
        job: says how large they may be.
        beginnings: whether of JPEGs, whatever their names, that will do.

    Raises:
        UserError: a file cannot be read, and neither can others.
        OSError: the storage does not answer, or this machine has no room to read.
    """
    names = [file_name(items[0]) for items in files]
    kept = {name: _last_video[name] for name in names[:1] if name in _last_video}
    _last_video.clear()  # before there is another
    reader = MediaReader()
    others = [items[0]["uri"] for items in files[: NEIGHBOURS + 1]] + list(job.witnesses)
    read = _Reading(reader, others, job, beginnings)
    with ThreadPoolExecutor(READS_IN_FLIGHT) as readers:
        for some in _read_at_once(files):
            found = readers.map(lambda at: kept.get(names[at]) or read(files[at][0]), some)
            for place, content in zip(some, found, strict=True):
                yield files[place], content
                kept.clear()
    if files and files[-1][0]["kind"] == "video" and not beginnings:
        _last_video.update({names[-1]: content} if isinstance(content, Content) else {})


def _read_at_once(files: Sequence[list[Item]]) -> Iterator[list[int]]:
    """Places of files that are read ahead together: of one row group, as the reader keeps two, and
    threads that want more of them take each other's away."""
    for _, group in groupby(range(len(files)), lambda at: cell_place(files[at][0]["uri"])[:2]):
        places = list(group)
        for some in read_together([_size(files[at][0]) for at in places], READ_AHEAD):
            yield places[some.start : some.stop]


def read_together(sizes: Sequence[int], most: int, count: int = READS_IN_FLIGHT) -> Iterator[range]:
    """Consecutive files of at most so many bytes in all, and at most `count`; at least one."""
    start, held = 0, 0
    for place, size in enumerate(sizes):
        if place > start and (held + size > most or place - start == count):
            yield range(start, place)
            start, held = place, 0
        held += size
    if sizes:
        yield range(start, len(sizes))


def file_name(item: Item) -> str:
    """By which a file as it was listed is known again."""
    return f"{item['uri']} {item.get('fingerprint')}"


def is_beginning(item: Item, content: Content | BadMedia) -> bool:
    """Whether there is more of the file."""
    return isinstance(content, Content) and len(content.data) < _size(item)


def readable(content: Content | BadMedia) -> bytes:
    """The bytes, or the reason there are none raised."""
    if isinstance(content, BadMedia):
        raise content
    return content.data


class _Reading:
    """A file's bytes, or why they are not read.

    A file that cannot be read is a reject if another of the same storage can be, and after that it
    still cannot: a source of millions has a few that are damaged, archived, or gone since they were
    listed. If none can, a node lacks the disk or the right to read, and all of its files would be
    rejects.

    Args:
        reader: of the files.
        others: locators of some files of the source.
        job: says for how many bytes of a file there is room, and what is mounted.
        beginnings: see `with_content`.
    """

    def __init__(
        self, reader: MediaReader, others: Sequence[str], job: Job, beginnings: bool
    ) -> None:
        self.reader, self.others, self.beginnings = reader, others, beginnings
        self.most, self.mounts = job.item_bytes, job.mounts

    def __call__(self, item: Item) -> Content | BadMedia:
        size, uri = _size(item), item["uri"]
        if size > self.most:
            told = f"{size} bytes are more than encode.item_gib, {self.most / 2**30:.3g} GiB"
            return BadMedia("read", "too large", told)
        if self.beginnings and item["kind"] == "image" and size > HEAD_BYTES:
            head = self._guarded(uri, lambda uri: self.reader.head(uri, HEAD_BYTES))
            if isinstance(head, BadMedia) or head.data.startswith(JPEG):
                return head
        return self._guarded(uri, self.reader.read)

    def _guarded(self, uri: str, read: Callable[[str], bytes]) -> Content | BadMedia:
        try:
            return Content(read(uri))
        except OSError as error:
            _check_file(error)
            first = error
            if not self._others_can_be_read(uri):
                if isinstance(error, _AWAY):
                    raise  # nobody answers
                raise _unreadable(uri, error) from error
        self.reader.try_again(uri)
        try:  # what was amiss may have passed by the time that the others were asked
            return Content(read(uri))
        except OSError as error:
            _check_file(error)
            if isinstance(error, _AWAY) and not isinstance(first, _AWAY):
                raise  # who answered before
            reason = _REASONS.get(type(error), "unreadable")
            return BadMedia("read", reason, f"{type(error).__name__}: {error}")

    def _others_can_be_read(self, uri: str) -> bool:
        mine = storage(uri, self.mounts)
        near = [each for each in self.others if storage(each, self.mounts) == mine]
        return any(self._answers(each) for each in near if each != uri)

    def _answers(self, uri: str) -> bool:
        try:
            return len(self.reader.first_byte(uri)) > 0
        except OSError:
            return False


def _check_file(error: OSError) -> None:
    """Raise what is no matter of one file: this machine has no room."""
    if error.errno in _OUR_OWN:
        raise error


def _size(item: Item) -> int:
    """Of the item's file; one of unknown size is as small as pictures in tables are."""
    return int(item.get("size") or 0)


def _unreadable(uri: str, error: OSError) -> UserError:
    return UserError(
        f"{uri} was listed but a worker cannot read it ({type(error).__name__}), nor others: every "
        "node needs the same disk or bucket and the right to read it; then run the same "
        "command again, it goes on from what is finished"
    )
