"""A local folder's files, with every symbolic link accounted for.

A link to a file of the folder is a file of its own. A link to a subfolder is not entered, as what
it leads to is listed under its own name: no file comes twice and no loop is walked. A link that
leads out of the folder is a fault: a downloaded folder should not decide which of its reader's
files are read.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from ldm_core.media.entries import Fault


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file of a source.

    Attributes:
        path: on its file system, without a scheme.
        size: bytes, where the file system tells.
        etag: changes when the content may have: a bucket's ETag, or a modification time.
        fault: what makes it unusable; two empty texts for nothing.
    """

    path: str
    size: int | None = None
    etag: str | None = None
    fault: Fault = ("", "")


def walk(root: str) -> Iterator[FoundFile]:
    """Every regular file under `root`, and every link that cannot be followed, in no order.

    Raises:
        OSError: a subfolder may not be read; half a listing would be taken for a whole.
    """
    real_root = os.path.realpath(root)
    folders = [root]
    while folders:
        for entry in _entries(folders.pop()):
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.is_symlink():
                yield from _link(entry.path, real_root)
            else:
                yield from local_file(entry.path)


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except (FileNotFoundError, NotADirectoryError):
        return  # it went while the others were listed, or was never there


def local_file(path: str) -> Iterator[FoundFile]:
    """The regular file at `path`, links followed; nothing if there is none."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISREG(status.st_mode):  # a pipe would keep its reader waiting for ever
        yield FoundFile(path, status.st_size, str(status.st_mtime_ns))


def link_fault(path: str, real_root: str) -> Fault:
    """What is wrong with following a path that may hold links; two empty texts for nothing."""
    try:
        target = os.path.realpath(path, strict=True)
    except (FileNotFoundError, NotADirectoryError):
        return "file missing", "a symlink leads nowhere" if os.path.lexists(path) else ""
    except OSError:
        return "symlink loop", ""
    if os.path.commonpath((target, real_root)) != real_root:
        return "symlink outside folder", f"it leads to {target}"
    return "", ""


def _link(path: str, real_root: str) -> Iterator[FoundFile]:
    fault = link_fault(path, real_root)
    if any(fault):
        yield FoundFile(path, fault=fault)
    else:
        yield from local_file(path)
