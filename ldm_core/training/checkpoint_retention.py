"""Which checkpoints stay, and how the others go: the manifest first, so that no half is one."""

from collections.abc import Mapping
from dataclasses import dataclass

from ldm_core.files import join, remove
from ldm_core.training.checkpoint_folder import (
    MANIFEST,
    Damaged,
    listing,
    read_checkpoint,
    step_of,
)
from ldm_core.training.checkpoint_newest import check_sizes


@dataclass(frozen=True)
class Retention:
    """The last `last` checkpoints stay, and those whose step is a multiple of `every`.

    Damaged ones do not count, so the newest sound one always stays. `Retention(last=None)` keeps
    all, as is right for the snapshots of a post-hoc average.
    """

    last: int | None = 3
    every: int | None = None

    def __post_init__(self) -> None:
        assert self.last is None or self.last >= 1, self.last
        assert self.every is None or self.every >= 1, self.every

    def keeps(self, step: int, newer: int) -> bool:
        """Whether a sound checkpoint stays that has so many `newer` sound ones."""
        return (
            self.last is None
            or newer < self.last
            or (self.every is not None and step % self.every == 0)
        )


def sweep(root: str, retention: Retention, present: str) -> list[str]:
    """Remove what need not stay, and attempts that were never committed; returns their names.

    Those of later steps than the one that was just committed say nothing of what may go: training
    went back behind them, as they are damaged, or were not found.

    Args:
        root: of the checkpoints. Nobody else is to be writing one there.
        retention: what stays.
        present: name of the folder that was just committed, which stays.

    Raises:
        Damaged: it is not as it was written; then nothing is removed.
    """
    folders = listing(root)
    sound = {folder: _sound(join(root, folder), sizes) for folder, sizes in folders.items()}
    if not sound.get(present):
        raise Damaged(f"{join(root, present)} has not the files that were written to it")
    going, newer = [], 0
    for folder, sizes in folders.items():
        if sound[folder]:
            stays = folder == present or retention.keeps(step_of(folder), newer)
            newer += step_of(folder) <= step_of(present)
        else:  # nobody has committed anything newer than it, which may still be mended
            stays = MANIFEST in sizes and newer == 0
        if not stays:
            going.append(folder)
    for folder in going:
        remove_checkpoint(join(root, folder))
    return going


def remove_checkpoint(uri: str) -> None:
    """Remove a checkpoint, or what there is of one."""
    remove(join(uri, MANIFEST))
    remove(uri)


def _sound(uri: str, sizes: Mapping[str, int]) -> bool:
    """Whether every file has its size; hashes are `newest`'s to look at."""
    if MANIFEST not in sizes:
        return False
    try:
        check_sizes(read_checkpoint(uri), sizes)
    except Damaged:
        return False
    return True
