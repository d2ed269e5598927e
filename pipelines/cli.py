"""The command line: `ldm <stage> RECIPE --set a.b=c`.

torch, Ray and MLflow take seconds to import. They are imported inside the commands, once the
user's words have been understood, so that help and a refused mistake take a moment.
"""

from typing import Annotated, Any

import typer

from pipelines.cli_options import (
    DEFAULT_RECIPE,
    Data,
    Force,
    Model,
    Overrides,
    RecipeWord,
    Root,
    Verbose,
)
from pipelines.exit_codes import Commands
from pipelines.export_command import export
from pipelines.recipe_options import Arguments
from pipelines.schedule_command import schedule
from pipelines.stage_commands import add_stages
from pipelines.store_command import store

app = typer.Typer(
    cls=Commands,
    help="Captioned pictures to a served few-step latent diffusion model, on Ray.\n\n"
    "Each stage reads what the one before it made under --root, and does nothing if its product "
    "is up to date. With RAY_ADDRESS set it runs on that cluster, else on this machine.",
    no_args_is_help=True,
    add_completion=False,
)
STAGES, MODELS, MORE = "Stages, in order", "Use a model", "More"


def main() -> None:
    """Entry point of `ldm`."""
    app(prog_name="ldm")


@app.command(rich_help_panel=STAGES)
def shapes(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or s3:// prefix to write.")],
    count: Annotated[int, typer.Option(help="Number of pictures.")] = 4096,
    size: Annotated[int, typer.Option(help="Side of a picture, pixels.")] = 64,
    seed: Annotated[int, typer.Option(help="Same seed, same pictures.")] = 0,
    verbose: Verbose = False,
) -> None:
    """Draw captioned pictures of shapes, where there are none yet.

    Example: ldm shapes demo/data --count 4096
    """
    from pipelines.make_shapes import make_shapes

    make_shapes(out, count, size, seed)
    print(f"{count} pictures in {out}")
    print(f"next: {Arguments(DEFAULT_RECIPE, data=out).command('autoencoder')}")


add_stages(app, STAGES)


@app.command(rich_help_panel=STAGES)
def demo(
    recipe: RecipeWord = DEFAULT_RECIPE,
    data: Data = None,
    root: Root = None,
    count: Annotated[int, typer.Option(help="Number of pictures to draw as data.")] = 4096,
    overrides: Overrides = None,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Run all of it, up to an answered request and a report.

    Example: ldm demo image-s --root demo --data demo/data
    """
    resolved = Arguments(recipe, data, root, tuple(overrides or ())).resolve()
    from pipelines.demo import run_demo
    from pipelines.stage import Options

    run_demo(resolved, Options(verbose=verbose, force=force), count)


@app.command(rich_help_panel=MODELS)
def sample(
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="What to draw; repeatable.")],
    out: Annotated[
        str, typer.Option(help="A .png file for all pictures, or a folder/ for one file each.")
    ] = "samples.png",
    count: Annotated[int, typer.Option(help="Pictures for each prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Of a prompt's first picture; then 1 more each.")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Steps from noise to picture; default: the model's.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale, 1 is none; default: the model's.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="Of a teacher, e.g. heun, dpmpp-2m; default: euler.")
    ] = None,
    eta: Annotated[
        float | None, typer.Option(help="The sampler's noise, 0 to 1; default: the sampler's.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, …; auto takes a GPU if any.")] = "auto",
    verbose: Verbose = False,
) -> None:
    """Draw pictures from prompts; each PNG says how it was made.

    Example: ldm sample --model demo/student
    --prompt "a large red circle in the center, white background"
    """
    from pipelines.sample_images import picture_requests, sample_images, sampler_choice

    choice = sampler_choice(sampler, eta)
    requests = picture_requests(prompt, count, seed, steps, guidance, choice)
    columns = count if len(prompt) > 1 else None
    print("\n".join(sample_images(model, requests, out, columns, device)))


@app.command(rich_help_panel=MODELS)
def serve(
    recipe: RecipeWord = DEFAULT_RECIPE,
    model: Annotated[
        str | None,
        typer.Option(metavar="URI", help="Model to serve; default: the recipe's student."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    data: Data = None,
    root: Root = None,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the YAML for `serve deploy`; start nothing.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Put a model behind an HTTP endpoint, until Ctrl-C.

    Example: ldm serve image-s --root demo --port 8000

    On a cluster: ldm serve --model s3://bucket/student --dry-run > serve.yaml
    and then: serve deploy serve.yaml
    """
    given = {"serve.host": host, "serve.port": port}
    sets = [f"{key}={value}" for key, value in given.items() if value is not None]
    resolved = Arguments(recipe, data, root, (*(overrides or ()), *sets)).resolve()
    uri = model or resolved.product("student")
    if dry_run:
        print(_serve_yaml(uri, resolved.serve.model_dump(), name), end="")
        return
    from pipelines.serving.serve_model import serve_forever

    serve_forever(uri, resolved.serve, name, verbose)


app.command(rich_help_panel=MODELS)(export)


def _serve_yaml(model: str, section: dict[str, Any], name: str | None) -> str:
    import yaml

    from pipelines.serving.app import ServeArgs, serve_config
    from pipelines.serving.serve_model import check_model

    check_model(model)
    config = serve_config(ServeArgs(model=model, name=name, **section))
    return str(yaml.safe_dump(config, sort_keys=False))


@app.command(rich_help_panel=MORE)
def show(
    what: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="Or a JSON file, a model, or a latent store."),
    ] = None,
    data: Data = None,
    root: Root = None,
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Print a recipe as JSON; without RECIPE, list them all.

    Example: ldm show image-s > my.json, then ldm train my.json
    """
    from pipelines import show as shown

    if what is None:
        print(shown.list_recipes())
    else:
        print(shown.show(Arguments(what, data, root, tuple(overrides or ()))))


@app.command(rich_help_panel=MORE)
def submit(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="The stage to run, e.g. encode.")],
    recipe: RecipeWord = DEFAULT_RECIPE,
    data: Data = None,
    root: Root = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(help="The cluster's dashboard; default: RAY_ADDRESS, or this machine's."),
    ] = None,
    working_dir: Annotated[str, typer.Option(help="The folder to send: the project's.")] = ".",
    pip: Annotated[
        list[str] | None, typer.Option(help="A package the job needs installed; repeatable.")
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Leave once it is sent.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the `ray job submit` line; send nothing.")
    ] = False,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Run a stage as a job on a Ray cluster and follow its log.

    AWS_* and MLFLOW_* variables go with it.
    Use s3:// URIs, or folders on a disk that all the cluster's machines share.

    Example: ldm submit encode image-s --data s3://b/pictures --root s3://b/run
    """
    from pipelines.submit_job import plan_submission
    from pipelines.submit_job import submit as send

    flags = [word for word, on in (("--force", force), ("--verbose", verbose)) if on]
    arguments = Arguments(recipe, data, root, tuple(overrides or ()))
    submission = plan_submission(stage, arguments, flags, address, working_dir, pip or ())
    print(submission.command(), flush=True)
    if not dry_run:
        send(submission, wait=not no_wait)


app.command(rich_help_panel=MORE)(store)
app.command(rich_help_panel=MORE)(schedule)


if __name__ == "__main__":
    main()
