"""Under which run a training is shown: that of the model it starts from, or of its latents."""

from ldm_core.latents.store import StoreVersion
from pipelines.stage import read_record
from pipelines.tracking import Run
from pipelines.train_inputs import InitialModel


def tell_parents(run: Run, version: StoreVersion, initial: InitialModel | None) -> None:
    """Tag the run with those that made what it reads, and nest it under the nearest of them.

    `parent.initial` is the initial model's run, `parent.latents` the one that published the store
    version, or found it up to date. MLflow shows the run under the first of these that its server
    knows, by the tag `mlflow.parentRunId`.
    """
    found = {
        "parent.initial": initial.run if initial else None,
        "parent.latents": encode_run(version),
    }
    parents = {name: id for name, id in found.items() if id}
    run.tags(parents)
    for id in parents.values():
        if id != run.id and run.knows(id):
            run.nest_under(id)
            return


def encode_run(version: StoreVersion) -> str | None:
    """The run that made a store version; None if the store has a newer one by now."""
    record = read_record(version.store.uri)
    made_it = record is not None and record.summary.get("version") == version.number
    return record.run_id if record and made_it else None
