"""`ldm schedule`: a stage whenever its time comes, kept by a cluster or by this terminal.

The recipe is resolved and every place looked at here, so that a mistake is found before the first
night. What a cluster gets holds no secret: the variables of the object store and of MLflow come
from a Secret that is already there.
"""

import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from importlib.metadata import version
from itertools import islice
from typing import Any

from ldm_core.errors import UserError
from pipelines.cluster_command import cluster_command, read_disk, stage_words
from pipelines.credentials import masked
from pipelines.cron import Cron
from pipelines.exit_codes import JobFailed
from pipelines.kubernetes_manifests import (
    LINGER_S,
    ClusterJob,
    kubernetes_cron_job,
    ray_cron_job,
    written,
)
from pipelines.recipe_options import Arguments
from pipelines.recipes.sections import Workers
from pipelines.schedule_loop import run_child, run_loop, terminated_like_interrupted
from pipelines.stages import STAGES

MEMORY = "8Gi"
LEAST_GAP_S = 600  # a Ray cluster takes minutes to start
SLACK_S = 60  # between a run that is stopped and the next

RAY_COMMENT = """\
Made by `ldm schedule`; needs KubeRay 1.7 or newer with its feature gate RayCronJob on.
A RayCronJob has no concurrencyPolicy. activeDeadlineSeconds keeps runs apart instead: one that
lasts until shortly before the next time is stopped, and the next goes on from what is finished.
Should two meet all the same (one started by hand), the second finds the store locked and ends with
an error that names the first; the next time goes on from what is finished.
Finished RayJobs stay: kubectl get rayjobs -n {namespace} -l ray.io/cronjob-name={name}
"""
KUBERNETES_COMMENT = """\
Made by `ldm schedule`, for a KubeRay with RayJobs but no RayCronJobs.
concurrencyPolicy keeps two starters apart, and the RayJob's name two runs: while the RayJob of
that name is not finished, a time is skipped, and the cluster never has two of one name.
How the last run ended: kubectl get rayjob -n {namespace} {name}
"""


class Kind(StrEnum):
    """Who keeps the schedule."""

    RAY = "ray"
    KUBERNETES = "kubernetes"
    LOCAL = "local"


@dataclass(frozen=True)
class Task:
    """What to run, and when.

    Attributes:
        stage: name of one of STAGES.
        arguments: the recipe's words.
        cron: when.
        flags: of the stage, e.g. "--verbose".

    Raises:
        UserError: no such stage, or the recipe is wrong.
    """

    stage: str
    arguments: Arguments
    cron: Cron
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [each.name for each in STAGES]
        if self.stage not in names:
            raise UserError(f"no stage {self.stage} to schedule; there are {', '.join(names)}")
        self.arguments.resolve()

    def words(self, python: str) -> list[str]:
        """What runs it on this machine."""
        return stage_words(python, self.stage, self.arguments, self.flags)


def show_times(task: Task, count: int = 3) -> None:
    """Say what would run on this machine, and the first times of it."""
    print(masked(shlex.join(task.words("python"))))
    for each in islice(task.cron.times(datetime.now(UTC)), count):
        print(f"at {each:%Y-%m-%d %H:%M %Z}")


def run_here(task: Task, runs: int | None = None) -> None:
    """Run it on this machine whenever its time comes, until interrupted or after so many runs.

    Raises:
        JobFailed: some of the runs failed.
    """
    now = partial(datetime.now, UTC)
    run = partial(run_child, task.words(sys.executable))
    with terminated_like_interrupted():
        tally = run_loop(task.cron.times(now()), now, time.sleep, run, runs)
    if tally.failed:
        raise JobFailed(str(tally))


def plan_cluster_job(
    task: Task, asked: Mapping[str, Any], shared_disk: str | None = None
) -> ClusterJob:
    """What a cluster needs to know, without telling it.

    Args:
        task: what to run, and when.
        asked: fields of the ClusterJob; what is missing or None follows from the recipe.
        shared_disk: "CLAIM:PATH" of a disk that all pods mount.

    Raises:
        UserError: a place or a number of the recipe does not fit the cluster.
        ValidationError: a name or an amount is none that Kubernetes takes.
    """
    recipe = task.arguments.resolve()
    disk = read_disk(shared_disk)
    workers: Workers = getattr(recipe, task.stage).workers
    fields = {
        "name": _name(f"ldm-{task.stage}-{recipe.name}"),
        "schedule": task.cron.expression,
        "time_zone": task.cron.zone,
        "entrypoint": cluster_command(task.stage, task.arguments, task.flags, disk),
        "ray_version": version("ray"),
        "workers": workers.count,
        "cpus": math.ceil(workers.cpus),
        "memory": MEMORY,
        "gpus": math.ceil(workers.gpus),
        "disk": disk,
    } | {name: value for name, value in asked.items() if value is not None}
    if "image" not in fields:
        raise UserError("no --image to run in; name one that holds this package and its libraries")
    job = ClusterJob.model_validate(fields)
    _check_room(job, workers, task.stage)
    return job


def manifest(job: ClusterJob, cron: Cron, kind: Kind) -> str:
    """The schedule as YAML for `kubectl apply`.

    Raises:
        UserError: its times are too close together for this kind.
    """
    names = {"name": job.name, "namespace": job.namespace}
    if kind is Kind.KUBERNETES:
        return written(KUBERNETES_COMMENT.format(**names), kubernetes_cron_job(job))
    limited = job.model_copy(update={"deadline_s": _deadline_s(cron)})
    return written(RAY_COMMENT.format(**names), ray_cron_job(limited))


def apply(text: str) -> None:
    """Hand the YAML to the cluster that `kubectl` knows.

    Raises:
        UserError: there is no kubectl, or the cluster refuses.
    """
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise UserError(
            "no kubectl on the PATH; install it, or write the YAML with --dry-run and apply it "
            "where there is one"
        )
    done = subprocess.run(
        [kubectl, "apply", "-f", "-"], input=text, text=True, capture_output=True, check=False
    )
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise UserError(
            f"kubectl apply: {done.stderr.strip()}; --kind ray needs KubeRay 1.7 with its feature "
            "gate RayCronJob, --kind kubernetes any KubeRay"
        )


def _name(text: str) -> str:
    """The text with only what the names of Kubernetes may hold."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def _check_room(job: ClusterJob, workers: Workers, stage: str) -> None:
    """Ray waits for ever for what the cluster does not have."""
    for name, had, needed in (
        ("CPUs", (job.workers + 1) * job.cpus, workers.count * workers.cpus),
        ("GPUs", max(1, job.workers) * job.gpus, workers.count * workers.gpus),
    ):
        if had < needed:
            raise UserError(
                f"{stage}.workers needs {needed:g} {name} and the cluster has {had:g}; ask for "
                f"more with --workers, --cpus, --gpus, or for less with --set {stage}.workers.count"
            )


def _deadline_s(cron: Cron) -> int:
    """How long a run may last so that it is gone, cluster and all, before the next."""
    gap = int(cron.shortest_gap(datetime.now(UTC)).total_seconds())
    if gap < LEAST_GAP_S:
        raise UserError(
            f"--cron {cron.expression!r} comes round after {gap} s, and --kind ray stops a run "
            f"before the next: leave {LEAST_GAP_S} s, or take --kind kubernetes, which skips a "
            "time while a run lasts"
        )
    return gap - LINGER_S - SLACK_S
