"""On which storage files are: what as a whole may be out of a node's reach.

That is a bucket, or what is mounted on a folder. A node that lacks the mount cannot tell where it
would be, so the driver does, who has listed the files.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache

from ldm_core.files import is_remote

Storage = tuple[str, str]  # scheme and bucket, or "" and the mount of local files


def storage(uri: str, mounts: Sequence[str]) -> Storage:
    """That of a file: of a local one the innermost of these mounts."""
    if is_remote(uri):
        scheme, _, path = uri.partition("://")
        return scheme, path.split("/")[0]
    within = [mount for mount in mounts if _local(uri).startswith(mount)]
    return "", max(within, key=len, default="")


def device_of(folder: str) -> int:
    """A number that differs between file systems; of a folder that is gone, that of its parent."""
    try:
        return os.stat(folder).st_dev
    except OSError:
        return device_of(os.path.dirname(folder)) if folder != "/" else 0


def mounts_of(uris: Iterable[str], device: Callable[[str], int] = device_of) -> tuple[str, ...]:
    """The folders, with a final slash, on which what the local files lie on is mounted.

    Links are followed to the device, but the path stays as it is named: that of a link to a folder
    elsewhere is a mount too.
    """
    device = cache(device)
    folders = {os.path.dirname(_local(uri)) for uri in uris if not is_remote(uri)}
    return tuple(sorted({_mount(folder, device) for folder in folders}))


def witnesses(uris: Iterable[str], mounts: Sequence[str], count: int) -> tuple[str, ...]:
    """So many files of each storage, spread over all of it, or all there are."""
    found: defaultdict[Storage, list[str]] = defaultdict(list)
    for uri in uris:
        found[storage(uri, mounts)].append(uri)
    return tuple(uri for each in found.values() for uri in _spread(each, count))


def _mount(folder: str, device: Callable[[str], int]) -> str:
    while (outer := os.path.dirname(folder)) != folder and device(outer) == device(folder):
        folder = outer
    return folder.rstrip("/") + "/"


def _spread(uris: Sequence[str], count: int) -> list[str]:
    return [uris[place] for place in sorted({k * len(uris) // count for k in range(count)})]


def _local(uri: str) -> str:
    return uri.removeprefix("file://")
