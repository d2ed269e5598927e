"""A run told beside training, by a tracking server that is away, refuses or loses answers."""

import pickle
import threading
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faulty_proxy import FaultyProxy
from mlflow.tracking import MlflowClient
from mlflow_server import mlflow_server
from proxy_faults import Answer, fails, lost_answer, named, to

from ldm_core.training.optimizers import Optimizers
from ldm_core.training.step import TrainingStep
from pipelines import training_state
from pipelines.run_beside import Item, Outbox, RunBeside
from pipelines.tracking import Run
from pipelines.training_state import Resuming

LOGGING = "/runs/log-batch"
nowhere = named("404", lambda forward: Answer(404, [("Content-Type", "text/plain")], b"nothing"))


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as url:
        yield url


@pytest.fixture
def proxy(server: str, monkeypatch) -> Iterator[FaultyProxy]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with FaultyProxy(server) as proxy:
        yield proxy


@pytest.fixture
def plain(proxy: FaultyProxy) -> Run:
    client = MlflowClient(proxy.url)
    return Run(proxy.url, client.create_run("0").info.run_id)


def beside(run: Run, told: list[str] | None = None) -> RunBeside:
    outbox = Outbox(run.refuses, (told if told is not None else []).append, first_pause_s=0.05)
    return RunBeside(run.uri, run.id, outbox)


def history(run: Run, server: str, name: str = "loss") -> list[tuple[int, float]]:
    found = MlflowClient(server).get_metric_history(run.id, name)
    return sorted((each.step, each.value) for each in found)


def test_nothing_is_lost_nor_told_twice_while_the_server_comes_and_goes(plain, proxy, server):
    told: list[str] = []
    proxy.rule(to("POST", LOGGING), lost_answer, times=2)  # it has them, and is told again
    proxy.rule(to("POST", LOGGING), fails(503), times=2)
    proxy.rule(to("POST", LOGGING), proxy.gone(1.0), times=1)
    expected = [(step, 1 / step) for step in range(1, 41)]
    with beside(plain, told) as run:
        for step, loss in expected:
            run.metrics({"loss": loss, "rate": 2.0 * step}, step)
        run.tags({"failure.1": "lost"})
        assert run.untold()
        assert run.outbox.flush(60)
        assert run.untold() == []
    assert (proxy.counts["lost_answer"], proxy.counts["503"], proxy.counts["gone"]) == (2, 2, 1)
    assert history(plain, server) == expected
    assert history(plain, server, "rate") == [(step, 2.0 * step) for step, _ in expected]
    assert MlflowClient(server).get_run(plain.id).data.tags["failure.1"] == "lost"
    assert "does not answer" in told[0]
    assert told[-1] == "the tracking server answers again"


def test_what_the_server_will_never_have_holds_up_nothing(plain, proxy, server):
    told: list[str] = []
    with beside(plain, told) as run:
        run.metrics({"not/a:name!": 1.0}, 1)
        run.metrics({"loss": 1.0}, 1)
        assert run.outbox.flush(60)
    assert history(plain, server) == [(1, 1.0)]
    [line] = told
    assert "refuses" in line
    assert "not/a:name!" in line


def test_a_404_is_a_refusal_of_mlflow_alone(plain, proxy):
    """What stands before a server that is away may say 404 as well."""
    with pytest.raises(Exception) as gone:  # noqa: PT011
        Run(plain.uri, "0" * 32).metrics({"loss": 1.0})
    assert plain.refuses(gone.value)
    for error in (ConnectionError(), OSError("a full disk")):
        assert not plain.refuses(error)
    proxy.rule(to("POST", LOGGING), nowhere)
    with pytest.raises(Exception) as unheard:  # noqa: PT011
        plain.metrics({"loss": 1.0})
    assert proxy.counts["404"] == 1
    assert not plain.refuses(unheard.value)


def test_nobody_waits_for_what_is_sent_in_order():
    release, sent = threading.Event(), []

    def send(number: int) -> None:
        release.wait(60)
        sent.append(number)

    outbox = Outbox(lambda error: False, print)
    for number in range(5):
        outbox.put(Item(lambda number=number: send(number), {"number": number}))
    assert sent == []
    assert [entry["number"] for entry in outbox.waiting()] == [*range(5)]
    assert not outbox.flush(0)
    release.set()
    assert outbox.flush(60)
    assert sent == [*range(5)]
    outbox.close()


