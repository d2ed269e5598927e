"""What a training leaves of its averages."""

from pathlib import Path
from types import SimpleNamespace

from torch import nn

from ldm_core.training.checkpoint_snapshots import snapshots_at
from ldm_core.training.power_ema import PowerEma
from pipelines.denoiser_network import new_averages
from pipelines.recipes.sections import TrainSection
from pipelines.training_state import Snapshots


def snapshots_of(root: Path, end: int, **fields) -> list[int]:
    """Steps of the snapshots that a training leaves that ends after `end` steps."""
    section = TrainSection(ema_lengths=(0.05, 0.1), **fields)
    network = nn.Linear(2, 2)
    averages = new_averages(section, network)
    job = SimpleNamespace(
        recipe=SimpleNamespace(train=section),
        product=f"{root}/teacher",
        checkpoints=f"{root}/checkpoints/teacher-d",
        run=None,
    )
    kept = Snapshots(job, averages.by_name, {})
    assert all(isinstance(each, PowerEma) for each in kept.powers.values())
    for done in range(1, end + 1):
        averages.update(network)
        kept.keep(done, end)
    kept.wait()
    found = snapshots_at(kept.checkpoints.root)
    assert all(each.time == each.checkpoint.step for each in found)
    return sorted(each.checkpoint.step for each in found)[::2]


def test_snapshots_of_a_whole_training(tmp_path):
    steps = snapshots_of(tmp_path, 120, steps=120, checkpoint_every=2)
    assert steps == list(range(4, 121, 4))


def test_an_end_before_the_last_step_has_one_too(tmp_path):
    assert snapshots_of(tmp_path, 7, steps=100, snapshot_every=3) == [3, 6, 7]
