"""What a training leaves of its averages."""

from pathlib import Path
from types import SimpleNamespace

from torch import nn

from ldm_core.files import remove
from ldm_core.training import checkpoints
from ldm_core.training.checkpoint_folder import listing
from ldm_core.training.checkpoint_snapshots import snapshots_at
from ldm_core.training.power_ema import PowerEma
from pipelines import training_state
from pipelines.denoiser_network import new_averages
from pipelines.recipes.sections import TrainSection
from pipelines.training_state import Snapshots


class Training:
    """Of which only the averages are there."""

    def __init__(self, root: Path, **fields) -> None:
        section = TrainSection(ema_lengths=(0.05, 0.1), **fields)
        self.network = nn.Linear(2, 2)
        self.averages = new_averages(section, self.network)
        job = SimpleNamespace(
            recipe=SimpleNamespace(train=section),
            product=f"{root}/teacher",
            checkpoints=f"{root}/checkpoints/teacher-d",
            run=SimpleNamespace(metrics=lambda *_: None),
        )
        self.kept = Snapshots(job, self.averages.by_name, {})
        assert all(isinstance(each, PowerEma) for each in self.kept.powers.values())

    def steps(self, first: int, end: int) -> None:
        """From after `first` steps to the end of the training."""
        for done in range(first + 1, end + 1):
            self.averages.update(self.network)
            self.kept.keep(done, end)
        self.kept.wait(end)

    def found(self) -> list[int]:
        """Steps of its snapshots; each has two averages."""
        found = snapshots_at(self.kept.checkpoints.root)
        assert all(each.time == each.checkpoint.step for each in found)
        return sorted(each.checkpoint.step for each in found)[::2]


def snapshots_of(root: Path, end: int, **fields) -> list[int]:
    """Steps of the snapshots that a training leaves that ends after `end` steps."""
    training = Training(root, **fields)
    training.steps(0, end)
    return training.found()


def test_snapshots_of_a_whole_training(tmp_path):
    steps = snapshots_of(tmp_path, 120, steps=120, checkpoint_every=2)
    assert steps == list(range(4, 121, 4))


def test_an_end_before_the_last_step_has_one_too(tmp_path):
    assert snapshots_of(tmp_path, 7, steps=100, snapshot_every=3) == [3, 6, 7]


def test_one_that_was_lost_with_its_workers_is_made_again(tmp_path):
    """Their checkpoint of the same step was not, so that nobody computes that step again."""
    training = Training(tmp_path, steps=100, snapshot_every=3)
    training.steps(0, 6)
    root = training.kept.checkpoints.root
    [last] = [folder for folder in listing(root) if folder.startswith("step-000000006.")]
    remove(f"{root}/{last}")
    assert training.found() == [3]
    training.kept.begin(6, 9)
    training.steps(6, 9)
    assert training.found() == [3, 6, 9]


def test_the_last_one_is_tried_once_more(tmp_path, monkeypatch):
    training = Training(tmp_path, steps=100, snapshot_every=3)
    write, left = checkpoints.write_bytes, [OSError("full")]

    def fails_once(uri: str, data: bytes) -> None:
        if "step-000000006." in uri and left:
            raise left.pop()
        write(uri, data)

    monkeypatch.setattr(checkpoints, "write_bytes", fails_once)
    monkeypatch.setattr(training_state.ray.train, "get_context", lambda: SimpleNamespace(
        get_world_rank=lambda: 0))  # fmt: skip
    training.steps(0, 6)
    assert training.found() == [3, 6]
