"""`ldm submit`: a stage as a Ray job on a cluster, followed to its end.

The recipe is resolved here, so that a mistake is found before anything is sent. Paths are made
absolute, because the job runs in a copy of the working directory: on more than one machine they
must be `s3://` URIs or on a disk that all machines share.
"""

import asyncio
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ldm_core.errors import UserError
from ldm_core.files import absolute, exists, is_remote
from pipelines.credentials import masked
from pipelines.exit_codes import INTERRUPTED, JobFailed
from pipelines.quiet import VARIABLES
from pipelines.ray_address import knock
from pipelines.recipe_options import Arguments
from pipelines.recipes.schema import Recipe
from pipelines.stages import STAGES

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
POLL_S = 2
AGENT_S = 60  # a cluster that has just started answers before it takes jobs
EXCLUDED = [".git", ".venv", "/demo", "mlruns", "*.db"]
FORWARDED = ("AWS_", "MLFLOW_")
# The rest of the forwarded variables is masked when shown.
SHOWN = frozenset(
    {"AWS_ALLOW_HTTP", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_REGION"}
    | {"AWS_REQUEST_CHECKSUM_CALCULATION", "MLFLOW_TRACKING_URI"}
)


@dataclass(frozen=True)
class Submission:
    """A job as Ray takes it.

    Attributes:
        address: of the cluster's dashboard.
        entrypoint: the command line it runs.
        runtime_env: working directory, variables and packages.
    """

    address: str
    entrypoint: str
    runtime_env: dict[str, Any]

    def command(self) -> str:
        """The same as a `ray job submit` line, with secrets masked."""
        variables = {name: _shown(name, value) for name, value in self._variables().items()}
        shown = {**self.runtime_env, "env_vars": variables}
        working_dir = shown.pop("working_dir")
        options = ["--address", self.address, "--working-dir", working_dir]
        words = ["ray", "job", "submit", *options, "--runtime-env-json", json.dumps(shown)]
        return f"{shlex.join(words)} -- {masked(self.entrypoint)}"

    def _variables(self) -> dict[str, str]:
        variables: dict[str, str] = self.runtime_env["env_vars"]
        return variables


def plan_submission(
    stage: str,
    arguments: Arguments,
    flags: Sequence[str] = (),
    address: str | None = None,
    working_dir: str = ".",
    pip: Sequence[str] = (),
) -> Submission:
    """Decide what to send, without sending it.

    Args:
        stage: name of one of STAGES.
        arguments: the recipe's words.
        flags: of the stage, e.g. "--force".
        address: of the dashboard; None takes RAY_ADDRESS if it is one, else this machine's.
        working_dir: sent to the cluster: the folder that holds `pipelines`.
        pip: packages the cluster installs for the job.

    Raises:
        UserError: no such stage, recipe or folder.
    """
    names = [each.name for each in STAGES]
    if stage not in names:
        raise UserError(f"no stage {stage} to submit; there are {', '.join(names)}")
    if not Path(working_dir).is_dir():
        raise UserError(f"--working-dir {working_dir} is no folder; name the project's")
    address = address or _address()
    recipe = arguments.resolve()
    words = replace(
        arguments,
        recipe=_recipe_word(arguments.recipe, working_dir),
        data=absolute(recipe.data),
        root=absolute(recipe.root),
        overrides=(*_shown_overrides(arguments), *_absolute_overrides(recipe)),
    ).words()
    runtime_env: dict[str, Any] = {
        "working_dir": str(Path(working_dir).absolute()),
        "excludes": [*EXCLUDED, *_own_folders(recipe, working_dir)],
        "env_vars": _forwarded(recipe),
    }
    if pip:
        runtime_env["pip"] = list(pip)
    entrypoint = shlex.join([_python(address), "-m", "pipelines.cli", stage, *words, *flags])
    return Submission(address, entrypoint, runtime_env)


def submit(submission: Submission, wait: bool = True) -> str:
    """Send the job, and unless told otherwise show its log until it ends; returns its id.

    Raises:
        UserError: no cluster at the address, or one that takes no jobs.
        JobFailed: the job failed or was stopped.
    """
    from ray.job_submission import JobSubmissionClient

    try:
        knock(submission.address)
        client = JobSubmissionClient(submission.address)
    except OSError as error:
        raise UserError(
            f"no Ray dashboard at {submission.address}; start one with `ray start --head`, or pass "
            "--address with another's"
        ) from error
    job = _send(client, submission)
    print(f"job {job} on {submission.address}", flush=True)
    if wait:
        _follow(client, job, submission.address)
    else:
        print(f"next: ray job logs --follow --address {submission.address} {job}", flush=True)
    return job


def _send(client: Any, submission: Submission) -> str:
    """Id of the job, once the cluster takes it."""
    patient_until = time.monotonic() + AGENT_S
    while True:
        try:
            job: str = client.submit_job(
                entrypoint=submission.entrypoint, runtime_env=submission.runtime_env
            )
            return job
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > patient_until:
                raise UserError(
                    f"the cluster at {submission.address} has had no agent to run a job for "
                    f"{AGENT_S} s; look at its nodes with `ray status`, and submit again"
                ) from error
        time.sleep(POLL_S)


def _follow(client: Any, job: str, address: str) -> None:
    async def show_log() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    try:
        try:
            asyncio.run(show_log())
        except RuntimeError as error:  # the connection, not the job
            print(f"\nthe log is lost ({error}); waiting for the job's end", flush=True)
        while not client.get_job_info(job).status.is_terminal():
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        print(f"\nthe job goes on; end it with: ray job stop --address {address} {job}", flush=True)
        raise SystemExit(INTERRUPTED) from None  # nothing that the same command would resume
    info = client.get_job_info(job)
    if info.status.value != "SUCCEEDED":
        reason = (info.message or "").partition(", last available logs")[0]  # they were shown
        raise JobFailed(f"job {job} is {info.status.value}: {reason}")


def _address() -> str:
    """RAY_ADDRESS where it names a dashboard: often it names the cluster's other port."""
    given = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS", "")
    return given if given.startswith("http") else DEFAULT_ADDRESS


def _forwarded(recipe: Recipe) -> dict[str, str]:
    """The user's own variables, not those this process set to keep libraries quiet."""
    variables = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(FORWARDED) and VARIABLES.get(name) != value
    }
    if recipe.tracking_uri:
        variables["MLFLOW_TRACKING_URI"] = recipe.tracking_uri
    return variables


