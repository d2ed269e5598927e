"""A whole encode on Ray, whose tasks and actors meet the faults of a bucket like the driver.

In a process of its own: Ray's workers keep the endpoint with which Ray was started.
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy
from picture_folder import picture, write_captions
from proxy_faults import by_lot, fails, named, slow, to
from tiny_runs import encode_here

from ldm_core.autoencoders.autoencoder import autoencoder_facts
from ldm_core.files import upload_folder
from ldm_core.latents.store import LatentStore, StoreVersion
from ldm_core.latents.verify import verify
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import AutoencoderSection, EncodeSection, TextSection, Workers

GOOD, BROKEN = 60, ("empty.png", "text.png")
NAMES = [f"{k:03d}.png" for k in range(GOOD)]
OUTAGE_S, PATIENCE_S = 6, 900  # the latter after which something hangs
ENCODE = (
    "import sys; from pipelines.encode_latents import encode; "
    "from pipelines.recipes.schema import Recipe; from pipelines.stage import Options; "
    "encode(Recipe.model_validate_json(sys.argv[1]), Options())"
)


@pytest.fixture
def data(s3: str, tmp_path: Path) -> str:
    """Good pictures and two that are none, in the bucket."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k, name in enumerate(NAMES):
        picture(k).save(folder / name)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    captions = {name: f"picture {k % 20}" for k, name in enumerate(NAMES)}
    write_captions(folder, captions | dict.fromkeys(BROKEN, "a picture"))
    upload_folder(folder, f"{s3}/faults-on-ray/data")
    return f"{s3}/faults-on-ray/data"


def project(data: str, folder: Path, name: str) -> Recipe:
    return Recipe(
        name="test",
        data=data,
        root=f"{data.rpartition('/')[0]}/{name}",
        tracking_uri=f"sqlite:///{folder}/{name}.db",
        size=16,
        autoencoder=AutoencoderSection(source="identity"),
        text=TextSection(tiny_width=8),
        encode=EncodeSection(
            shard_size=4,
            max_aspect=1,
            upscale=True,
            max_reject_share=0.5,
            workers=Workers(count=2, cpus=0.5),
        ),
    )


def newest(recipe: Recipe) -> StoreVersion:
    return LatentStore(recipe.product("latents")).open_version()


def disturb(proxy: FaultyProxy) -> None:
    """One outage amid the commits, and a tenth of all requests: of tasks that read pictures, of
    actors that write files, and of the driver, told apart."""
    middle = to("PUT", "/samples/_delta_log/00000000000000000005.json")
    proxy.rule(middle, proxy.gone(OUTAGE_S), times=1)
    asked = {"read": to("GET", ".png"), "written": to("PUT", ".parquet"), "other": to("")}
    for number, (what, match) in enumerate(asked.items()):
        for seed, fault in enumerate((fails(500), fails(503), slow(0.5))):
            told = named(f"{what} {fault.__name__}", fault)
            proxy.rule(by_lot(10 * number + seed, 0.034, match), told)


def encode_behind(proxy: FaultyProxy, recipe: Recipe) -> None:
    clean = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    there = {"AWS_ENDPOINT_URL": proxy.url, "PYTHONPATH": os.getcwd()}
    ended = subprocess.run(
        [sys.executable, "-c", ENCODE, recipe.model_dump_json()],
        env=clean | there,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_behind_a_bucket_that_fails_make_what_they_always_make(data, tmp_path):
    calm, mine = (project(data, tmp_path, name) for name in ("calm", "disturbed"))
    encode_here(calm)
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        disturb(proxy)
        encode_behind(proxy, mine)
    met = Counter(name.split()[0] for name in proxy.counts.elements())
    assert met["gone"] == 1
    assert min(met["read"], met["written"], met["other"]) > 0, proxy.counts
    assert met["read"] + met["written"] + met["other"] > 0.05 * proxy.counts["requests"]
    version, expected = newest(mine), newest(calm)
    assert version.store.versions() == [1]
    assert version.manifest.content == expected.manifest.content
    assert version.manifest.counts == expected.manifest.counts
    ids = {name: version.table(name, ["id"])["id"].to_pylist() for name in ("samples", "rejects")}
    assert sorted(ids["samples"]) == NAMES
    assert sorted(ids["rejects"]) == sorted(BROKEN)
    checks = verify(version, autoencoder_facts("identity"))
    assert [check for check in checks if check.failed] == []
