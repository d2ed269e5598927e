"""What ends a training and what it asks for: users' mistakes in workers, warnings, GPUs."""

import logging
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import ray.train
from mlflow.tracking import MlflowClient
from ray import cloudpickle
from ray.train import ControllerError, WorkerGroupError
from tiny_runs import encode_here, tiny_recipe

from ldm_core.errors import UserError
from ldm_core.media.shapes import write_shapes
from pipelines import ray_training, train_denoiser
from pipelines.exit_codes import MISTAKE, exit_code
from pipelines.ray_training import Job, fit
from pipelines.recipes.sections import Workers
from pipelines.stage import Context, Options
from pipelines.tracking import track, tracking_uri
from pipelines.training_failures import cause_of, supervised

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not have this module
MESSAGE = "row 3 of the store is damaged: run `ldm store verify`"


def context_of(recipe, run) -> Context:
    return Context(recipe, "train", run, "d", recipe.product("teacher"), {}, Options())


def train(recipe, worker, retries: int = 3) -> dict:
    """A worker function on two workers, in a run of its own."""
    with track(recipe, "train", "d", recipe.product("teacher")) as run:
        return fit(context_of(recipe, run), worker, Workers(count=2), 10, retries)


def one_is_mistaken(begun: Path, config: dict[str, Job]) -> dict:
    """Both warn; the second finds bad data, and the first waits for it as in a collective."""
    rank = ray.train.get_context().get_world_rank()
    for number in range(3):
        logging.getLogger("ldm_core.patient_s3").warning("S3 is away (%s)", f"{rank}.{number}")
    with begun.open("a") as file:
        print(rank, file=file)
    if rank == 1:
        raise UserError(MESSAGE)
    threading.Event().wait(600)
    return {}


@pytest.mark.ray
class TestWorkers:
    @pytest.fixture
    def recipe(self, tmp_path, ray_session):
        return tiny_recipe(str(tmp_path / "data"), str(tmp_path / "root"))

    def test_a_mistake_ends_it_at_once_and_warnings_are_seen(self, recipe, tmp_path, capsys):
        begun = tmp_path / "begun"
        code = exit_code(lambda: train(recipe, partial(one_is_mistaken, begun)), ["train"])
        assert code == MISTAKE
        said = capsys.readouterr()
        assert said.err.splitlines()[-1] == f"ldm: {MESSAGE}"
        [warning] = [line for line in said.out.splitlines() if "S3 is away" in line]
        assert warning.startswith("[teacher] S3 is away (")  # once, though six say it
        assert sorted(begun.read_text().split()) == ["0", "1"]  # each of them once
        [run] = MlflowClient(tracking_uri(recipe)).search_runs(["1"])
        assert run.info.status == "FAILED"
        [cause] = [value for name, value in run.data.tags.items() if name.startswith("failure.")]
        assert cause == f"worker 1: {MESSAGE}"

    @pytest.mark.slow
    def test_bad_data_ends_a_training_at_once(self, tmp_path, ray_session, capsys):
        """A row group whose latents are of another size than the table says."""
        write_shapes(tmp_path / "data", 24, 16, seed=0)
        sizes = {"steps": 8, "sample_every": 100}
        recipe = tiny_recipe(str(tmp_path / "data"), str(tmp_path / "root"), train=sizes)
        encode_here(recipe)
        for path in Path(recipe.product("latents"), "samples").rglob("*.parquet"):
            shorten_latents(path)
        code = exit_code(lambda: train_denoiser.train_denoiser(recipe, Options()), ["train"])
        assert code == MISTAKE
        assert "ldm store verify" in capsys.readouterr().err


def shorten_latents(path: Path) -> None:
    """Two bytes less of each."""
    table = pq.read_table(path)
    at = table.schema.get_field_index("latent_mean")
    short = [value[:-2] for value in table["latent_mean"].to_pylist()]
    changed = table.set_column(at, table.schema.field(at), [short])
    pq.write_table(changed, path, write_page_checksum=True)


class TestCauses:
    @pytest.mark.parametrize(
        "error",
        [
            WorkerGroupError("both", {0: RuntimeError("a socket"), 1: UserError(MESSAGE)}),
            ControllerError(UserError(MESSAGE)),
        ],
    )
    def test_the_mistake_is_found_whoever_hands_it_on(self, error):
        assert str(cause_of(error)) == MESSAGE

    def test_also_behind_other_errors(self):
        error = RuntimeError("reading ahead")
        error.__cause__ = UserError(MESSAGE)
        assert str(cause_of(WorkerGroupError("one", {0: error}))) == MESSAGE

    def test_a_controller_is_begun_again_though_nobody_can_be_told(self, capsys):
        outcomes = [ControllerError(OSError("lost")), ControllerError(OSError("lost"))]

        def once() -> dict:
            if outcomes:
                raise outcomes.pop()
            return {"steps": 1}

        def tags(values: object) -> None:
            raise ConnectionError("no tracking server")

        assert supervised(once, SimpleNamespace(tags=tags), 2) == {"steps": 1}
        assert capsys.readouterr().out.count("could not tell the run") == 2

    def test_it_is_not_begun_again_for_ever(self):
        run = SimpleNamespace(tags=lambda values: None)

        def fails() -> dict:
            raise ControllerError(OSError("lost"))

        with pytest.raises(ControllerError):
            supervised(fails, run, 2)

    def test_nor_for_a_mistake(self):
        calls = []

        def fails() -> dict:
            calls.append(1)
            raise ControllerError(UserError(MESSAGE))

        with pytest.raises(UserError, match="damaged"):
            supervised(fails, SimpleNamespace(), 2)
        assert calls == [1]


@pytest.mark.parametrize(
    ("workers", "beside", "asked"),
    [
        (Workers(count=2, gpus=1), 0.5, "2.5 GPU of 2"),
        (Workers(count=2), 0.5, "0.5 GPU of 0"),
        (Workers(count=3), 0, "3 CPU of 2"),
    ],
)
def test_room_is_asked_for_workers_and_what_is_beside_them(
    workers, beside, asked, tmp_path, monkeypatch
):
    gpus = int(asked.rpartition(" ")[2]) if "GPU" in asked else 0
    monkeypatch.setattr(ray_training, "start", lambda verbose: None)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2, "GPU": gpus})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    recipe = tiny_recipe("data", str(tmp_path))
    with pytest.raises(UserError, match=f"train needs {asked} on this machine") as refused:
        fit(context_of(recipe, None), pytest.fail, workers, 1, 0, None, beside)
    assert ("or train.validation_gpus" in str(refused.value)) == bool(beside)


def test_a_validation_s_gpus_are_asked_for(tmp_path, monkeypatch):
    """By the stage, with those of its workers."""
    write_shapes(tmp_path / "data", 8, 16, seed=0)
    sizes = {"validation_gpus": 0.25, "least_workers": 1}
    recipe = tiny_recipe(str(tmp_path / "data"), str(tmp_path / "root"), train=sizes)
    encode_here(recipe)
    monkeypatch.setattr(ray_training, "start", lambda verbose: None)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=r"train needs 0\.25 GPU of 0 on this machine"):
        train_denoiser.train_denoiser(recipe, Options())
