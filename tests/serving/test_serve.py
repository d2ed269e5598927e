"""The endpoint over HTTP on a real Ray Serve, with a generator that needs no model."""

import base64
import contextlib
import io
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import fake_generator
import httpx
import pytest
from fake_generator import FakeGenerator, drawn
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from ray import cloudpickle
from ray.serve.schema import ServeDeploySchema
from tiny_project import IDENTITY, model_config

from ldm_core.errors import UserError
from pipelines.recipes.sections import ServeSection
from pipelines.serving.app import ServeArgs, application, serve_config
from pipelines.serving.serve_model import curl_line, serve_in_background

pytestmark = pytest.mark.ray
cloudpickle.register_pickle_by_value(fake_generator)  # replicas do not have tests/ on their path


GENERATIONS = "/v1/images/generations"
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Endpoint:
    """The server, its model's folder, and a client with room for all the threads of a test."""

    client: httpx.Client
    folder: Path
    stop: Callable[[], None]

    def post(self, timeout: float = 30, **body) -> httpx.Response:
        return self.client.post(GENERATIONS, json=body, timeout=timeout)

    def together(self, prompts: list[str]) -> list[httpx.Response]:
        """The answers to requests sent at once, each with its index as the seed."""
        start = threading.Barrier(len(prompts))

        def one(index: int) -> httpx.Response:
            start.wait()
            return self.post(prompt=prompts[index], seed=index)

        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(one, range(len(prompts))))

    def samples(self) -> Counter[str]:
        """The metrics, as name{label value} -> number."""
        text = self.client.get("/metrics").text
        return Counter(
            {
                " ".join([sample.name, *sample.labels.values()]): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }
        )


@pytest.fixture(scope="module")
def endpoint(ray_session, tmp_path_factory):
    """One replica, batches of 4, and a queue of 4 beside the 8 pictures it holds."""
    folder = tmp_path_factory.mktemp("student")
    config = model_config({"t5": IDENTITY, "clip": IDENTITY}, "student")
    (folder / "config.json").write_text(config.model_dump_json())
    (folder / "batches.jsonl").touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    section = ServeSection(
        port=port, max_replicas=1, max_batch_size=4, max_pictures=8, max_queued_pictures=4
    )
    with contextlib.ExitStack() as server:
        url = server.enter_context(
            serve_in_background(
                str(folder), section, "fake", build=lambda args: application(args, FakeGenerator)
            )
        )
        with httpx.Client(base_url=url, timeout=30) as client:
            yield Endpoint(client, folder, server.close)


def pngs(response: httpx.Response) -> list[bytes]:
    assert response.status_code == 200, response.text
    return [base64.b64decode(picture["b64_json"]) for picture in response.json()["data"]]


def test_a_request_returns_its_pictures(endpoint):
    response = endpoint.post(prompt="a red circle", n=3, seed=11)
    answer = response.json()
    assert [picture["seed"] for picture in answer["data"]] == [11, 12, 13]
    assert (answer["model"], answer["model_digest"]) == ("fake", FakeGenerator.digest)
    assert (answer["steps"], answer["guidance_scale"], answer["size"]) == (4, 1.0, "32x32")
    images = [Image.open(io.BytesIO(png)) for png in pngs(response)]
    assert [(image.format, image.size) for image in images] == [("PNG", (32, 32))] * 3
    assert len({image.tobytes() for image in images}) == 3


def test_the_png_says_how_to_make_it_again(endpoint):
    (png,) = pngs(endpoint.post(prompt="a red circle", seed=11))
    text = json.dumps(Image.open(io.BytesIO(png)).text)
    assert all(part in text for part in ("a red circle", "11", FakeGenerator.digest))


def test_a_seed_the_server_chose_makes_the_picture_again(endpoint):
    first = endpoint.post(prompt="a red circle")
    again = endpoint.post(prompt="a red circle", seed=first.json()["data"][0]["seed"])
    assert pngs(first) == pngs(again)


def test_batches_form_and_a_picture_is_the_same_in_company(endpoint):
    alone = [pngs(endpoint.post(prompt="a circle", seed=seed)) for seed in range(8)]
    before = endpoint.samples()
    assert [pngs(response) for response in endpoint.together(["a circle"] * 8)] == alone
    new = endpoint.samples() - before
    assert new["ldm_batch_size_count"] == 8
    assert new["ldm_batch_size_sum"] / new["ldm_batch_size_count"] > 1.5


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"prompt": ""}, 422, "prompt"),
        ({"prompt": "x", "n": 9}, 422, "n"),
        ({"prompt": "x", "size": "64x64"}, 422, "size"),
        ({"prompt": "x", "quality": "hd"}, 422, "quality"),
        ({"prompt": "x", "model": "other"}, 404, "model"),
        ({"prompt": "x", "guidance_scale": 3.0}, 422, None),  # the model's own refusal
        (["no", "object"], 422, None),
    ],
)
def test_refusals_have_openais_shape(endpoint, body, status, param):
    response = endpoint.client.post(GENERATIONS, json=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert param is None or error["message"].startswith(f"{param}: ")


def test_what_is_no_json_and_what_is_no_route(endpoint):
    broken = endpoint.client.post(GENERATIONS, content=b"{", headers=JSON)
    form = endpoint.client.post(GENERATIONS, data={"prompt": "x"})
    assert broken.status_code == 422
    assert "no JSON" in broken.json()["error"]["message"]
    assert form.status_code == 422
    assert "Content-Type: application/json" in form.json()["error"]["message"]
    assert "/v1/nothing" in endpoint.client.get("/v1/nothing").json()["error"]["message"]


def test_a_bug_is_a_plain_500_and_the_replica_lives(endpoint):
    response = endpoint.post(prompt="a bug")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "fire" not in response.text
    assert endpoint.post(prompt="no bug").status_code == 200


def test_the_other_routes_answer(endpoint):
    assert endpoint.client.get("/health").json() == {"status": "ok"}
    (model,) = endpoint.client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["default_steps"]) == ("fake", "model", 4)
    assert (model["max_pictures"], model["lineage"]) == (8, FakeGenerator.lineage)
    page = endpoint.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "data-prompts" in page.text
    assert endpoint.client.get("/docs").status_code == 200
    assert endpoint.samples()["ldm_requests_total 200"] >= 1


