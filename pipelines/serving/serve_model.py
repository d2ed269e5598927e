"""Stage 6: `ldm serve` puts a model behind the endpoint and stays until Ctrl-C or SIGTERM."""

import contextlib
import errno
import json
import shlex
import signal
import socket
import threading
from collections.abc import Callable, Iterator

from ray import serve
from ray.serve.config import HTTPOptions

from ldm_core.errors import UserError
from ldm_core.files import absolute
from ldm_core.model_directory import read_config
from pipelines.model_registry import resolve_model
from pipelines.ray_runtime import ray_session
from pipelines.recipes.sections import ServeSection
from pipelines.serving.app import APP_NAME, ServeArgs, build_app
from pipelines.serving.web import GENERATIONS

EXAMPLE_PROMPT = "a large red circle in the center, white background"


def serve_forever(
    model_uri: str, section: ServeSection, name: str | None = None, verbose: bool = False
) -> None:
    """Serve a model until Ctrl-C or SIGTERM, answer what is running, and take the endpoint down.

    Raises:
        UserError: there is no such model, or the port is taken.
    """
    stop = threading.Event()
    with serve_in_background(model_uri, section, name, verbose) as url, _on_signals(stop):
        print(f"serving {model_uri}\n  page   {url}/\n  try    {curl_line(url)}", flush=True)
        print("  stop   Ctrl-C", flush=True)
        stop.wait()
        print("stopping when the running requests are answered", flush=True)


@contextlib.contextmanager
def serve_in_background(
    model_uri: str,
    section: ServeSection,
    name: str | None = None,
    verbose: bool = False,
    build: Callable[[ServeArgs], serve.Application] = build_app,
) -> Iterator[str]:
    """The endpoint for the length of a `with`; gives its base URL when it is ready for requests.

    Args:
        model_uri: model directory, `s3://` URI, or `models:/name@alias`.
        section: the recipe's settings of the endpoint.
        name: the id clients see; None takes the last part of the URI.
        verbose: show what Ray says.
        build: makes the application.

    Raises:
        UserError: there is no such model, or the port is taken.
    """
    args = ServeArgs(model=model_uri, name=name, **section.model_dump())
    check_model(model_uri)
    with ray_session(verbose):
        _check_port(section)
        serve.start(http_options=HTTPOptions(host=section.host, port=section.port))
        try:
            _deploy(build(args))
            yield _url(section)
            serve.delete(APP_NAME)  # waits for running requests, which `shutdown` would cut off
        finally:
            serve.shutdown()


def _deploy(app: serve.Application) -> None:
    try:
        serve.run(app, name=APP_NAME, route_prefix="/")
    except RuntimeError as error:  # says which deployment failed; why is in its status
        deployments = serve.status().applications[APP_NAME].deployments
        reasons = "\n".join(each.message for each in deployments.values() if each.message)
        raise RuntimeError(f"{error}\n{reasons}") from error


def curl_line(url: str, prompt: str = EXAMPLE_PROMPT, file: str = "picture.png") -> str:
    """A shell line that writes one picture to a file with nothing but curl and Python.

    Instead of the picture an error's text is shown, and the line fails.
    """
    body = shlex.quote(json.dumps({"prompt": prompt, "seed": 7}))
    decode = (
        "import base64,json,sys; answer = sys.stdin.read(); "
        '"b64_json" in answer or sys.exit(answer or 1); '
        'open(sys.argv[1], "wb").write(base64.b64decode(json.loads(answer)["data"][0]["b64_json"]))'
    )
    return (
        f"curl -sS --fail-with-body {url}{GENERATIONS}"
        f" -H 'Content-Type: application/json' -d {body}"
        f" | python3 -c {shlex.quote(decode)} {shlex.quote(file)}"
    )


def _url(section: ServeSection) -> str:
    host = "127.0.0.1" if section.host in ("0.0.0.0", "::") else section.host
    return f"http://{host}:{section.port}"


def check_model(uri: str) -> None:
    """Fail here in one line, not in a replica's log after Serve has tried three times.

    Raises:
        UserError: there is no such model, or something else.
    """
    read_config(absolute(resolve_model(uri)))


def _check_port(section: ServeSection) -> None:
    if serve.status().proxies:
        raise UserError(
            "Ray Serve already runs on this cluster; deploy beside it with "
            "ldm serve … --dry-run > serve.yaml && serve deploy serve.yaml"
        )
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((section.host, section.port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:  # other errors: the proxies are on other machines
                raise UserError(
                    f"{section.host}:{section.port} is taken by another program; stop it or "
                    "choose another port with --port"
                ) from error


@contextlib.contextmanager
def _on_signals(stop: threading.Event) -> Iterator[None]:
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stop.set()) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
