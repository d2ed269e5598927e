"""Manifests: Parquet, JSON lines or CSV files that name captioned media, or hold them."""

import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from ldm_core.errors import BadMedia
from ldm_core.files import filesystem
from ldm_core.media.entries import Candidate, media_kind, printable
from ldm_core.media.local_walk import FoundFile, link_fault
from ldm_core.media.manifest_rows import ManifestRow, manifest_rows
from ldm_core.media.places import Place, stat_each, stat_files
from ldm_core.media.weighted_captions import caption_pairs

MANIFESTS = (".parquet", ".jsonl", ".csv")
# Media are fetched from the user's disks and buckets, never from a host that a manifest names.
_BUCKETS = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"))

Stat = Callable[[AbstractFileSystem, Iterable[str]], dict[str, FoundFile]]


def list_manifests(
    place: Place, some: Mapping[str, Mapping[int, int]] | None = None
) -> Iterator[Candidate]:
    """Every row of a place's manifests; rows that name one file are one sample.

    Relative files are relative to their manifest. An id is the row's own `id`, or else the file
    as it is named (below the source's folder), or else the manifest's name and the row's number.

    Reject reasons: "remote url not allowed", "path outside folder", "symlink outside folder",
    "symlink loop", "unsafe path", "file missing", "no file named", "duplicate id", "not an image
    or video", "unreadable caption", "no caption", "bad weight".

    Args:
        place: of the manifests.
        some: by manifest, row groups and how many rows of each, where not all are wanted.

    Raises:
        UserError: a manifest that cannot be read or lacks a column.
    """
    stat = stat_files if some is None else stat_each
    for id in place.ending(*MANIFESTS) if some is None else sorted(some):
        manifest = _opened(place, id)
        candidates: list[Candidate] = []
        named: list[Candidate] = []
        for row in manifest_rows(place, id, None if some is None else some[id]):
            candidates.append(_candidate(manifest, row))
            if row.cell is None and not candidates[-1].fault[0]:
                named.append(candidates[-1])
        _look_up(named, stat)
        yield from candidates


@dataclass(frozen=True)
class _Manifest:
    """A manifest and what its rows are relative to.

    Attributes:
        folder: of the manifest, below the source's folder.
        root: path of the source's folder, with a final slash unless it is empty.
        real_root: where that is on the local disk, links followed; None on others.
        schemes: of the addresses that it may name.
    """

    fs: AbstractFileSystem
    folder: str
    root: str
    real_root: str | None
    schemes: frozenset[str]
    etag: str | None


def _opened(place: Place, id: str) -> _Manifest:
    file = place.files[id]
    root = file.path.removesuffix(id)
    local = isinstance(place.fs, LocalFileSystem)
    return _Manifest(
        fs=place.fs,
        folder=posixpath.dirname(id),
        root=root,
        real_root=os.path.realpath(root) if local else None,
        schemes=_BUCKETS | {place.uri(id).partition("://")[0]},
        etag=file.etag,
    )


def _candidate(manifest: _Manifest, row: ManifestRow) -> Candidate:
    """One row, looked up nowhere yet: that is done for many at once."""
    file, given = row.values.get("file"), row.values.get("id")
    name = _name(manifest, file) if row.cell is None else None
    own = None if given is None else str(given).strip()
    one = Candidate(own or name or row.place, "", None, [], origin=row.place)
    try:
        if row.cell is None:
            one.uri = _locate(manifest, file, name)
            one.kind = media_kind(one.uri)
        else:
            one.uri, one.kind, one.etag = row.cell, row.kind, manifest.etag
        one.pairs = caption_pairs(row.values["caption"], row.values.get("weight"))
    except BadMedia as bad:
        one.fault = (bad.reason, bad.detail)
    except ValueError as error:
        one.fault = ("unreadable caption", str(error))
    return one


def _name(manifest: _Manifest, file: object) -> str | None:
    """A file as the manifest names it, relative ones below the folder of the source."""
    if not isinstance(file, str) or not file.strip():
        return None
    file = file.strip()
    if "://" in file or file.startswith("/"):
        return file
    return posixpath.normpath(posixpath.join(manifest.folder, file))


def _locate(manifest: _Manifest, file: object, name: str | None) -> str:
    """The URI of the file that `_name` calls `name`."""
    if name is None:
        raise BadMedia("list", "no file named", repr(file))
    if "::" in name or "\0" in name or printable(name) != name:
        raise BadMedia("list", "unsafe path", repr(name))
    scheme, separator, _ = name.partition("://")
    if separator:
        if scheme not in manifest.schemes:
            raise BadMedia("list", "remote url not allowed", name)
        return name
    if name.startswith("/") and manifest.real_root:
        return manifest.fs.unstrip_protocol(name)
    if name.startswith(("/", "../")) or name == "..":
        raise BadMedia("list", "path outside folder")
    path = manifest.root + name
    fault = link_fault(path, manifest.real_root) if manifest.real_root else ("", "")
    if fault[0]:
        raise BadMedia("list", *fault)
    return manifest.fs.unstrip_protocol(path)


def _look_up(candidates: Iterable[Candidate], stat: Stat) -> None:
    """Complete candidates with what their files are; those without one are at fault."""
    by_scheme: dict[str, list[Candidate]] = {}
    for one in candidates:
        by_scheme.setdefault(one.uri.partition("://")[0], []).append(one)
    for group in by_scheme.values():
        fs, _ = filesystem(group[0].uri)
        paths = [str(fs._strip_protocol(one.uri)) for one in group]
        found = stat(fs, paths)
        for one, path in zip(group, paths, strict=True):
            if path in found:
                one.size, one.etag = found[path].size, found[path].etag
            else:
                one.fault = ("file missing", "")
