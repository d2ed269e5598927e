"""The newest checkpoint that is sound: sizes and hashes are what the manifest says."""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ldm_core.errors import UserError
from ldm_core.files import filesystem, join
from ldm_core.training.checkpoint_folder import (
    MANIFEST,
    Checkpoint,
    Damaged,
    architecture_digest,
    listing,
    read_checkpoint,
)
from ldm_core.training.checkpoint_patience import patiently
from ldm_core.training.checkpoint_ranks import Ranks

_PIECE = 64 << 20  # bytes read at once
_THREADS = 4


def newest(
    root: str,
    architecture: Mapping[str, Any] | None = None,
    told: Callable[[str], None] = warnings.warn,
    ranks: Ranks = Ranks(),
    hashes: bool = True,
) -> Checkpoint | None:
    """The newest complete checkpoint at `root`; None where there is none.

    A damaged one is told of and the one before is taken.

    Args:
        root: folder or prefix of a run's checkpoints.
        architecture: of the run that is to go on, as it gave it to `Checkpoints`.
        told: is given one line for each damaged checkpoint, on the first worker.
        ranks: they share the reading, and all get the same.
        hashes: whether files are read; sizes are compared in any case.

    Raises:
        UserError: another architecture or format, or all of the checkpoints are damaged.
    """
    damaged = []
    folders = ranks.first(lambda: patiently(lambda: listing(root)))
    for folder, sizes in folders.items():
        if MANIFEST not in sizes:
            continue
        try:
            return _verified(join(root, folder), sizes, architecture, ranks, hashes)
        except Damaged as error:
            damaged.append(f"checkpoint {join(root, folder)} is damaged: {error}")
            if ranks.rank == 0:
                told(f"{damaged[-1]}; looking for the one before")
    if damaged:
        raise UserError(
            f"none of the {len(damaged)} checkpoints at {root} is sound ({damaged[0]}): restore "
            "them from a backup, or remove the folder to train from the beginning"
        )
    return None


def sound(
    root: str, told: Callable[[str], None] = warnings.warn, hashes: bool = True
) -> Iterator[Checkpoint]:
    """All sound checkpoints at `root`, newest first; damaged ones are told of.

    Args:
        root: folder or prefix.
        told: is given one line for each damaged checkpoint.
        hashes: whether files are read; sizes are compared in any case.

    Raises:
        UserError: one in another format.
    """
    for folder, sizes in patiently(lambda: listing(root)).items():
        if MANIFEST in sizes:
            try:
                yield _verified(join(root, folder), sizes, None, Ranks(), hashes)
            except Damaged as error:
                told(f"checkpoint {join(root, folder)} is damaged: {error}")


def _verified(
    uri: str,
    sizes: Mapping[str, int],
    architecture: Mapping[str, Any] | None,
    ranks: Ranks,
    hashes: bool,
) -> Checkpoint:
    """The checkpoint at `uri`, whose files the workers read between them."""
    found = ranks.first(lambda: read_checkpoint(uri))
    check_sizes(found, sizes)
    _check_architecture(found, architecture)
    names = sorted(found.manifest.files) if hashes else []
    ranks.each(lambda: check_hashes(found, names[ranks.rank :: ranks.world]))
    return found


def _check_architecture(found: Checkpoint, mine: Mapping[str, Any] | None) -> None:
    if mine is None or architecture_digest(mine) == found.manifest.digest:
        return
    theirs = found.manifest.architecture
    names = sorted(name for name in {*theirs, *mine} if theirs.get(name) != mine.get(name))
    differences = ", ".join(f"{n} {theirs.get(n)} there, {mine.get(n)} here" for n in names)
    raise UserError(
        f"{found.uri} is a checkpoint of architecture {found.manifest.digest}, this run's is "
        f"{architecture_digest(mine)} ({differences}): go on with the settings it was begun with, "
        "or train into another folder"
    )


def check_sizes(checkpoint: Checkpoint, sizes: Mapping[str, int]) -> None:
    """Compare a listing of the folder with the manifest.

    Raises:
        Damaged: a file is missing or has another size.
    """
    for name, entry in checkpoint.manifest.files.items():
        if name not in sizes:
            raise Damaged(f"{name} is missing")
        if sizes[name] != entry.size:
            raise Damaged(f"{name} has {sizes[name]} bytes of {entry.size}")


def check_hashes(checkpoint: Checkpoint, names: list[str]) -> None:
    """Read some of the files and compare them with the manifest.

    Raises:
        Damaged: one has other content, or has gone.
    """

    def check(name: str) -> None:
        try:
            found = patiently(lambda: _sha256(join(checkpoint.uri, name)))
        except FileNotFoundError as error:
            raise Damaged(f"{name} is missing") from error
        if found != checkpoint.manifest.files[name].sha256:
            raise Damaged(f"{name} has other content than was written")

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="checkpoint-hash") as pool:
        list(pool.map(check, names))


def _sha256(uri: str) -> str:
    digest = hashlib.sha256()
    fs, path = filesystem(uri)
    size = int(fs.size(path))
    for start in range(0, size, _PIECE):
        digest.update(fs.cat_file(path, start=start, end=min(start + _PIECE, size)))
    return digest.hexdigest()
