"""The newest sound checkpoint is gone on from; damaged ones are named, others refused."""

import errno
import os
from pathlib import Path

import pytest
import torch
from checkpoint_runs import (
    ARCHITECTURE,
    go_on,
    new_state,
)
from saved_checkpoints import ONES, cut, flip, folder_of, no_warning, saved

from ldm_core.errors import UserError
from ldm_core.training import checkpoint_patience
from ldm_core.training.checkpoint_folder import (
    INDEX,
    MANIFEST,
    STATE,
    Manifest,
    read_checkpoint,
)
from ldm_core.training.checkpoint_newest import newest
from ldm_core.training.checkpoint_retention import Retention
from ldm_core.training.checkpoint_state import TrainingState
from ldm_core.training.checkpoint_tensors import read_tensors
from ldm_core.training.checkpoints import Checkpoints
from ldm_core.training.ema import Ema


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "checkpoints")


@pytest.mark.parametrize("name", [MANIFEST, INDEX, STATE, "part-00000-000.safetensors"])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_one_is_named_and_the_one_before_is_used(root, name, damage):
    saved(root, 1, 2)
    damage(folder_of(root, 2) / name)
    told: list[str] = []
    found = newest(root, ARCHITECTURE, told.append)
    assert found.step == 1
    assert read_tensors(found, "model/")["weight"].unique().tolist() == [1]
    if (name, damage) == (MANIFEST, Path.unlink):
        assert told == []  # it never was one
    else:
        [line] = told
        assert str(folder_of(root, 2)) in line
        assert name in line


def test_a_listing_that_fails_for_a_moment_is_tried_again(root, monkeypatch):
    saved(root, 1)
    monkeypatch.setattr(checkpoint_patience, "FIRST_PAUSE_S", 0.0)
    scan, left = os.scandir, [OSError(errno.ESTALE, "stale file handle")]

    def stale_once(path: str) -> object:
        if left:
            raise left.pop()
        return scan(path)

    monkeypatch.setattr(os, "scandir", stale_once)
    assert newest(root, told=no_warning).step == 1
    assert left == []


def test_every_byte_of_a_manifest_counts(root):
    saved(root, 1, 2)
    path = folder_of(root, 2) / MANIFEST
    good = path.read_bytes()
    for place in range(0, len(good), 17):
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        assert newest(root, ARCHITECTURE, lambda line: None).step == 1
    path.write_bytes(good)
    assert newest(root, ARCHITECTURE, no_warning).step == 2


def test_sizes_alone_are_quick_and_see_less(root):
    saved(root, 1, 2)
    [part] = folder_of(root, 2).glob("part-*")
    flip(part)
    assert newest(root, ARCHITECTURE, no_warning, hashes=False).step == 2
    cut(part)
    assert newest(root, ARCHITECTURE, lambda line: None, hashes=False).step == 1


def test_none_and_none_sound(root):
    assert newest(root) is None
    saved(root, 1, 2)
    for step in (1, 2):
        flip(folder_of(root, step) / STATE)
    with pytest.raises(UserError, match=r"none of the 2 checkpoints at .* is sound"):
        newest(root, told=lambda line: None)


def test_of_two_of_the_same_step_the_later_one(root):
    saved(root, 1)
    made = Checkpoints(root, ARCHITECTURE, retention=Retention(None))
    made.save(1, ONES, {"again": True})
    made.wait()
    assert made.newest().state == {"again": True}


def test_another_architecture_is_refused(root):
    saved(root, 1)
    with pytest.raises(UserError) as told:
        newest(root, {"class": "Small", "width": 8})
    assert "(width 6 there, 8 here)" in str(told.value)
    assert read_checkpoint(str(folder_of(root, 1))).manifest.digest in str(told.value)


def test_another_format_is_refused(root, monkeypatch):
    saved(root, 1)
    path = folder_of(root, 1) / MANIFEST
    manifest = Manifest.model_validate_json(path.read_text())
    path.write_bytes(manifest.model_copy(update={"format": 2}).to_bytes())
    with pytest.raises(UserError, match="in format 2, this program reads 1"):
        newest(root)


def test_other_averages_or_optimisers_are_refused(root):
    state = new_state()
    go_on(state, 0, 1)
    made = Checkpoints(root, ARCHITECTURE)
    made.save(1, state.tensors(), state.facts())
    made.wait()
    found = made.newest()
    other = new_state()
    with pytest.raises(UserError, match=r"averages \['ema', 'power'\], this run keeps \['slow'\]"):
        TrainingState(other.network, other.optimizers, {"slow": Ema(other.network, 0.9)}).load(
            found
        )
    plain = (torch.optim.AdamW(other.network.parameters(), 0.1),)
    with pytest.raises(UserError, match=r"with Muon for first\.weight, this run has AdamW"):
        TrainingState(other.network, plain, other.averages).load(found)


# What stays
