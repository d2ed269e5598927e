"""A checkpoint as a folder: safetensors and JSON, nothing pickled, and a manifest written last.

    root/step-000001000.0199a3c2e4f1.5d3a/
        part-00000-000.safetensors    of worker 0; a tensor's piece by name and offsets
        index.json                    every tensor's shape and where its pieces lie
        state.json                    what is no tensor: counters, averages, the caller's own
        manifest.json                 sizes and SHA-256 of the other files; what it is of

A folder without a manifest is an attempt that did not come to its end and does not count. Names are
never used twice, so that nobody's late write changes what another has committed.
"""

import hashlib
import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, ValidationError

from ldm_core.errors import UserError
from ldm_core.files import file_sizes, filesystem, join, read_bytes
from ldm_core.training.checkpoint_patience import patiently

FORMAT: Final = 1
MANIFEST, INDEX, STATE = "manifest.json", "index.json", "state.json"
_NAME = re.compile(r"step-(\d{9,})\.[0-9a-f]+\.[0-9a-f]+")


class Damaged(Exception):
    """A checkpoint is not what was written; the message says which file and how."""


class Entry(BaseModel):
    """What the manifest says of a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    sha256: str


class Manifest(BaseModel):
    """What makes a folder a checkpoint.

    Attributes:
        step: optimiser steps done.
        architecture: what the weights are of, as JSON; `digest` is of this.
        layout: of the run that wrote it, in words; it may be read in any other.
        workers: that wrote it.
        files: every other file of it, by name.
        checksum: SHA-256 of the rest of the manifest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    step: int
    architecture: dict[str, Any]
    digest: str
    layout: str
    workers: int
    files: dict[str, Entry]
    checksum: str = ""

    def sealed(self) -> "Manifest":
        """Itself with its checksum."""
        return self.model_copy(update={"checksum": _checksum(self.model_dump(mode="json"))})

    def to_bytes(self) -> bytes:
        """The file's content."""
        return json_bytes(self.sealed().model_dump(mode="json"))


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder and what its manifest says."""

    uri: str
    manifest: Manifest

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.manifest.step

    @cached_property
    def state(self) -> dict[str, Any]:
        """What is no tensor."""
        return dict(json.loads(patiently(lambda: read_bytes(join(self.uri, STATE)))))

    @cached_property
    def index(self) -> dict[str, Any]:
        """By tensor: dtype, shape and pieces, each as offsets, shape, file, first byte."""
        return dict(json.loads(patiently(lambda: read_bytes(join(self.uri, INDEX)))))


def json_bytes(value: Any) -> bytes:
    """Compact JSON with its keys in the order they have."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def architecture_digest(architecture: Mapping[str, Any]) -> str:
    """16 hex digits of what the weights are of."""
    return hashlib.sha256(json.dumps(architecture, sort_keys=True).encode()).hexdigest()[:16]


def folder_name(step: int) -> str:
    """A new name for a checkpoint at a step; later ones sort behind."""
    return f"step-{step:09d}.{time.time_ns() // 1_000_000:012x}.{secrets.token_hex(4)}"


def listing(root: str) -> dict[str, dict[str, int]]:
    """Bytes of every file, by name, of everything at `root` that is named like a checkpoint.

    Raises:
        OSError: it cannot be listed as a whole.
    """
    fs, path = filesystem(root)
    before, folders = fs.unstrip_protocol(path.rstrip("/")), dict[str, dict[str, int]]()
    for name, size in file_sizes(root).items():
        folder, _, file = name.removeprefix(before).lstrip("/").partition("/")
        if _NAME.fullmatch(folder) and file:
            folders.setdefault(folder, {})[file] = size
    return dict(sorted(folders.items(), key=lambda pair: (step_of(pair[0]), pair[0]), reverse=True))


def step_of(folder: str) -> int:
    """The step in a checkpoint's name."""
    found = _NAME.fullmatch(folder)
    assert found, folder
    return int(found[1])


def read_checkpoint(uri: str) -> Checkpoint:
    """The checkpoint in a folder that has a manifest.

    Raises:
        Damaged: the manifest is not what was written.
        UserError: it is in another format.
    """
    try:
        written = json.loads(patiently(lambda: read_bytes(join(uri, MANIFEST))))
    except FileNotFoundError as error:
        raise Damaged(f"{MANIFEST} is missing") from error
    except ValueError as error:
        raise Damaged(f"{MANIFEST} is cut or garbled ({error})") from error
    if not isinstance(written, dict) or written.get("checksum") != _checksum(written):
        raise Damaged(f"{MANIFEST} does not match its own checksum")
    if written.get("format") != FORMAT:
        raise UserError(
            f"{uri} is a checkpoint in format {written.get('format')}, this program reads {FORMAT}:"
            " go on with the version of the program that wrote it, or train into another folder"
        )
    try:
        return Checkpoint(uri, Manifest.model_validate(written))
    except ValidationError as error:
        raise Damaged(f"{MANIFEST}: {error.errors()[0]['msg']}") from error


def _checksum(manifest: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
