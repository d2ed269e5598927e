"""The commands of the stages: they take the same words and differ in what they run."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

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
from pipelines.stages import STAGES, Stage

if TYPE_CHECKING:
    from pipelines.stage import Options

Command = Callable[..., None]


def add_stages(app: typer.Typer, panel: str) -> None:
    """Add the commands in the order of the stages; `panel` is their heading in the help."""
    for stage in STAGES:
        text = f"{stage.text}\n\nExample: ldm {stage.name} {DEFAULT_RECIPE} --root demo"
        make = {"encode": _encode_command, "train": _train_command}.get(stage.name, _stage_command)
        app.command(stage.name, help=text, rich_help_panel=panel)(make(stage))


def _stage_command(stage: Stage) -> Command:
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
        from pipelines.stage import Options

        arguments = Arguments(recipe, data, root, tuple(overrides or ()))
        _run(stage, arguments, Options(verbose, force, dry_run))

    return command


def _encode_command(stage: Stage) -> Command:
    """The command of the one stage that has rejects."""

    def command(
        recipe: RecipeWord = DEFAULT_RECIPE,
        data: Data = None,
        root: Root = None,
        overrides: Overrides = None,
        dry_run: DryRun = False,
        force: Force = False,
        retry_rejects: Annotated[
            bool, typer.Option("--retry-rejects", help="Try what was rejected again.")
        ] = False,
        verbose: Verbose = False,
    ) -> None:
        from pipelines.stage import Options

        arguments = Arguments(recipe, data, root, tuple(overrides or ()))
        _run(stage, arguments, Options(verbose, force or retry_rejects, dry_run, retry_rejects))

    return command


def _train_command(stage: Stage) -> Command:
    """The command of the one stage that is planned."""

    def command(
        recipe: RecipeWord = DEFAULT_RECIPE,
        data: Data = None,
        root: Root = None,
        overrides: Overrides = None,
        dry_run: DryRun = False,
        accelerator: Annotated[
            str | None,
            typer.Option(help="What the workers have, e.g. H100-80: a layout must fit it."),
        ] = None,
        force: Force = False,
        verbose: Verbose = False,
    ) -> None:
        from pipelines.stage import Options

        named = [f"train.accelerator={accelerator}"] if accelerator else []
        arguments = Arguments(recipe, data, root, (*(overrides or ()), *named))
        _run(stage, arguments, Options(verbose, force, dry_run))

    return command


def _run(stage: Stage, arguments: Arguments, options: "Options") -> None:
    resolved = arguments.resolve()
    run = stage.load()
    from pipelines.preview import preview

    if options.dry_run:
        preview(stage.name, resolved)
    run(resolved, options)
    if not options.dry_run:
        shown = replace(arguments, overrides=tuple(map(masked, arguments.overrides)))
        print(f"next: {shown.command(_next(stage.next, resolved))}", flush=True)


def _next(name: str, recipe: Recipe) -> str:
    """The stage to run next: only shapes can be evaluated."""
    if name != "evaluate":
        return name
    from pipelines.judged_pictures import made_of_shapes

    return name if made_of_shapes(recipe) else "serve"
