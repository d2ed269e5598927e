"""Small checkpoints, and what there is of them."""

from pathlib import Path

import torch
from checkpoint_runs import ARCHITECTURE

from ldm_core.training.checkpoint_folder import MANIFEST, listing
from ldm_core.training.checkpoint_retention import Retention
from ldm_core.training.checkpoints import Checkpoints

ONES = {"model/weight": torch.ones(3, 5)}


def saved(root: str, *steps: int, retention: Retention = Retention(None)) -> Checkpoints:
    made = Checkpoints(root, ARCHITECTURE, retention=retention)
    for step in steps:
        made.save(step, {"model/weight": torch.full((3, 5), float(step))}, {"step": step})
    made.wait()
    return made


def steps_in(root: str) -> list[int]:
    return [int(name[5:14]) for name, files in listing(root).items() if MANIFEST in files]


def folder_of(root: str, step: int) -> Path:
    [folder] = Path(root).glob(f"step-{step:09d}.*")
    return folder


def no_warning(line: str) -> None:
    raise AssertionError(line)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
