"""The encode stage while its bucket misbehaves: it ends with what it always ends with.

Pictures, text encoders and store are behind a proxy that fails on purpose; the server is moto's,
or a real one under `make test-s3`.
"""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy
from picture_folder import picture, write_captions
from proxy_faults import Forward, Match, after, before, by_lot, fails, lost_answer, named, slow, to
from store_faults import add_rows, reject
from tiny_runs import encode_here

from ldm_core.autoencoders.autoencoder import autoencoder_facts
from ldm_core.files import file_sizes, join, read_json, upload_folder
from ldm_core.latents import commit
from ldm_core.latents import store as store_module
from ldm_core.latents.commit import CommitFailed
from ldm_core.latents.store import LatentStore, StoreVersion
from ldm_core.latents.verify import verify
from ldm_core.patient_s3 import PatientS3
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import AutoencoderSection, EncodeSection, TextSection

GOOD = 10
BROKEN = ("empty.png", "text.png")
SERVER = Path(__file__).parents[2] / "infra/local/s3.py"


@pytest.fixture(scope="module")
def data(s3: str, tmp_path_factory) -> str:
    """Good pictures and two that are none, in the bucket."""
    folder: Path = tmp_path_factory.mktemp("pictures")
    names = [f"{i:03d}.png" for i in range(GOOD)]
    for i, name in enumerate(names):
        picture(i).save(folder / name)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    write_captions(folder, {name: f"picture {len(name) % 2}" for name in (*names, *BROKEN)})
    upload_folder(folder, f"{s3}/faults/data")
    return f"{s3}/faults/data"


@pytest.fixture(scope="module")
def tracking(tmp_path_factory) -> str:
    """One MLflow database: making it takes longer than a run."""
    return f"sqlite:///{tmp_path_factory.mktemp('tracking')}/mlflow.db"


@pytest.fixture(scope="module")
def undisturbed(data: str, tracking: str) -> StoreVersion:
    """What the stage makes of it when nothing happens."""
    recipe = project(data, tracking, "calm")
    encode_here(recipe)
    return LatentStore(recipe.product("latents")).open_version()


@pytest.fixture
def proxy(undisturbed: StoreVersion, monkeypatch) -> Iterator[FaultyProxy]:
    """Between every client of the test and the server."""
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        PatientS3.clear_instance_cache()  # a client keeps the endpoint it began with
        yield proxy
    PatientS3.clear_instance_cache()


@pytest.fixture
def recipe(data: str, tracking: str, request) -> Recipe:
    """With a root of its own in the bucket."""
    return project(data, tracking, request.node.name)


def project(data: str, tracking: str, name: str) -> Recipe:
    return Recipe(
        name="test",
        data=data,
        root=f"{data.rpartition('/')[0]}/{name}",
        tracking_uri=tracking,
        size=16,
        autoencoder=AutoencoderSection(source="identity"),
        text=TextSection(tiny_width=8),
        encode=EncodeSection(shard_size=4, max_aspect=1, upscale=True, max_reject_share=0.5),
    )


def steps() -> dict[str, Match]:
    """A request of each thing the stage does."""
    return {
        "the listing": to("GET"),
        "the lock": to("PUT", "/locks/"),
        "the tables": to("PUT", "/_delta_log/00000000000000000000.json"),
        "a picture": to("GET", "/data/003.png"),
        "a file of latents": to("PUT", "/samples/"),
        "a commit": to("PUT", "/samples/_delta_log/00000000000000000001.json"),
        "embeddings": to("PUT", "/texts/"),
        "the version": to("PUT", "/versions/"),
        "the log": after(to("PUT", "/versions/"), to("GET", "/_delta_log/")),
        "the record": to("PUT", "/record.json"),
    }


def check(recipe: Recipe, undisturbed: StoreVersion, proxy: FaultyProxy) -> None:
    """One version, of the very content; each file one row; every row sound; the lock given back."""
    proxy.forgive()
    store = LatentStore(recipe.product("latents"))
    assert store.versions() == [1]
    manifest, expected = store.open_version().manifest, undisturbed.manifest
    assert manifest.content == expected.content
    assert (manifest.counts, manifest.rejects) == (expected.counts, expected.rejects)
    rows = Counter(id for name in ("samples", "rejects") for id in ids(store, name))
    assert rows == Counter({*BROKEN, *(f"{i:03d}.png" for i in range(GOOD))})
    failed = [each for each in verify(store.open_version(), autoencoder_facts("identity"))
              if each.failed]  # fmt: skip
    assert failed == []
    [lock] = file_sizes(join(store.uri, "locks"))
    assert read_json(lock)["released"]


