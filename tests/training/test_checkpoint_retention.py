"""Which checkpoints stay, and that none goes before another is there."""

from pathlib import Path

import pytest
from saved_checkpoints import cut, flip, folder_of, no_warning, saved, steps_in

from ldm_core.training import (
    checkpoint_retention,
)
from ldm_core.training.checkpoint_folder import (
    MANIFEST,
    Damaged,
    listing,
)
from ldm_core.training.checkpoint_newest import newest
from ldm_core.training.checkpoint_retention import Retention, sweep


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "checkpoints")


def test_the_last_and_every_nth_stay(root):
    saved(root, *range(1, 10), retention=Retention(last=2, every=4))
    assert steps_in(root) == [9, 8, 4]
    saved(root, 10, retention=Retention(last=2, every=4))
    assert steps_in(root) == [10, 9, 8, 4]


def test_snapshots_all_stay(root):
    saved(root, *range(1, 8), retention=Retention(last=None))
    assert steps_in(root) == list(range(7, 0, -1))


def test_attempts_without_a_manifest_go_with_the_next_save(root):
    saved(root, 1, 2)
    (folder_of(root, 2) / MANIFEST).unlink()
    (folder_of(root, 2) / ".part-left-by-a-kill").write_text("half")
    (Path(root) / "notes.txt").write_text("somebody's own")
    saved(root, 3)
    assert list(listing(root)) == [folder_of(root, 3).name, folder_of(root, 1).name]
    assert (Path(root) / "notes.txt").exists()


def test_damaged_ones_do_not_count(root):
    saved(root, 1, 2, 3)
    for step in (2, 3):
        cut(next(folder_of(root, step).glob("part-*")))
    saved(root, 4, retention=Retention(last=2))
    assert steps_in(root) == [4, 1]


def test_what_was_just_written_stays_behind_damaged_ones_of_later_steps(root):
    """Whose sizes are right, so that only training, which reads them, knows."""
    saved(root, 10, 20, 30)
    for step in (20, 30):
        flip(next(folder_of(root, step).glob("part-*")))
    assert newest(root, told=[].append).step == 10
    saved(root, 15, retention=Retention(last=2))
    assert newest(root, told=[].append).step == 15
    saved(root, 35, 40, retention=Retention(last=2))
    assert steps_in(root) == [40, 35]


def test_nothing_goes_unless_what_was_just_written_is_sound(root):
    saved(root, 1, 2)
    cut(next(folder_of(root, 2).glob("part-*")))
    with pytest.raises(Damaged, match="step-000000002"):
        sweep(root, Retention(1), folder_of(root, 2).name)
    assert steps_in(root) == [2, 1]


def test_a_removal_that_was_cut_short_leaves_no_half(root, monkeypatch):
    saved(root, 1, 2)
    order = []
    remove = checkpoint_retention.remove

    def first_only(uri: str) -> None:
        order.append(Path(uri).name)
        remove(uri)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_retention, "remove", first_only)
    with pytest.raises(KeyboardInterrupt):
        sweep(root, Retention(1), folder_of(root, 2).name)
    assert order == [MANIFEST]
    assert newest(root, told=no_warning).step == 2
    assert steps_in(root) == [2]
