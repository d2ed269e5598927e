"""Files and folders behind a URI: a local path or anything fsspec knows, `s3://` first.

S3 endpoint and keys come from the usual `AWS_*` variables (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION).
"""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec


def is_remote(uri: str) -> bool:
    """True for `scheme://…` other than `file://`."""
    return "://" in uri and not uri.startswith("file://")


def join(uri: str, *parts: str) -> str:
    """`uri` with path parts appended, whatever the scheme."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def absolute(uri: str) -> str:
    """A local path made absolute; a remote URI as it is."""
    return uri if is_remote(uri) else str(Path(uri.removeprefix("file://")).absolute())


def filesystem(uri: str, patience_s: float | None = None) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec file system and the path on it; listings are never cached.

    That of S3 outlasts a server that is away for `patience_s`, by default a minute.
    """
    if uri.startswith(("s3://", "s3a://")):
        from ldm_core.patient_s3 import PatientS3  # here: s3fs takes half a second

        fs = PatientS3(use_listings_cache=False, patience_s=patience_s)
        return fs, PatientS3._strip_protocol(uri)
    options = {"use_listings_cache": False} if is_remote(uri) else {}
    return fsspec.core.url_to_fs(uri, **options)


def reach(uri: str, patience_s: float = 5.0) -> None:
    """Make sure, before somebody who waits is kept waiting, that the storage of a URI answers.

    Everything else outlasts a bucket that is away for a minute, as a job should.

    Raises:
        ConnectionError: it does not within about `patience_s`.
    """
    if uri.startswith(("s3://", "s3a://")):
        from ldm_core import patient_s3  # here: s3fs takes half a second

        patient_s3.reach(uri, patience_s)


def exists(uri: str) -> bool:
    """Whether a file or folder is there.

    Raises:
        OSError: the storage cannot say, which fsspec takes for a no on a local path: a network file
            system that fails for a moment would make a finished training one that never was.
    """
    fs, path = filesystem(uri)
    if is_remote(uri):
        return bool(fs.exists(path))
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # what was asked is no path
            return False
        raise
    return True


def read_bytes(uri: str) -> bytes:
    """The whole file."""
    fs, path = filesystem(uri)
    return bytes(fs.cat_file(path))


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file: atomically on a local disk (temp + rename) and on object stores."""
    fs, path = filesystem(uri)
    if is_remote(uri):
        fs.pipe_file(path, data)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".part-", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except OSError:  # a full disk, which the half of a file would keep full
            os.unlink(file.name)
            raise
    os.chmod(file.name, 0o644)  # temporary files are private by default
    os.replace(file.name, target)


def read_json(uri: str) -> Any:
    """A JSON file's content."""
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    """Write indented JSON with a final newline."""
    write_bytes(uri, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def remove(uri: str) -> None:
    """Remove a file or a whole folder; nothing there is fine."""
    fs, path = filesystem(uri)
    if exists(uri):
        fs.rm(path, recursive=True)


def file_sizes(folder: str) -> dict[str, int]:
    """Bytes of every file under the folder, by URI, from one listing.

    Raises:
        OSError: a part of it cannot be listed; half a listing would be taken for a whole.
    """
    fs, root = filesystem(folder)
    if is_remote(folder):
        found = fs.find(root, detail=True)
        return {fs.unstrip_protocol(path): int(info["size"]) for path, info in found.items()}
    return {fs.unstrip_protocol(path): size for path, size in _local_sizes(root)}


def _local_sizes(root: str) -> Iterator[tuple[str, int]]:
    """Without fsspec, whose `find` leaves out what it cannot list."""

    def failed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for folder, _, names in os.walk(root, onerror=failed):
        for name in names:
            path = os.path.join(folder, name)
            with suppress(FileNotFoundError):  # it went meanwhile
                yield path, os.stat(path).st_size


def upload_folder(local: str | Path, uri: str) -> None:
    """Copy a local folder to a URI file by file, JSON last, so that a half is no model."""
    files = sorted(p for p in Path(local).rglob("*") if p.is_file())
    for file in sorted(files, key=lambda p: p.suffix == ".json"):
        write_bytes(join(uri, file.relative_to(local).as_posix()), file.read_bytes())


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """The folder at `uri` as a local folder: itself if local, else a temporary download.

    Raises:
        FileNotFoundError: nothing is there.
    """
    if not is_remote(uri):
        path = Path(uri.removeprefix("file://"))
        if not path.is_dir():
            raise FileNotFoundError(f"no folder {uri}")
        yield path
        return
    fs, root = filesystem(uri)
    names = fs.find(root)
    if not names:
        raise FileNotFoundError(f"no folder {uri}")
    with tempfile.TemporaryDirectory(prefix="ldm-") as folder:
        for name in names:
            target = Path(folder, name.removeprefix(root).lstrip("/"))
            target.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(name, str(target))
        yield Path(folder)


def folder_digest(folder: str | Path, *suffixes: str) -> str:
    """SHA-256 (16 hex) over names and bytes of the folder's files with these suffixes."""
    digest = hashlib.sha256()
    for file in sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.suffix in suffixes):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
