"""The line `ldm serve` prints, run by a shell against a server that answers as it is told."""

import base64
import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pipelines.serving.serve_model import curl_line

pytestmark = pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl")
PROMPT = "it's red"
REFUSAL = '{"error": {"message": "prompt: too red"}}'
Ask = Callable[[], "subprocess.CompletedProcess[str]"]


class Endpoint(HTTPServer):
    """Answers every request with `answer`."""

    answer = (200, "")
    asked = ""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.server.asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        status, body = self.server.answer
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def in_a_shell(line: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(line, shell=True, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def ask(endpoint: Endpoint, tmp_path: Path, monkeypatch) -> Ask:
    """Runs the line in an empty folder."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url = f"http://127.0.0.1:{endpoint.server_port}"
    return lambda: in_a_shell(curl_line(url, PROMPT, "my picture.png"), tmp_path)


def test_it_writes_the_picture(endpoint, ask, tmp_path):
    picture = base64.b64encode(b"a PNG").decode()
    endpoint.answer = (200, json.dumps({"data": [{"b64_json": picture}]}))
    done = ask()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads(endpoint.asked)["prompt"] == PROMPT
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        "my picture.png": b"a PNG"
    }


@pytest.mark.parametrize("answer", [(422, REFUSAL), (502, "<html>no JSON</html>")])
def test_it_shows_why_there_is_none(endpoint, ask, tmp_path, answer):
    endpoint.answer = answer
    done = ask()
    assert done.returncode != 0
    assert str(answer[0]) in done.stderr
    assert answer[1] in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_it_says_that_nobody_listens(tmp_path):
    done = in_a_shell(curl_line("http://127.0.0.1:1", PROMPT), tmp_path)
    assert done.returncode != 0
    assert "curl: (7)" in done.stderr
    assert "Traceback" not in done.stderr
