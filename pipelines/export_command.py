"""`ldm export`: a trained model for others to read, or another average of it."""

from typing import Annotated, Literal

import typer

from pipelines.cli_options import Verbose


def export(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Model directory, s3:// URI, or models:/NAME@ALIAS."),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or s3:// prefix to write.")],
    average: Annotated[
        float | None,
        typer.Option(
            metavar="LENGTH",
            help="Weights averaged anew, over a length relative to training's, e.g. 0.07; "
            "of a model that was trained with train.ema_lengths.",
        ),
    ] = None,
    to: Annotated[
        Literal["diffusers", "ldm"] | None,
        typer.Option(help="Default: diffusers; with --average ldm, a model directory."),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Write a model in diffusers' layout, or with another average of its weights.

    Example: ldm export demo/teacher demo/averaged --average 0.07
    """
    from pipelines.export_model import export_model

    print("\n".join(export_model(model, out, average, to)))
