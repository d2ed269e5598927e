from pathlib import Path

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import nn

from ldm_core.errors import UserError
from ldm_core.training.checkpoint_retention import Retention
from ldm_core.training.checkpoint_snapshots import (
    average_of,
    average_of_length,
    snapshot,
    snapshots_at,
)
from ldm_core.training.checkpoints import Checkpoints
from ldm_core.training.power_ema import PowerEma, power_exponent, snapshot_shares

WIDTHS = {"0.05": 0.05, "0.10": 0.10}


def walk(root: str, every: int = 16) -> tuple[nn.Linear, PowerEma]:
    """A random walk of weights; returns the average of width .075 that was kept on the way."""
    torch.manual_seed(0)
    network = nn.Linear(20, 5).double()
    kept = {name: PowerEma(network, std) for name, std in WIDTHS.items()}
    wanted = PowerEma(network, 0.075)
    snapshots = Checkpoints(root, {}, retention=Retention(None))
    for step in range(1, 129):
        for weight in network.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
        for average in (*kept.values(), wanted):
            average.update(network)
        if step % every == 0:
            snapshots.save(step, *snapshot(kept))
    snapshots.wait()
    return network, wanted


def test_the_average_that_was_not_kept(tmp_path):
    network, wanted = walk(str(tmp_path))
    found = average_of_length(str(tmp_path), 0.075)
    moved = (wanted.shadow["weight"] - network.weight).norm()
    assert (found["weight"] - wanted.shadow["weight"]).norm() < 0.02 * moved


def test_how_far_the_profile_is_from_the_one_asked_for(tmp_path):
    """Profiles as they are, on a fine grid of times, without the closed form of their products."""
    walk(str(tmp_path), every=32)
    kept = snapshots_at(str(tmp_path))
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) * 128 / 200_000

    def profile(time: float, exponent: float) -> torch.Tensor:
        weight = (exponent + 1) / time * (grid / time) ** exponent
        return torch.where(grid < time, weight, 0)

    errors = {}
    for std in (0.05, 0.075, 0.2):
        errors[std] = average_of(kept, std)[1]
        times, exponents = ([getattr(k, of) for k in kept] for of in ("time", "exponent"))
        wanted = power_exponent(std)
        shares = snapshot_shares(torch.tensor(times), torch.tensor(exponents), 128, wanted)
        pairs = zip(shares.tolist(), times, exponents, strict=True)
        made = sum(share * profile(time, exponent) for share, time, exponent in pairs)
        aim = profile(128, wanted)
        assert errors[std] == pytest.approx(float((made - aim).norm() / aim.norm()), abs=1e-4)
    assert errors[0.05] < 1e-6 < errors[0.075] < errors[0.2]


def test_a_damaged_snapshot_is_left_out_and_named(tmp_path):
    walk(str(tmp_path), every=32)
    [folder] = Path(tmp_path).glob("step-000000064.*")
    next(folder.glob("part-*")).write_bytes(b"")
    told: list[str] = []
    average_of_length(str(tmp_path), 0.075, told.append)
    assert [str(folder) in line for line in told] == [True]


def test_every_snapshot_is_read_once(tmp_path, monkeypatch):
    """They may be terabytes: what is wrong with a file beside its size is not looked for."""
    walk(str(tmp_path), every=32)
    read = []
    plain = LocalFileSystem.cat_file

    def counted(fs, path, *args, **kwargs):
        data = plain(fs, path, *args, **kwargs)
        if path.endswith(".safetensors"):
            read.append(len(data))
        return data

    monkeypatch.setattr(LocalFileSystem, "cat_file", counted)
    found, _ = average_of(snapshots_at(str(tmp_path)), 0.075)
    kept = sum(4 * len(WIDTHS) * value.nbytes for value in found.values())
    assert sum(read) == kept


def test_none_at_all(tmp_path):
    with pytest.raises(UserError, match="no snapshots at"):
        average_of_length(str(tmp_path), 0.075)
