"""One MLflow run per stage, whatever its restarts, linked to its inputs.

MLflow is imported where it is used: every process of a training imports this module for what it
is sent, one of them logs, and MLflow takes a second.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_core.errors import UserError
from ldm_core.files import absolute, is_remote
from pipelines.credentials import masked
from pipelines.ray_address import knock
from pipelines.recipe_options import flattened
from pipelines.recipes.schema import Recipe

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
PARAM_LENGTH = 500  # of a parameter's value: servers before 2.8 refuse longer ones


def tracking_uri(recipe: Recipe) -> str:
    """The recipe's, else MLFLOW_TRACKING_URI, else sqlite beside the products.

    Raises:
        UserError: the workers of a cluster would not reach that sqlite.
    """
    chosen = _chosen(recipe)
    if not chosen and is_remote(recipe.root) and os.environ.get("RAY_ADDRESS"):
        raise UserError(
            f"root {recipe.root} with RAY_ADDRESS={os.environ['RAY_ADDRESS']} needs an MLflow "
            "server that the whole cluster reaches: set MLFLOW_TRACKING_URI, or "
            "--set tracking_uri=http://HOST:5000"
        )
    return chosen or f"sqlite:///{_local_folder(recipe)}/mlflow.db"


def _chosen(recipe: Recipe) -> str | None:
    chosen = recipe.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if chosen and chosen.startswith("sqlite:///"):  # workers run in folders of their own
        return f"sqlite:///{absolute(chosen.removeprefix('sqlite:///'))}"
    return chosen


def _local_folder(recipe: Recipe) -> Path:
    folder = Path(".") if is_remote(recipe.root) else Path(absolute(recipe.root))
    folder.mkdir(parents=True, exist_ok=True)
    return folder.absolute()


@dataclass(frozen=True)
class Run:
    """A handle on one MLflow run; picklable, so that a worker logs to the driver's run."""

    uri: str
    id: str

    @property
    def client(self) -> "MlflowClient":
        """A client of the run's tracking server."""
        return client_of(self.uri)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log numbers at a step, in one transaction."""
        numbers = {key: float(value) for key, value in values.items()}
        self.tell({"metrics": numbers, "step": step, "at": int(time.time() * 1000)})  # ms

    def params(self, values: Mapping[str, Any]) -> None:
        """Log settings. MLflow lets none be changed: a run gone on with keeps those it began with.

        They may differ only in what does not decide the result, such as the number of workers.
        """
        from mlflow.entities import Param

        known = self.client.get_run(self.id).data.params
        batch = [Param(key, _text(value)) for key, value in values.items() if key not in known]
        self.client.log_batch(self.id, params=batch)

    def tags(self, values: Mapping[str, Any]) -> None:
        """Tag the run."""
        self.tell({"tags": {key: str(value) for key, value in values.items()}})

    def tell(self, entry: Mapping[str, Any]) -> None:
        """Log what `metrics` or `tags` made of their values, at the time it was of.

        The same entry told twice is kept once where MLflow has a database.
        """
        from mlflow.entities import Metric, RunTag

        numbers, tags = entry.get("metrics", {}), entry.get("tags", {})
        batch = [Metric(key, each, entry["at"], entry["step"]) for key, each in numbers.items()]
        self.client.log_batch(self.id, metrics=batch, tags=[RunTag(*pair) for pair in tags.items()])

    def untold(self) -> list[Mapping[str, Any]]:
        """Entries that its server has not heard yet: of this kind of run none."""
        return []

    def refuses(self, error: Exception) -> bool:
        """Whether an entry is at fault, and would fail again every time: a name that MLflow takes
        for none, a run that was deleted.
        """
        from mlflow.exceptions import MlflowException, RestException

        if not isinstance(error, MlflowException):
            return False
        # not the 404 of what stands before a server that is away
        heard = isinstance(error, RestException) or not self.uri.startswith("http")
        status = error.get_http_status_code()
        return status == 400 or (status == 404 and heard)

    def image(self, picture: np.ndarray, key: str, step: int = 0) -> None:
        """Log a (H, W, 3) uint8 picture; the UI shows the steps of one key as a slider."""
        self.client.log_image(self.id, picture, key=key, step=step)

    def document(self, value: Any, name: str) -> None:
        """Log a JSON artifact."""
        self.client.log_dict(self.id, value, name)

    def file(self, path: Path | str, folder: str | None = None) -> None:
        """Log a local file as an artifact."""
        self.client.log_artifact(self.id, str(path), folder)

    def dataset(self, name: str, source: str, digest: str, context: str) -> None:
        """Say which data the run read: `context` is "training", "evaluation", …"""
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

        data = Dataset(name, digest, source_type="local", source=json.dumps({"uri": source}))
        entry = DatasetInput(data, [InputTag(MLFLOW_DATASET_CONTEXT, context)])
        self.client.log_inputs(self.id, datasets=[entry])

    def knows(self, other: str) -> bool:
        """Whether the server of this run has another one, and it is not deleted."""
        from mlflow.exceptions import MlflowException

        try:
            return bool(self.client.get_run(other).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return False
            raise

    def nest_under(self, other: str) -> None:
        """Have MLflow show this run as a child of another."""
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        self.tags({MLFLOW_PARENT_RUN_ID: other})


def load_sampler() -> Callable[[Run, str], Any]:
    """MLflow's sampler of a machine's load, of (run, name of the machine).

    What it publishes is in the run under `system/NAME/…`, numbered on from what is there.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    def sampler(run: Run, name: str) -> SystemMetricsMonitor:
        return SystemMetricsMonitor(run.id, resume_logging=True, node_id=name, tracking_uri=run.uri)

    return sampler


