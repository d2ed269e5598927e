"""Where media are: a folder, a file or a pattern, local or remote, as the files it holds."""

import posixpath
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from ldm_core.errors import UserError
from ldm_core.files import filesystem
from ldm_core.media.braces import expand_braces
from ldm_core.media.local_walk import FoundFile, local_file, walk

READERS = 16  # requests in flight; a bucket answers each in tens of milliseconds
# What the file systems that fsspec knows call the mark of a version, the surest first.
_ETAGS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "created")


@dataclass(frozen=True)
class Place:
    """What a user's source comes to.

    Attributes:
        source: as the user wrote it.
        files: by id: the path relative to the folder, with forward slashes.
        is_folder: whether the source names a folder, not files.
    """

    source: str
    fs: AbstractFileSystem
    files: dict[str, FoundFile]
    is_folder: bool

    def uri(self, id: str) -> str:
        """The URI of one of the files."""
        return self.fs.unstrip_protocol(self.files[id].path)

    def read(self, id: str) -> bytes:
        """The bytes of one of the files."""
        return bytes(self.fs.cat_file(self.files[id].path))

    def ending(self, *extensions: str) -> list[str]:
        """Ids of the usable files with these extensions, sorted."""
        return sorted(
            id
            for id, file in self.files.items()
            if id.lower().endswith(extensions) and not file.fault[0]
        )


def find_place(source: str) -> Place:
    """The files of `source`: of a folder, with its subfolders; of a pattern; or the file itself.

    Raises:
        UserError: nothing is there, it may not be read, or the address cannot be opened.
    """
    fs, root = _open(source)
    try:
        if set("*?[{") & set(root) and not fs.exists(root):
            return Place(source, fs, _matching(source, fs, root), is_folder=False)
        if fs.isfile(root):
            file = stat_files(fs, [root])[root]
            return Place(source, fs, {posixpath.basename(root): file}, is_folder=False)
        files = dict(_under(fs, root))
    except PermissionError as error:
        raise UserError(f"{source} may not be read ({error}): check the credentials") from error
    if not files:
        raise UserError(f"{source} is empty or does not exist: name a folder of pictures")
    return Place(source, fs, files, is_folder=True)


def stat_files(fs: AbstractFileSystem, paths: Iterable[str]) -> dict[str, FoundFile]:
    """Those of the paths that are files; each remote folder they lie in is listed once."""
    wanted = set(paths)
    if isinstance(fs, LocalFileSystem):
        return {path: file for path in wanted for file in local_file(path)}
    folders = sorted({posixpath.dirname(path) for path in wanted})
    with ThreadPoolExecutor(READERS) as readers:
        listings = readers.map(lambda folder: _listed(fs, folder), folders)
        found = (file for listing in listings for file in listing)
        return {file.path: file for file in found if file.path in wanted}


def stat_each(fs: AbstractFileSystem, paths: Iterable[str]) -> dict[str, FoundFile]:
    """Those of the paths that are files, asked for one by one: a few of folders that hold many."""
    if isinstance(fs, LocalFileSystem):
        return stat_files(fs, paths)

    def asked(path: str) -> Iterable[FoundFile]:
        try:
            return list(_files([fs.info(path)]))
        except FileNotFoundError:
            return []

    with ThreadPoolExecutor(READERS) as readers:
        return {file.path: file for found in readers.map(asked, set(paths)) for file in found}


def _open(source: str) -> tuple[AbstractFileSystem, str]:
    if source.startswith(("http://", "https://")):
        raise UserError(f"{source} is a web address: copy the data to a disk or a bucket first")
    try:
        return filesystem(source)
    except (ValueError, ImportError) as error:  # an unknown scheme, or its driver is missing
        raise UserError(f"{source} cannot be opened: {error}") from error


def _under(fs: AbstractFileSystem, root: str) -> Iterator[tuple[str, FoundFile]]:
    """Id and file of everything under a folder, from one listing."""
    if isinstance(fs, LocalFileSystem):
        found = walk(root)
    else:
        found = _files(fs.find(root, detail=True).values())
    for file in found:
        yield _identified(root, file)


def _identified(folder: str, file: FoundFile) -> tuple[str, FoundFile]:
    """The file's path below its folder and the file, at fault if no worker could open it."""
    if "::" in file.path and not file.fault[0]:
        file = FoundFile(file.path, fault=("unsafe path", "fsspec takes :: for two addresses"))
    return file.path.removeprefix(folder).lstrip("/"), file


def _listed(fs: AbstractFileSystem, folder: str) -> list[FoundFile]:
    try:
        return list(_files(fs.ls(folder, detail=True)))
    except FileNotFoundError:
        return []


def _files(infos: Iterable[dict[str, Any]]) -> Iterator[FoundFile]:
    for info in infos:
        if info["type"] == "file" and not info["name"].endswith("/"):  # a bucket's "folder"
            mark = next((info[key] for key in _ETAGS if info.get(key)), None)
            yield FoundFile(info["name"], info.get("size"), None if mark is None else str(mark))


def _matching(source: str, fs: AbstractFileSystem, pattern: str) -> dict[str, FoundFile]:
    """The files that a pattern of braces and wildcards names, by path below their folder."""
    names = expand_braces(pattern)
    globs = [name for name in names if set("*?[") & set(name)]
    exact = set(names).difference(globs)
    found = stat_files(fs, [*exact, *(path for name in globs for path in fs.glob(name))])
    missing = sorted(exact - found.keys())
    if missing:
        raise UserError(
            f"{source} names {len(exact)} files, of which {len(missing)} are missing, such as "
            f"{missing[0]}: name those that are there"
        )
    if not found:
        raise UserError(f"{source} matches no file: quote the pattern and check the folder")
    folder = posixpath.commonpath([posixpath.dirname(path) for path in found])
    return dict(_identified(folder, file) for file in found.values())