def test_overload_is_429_with_retry_after_and_nothing_is_lost(endpoint):
    before = endpoint.samples()
    prompts = [f"slow {index}" for index in range(30)]
    responses = dict(zip(prompts, endpoint.together(prompts), strict=True))
    answered = [prompt for prompt, response in responses.items() if response.status_code == 200]
    refused = [response for response in responses.values() if response.status_code == 429]
    assert len(answered) + len(refused) == 30
    assert len(answered) >= 4
    assert refused
    assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
    assert {response.json()["error"]["code"] for response in refused} == {"queue_full"}
    # exactly what was answered was drawn, and the metrics tell the same story
    assert sorted(set(drawn(endpoint.folder)) & set(prompts)) == sorted(answered)
    after = endpoint.samples()
    assert (after - before)["ldm_requests_total 200"] == len(answered)
    assert (after - before)["ldm_requests_total 429"] == len(refused)
    assert after["ldm_requests_open"] == 0


def test_the_queue_is_counted_in_pictures(endpoint):
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(endpoint.post, prompt="slow, eight of them", n=8)
        while "slow, eight of them" not in drawn(endpoint.folder):
            time.sleep(0.01)
        assert endpoint.post(prompt="five more", n=5).status_code == 429
        assert endpoint.post(prompt="four more", n=4).status_code == 200
        assert busy.result().status_code == 200
    assert "five more" not in drawn(endpoint.folder)


def test_a_client_that_leaves_takes_its_waiting_request_along(endpoint):
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(endpoint.post, prompt="slow and stays", n=4)
        while "slow and stays" not in drawn(endpoint.folder):
            time.sleep(0.01)
        with pytest.raises(httpx.ReadTimeout):
            endpoint.post(timeout=0.1, prompt="leaves")
        assert busy.result().status_code == 200
    assert endpoint.post(prompt="comes after").status_code == 200
    assert "comes after" in drawn(endpoint.folder)
    assert "leaves" not in drawn(endpoint.folder)
    assert endpoint.samples()["ldm_requests_total 499"] == 1


def test_a_second_endpoint_is_refused(endpoint):
    section = ServeSection(port=endpoint.client.base_url.port)
    with (
        pytest.raises(UserError, match="already runs"),
        serve_in_background(str(endpoint.folder), section),
    ):
        pass


def test_what_runs_when_it_stops_is_answered(endpoint):
    """After all others that need the endpoint."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(endpoint.post, prompt="slow, the last")
        while "slow, the last" not in drawn(endpoint.folder):
            time.sleep(0.01)
        endpoint.stop()
        assert len(pngs(running.result())) == 1


def test_no_model_is_a_users_mistake(tmp_path):
    with (
        pytest.raises(UserError, match=r"config\.json"),
        serve_in_background(str(tmp_path / "nothing"), ServeSection()),
    ):
        pass


def test_the_declarative_config_is_serves_own(tmp_path):
    args = ServeArgs(model=str(tmp_path / "student"), host="0.0.0.0", port=9000, max_replicas=3)
    config = serve_config(args)
    schema = ServeDeploySchema.model_validate(json.loads(json.dumps(config)))
    assert (schema.http_options.host, schema.http_options.port) == ("0.0.0.0", 9000)
    (app,) = schema.applications
    assert ServeArgs.model_validate(app.args).model_id == "student"
    sampler = next(each for each in app.deployments if each.name == "Sampler")
    assert sampler.autoscaling_config["max_replicas"] == 3
    assert {each.name for each in app.deployments} == {"Sampler", "Ingress"}


def test_the_models_id_is_short():
    names = {
        "/a/student/": "student",
        "s3://b/x/teacher": "teacher",
        "models:/shapes/3": "shapes/3",
    }
    assert {uri: ServeArgs(model=uri).model_id for uri in names} == names
    assert ServeArgs(model="/a/student", name="mine").model_id == "mine"


def test_the_curl_line_is_one_shell_command():
    line = curl_line("http://127.0.0.1:8000", prompt="it's red")
    assert line.startswith("curl ")
    assert "\n" not in line
