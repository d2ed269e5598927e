"""Training that is killed again and again, and goes on with other workers in other layouts."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow.tracking import MlflowClient
from test_train import DRIVER, SCAN_S, checkpointed, history, training_workers, wait_for
from tiny_runs import SIZE, encode_here, tiny_recipe

from ldm_core.media.shapes import write_shapes
from ldm_core.training.checkpoint_folder import MANIFEST, read_checkpoint, step_of
from ldm_core.training.layout import Layout
from pipelines.recipes.layout_section import LayoutSection
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import Workers
from pipelines.stage import Options, Record
from pipelines.tracking import tracking_uri
from pipelines.train_denoiser import train_denoiser

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STEPS, EVERY, KILLS = 160, 4, 10


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, ray_session: None) -> Recipe:
    """Encoded; four micro-batches a step, so that one to four workers can share them."""
    place = tmp_path_factory.mktemp("project")
    write_shapes(place / "data", 50, SIZE, seed=0)
    train = {
        "steps": STEPS, "checkpoint_every": EVERY, "log_every": 1, "sample_every": STEPS,
        "max_failures": 2 * KILLS, "micro_batches": 4, "validation_samples": 6,
        "validate_every": STEPS // 2,
    }  # fmt: skip
    recipe = tiny_recipe(str(place / "data"), str(place / "root"), train=train)
    encode_here(recipe)
    return recipe


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe) -> Record:
    return train_denoiser(recipe, Options())


def moved(recipe: Recipe, root: Path) -> Recipe:
    """With the same latents, and nothing trained yet."""
    root.mkdir()
    os.symlink(recipe.product("latents"), root / "latents")
    os.symlink(Path(recipe.root, "text"), root / "text")
    return recipe.model_copy(update={"root": str(root)})


def curve(recipe: Recipe, record: Record, name: str = "loss") -> dict[int, float]:
    """The value of every step; those logged twice are to be the same."""
    logged = set(history(recipe, record.run_id, name))
    assert len(dict(logged)) == len(logged), "a step computed again came out otherwise"
    return dict(logged)


def test_ten_killed_workers_change_no_bit(recipe, undisturbed, tmp_path):
    mine, rng, killed = moved(recipe, tmp_path / "killed"), random.Random(0), []
    gone: set[int] = set()

    def new_group() -> list[Any]:
        """All workers of a group that has begun since the last kill; nobody of it was there."""
        found = training_workers()
        whole = len(found) == mine.train.workers.count
        return found if whole and gone.isdisjoint(each.pid for each in found) else []

    def kill_one_after_another() -> None:
        while len(killed) < KILLS:
            wait_for(new_group, pause=SCAN_S)
            before = checkpointed(mine)
            wait_for(lambda before=before: checkpointed(mine) > before)
            time.sleep(rng.uniform(0, 0.5))
            group = new_group()
            assert checkpointed(mine) < STEPS - 2 * EVERY, f"too late, after {len(killed)} kills"
            rng.choice(group).send_signal(signal.SIGKILL)
            gone.update(each.pid for each in group)
            killed.append(checkpointed(mine))

    killer = threading.Thread(target=kill_one_after_another, daemon=True)
    killer.start()
    record = train_denoiser(mine, Options())
    killer.join(1)
    print(f"killed at the checkpoints {killed}")
    assert len(killed) == KILLS
    assert curve(mine, record) == curve(recipe, undisturbed)
    for name in ("samples_checksum", "validation_loss"):
        assert curve(mine, record, name) == curve(recipe, undisturbed, name)
    assert record.summary["digest"] == undisturbed.summary["digest"]
    causes = MlflowClient(tracking_uri(mine)).get_run(record.run_id).data.tags
    assert sum(name.startswith("failure.") for name in causes) >= 1


def laid_out(recipe: Recipe, workers: int, shard: int, context: int = 1) -> Recipe:
    layout = LayoutSection(shard=shard, context=context)
    section = recipe.train.model_copy(
        update={"workers": Workers(count=workers, cpus=0.4), "layout": layout}
    )
    return recipe.model_copy(update={"train": section})


def written_by(recipe: Recipe) -> tuple[int, str]:
    """How many workers wrote the newest checkpoint, and in which layout."""
    manifests = Path(recipe.root, "checkpoints").glob(f"teacher-*/*/{MANIFEST}")
    last = max(manifests, key=lambda path: step_of(path.parent.name))
    manifest = read_checkpoint(str(last.parent)).manifest
    return manifest.workers, manifest.layout


def test_other_numbers_of_workers_and_layouts_read_the_same(recipe, undisturbed, tmp_path):
    mine = moved(recipe, tmp_path / "moved")
    # workers, shards, context: one process, DDP, FSDP2, DDP, HSDP, tokens dealt out
    ways = [(1, 1, 1), (2, 1, 1), (2, 2, 1), (3, 1, 1), (4, 2, 1), (2, 1, 2)]
    for workers, shard, context in ways:
        before = checkpointed(mine)
        arranged = laid_out(mine, workers, shard, context).model_dump_json()
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, arranged],
            env={
                **os.environ,
                "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
                "PYTHONPATH": str(Path(__file__).parents[2]),
            },
        )
        wait_for(lambda before=before: checkpointed(mine) > before + EVERY)
        driver.kill()
        driver.wait()
        wait_for(lambda: not training_workers(), pause=SCAN_S)
        print(f"{workers} workers, {shard} x {context}, up to {checkpointed(mine)}")
        assert checkpointed(mine) < STEPS
        assert written_by(mine) == (workers, str(Layout.filling(workers, shard, context)))
    record = train_denoiser(laid_out(mine, 1, 1), Options())
    assert curve(mine, record, "samples_checksum") == curve(recipe, undisturbed, "samples_checksum")
    losses, expected = history(mine, record.run_id, "loss"), curve(recipe, undisturbed)
    worst = max(abs(loss - expected[step]) for step, loss in losses)
    print(json.dumps({"worst difference of a loss": worst}))
    assert worst < 1e-4  # roundings differ from layout to layout, and grow with the steps
