"""MLflow's registry of models: versions of a name, each with the digest of what it was."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ldm_core.errors import UserError
from ldm_core.files import absolute, exists, join
from ldm_core.model_directory import load_model
from pipelines.credentials import masked
from pipelines.tracking import Run, client_of

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def register_model(
    run: Run,
    name: str,
    uri: str,
    digest: str,
    alias: str | None,
    tags: Mapping[str, str] | None = None,
) -> str:
    """Register the model directory at `uri` as the next version of `name`, perhaps under an alias.

    The version is tagged with the model's digest: the next model is written to the same folder.
    """
    from mlflow.exceptions import MlflowException

    try:
        run.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = run.client.create_model_version(
        name, source=absolute(uri), run_id=run.id, tags={"digest": digest, **(tags or {})}
    )
    if alias:
        run.client.set_registered_model_alias(name, alias, version.version)
    return str(version.version)


def named_version(run: Run, name: str, alias: str) -> "ModelVersion | None":
    """The version of a registered model under an alias; None if there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return run.client.get_model_version_by_alias(name, alias)
    except MlflowException as error:  # no such model; no such alias
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def resolve_model(uri: str, registry: str | None = None) -> str:
    """`models:/name@alias` or `models:/name/3` to the model directory's URI; others unchanged.

    Raises:
        UserError: the registry knows no such model, version or alias, or its folder now holds
            another model.
    """
    if not uri.startswith("models:/"):
        return uri
    from mlflow.exceptions import MlflowException

    named = map(os.environ.get, ("MLFLOW_REGISTRY_URI", "MLFLOW_TRACKING_URI"))
    registry = registry or next(filter(None, named), None)
    if not registry:  # MLflow would look into ./mlflow.db, and make an empty one
        raise UserError(
            f"{uri} is a name in a model registry, and MLFLOW_TRACKING_URI does not say which: set "
            "it, e.g. to sqlite:///PATH/OF/ROOT/mlflow.db, or pass the model's folder"
        )
    client = client_of(registry)
    name = uri.removeprefix("models:/")
    try:
        if "@" in name:
            model, alias = name.split("@", 1)
            found = client.get_model_version_by_alias(model, alias)
        else:
            model, version = name.split("/", 1)
            found = client.get_model_version(model, version)
    except (MlflowException, ValueError) as error:
        raise UserError(
            masked(f"the registry {client.tracking_uri} has no {uri} ({error}); ")
            + "set MLFLOW_TRACKING_URI to the one that does, or pass the model's folder"
        ) from error
    _check_folder(uri, str(found.source), found.tags.get("digest"))
    return str(found.source)


def _check_folder(uri: str, folder: str, digest: str | None) -> None:
    """Refuse a version whose folder now holds other weights, finished and registered or not."""
    if digest is None or not exists(join(folder, "config.json")):
        return  # registered by others, or gone, which loading it will say
    there = load_model(folder)[2]
    if digest != there:
        raise UserError(
            f"{uri} is the model {digest}, but {folder} now holds {there}: name the version "
            "registered last, or put the old model back"
        )
