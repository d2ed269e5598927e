"""Training on machines that vanish, come, or are about to be taken away: Ray nodes on loopback."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from test_exact_resume import curve, moved
from test_train import SCAN_S, checkpointed, wait_for
from tiny_runs import SIZE, encode_here, tiny_recipe, train_here

from ldm_core.media.shapes import write_shapes
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import Workers
from pipelines.stage import Record, read_record
from pipelines.tracking import tracking_uri
from pipelines.train_denoiser import train_denoiser

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STEPS, EVERY, STEP_S, RESIZE_S, NOTICE_S = 240, 10, 0.25, 5, 30
SAME = 1e-5  # of losses: other numbers of workers sum in another order

DRIVER = f"""
import sys
from pipelines import ray_training, train_denoiser
from pipelines.recipes.schema import Recipe
from pipelines.stage import Options

def slowed(data, config):
    import time
    from pipelines import denoiser_worker as module
    step = module.DenoiserTraining.step
    module.DenoiserTraining.step = lambda *args: time.sleep({STEP_S}) or step(*args)
    return module.denoiser_worker(data, config)

train_denoiser.denoiser_worker = slowed
ray_training.RESIZE_S = {RESIZE_S}
train_denoiser.train_denoiser(Recipe.model_validate_json(sys.argv[1]), Options())
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    """Encoded; all steps take some time, so that a cluster can change meanwhile."""
    place = tmp_path_factory.mktemp("project")
    write_shapes(place / "data", 64, SIZE, seed=0)
    train = {
        "steps": STEPS, "checkpoint_every": EVERY, "log_every": 1, "sample_every": 10 * STEPS,
        "micro_batches": 4, "least_workers": 1, "learning_rate": 2e-4,
    }  # fmt: skip
    recipe = tiny_recipe(str(place / "data"), str(place / "root"), train=train)
    encode_here(recipe)
    return recipe


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe) -> Record:
    """By one worker in this process."""
    section = recipe.train.model_copy(update={"workers": Workers(count=1), "least_workers": None})
    return train_here(train_denoiser, recipe.model_copy(update={"train": section}))


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head that trains nothing, and two nodes of a CPU each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


class Driver:
    """The command in a process of its own, and what it says."""

    def __init__(self, recipe: Recipe, cluster: Cluster, folder: Path) -> None:
        self.log = folder / "driver.log"
        self.begun = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, recipe.model_dump_json()],
            env={
                **os.environ,
                "RAY_ADDRESS": cluster.address,
                "PYTHONPATH": str(Path(__file__).parents[2]),
            },
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def say(self, line: str) -> None:
        print(f"{time.monotonic() - self.begun:6.1f} s: {line}", flush=True)

    def wait_for(self, what: str, condition) -> None:
        """It happens while the command runs."""

        def over() -> bool:
            assert self.process.poll() is None, f"ended before {what}: {self.log.read_text()}"
            return bool(condition())

        wait_for(over, 300, SCAN_S)
        self.say(what)

    def finish(self) -> list[int]:
        """At the end; the steps it went on from."""
        try:
            assert self.process.wait(600) == 0, self.log.read_text()
        finally:
            self.process.kill()
        self.say("done")
        pattern = rf"goes on from (\d+) of {STEPS} steps"
        return [int(step) for step in re.findall(pattern, self.log.read_text())]


def workers_of(*nodes) -> list[psutil.Process]:
    """The processes that train on some nodes."""
    found = []
    for node in nodes:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in raylet.children(recursive=True):
            try:
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
    return found


def check(mine: Recipe, recipe: Recipe, undisturbed: Record) -> None:
    """The same samples at every step, and losses that differ by rounding alone."""
    record = read_record(mine.product("teacher"))
    checksums = [curve(of, run, "samples_checksum") for of, run in
                 ((mine, record), (recipe, undisturbed))]  # fmt: skip
    assert checksums[0] == checksums[1]
    assert sorted(checksums[0]) == [*range(1, STEPS + 1)]
    expected = curve(recipe, undisturbed)
    logged = MlflowClient(tracking_uri(mine)).get_metric_history(record.run_id, "loss")
    assert {each.step for each in logged} == set(expected)
    worst = max(abs(each.value - expected[each.step]) for each in logged)
    print(f"worst difference of a loss: {worst:.2e}")
    assert worst < SAME


def causes(mine: Recipe) -> list[str]:
    """Failures that the run was told of."""
    record = read_record(mine.product("teacher"))
    tags = MlflowClient(tracking_uri(mine)).get_run(record.run_id).data.tags
    return [value for name, value in tags.items() if name.startswith("failure.")]


def test_a_lost_node_and_a_new_one_change_nothing(recipe, undisturbed, cluster, tmp_path):
    mine = moved(recipe, tmp_path / "lost")
    driver = Driver(mine, cluster, tmp_path)
    first, second = cluster.worker_nodes
    driver.wait_for("two workers", lambda: len(workers_of(first, second)) == 2)
    driver.wait_for("a checkpoint", lambda: checkpointed(mine))
    at = checkpointed(mine)
    cluster.remove_node(first, allow_graceful=False)
    driver.say("a node is gone")
    driver.wait_for("a later checkpoint of one worker", lambda: checkpointed(mine) > at + EVERY)
    assert len(workers_of(second)) == 1
    third = cluster.add_node(num_cpus=1)
    driver.say("a node is there")
    driver.wait_for("two workers", lambda: len(workers_of(second, third)) == 2)
    again = checkpointed(mine)
    went_on = driver.finish()
    assert len(went_on) == 2  # after each of the two, from the last checkpoint
    assert at <= went_on[0] < again <= went_on[1] < STEPS
    check(mine, recipe, undisturbed)
    assert len(causes(mine)) == 1  # a node more is no failure


def test_a_notice_is_saved_for_at_once(recipe, undisturbed, cluster, tmp_path):
    """Nothing else saves in this run, and no failure is forgiven."""
    mine = moved(recipe, tmp_path / "noticed")
    rarely = {"checkpoint_every": STEPS, "max_failures": 0}
    mine = mine.model_copy(update={"train": mine.train.model_copy(update=rarely)})
    driver = Driver(mine, cluster, tmp_path)
    going, staying = cluster.worker_nodes
    driver.wait_for("two workers", lambda: len(workers_of(going, staying)) == 2)
    time.sleep(5)  # of training
    deadline = time.time() + NOTICE_S
    accepted, why = GcsClient(address=cluster.address).drain_node(
        going.node_id, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "a spot machine",
        int(1000 * deadline),
    )  # fmt: skip
    assert accepted, why
    driver.say("a node is about to go")
    driver.wait_for("a checkpoint", lambda: checkpointed(mine))
    assert len(workers_of(going, staying)) == 2
    assert time.time() < deadline
    saved = checkpointed(mine)
    time.sleep(max(0.0, deadline - time.time()))
    cluster.remove_node(going, allow_graceful=False)
    driver.say("it is gone")
    driver.wait_for("one worker", lambda: len(workers_of(staying)) == 1)
    assert driver.finish() == [saved]
    check(mine, recipe, undisturbed)
