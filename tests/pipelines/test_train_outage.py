"""A training on a bucket that is away for 12 and for 60 seconds, while it reads and while it saves.

Ray Train alone ends at 12 s. The bucket is behind a proxy that vanishes: connections are cut, new
ones refused; the server is moto's, or a real one under `make test-s3`.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from proxy_faults import to
from test_train import DRIVER, history, wait_for
from tiny_runs import SIZE, encode_here, tiny_recipe

from ldm_core.files import upload_folder
from ldm_core.media.shapes import write_shapes
from pipelines.recipes.schema import Recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STEPS = 300
READS, SAVES = to("GET", "/samples/"), to("PUT", "/checkpoints/")
OUTAGES = [(READS, 12), (SAVES, 12), (READS, 60), (SAVES, 60)]


def project(data: Path, root: str, tracking: Path) -> Recipe:
    train = {
        "steps": STEPS, "checkpoint_every": 20, "log_every": 1, "sample_every": STEPS,
        "validate_every": STEPS, "validation_samples": 6, "max_failures": 0,
    }  # fmt: skip
    recipe = tiny_recipe(str(data), root, train=train)
    return recipe.model_copy(update={"tracking_uri": f"sqlite:///{tracking}"})


def training(recipe: Recipe, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A driver with a Ray of its own, whose workers inherit the environment."""
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, recipe.model_dump_json()],
        env={**inherited, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
    )


def teachers(recipe: Recipe) -> list[Run]:
    """The runs of its training; none while its database is being made."""
    with contextlib.suppress(MlflowException):
        runs = MlflowClient(recipe.tracking_uri).search_runs(["1"])
        return [run for run in runs if run.info.run_name == "train"]
    return []


def losses(recipe: Recipe) -> list[tuple[int, float]]:
    """Of all steps, with those that were logged twice."""
    found = [history(recipe, run.info.run_id, "loss") for run in teachers(recipe)]
    return [pair for run in found for pair in run]


def test_it_ends_as_if_nothing_had_been(s3, tmp_path):
    write_shapes(tmp_path / "data", 96, SIZE, seed=0)
    calm = project(tmp_path / "data", str(tmp_path / "calm"), tmp_path / "calm.db")
    encode_here(calm)
    assert training(calm, {}).wait(600) == 0

    away = project(tmp_path / "data", f"{s3}/outage", tmp_path / "away.db")
    upload_folder(calm.product("latents"), away.product("latents"))
    upload_folder(Path(calm.root, "text"), f"{away.root}/text")
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        driver = training(away, {"AWS_ENDPOINT_URL": proxy.url})

        def step() -> int:
            assert driver.poll() is None, "training ended before all outages"
            return max((step for step, _ in losses(away)), default=0)

        for count, (match, seconds) in enumerate(OUTAGES, start=1):
            begun = step()
            wait_for(lambda begun=begun: step() > begun)  # it goes on after the last one
            proxy.rule(match, proxy.gone(seconds), times=1)
            wait_for(lambda count=count: proxy.counts["gone"] == count)
            print(f"away for {seconds} s from step {step()}")
        assert driver.wait(600) == 0
    assert losses(away) == losses(calm)
    [run] = teachers(away)
    assert run.info.status == "FINISHED"
    assert not [name for name in run.data.tags if name.startswith("failure.")]
