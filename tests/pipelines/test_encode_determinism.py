"""The rows of a store are the same however many workers made them, wherever it lies."""

import fsspec
import numpy as np
import pytest
import torch
from picture_folder import SIZE, picture_folder
from test_encode_media import cells, saved, tiny_kl
from tiny_runs import encode_here

from ldm_core.latents.reader import LatentReader
from ldm_core.latents.store import LatentStore
from pipelines.encode_latents import encode
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import AutoencoderSection, EncodeSection, TextSection, Workers
from pipelines.stage import Options


@pytest.mark.ray
def test_four_workers_on_a_bucket_give_the_same_rows(s3, ray_session, tmp_path):
    """As one in this process, of an autoencoder that computes; in smaller shards, which end out of
    order."""
    (tmp_path / "data").mkdir()
    data = picture_folder(tmp_path / "data")
    fsspec.filesystem("s3").put(str(data), f"{s3}/pictures", recursive=True)
    section = EncodeSection(upscale=True, shard_size=5, batch_size=4)
    calm = Recipe(
        name="test",
        data=str(data),
        root=str(tmp_path / "root"),
        size=SIZE,
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
        autoencoder=AutoencoderSection(source=saved(tiny_kl(), tmp_path / "kl")),
        text=TextSection(tiny_width=8),
        encode=section,
    )
    four = section.model_copy(update={"shard_size": 2, "workers": Workers(count=4, cpus=0.5)})
    away = {"data": f"{s3}/pictures", "root": f"{s3}/products", "encode": four}
    mine = calm.model_copy(update=away)
    encode_here(calm)
    encode(mine, Options())
    version, remote = (LatentStore(of.product("latents")).open_version() for of in (calm, mine))
    assert remote.manifest.content == version.manifest.content
    assert remote.manifest.statistics == version.manifest.statistics
    elsewhere = ("source_uri", "fingerprint")
    for table in ("texts", "rejects"):  # of which the content does not tell
        assert cells(remote, table, *elsewhere) == cells(version, table, *elsewhere)
    uris = remote.table("samples", ["source_uri"])["source_uri"].to_pylist()
    assert all(uri.startswith(f"{s3}/pictures/") for uri in uris)
    ours, theirs = (
        LatentReader(v).batch(np.arange(8), np.zeros(8, np.int64), 0) for v in (version, remote)
    )
    assert torch.equal(ours.latents, theirs.latents)
    assert torch.equal(ours.condition.tokens, theirs.condition.tokens)