def _shown_overrides(arguments: Arguments) -> list[str]:
    """The overrides without the tracking server's: it may hold a password, and Ray shows a job's
    command to everybody, so it goes as a variable."""
    return [each for each in arguments.overrides if not each.startswith("tracking_uri=")]


def _own_folders(recipe: Recipe, working_dir: str) -> list[str]:
    """Data and products that lie in the working directory, which are not to be sent with it."""
    sent = Path(working_dir).absolute()
    places = [Path(absolute(uri)) for uri in (recipe.data, recipe.root) if not is_remote(uri)]
    return [f"/{p.relative_to(sent)}" for p in places if sent in p.parents]


def _python(address: str) -> str:
    """A job on this machine gets this Python, wherever the cluster was started from."""
    here = urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1")
    return sys.executable if here else "python"


def _recipe_word(recipe: str, working_dir: str) -> str:
    """A recipe's file is sent along if it lies in the working directory."""
    if not recipe.endswith(".json") or is_remote(recipe):
        return recipe
    file, folder = Path(absolute(recipe)), Path(working_dir).absolute()
    return str(file.relative_to(folder)) if file.is_relative_to(folder) else str(file)


def _absolute_overrides(recipe: Recipe) -> list[str]:
    """Overrides for paths in the recipe that mean another place in the job's folder."""
    paths = {
        "autoencoder.source": recipe.autoencoder.source,
        "text.t5": recipe.text.t5,
        "text.clip": recipe.text.clip,
    }
    return [
        f"{key}={absolute(path)}"
        for key, path in paths.items()
        if path not in ("train", "identity", "tiny") and absolute(path) != path and exists(path)
    ]


def _shown(name: str, value: str) -> str:
    return masked(value) if name in SHOWN else "***"