def ids(store: LatentStore, table: str) -> list[str]:
    return store.open_version().table(table, ["id"])["id"].to_pylist()


@pytest.mark.parametrize(
    "seconds", [2, *(pytest.param(s, marks=pytest.mark.slow) for s in (8, 30))]
)
def test_away_while_it_encodes_and_while_it_commits(recipe, undisturbed, proxy, seconds):
    for step in ("a picture", "a commit", "the log"):
        proxy.rule(steps()[step], proxy.gone(seconds), times=1)
    encode_here(recipe)
    assert proxy.counts["gone"] == 3
    check(recipe, undisturbed, proxy)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [2, 10])
def test_away_at_every_step(recipe, undisturbed, proxy, seconds):
    for match in steps().values():
        proxy.rule(match, proxy.gone(seconds), times=1)
    encode_here(recipe)
    assert proxy.counts["gone"] == len(steps())
    check(recipe, undisturbed, proxy)


@pytest.mark.slow
def test_what_cannot_be_committed_costs_the_same_command_again(
    recipe, undisturbed, proxy, monkeypatch
):
    monkeypatch.setitem(store_module._PATIENCE, "max_retries", "0")
    monkeypatch.setattr(commit, "FIRST_PAUSE_S", 0.0)
    proxy.rule(to("PUT", "/samples/_delta_log/00000000000000000002.json"), fails(503))
    with pytest.raises(CommitFailed, match="run the same command again"):
        encode_here(recipe)
    assert proxy.counts["503"] == commit.ATTEMPTS
    proxy.forgive()
    encode_here(recipe)
    check(recipe, undisturbed, proxy)


@pytest.mark.slow
def test_a_tenth_of_the_requests_fails_or_is_late(recipe, undisturbed, proxy):
    for seed, fault in enumerate((fails(500), fails(503), slow(0.5))):
        proxy.rule(by_lot(seed, 0.034, to("")), fault)
    encode_here(recipe)
    assert {"500", "503", "slow"} <= proxy.counts.keys()
    check(recipe, undisturbed, proxy)


@pytest.mark.slow
def test_writes_that_are_done_and_not_acknowledged(recipe, undisturbed, proxy):
    for part in ("/locks/", "/_delta_log/", "/versions/", "/record.json"):
        proxy.rule(to("PUT", part), lost_answer, times=1)
    proxy.rule(by_lot(0, 0.5, to("PUT", "/latents/")), lost_answer)
    encode_here(recipe)
    assert proxy.counts["lost_answer"] > 6
    check(recipe, undisturbed, proxy)


@pytest.mark.slow
def test_commits_that_are_not_acknowledged_over_twenty_rounds(s3, undisturbed, proxy):
    store = LatentStore(f"{s3}/faults/rounds")
    store.create()
    proxy.rule(by_lot(0, 0.6, to("PUT", "/_delta_log/")), lost_answer)
    proxy.rule(by_lot(1, 0.6, to("PUT", "/versions/")), lost_answer)
    for k in range(20):
        add_rows(store, "rejects", [reject(f"{k:02d}a"), reject(f"{k:02d}b")], f"shard{k}")
        assert store.publish(undisturbed.manifest) == k + 1
    assert proxy.counts["lost_answer"] > 15
    proxy.forgive()
    found = store.table("rejects")["id"].to_pylist()
    assert sorted(found) == [f"{k:02d}{end}" for k in range(20) for end in "ab"]
    assert store.open("rejects").version() == 20
    assert store.versions() == list(range(1, 21))


@pytest.mark.skipif(not os.environ.get("LDM_TEST_S3"), reason="make test-s3 has a real server")
def test_a_gateway_killed_and_started_again(recipe, undisturbed, proxy):
    def restart() -> None:
        server("kill-gateway")
        starts.append(subprocess.Popen([sys.executable, SERVER, "start"]))

    def kill_after(forward: Forward) -> None:  # what it did is done, though nobody is told
        forward()
        restart()

    starts: list[subprocess.Popen] = []
    proxy.rule(steps()["a file of latents"], before(restart, "killed before"), times=1)
    proxy.rule(steps()["a commit"], named("killed after", kill_after), times=1)
    proxy.rule(steps()["the version"], before(restart, "killed before"), times=1)
    encode_here(recipe)
    assert proxy.counts["killed before"] == 2
    assert proxy.counts["killed after"] == 1
    assert [start.wait() for start in starts] == [0, 0, 0]
    check(recipe, undisturbed, proxy)


def server(word: str) -> None:
    subprocess.run([sys.executable, SERVER, word], check=True)
