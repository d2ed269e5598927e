"""Training and distilling for real, killed on the way: Ray Train, MLflow, signals, processes."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from mlflow.tracking import MlflowClient
from tiny_runs import SIZE, encode_here, tiny_recipe, train_here

from ldm_core.errors import UserError
from ldm_core.generation import PictureGenerator, PictureRequest
from ldm_core.latents.store import LatentStore
from ldm_core.media.shapes import write_shapes
from ldm_core.model_directory import load_model
from ldm_core.training.checkpoint_folder import MANIFEST, step_of
from pipelines import distill_student as distilling
from pipelines import train_denoiser as training
from pipelines.model_registry import resolve_model
from pipelines.recipes.schema import Recipe
from pipelines.stage import Options, Record
from pipelines.tracking import tracking_uri

pytestmark = pytest.mark.ray
STEPS, EVERY = 40, 8
SCAN_S = 0.25  # between looks through all processes, each of which takes long


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """A project folder to be in: its recipes name data and products by relative paths."""
    place = tmp_path_factory.mktemp("project")
    write_shapes(place / "data", 48, SIZE, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield place


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    """An encoded project; every step is logged, so that kills have time to land between them."""
    train = {"steps": STEPS, "checkpoint_every": EVERY, "log_every": 1, "sample_every": STEPS // 2}
    recipe = tiny_recipe("data", "root", train=train)
    encode_here(recipe)
    shutil.copytree("root", "encoded", ignore=shutil.ignore_patterns("mlflow*"))
    return recipe


@pytest.fixture(scope="module")
def teacher(recipe: Recipe, ray_session: None) -> Record:
    """An undisturbed run."""
    return training.train_denoiser(recipe, Options())


@pytest.fixture(scope="module")
def student(recipe: Recipe, teacher: Record) -> Record:
    """In this process: starting workers takes longer, and the teacher has shown them."""
    return train_here(distilling.distill_student, recipe)


def history(recipe: Recipe, run_id: str, name: str) -> list[tuple[int, float]]:
    """Every value logged, with its step, also those logged twice."""
    client = MlflowClient(tracking_uri(recipe))
    return sorted((m.step, m.value) for m in client.get_metric_history(run_id, name))


class TestTeacher:
    def test_it_loads_and_draws(self, recipe, teacher):
        generator = PictureGenerator.load(recipe.product("teacher"))
        assert generator.digest == teacher.summary["digest"]
        assert generator.size == SIZE
        defaults = (generator.default_steps, generator.default_guidance)
        assert defaults == (recipe.train.sample_steps, recipe.train.guidance)
        pictures = generator.generate([PictureRequest("a red circle", i, steps=2) for i in (0, 1)])
        assert not np.array_equal(*pictures)
        assert "ldm sample" in Path(recipe.product("teacher"), "README.md").read_text()

    def test_its_lineage(self, recipe, teacher):
        config, _, _ = load_model(recipe.product("teacher"))
        version = LatentStore(recipe.product("latents")).open_version()
        assert config.lineage["run"] == teacher.run_id
        assert config.lineage["store_content"] == version.manifest.content
        assert config.lineage["store_version"] == "1"
        assert Path(config.lineage["store"]).is_absolute()
        assert config.latents_mean == tuple(version.manifest.statistics.mean)

    def test_mlflow_has_the_curve_pictures_data_and_recipe(self, recipe, teacher):
        client = MlflowClient(tracking_uri(recipe))
        run = client.get_run(teacher.run_id)
        assert run.info.status == "FINISHED"
        steps = [step for step, _ in history(recipe, teacher.run_id, "loss")]
        assert steps == [*range(1, STEPS + 1)]
        wanted = {"gradient_norm", "learning_rate", "samples_per_second", "data_wait_share"}
        assert wanted <= set(run.data.metrics)
        images = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
        for step in (STEPS // 2, STEPS):
            assert any(re.match(rf"images/samples\Wstep\W{step}\W", name) for name in images)
        [data] = run.inputs.dataset_inputs
        version = LatentStore(recipe.product("latents")).open_version()
        assert data.dataset.digest == version.manifest.content[:36]
        assert run.data.tags["input.latents"] == version.manifest.content[:16]
        artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert {"recipe.json", "preview-captions.json"} <= artifacts

    def test_the_registry_has_it(self, recipe, teacher):
        assert teacher.summary["registered"] == "models:/shapes-teacher/1"
        for name in (teacher.summary["registered"], "models:/shapes-teacher@champion"):
            found = resolve_model(name, tracking_uri(recipe))
            assert found == str(Path(recipe.product("teacher")).absolute())

    def test_checkpoints_are_removed_at_the_end(self, recipe, teacher):
        assert list(Path(recipe.root, "checkpoints").rglob("*.safetensors")) == []


class TestStudent:
    def test_it_draws_in_one_step_without_guidance(self, recipe, student):
        generator = PictureGenerator.load(recipe.product("student"))
        assert generator.digest == student.summary["digest"]
        assert (generator.kind, generator.default_guidance) == ("student", 1.0)
        request = PictureRequest("a red circle", 0, steps=1)
        [picture] = generator.generate([request])
        assert picture.shape == (SIZE, SIZE, 3)
        with pytest.raises(UserError, match="guidance folded in"):
            generator.generate([PictureRequest("a red circle", 0, guidance=2.5)])

    def test_its_lineage(self, recipe, teacher, student):
        config, network, _ = load_model(recipe.product("student"))
        assert network.config.flow_map
        assert config.lineage["teacher"] == teacher.summary["digest"]
        assert config.lineage["teacher_run"] == teacher.run_id
        assert config.lineage["run"] == student.run_id
        run = MlflowClient(tracking_uri(recipe)).get_run(student.run_id)
        assert run.data.tags["parent.teacher"] == teacher.run_id
        assert {"loss/guidance", "loss/trajectory", "loss/shortcut"} <= set(run.data.metrics)
        assert resolve_model("models:/shapes@champion", tracking_uri(recipe)).endswith("student")


def test_the_same_commands_again_do_nothing(recipe, teacher, student, monkeypatch, capsys):
    def fit(*_: object) -> None:
        raise AssertionError("a training was started")

    for module in (training, distilling):
        monkeypatch.setattr(module, "fit", fit)
    assert training.train_denoiser(recipe, Options()) == teacher
    assert distilling.distill_student(recipe, Options()) == student
    assert capsys.readouterr().out.count("up to date") == 2


DRIVER = """
import sys
from pipelines.recipes.schema import Recipe
from pipelines.stage import Options
from pipelines.train_denoiser import train_denoiser
train_denoiser(Recipe.model_validate_json(sys.argv[1]), Options())
"""


def checkpointed(recipe: Recipe) -> int:
    """The step of the newest checkpoint; 0 while there is none."""
    manifests = Path(recipe.root, "checkpoints").glob(f"teacher-*/*/{MANIFEST}")
    return max((step_of(path.parent.name) for path in manifests), default=0)


def wait_for(condition: Callable[[], object], seconds: float = 120, pause: float = 0.02) -> None:
    """Ask every `pause` seconds until it is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(pause)


