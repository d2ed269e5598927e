"""From nothing to an answered request: every stage in its order, then a page about all of it.

A stage that is up to date is left alone, so the second run shows the report again in seconds, and
a run after a change or a kill does only what is missing. Ray starts when the first stage has work.
"""

import contextlib
import json
import posixpath
import socket
import time
from collections.abc import Callable, Iterator

import ray

from ldm_core.files import exists, filesystem, join, read_bytes, read_json, write_bytes, write_json
from pipelines.ask_endpoint import Answer, ask
from pipelines.commands import command, shapes_command
from pipelines.distill_student import distill_student
from pipelines.encode_latents import encode
from pipelines.evaluate_model import evaluate
from pipelines.judged_pictures import made_of_shapes
from pipelines.make_shapes import make_shapes
from pipelines.recipes.schema import Recipe, ServeSection
from pipelines.report import write_report
from pipelines.serving.serve_model import EXAMPLE_PROMPT, curl_line, serve_in_background
from pipelines.stage import Options, Record, read_record
from pipelines.train_autoencoder import train_autoencoder
from pipelines.train_denoiser import train_denoiser

SEED = 7  # the one in `curl_line`
OURS = {"images", "captions.jsonl", "captions.jsonl.partial"}  # what `ldm shapes` writes

STAGES: tuple[tuple[str, str, Callable[[Recipe, Options], Record | None]], ...] = (
    ("autoencoder", "pixels to latents and back", train_autoencoder),
    ("encode", "pictures and captions to the latent store", encode),
    ("train", "the store to a teacher", train_denoiser),
    ("distill", "the teacher to a student of a few steps", distill_student),
    ("evaluate", "whether the pictures show what was asked for", evaluate),
)


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
        for number, (stage, title, run) in enumerate(STAGES, 2):
            _headline(number, title, command(recipe, stage))
            if stage == "evaluate" and not made_of_shapes(recipe):
                print("[evaluate] left out: its judge knows the shapes alone", flush=True)
                continue
            run(recipe, options)
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
    names = _names(recipe.data)
    captions = join(recipe.data, "captions.jsonl")
    lines = read_bytes(captions).splitlines() if "captions.jsonl" in names else []
    if names - OURS or (lines and "objects" not in json.loads(lines[0])):
        print(f"[shapes] none needed: {recipe.data} holds pictures of your own", flush=True)
    elif len(lines) == count:
        print(f"[shapes] up to date: {recipe.data} has {count} pictures", flush=True)
    else:
        make_shapes(recipe.data, count, recipe.size, recipe.seed)


def _names(folder: str) -> set[str]:
    """What lies directly in a folder or under a prefix; nothing if there is none."""
    fs, path = filesystem(folder)
    try:
        found = {each.rstrip("/") for each in fs.ls(path, detail=False)}
    except FileNotFoundError:
        return set()
    return {posixpath.basename(each) for each in found - {path.rstrip("/")}}


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
