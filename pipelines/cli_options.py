"""The words that several commands take, each explained once."""

from typing import Annotated

import typer

from pipelines.quiet import quiet
from pipelines.recipes import RECIPES

DEFAULT_RECIPE = next(iter(RECIPES))


def _quiet_unless(verbose: bool) -> bool:
    if not verbose:
        quiet()
    return verbose


RecipeWord = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A recipe's name, or a JSON file made by `ldm show`."),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="URI",
        help="Captioned pictures or videos: a folder or s3:// prefix, .tar, manifest.",
    ),
]
Root = Annotated[
    str | None,
    typer.Option(metavar="URI", help="Folder or s3:// prefix of everything that is made."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a field of the recipe, e.g. train.steps=2000; repeatable.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Say what would be done and write nothing; encode measures a few files for it.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Run it again even if it is up to date.")]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        help="Show what the libraries say, and tracebacks.",
        callback=_quiet_unless,
        is_eager=True,  # before anything is imported
    ),
]
Model = Annotated[
    str, typer.Option(metavar="URI", help="Model directory, s3:// URI, or models:/NAME@ALIAS.")
]
