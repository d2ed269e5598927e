"""`ldm schedule` on the command line: most of its words say what the cluster is to be."""

from typing import Annotated

import typer

from ldm_core.errors import UserError
from pipelines.cli_options import DEFAULT_RECIPE, Data, Overrides, RecipeWord, Root, Verbose
from pipelines.cron import Cron
from pipelines.recipe_options import Arguments
from pipelines.schedule_job import (
    Kind,
    Task,
    apply,
    manifest,
    plan_cluster_job,
    run_here,
    show_times,
)

CLUSTER = "On a cluster"

StageWord = Annotated[str, typer.Argument(metavar="STAGE", help="The stage to run, e.g. encode.")]
When = Annotated[
    str,
    typer.Option("--cron", help="Minute hour day month weekday; '0 3 * * *' is daily at 3:00."),
]
Zone = Annotated[str, typer.Option(help="Whose hours --cron means, e.g. Europe/Berlin.")]
KindWord = Annotated[
    Kind,
    typer.Option(help="Kept by a RayCronJob, by a Kubernetes CronJob, or by this terminal."),
]
Runs = Annotated[
    int | None, typer.Option(min=1, help="With --kind local: stop after so many; default: never.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the YAML, or the next times; start nothing.")
]
Image = Annotated[
    str | None,
    typer.Option(help="Container image that holds this package.", rich_help_panel=CLUSTER),
]
Name = Annotated[
    str | None,
    typer.Option(help="Of the schedule; default: ldm-STAGE-RECIPE.", rich_help_panel=CLUSTER),
]
Namespace = Annotated[
    str | None, typer.Option(help="Of Kubernetes; default: default.", rich_help_panel=CLUSTER)
]
Pods = Annotated[
    int | None,
    typer.Option(
        "--workers",
        help="Pods beside Ray's head; default: the stage's workers.",
        rich_help_panel=CLUSTER,
    ),
]
Cpus = Annotated[
    float | None,
    typer.Option(help="Of each pod; default: a worker's.", rich_help_panel=CLUSTER),
]
Memory = Annotated[
    str | None, typer.Option(help="Of each pod; default: 8Gi.", rich_help_panel=CLUSTER)
]
Gpus = Annotated[
    int | None,
    typer.Option(help="Of each worker pod; default: a worker's.", rich_help_panel=CLUSTER),
]
Account = Annotated[
    str | None,
    typer.Option("--service-account", help="Of the pods.", rich_help_panel=CLUSTER),
]
EnvFrom = Annotated[
    str | None,
    typer.Option(
        metavar="SECRET",
        help="A Secret that is there, with AWS_* and MLFLOW_* for the pods.",
        rich_help_panel=CLUSTER,
    ),
]
SharedDisk = Annotated[
    str | None,
    typer.Option(
        metavar="CLAIM:PATH",
        help="A PersistentVolumeClaim for all pods; --data and --root may lie under PATH.",
        rich_help_panel=CLUSTER,
    ),
]
KubectlImage = Annotated[
    str | None,
    typer.Option(help="With --kind kubernetes: has kubectl and sh.", rich_help_panel=CLUSTER),
]


def schedule(
    stage: StageWord,
    cron: When,
    recipe: RecipeWord = DEFAULT_RECIPE,
    kind: KindWord = Kind.RAY,
    time_zone: Zone = "UTC",
    data: Data = None,
    root: Root = None,
    overrides: Overrides = None,
    image: Image = None,
    name: Name = None,
    namespace: Namespace = None,
    workers: Pods = None,
    cpus: Cpus = None,
    memory: Memory = None,
    gpus: Gpus = None,
    service_account: Account = None,
    env_from: EnvFrom = None,
    shared_disk: SharedDisk = None,
    kubectl_image: KubectlImage = None,
    runs: Runs = None,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Run a stage whenever its time comes, never twice at once.

    Example: ldm schedule encode image-s --cron "0 3 * * *" --image registry/ldm
    --data s3://b/pictures --root s3://b/run --env-from bucket --dry-run
    """
    flags = ("--verbose",) if verbose else ()
    arguments = Arguments(recipe, data, root, tuple(overrides or ()))
    task = Task(stage, arguments, Cron(cron, time_zone), flags)
    if kind is Kind.LOCAL:
        show_times(task) if dry_run else run_here(task, runs)
        return
    if runs is not None:
        raise UserError(f"--runs {runs} is for --kind local; a cluster goes on until it is told")
    asked = {
        "image": image,
        "name": name,
        "namespace": namespace,
        "workers": workers,
        "cpus": cpus,
        "memory": memory,
        "gpus": gpus,
        "service_account": service_account,
        "env_from": env_from,
        "kubectl_image": kubectl_image,
    }
    text = manifest(plan_cluster_job(task, asked, shared_disk), task.cron, kind)
    print(text, end="") if dry_run else apply(text)