@contextmanager
def track(recipe: Recipe, stage: str, digest: str, product: str) -> Iterator[Run]:
    """The stage's run: the unfinished one of this product if a kill left one, else a new one.

    Raises:
        UserError: nothing listens where the tracking server is to be.

    Args:
        recipe: logged in full as `recipe.json`, but for passwords, and what the stage reads of it
            as parameters such as `train.steps`.
        stage: name of the stage, also the run's name.
        digest: of everything that decides the result.
        product: URI of what it makes: another root's run of the same digest is not this one's.
    """
    _check_server(tracking_uri(recipe))
    client = client_of(tracking_uri(recipe))
    experiment = _experiment(client, recipe)
    run = Run(tracking_uri(recipe), _open_run(client, experiment, stage, digest, product))
    values = json.loads(masked(recipe.model_dump_json()))
    run.document(values, "recipe.json")
    run.params(dict(flattened(_settings(values, stage))))
    try:
        yield run
    except BaseException:
        client.set_terminated(run.id, "FAILED")
        raise
    client.set_terminated(run.id, "FINISHED")


def _check_server(uri: str) -> None:
    """Refuse a tracking server where nothing listens: MLflow would try for minutes, unheard.

    Raises:
        UserError: it does not answer.
    """
    if not uri.startswith("http"):
        return
    try:
        knock(uri)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no MLflow server answers at {masked(uri)} ({error}): start it, name another with "
            "MLFLOW_TRACKING_URI or tracking_uri, or name none to use sqlite beside the products"
        ) from error


def client_of(uri: str | None) -> "MlflowClient":
    """A client of a tracking server."""
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _experiment(client: "MlflowClient", recipe: Recipe) -> str:
    """Its id; made if it is not there, also if another job makes it at this moment."""
    from mlflow.exceptions import MlflowException

    if experiment := client.get_experiment_by_name(recipe.experiment):
        return str(experiment.experiment_id)
    place, uri = None, tracking_uri(recipe)
    if uri.startswith("sqlite:///"):  # MLflow would take ./mlruns, wherever one happens to be
        place = str(Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlruns")
    try:
        return str(client.create_experiment(recipe.experiment, artifact_location=place))
    except MlflowException:
        experiment = client.get_experiment_by_name(recipe.experiment)
        if experiment is None:
            raise
        return str(experiment.experiment_id)


def _settings(values: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """A recipe without the sections of other stages; all of them read what `text` says."""
    mine = (stage, "text")
    return {k: value for k, value in values.items() if k in mine or not isinstance(value, dict)}


def _text(value: Any) -> str:
    """As `--set` takes it, cut to what every MLflow server stores."""
    return (value if isinstance(value, str) else json.dumps(value))[:PARAM_LENGTH]


def _open_run(
    client: "MlflowClient", experiment_id: str, stage: str, digest: str, product: str
) -> str:
    unfinished = client.search_runs(
        [experiment_id],
        f"tags.digest = '{digest}' and tags.stage = '{stage}' and attributes.status != 'FINISHED'",
    )
    for run in unfinished:  # compared here: a path may hold any quote the filter would end at
        if run.data.tags.get("product") == product:
            client.update_run(run.info.run_id, "RUNNING")
            return str(run.info.run_id)
    tags = {"digest": digest, "stage": stage, "product": product}
    return str(client.create_run(experiment_id, run_name=stage, tags=tags).info.run_id)
