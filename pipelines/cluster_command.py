"""A stage's shell line for a cluster: every place in it is one that pods see, none is a secret."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ldm_core.errors import UserError
from ldm_core.files import absolute, is_remote
from pipelines.credentials import masked
from pipelines.kubernetes_manifests import Disk
from pipelines.recipe_options import Arguments
from pipelines.recipes.schema import Recipe


def stage_words(
    python: str, stage: str, arguments: Arguments, flags: Sequence[str] = ()
) -> list[str]:
    """The words that run a stage in a process of its own."""
    return [python, "-m", "pipelines.cli", stage, *arguments.words(), *flags]


def cluster_command(
    stage: str, arguments: Arguments, flags: Sequence[str], disk: Disk | None
) -> str:
    """The line that does in a pod what the stage would do here.

    Args:
        stage: the stage's name.
        arguments: the recipe's words.
        flags: of the stage, e.g. "--verbose".
        disk: that all pods mount; without it, every place has to be a URI.

    Raises:
        UserError: the recipe is wrong, a place of it is on this machine, or a password is in it.
    """
    recipe = arguments.resolve()
    located = recipe.located()
    sources, given = _sources(located), _sources(recipe)
    file = arguments.recipe
    word = absolute(file) if file.endswith(".json") else file
    places = {"the recipe": word, "data": located.data, "root": located.root, **sources}
    for name, place in places.items():
        _check_place(name, place, disk)
    moved = (f"{name}={place}" for name, place in sources.items() if place != given[name])
    overrides = (*arguments.overrides, *moved)
    seen = replace(
        arguments, recipe=word, data=located.data, root=located.root, overrides=overrides
    )
    words = stage_words("python", stage, seen, flags)
    _check_secrets(words)
    return shlex.join(words)


def read_disk(shared: str | None) -> Disk | None:
    """The disk that "CLAIM:PATH" names.

    Raises:
        UserError: it names none.
    """
    if shared is None:
        return None
    claim, _, path = shared.partition(":")
    if not claim or not path.startswith("/"):
        raise UserError(
            f"--shared-disk {shared} is not CLAIM:PATH; write the PersistentVolumeClaim's name and "
            "where pods mount it, e.g. pictures:/mnt/pictures"
        )
    return Disk(claim=claim, path=path)


def _sources(recipe: Recipe) -> dict[str, str]:
    """The fields of the recipe's sections that may name a folder."""
    return {
        "autoencoder.source": recipe.autoencoder.source,
        "text.t5": recipe.text.t5,
        "text.clip": recipe.text.clip,
    }


def _check_place(name: str, place: str, disk: Disk | None) -> None:
    """Pods see object stores and the disk they share, not this machine."""
    if is_remote(place) or not Path(place).is_absolute():
        return
    if disk is None:
        raise UserError(
            f"{name}: {place} is on this machine, which a cluster's pods do not see; take an "
            "s3:// URI, or a disk they share with --shared-disk CLAIM:PATH"
        )
    if not Path(place).is_relative_to(disk.path):
        raise UserError(
            f"{name}: {place} is not under {disk.path}, where --shared-disk mounts {disk.claim}"
        )


def _check_secrets(words: Sequence[str]) -> None:
    """A job's command can be read by everybody who may look at the job."""
    for word in words:
        if masked(word) != word:
            raise UserError(
                f"{masked(word)} holds a password, and a job's command is no secret; put it into "
                "the Secret of --env-from, e.g. as MLFLOW_TRACKING_URI"
            )