def test_of_too_many_the_oldest_go_and_it_is_said_once_each_time():
    told, sent = [], []
    outbox = Outbox(lambda error: False, told.append, most=3)

    def send(release: threading.Event, number: int) -> None:
        release.wait(60)
        sent.append(number)

    for time in (1, 2):
        release = threading.Event()
        for number in range(6):
            outbox.put(Item(partial(send, release, number), {"number": number}))
        assert [entry["number"] for entry in outbox.waiting()] == [3, 4, 5]
        assert len(told) == time
        assert "more than 3 entries wait" in told[-1]
        release.set()
        assert outbox.flush(60)
        assert sent[-3:] == [3, 4, 5]
    outbox.close()


def test_what_need_not_arrive_is_tried_so_often_and_holds_up_nothing_else():
    told, tried, sent = [], [], []

    def send() -> None:
        tried.append(1)
        raise ConnectionError("a bucket that takes nothing")

    outbox = Outbox(lambda error: False, told.append, first_pause_s=0.01)
    outbox.put(Item(send, tries=3))
    outbox.put(Item(lambda: sent.append("figures"), {}))
    assert outbox.flush(60)
    assert (len(tried), sent) == (3, ["figures"])
    assert told[-1] == "the tracking server is without an artifact: a bucket that takes nothing"
    outbox.close()


def test_pictures_and_documents_are_told_beside_too(plain, proxy, server):
    """Whoever tells them goes on before anybody answers."""
    release = threading.Event()
    proxy.rule(to(""), named("held", lambda forward: forward() if release.wait(60) else None))
    with beside(plain) as run:
        run.document(["a caption"], "captions.json")
        run.image(np.zeros((2, 2, 3), np.uint8), "samples", 7)
        assert run.untold() == []
        assert not run.outbox.flush(0)
        release.set()
        assert run.outbox.flush(60)
    names = [each.path for each in MlflowClient(server).list_artifacts(plain.id)]
    assert {"captions.json", "images"} <= set(names)


def test_elsewhere_it_is_a_plain_run(plain):
    with beside(plain) as run:
        assert pickle.loads(pickle.dumps(run)) == plain


def trained(run: Run, folder: str) -> Resuming:
    """A worker's side of the checkpoints of a small network."""
    network = torch.nn.Linear(2, 2)
    optimizers = Optimizers(torch.optim.SGD(network.parameters(), lr=0.1))
    update = TrainingStep(network, optimizers, torch.device("cpu"), torch.float32, 1.0)
    job = SimpleNamespace(
        run=run,
        checkpoints=folder,
        begin=lambda first, seconds: first,
        board=SimpleNamespace(seconds=SimpleNamespace(remote=lambda: 0.0)),
    )
    return Resuming(job, update, {}, {"class": "Linear"})


def test_a_killed_worker_s_figures_are_told_by_the_next(
    plain, proxy, server, tmp_path, monkeypatch
):
    """Those up to the checkpoint, which are not computed again."""
    monkeypatch.setattr(training_state.ray, "get", lambda value: value)
    killed = beside(plain)
    killed.metrics({"loss": 1.0}, 1)
    assert killed.outbox.flush(60)
    proxy.rule(to("POST", LOGGING), lost_answer, times=1)
    proxy.rule(to("POST", LOGGING), fails(503))
    killed.metrics({"loss": 0.5}, 2)  # which the server hears, though it cannot say so
    killed.metrics({"loss": float("nan")}, 3)
    resuming = trained(killed, str(tmp_path))
    resuming.save(3)
    resuming.wait()
    killed.metrics({"loss": 0.1}, 4)
    killed.outbox.close()
    proxy.forgive()
    with beside(plain) as run:
        assert trained(run, str(tmp_path)).restore() == 3
        assert run.outbox.flush(60)
    found = history(plain, server)
    assert found[:2] == [(1, 1.0), (2, 0.5)]
    assert [step for step, _ in found] == [1, 2, 3]
