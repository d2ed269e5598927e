"""Stores that many tests ask for: each is written once a process, and its files are laid down."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ldm_core.files import filesystem, is_remote, join
from ldm_core.latents.store import LatentStore, StoreVersion


def laid_down(uri: str | Path, write: Callable[..., object], *arguments: Any) -> StoreVersion:
    """The newest version of the store that `write(uri, *arguments)` writes.

    Where there is a store already, it is written to; stores laid down have the same file names.

    Args:
        uri: of a folder or a bucket's.
        write: what writes a store, for which nothing counts but its arguments.
        arguments: hashable.
    """
    fs, path = filesystem(str(uri))
    if fs.exists(join(path, "samples")):
        write(uri, *arguments)
    elif is_remote(str(uri)):
        files = _files(write, *arguments)
        fs.pipe({join(path, name): content for name, content in files.items()})
    else:
        for name, content in _files(write, *arguments).items():
            Path(path, name).parent.mkdir(parents=True, exist_ok=True)
            Path(path, name).write_bytes(content)
    return LatentStore(str(uri)).open_version()


@lru_cache(maxsize=16)
def _files(write: Callable[..., object], *arguments: Any) -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        write(folder, *arguments)
        paths = (path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
