"""The commands of the stages: they take the same words and differ in what they run."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from pipelines.cli_options import (
    DEFAULT_RECIPE,
    Data,
    DryRun,
    Force,
    Overrides,
    RecipeWord,
    Root,
    Verbose,
)
from pipelines.credentials import masked
from pipelines.recipe_options import Arguments
from pipelines.recipes.schema import Recipe

if TYPE_CHECKING:
    from pipelines.stage import StageFunction

Command = Callable[..., None]

# Each imports its stage, which takes seconds, only when it is called


def _train_autoencoder() -> "StageFunction":
    from pipelines.train_autoencoder import train_autoencoder

    return train_autoencoder


def _encode() -> "StageFunction":
    from pipelines.encode_latents import encode

    return encode


def _train_denoiser() -> "StageFunction":
    from pipelines.train_denoiser import train_denoiser

    return train_denoiser


def _distill_student() -> "StageFunction":
    from pipelines.distill_student import distill_student

    return distill_student


def _evaluate() -> "StageFunction":
    from pipelines.evaluate_model import evaluate

    return evaluate


# Name, what imports it, the command to run next, and help
_STAGES: tuple[tuple[str, Callable[[], "StageFunction"], str, str], ...] = (
    (
        "autoencoder",
        _train_autoencoder,
        "encode",
        "Train the autoencoder, pixels to latents, on the pictures.",
    ),
    (
        "encode",
        _encode,
        "train",
        "Encode new and changed pictures into the latent store.",
    ),
    (
        "train",
        _train_denoiser,
        "distill",
        "Train the teacher on the newest version of the latent store.",
    ),
    (
        "distill",
        _distill_student,
        "evaluate",
        "Distil the teacher into a student that draws in a few steps.",
    ),
    (
        "evaluate",
        _evaluate,
        "serve",
        "Count how often teacher and student draw what the captions say.",
    ),
)


def add_stages(app: typer.Typer, panel: str) -> None:
    """Add the commands in the order of the stages; `panel` is their heading in the help."""
    for name, load, next_name, text in _STAGES:
        text = f"{text}\n\nExample: ldm {name} {DEFAULT_RECIPE} --root demo"
        app.command(name, help=text, rich_help_panel=panel)(_stage_command(name, load, next_name))


def _stage_command(name: str, load: Callable[[], "StageFunction"], next_name: str) -> Command:
    """The command of one stage."""

    def command(
        recipe: RecipeWord = DEFAULT_RECIPE,
        data: Data = None,
        root: Root = None,
        overrides: Overrides = None,
        dry_run: DryRun = False,
        force: Force = False,
        verbose: Verbose = False,
    ) -> None:
        arguments = Arguments(recipe, data, root, tuple(overrides or ()))
        resolved = arguments.resolve()
        run = load()
        from pipelines.preview import preview
        from pipelines.stage import Options

        if dry_run:
            preview(name, resolved)
        run(resolved, Options(verbose, force, dry_run))
        if not dry_run:
            shown = Arguments(recipe, data, root, tuple(map(masked, arguments.overrides)))
            print(f"next: {shown.command(_next(next_name, resolved))}", flush=True)

    return command


def _next(name: str, recipe: Recipe) -> str:
    """The stage to run next: only shapes can be evaluated."""
    if name != "evaluate":
        return name
    from pipelines.judged_pictures import made_of_shapes

    return name if made_of_shapes(recipe) else "serve"
