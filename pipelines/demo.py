"""From nothing to an answered request: every stage in its order, then a page about all of it.

A stage that is up to date is left alone, so the second run shows the report again in seconds, and
a run after a change or a kill does only what is missing. Ray starts when the first stage has work.
"""

import contextlib
import socket
import time
from collections.abc import Iterator

import ray

from ldm_core.files import exists, read_json, write_bytes, write_json
from pipelines.ask_endpoint import Answer, ask
from pipelines.commands import command, shapes_command
from pipelines.judged_pictures import made_of_shapes
from pipelines.make_shapes import holds_other_pictures, make_shapes
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import ServeSection
from pipelines.report import write_report
from pipelines.serving.serve_model import EXAMPLE_PROMPT, curl_line, serve_in_background
from pipelines.stage import Options, read_record
from pipelines.stages import STAGES

SEED = 7  # the one in `curl_line`


def run_demo(recipe: Recipe, options: Options, count: int) -> None:
    """Run all stages, ask the served student for one picture, and write `report.html`.

    Args:
        recipe: its data folder is filled with shapes unless it holds other pictures.
        options: verbose; force makes every product again.
        count: pictures of shapes.
    """
    start = time.monotonic()
    with _ray_until_the_end():
        _headline(1, "captioned pictures", shapes_command(recipe, count))
        _make_pictures(recipe, count)
        for number, stage in enumerate(STAGES, 2):
            _headline(number, stage.title, command(recipe, stage.name))
            if stage.name == "evaluate" and not made_of_shapes(recipe):
                print("[evaluate] left out: its judge knows the shapes alone", flush=True)
                continue
            stage.load()(recipe, options)
        _headline(len(STAGES) + 2, "one request to the endpoint", command(recipe, "serve"))
        _ask_student(recipe, options)
    report = write_report(recipe)
    print(f"\nall done in {time.monotonic() - start:.0f}s: {report}", flush=True)
    print(f"next: {command(recipe, 'serve')}", flush=True)


@contextlib.contextmanager
def _ray_until_the_end() -> Iterator[None]:
    """One Ray for all stages: each would start it, and what they started is shut down once."""
    mine = not ray.is_initialized()
    try:
        yield
    finally:
        if mine:
            ray.shutdown()


def _headline(number: int, title: str, line: str) -> None:
    print(f"\n{number}. {title}\n   $ {line}", flush=True)


def _make_pictures(recipe: Recipe, count: int) -> None:
    """Write the shapes, unless they are there or the folder holds pictures of the user's."""
    if holds_other_pictures(recipe.data):
        print(f"[shapes] none needed: {recipe.data} holds pictures of your own", flush=True)
    else:
        make_shapes(recipe.data, count, recipe.size, recipe.seed)


def _ask_student(recipe: Recipe, options: Options) -> None:
    """Serve the student, draw one picture over HTTP, and keep it with how it was asked for."""
    uri = recipe.product("answer.json")
    student = read_record(recipe.product("student"))
    assert student is not None  # it was made a moment ago
    known = Answer.model_validate(read_json(uri)).model_digest if exists(uri) else None
    if known == student.summary["digest"] and not options.force:
        print(f"[serve] up to date: {uri} is this student's answer", flush=True)
        return
    section = _with_free_port(recipe.serve)
    model = recipe.product("student")
    with serve_in_background(model, section, verbose=options.verbose) as url:
        line = curl_line(url)
        print(f"[serve] {url} is ready\n   $ {line}", flush=True)
        picture, answer = ask(url, EXAMPLE_PROMPT, SEED, line)
    write_bytes(recipe.product("answer.png"), picture)
    write_json(uri, answer.model_dump(mode="json"))
    place = recipe.product("answer.png")
    print(f"[serve] answered in {answer.seconds:.2f}s: {place}", flush=True)


def _with_free_port(section: ServeSection) -> ServeSection:
    """The endpoint's settings, on another port if theirs is taken."""
    for port in (section.port, 0):
        with contextlib.closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((section.host, port))
                return section.model_copy(update={"port": probe.getsockname()[1]})
    return section  # not an address of this machine: the proxies run elsewhere