def training_workers() -> list[Any]:
    """The processes of this test's Ray that train; they are gone some time after their driver."""
    import psutil  # comes with Ray

    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def kill_a_worker_after(step: int, recipe: Recipe, seen: list[int]) -> None:
    """Once there is a later checkpoint than `step`, SIGKILL one of this test's training workers.

    They are looked for before: that takes longer than some steps.
    """
    wait_for(lambda: len(training_workers()) == recipe.train.workers.count, pause=SCAN_S)
    last = training_workers()[-1]
    wait_for(lambda: checkpointed(recipe) > step)
    last.send_signal(signal.SIGKILL)
    seen.append(checkpointed(recipe))


def kill_the_driver(recipe: Recipe) -> int:
    """Train in a process of its own and SIGKILL that after a checkpoint; returns its step."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, recipe.model_dump_json()],
        env={
            **os.environ,
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        stdout=subprocess.DEVNULL,
    )
    wait_for(lambda: checkpointed(recipe) or driver.poll() is not None)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    # they may save once more before Ray ends them
    wait_for(lambda: not training_workers(), pause=SCAN_S)
    return checkpointed(recipe)


def test_a_killed_driver_and_a_killed_worker_change_nothing(recipe, folder, teacher, capsys):
    mine = recipe.model_copy(update={"root": str(folder / "encoded")})
    at_first = kill_the_driver(mine)
    assert EVERY <= at_first < STEPS
    assert not Path(mine.product("teacher")).exists()

    capsys.readouterr()
    seen: list[int] = []
    killer = threading.Thread(target=kill_a_worker_after, args=(at_first, mine, seen))
    killer.start()
    record = training.train_denoiser(mine, Options())
    killer.join()
    assert at_first < seen[0] < STEPS
    said = re.findall(rf"goes on from (\d+) of {STEPS} steps", capsys.readouterr().out)
    assert int(said[0]) == at_first < int(said[-1])
    assert 0 < record.summary["earlier_seconds"] < record.seconds
    assert teacher.summary["earlier_seconds"] == 0

    weights = [Path(r.product("teacher"), "model.safetensors") for r in (recipe, mine)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert record.summary["digest"] == teacher.summary["digest"]
    undisturbed = dict(history(recipe, teacher.run_id, "loss"))
    logged = history(mine, record.run_id, "loss")  # one run, whatever its restarts
    assert dict(logged) == undisturbed
    assert len(set(logged)) == STEPS  # what was computed twice came out the same
    times = Counter(step for step, _ in logged)
    assert all(times[step] == 1 for step in range(1, at_first + 1))  # and nothing before the kill
    runs = MlflowClient(tracking_uri(mine)).search_runs(["1"], "tags.stage = 'train'")
    assert [run.info.run_id for run in runs] == [record.run_id]
