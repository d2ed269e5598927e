"""One request to a served model, as any HTTP client would send it, and a record of the answer."""

import base64
import json
import time
import urllib.request

from pydantic import BaseModel

from pipelines.serving.web import GENERATIONS

TIMEOUT_S = 120


class Answer(BaseModel):
    """What was asked, by which shell line, and how it was answered; `answer.png` lies beside it."""

    model: str
    model_digest: str
    prompt: str
    seed: int
    steps: int
    size: str
    seconds: float
    curl: str


def ask(url: str, prompt: str, seed: int, curl: str) -> tuple[bytes, Answer]:
    """Send one request to the endpoint at `url`; returns the PNG and the record.

    Args:
        url: base URL of the endpoint.
        prompt: of the picture.
        seed: of its noise.
        curl: shell line that sends the same request, for the record.
    """
    body = json.dumps({"prompt": prompt, "seed": seed}).encode()
    request = urllib.request.Request(
        url + GENERATIONS, body, headers={"Content-Type": "application/json"}
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is our own server
    begin = time.monotonic()
    with direct.open(request, timeout=TIMEOUT_S) as response:
        answer = json.load(response)
    seconds = time.monotonic() - begin
    record = Answer(
        model=answer["model"],
        model_digest=answer["model_digest"],
        prompt=prompt,
        seed=answer["data"][0]["seed"],
        steps=answer["steps"],
        size=answer["size"],
        seconds=seconds,
        curl=curl,
    )
    return base64.b64decode(answer["data"][0]["b64_json"]), record
