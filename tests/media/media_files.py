"""Small media, archives and tables for the tests of sources, and a file system that counts."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import fsspec
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image


def png(grey: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), grey).save(buffer, "PNG")
    return buffer.getvalue()


def jsonl(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def tar_bytes(members, format=tarfile.PAX_FORMAT) -> bytes:
    """An archive of (name, content) pairs and ready-made TarInfos."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            name, content = member
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def sample(key: str, grey: int = 0, caption: str = "") -> list[tuple[str, bytes]]:
    return [(f"{key}.png", png(grey)), (f"{key}.txt", (caption or f"picture {key}").encode())]


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def captions_of(listing) -> dict[str, dict[str, float]]:
    return {
        entry.id: {caption.text: caption.weight for caption in entry.captions}
        for entry in listing.entries
    }


def reasons_of(listing) -> dict[str, str]:
    return {reject.id: reject.reason for reject in listing.rejects}


class _CountedFile(io.BytesIO):
    def __init__(self, data: bytes, counts: Counter) -> None:
        super().__init__(data)
        self.counts = counts

    def read(self, size=-1):
        data = super().read(size)
        self.counts["bytes"] += len(data)
        return data


class CountingFileSystem(MemoryFileSystem):
    """Remote files of this process at `counted://`; knows what was asked of it."""

    protocol = "counted"
    store, pseudo_dirs = {}, [""]
    counts: Counter = Counter()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("counted://", "memory://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        data = super().cat_file(path, start=start, end=end, **kwargs)
        self.counts["cat_file"] += 1
        self.counts["bytes"] += len(data)
        return data

    def _open(self, path, mode="rb", **kwargs):
        if mode != "rb":
            return super()._open(path, mode, **kwargs)
        self.counts["open"] += 1
        return _CountedFile(self.store[path].getvalue(), self.counts)

    def info(self, path, **kwargs):
        self.counts["info"] += 1
        return super().info(path, **kwargs)

    def find(self, path, **kwargs):
        self.counts["find"] += 1
        return super().find(path, **kwargs)

    def ls(self, path, **kwargs):
        self.counts["ls"] += 1
        return super().ls(path, **kwargs)


fsspec.register_implementation("counted", CountingFileSystem, clobber=True)


def counted(name: str, files: dict[str, bytes]) -> tuple[str, Counter]:
    """A folder of a remote file system holding `files`, and the counts of what comes next."""
    fs = fsspec.filesystem("counted")
    for file, content in files.items():
        fs.pipe_file(f"/{name}/{file}", content)
    fs.counts.clear()
    return f"counted://{name}", fs.counts
