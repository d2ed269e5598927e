"""The pictures of `ldm store --preview`: decoded by the autoencoder that the store names."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from store_faults import sound_store

from ldm_core.autoencoders.autoencoder import load_autoencoder
from ldm_core.autoencoders.training import new_autoencoder
from ldm_core.latents.manifest import EncoderEntry
from ldm_core.latents.reader import sample_key
from ldm_core.latents.schema import decode_array
from ldm_core.latents.store import StoreVersion
from ldm_core.media.pixels import to_image
from pipelines.store_preview import write_preview


@pytest.fixture
def version(tmp_path: Path) -> StoreVersion:
    return sound_store(tmp_path / "my latents", count=20)


class TestPreview:
    def test_shows_sixteen_samples(self, ldm, version, tmp_path):
        result = ldm("store", "my latents", "--verify", "--preview", "new/grid.png")
        assert result.exit_code == 0, result.output
        assert "new/grid.png: 16 of bucket 4x4x1, decoded" in result.stdout
        sheet = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
        assert sheet.shape == (4 * 6 + 2, 4 * 6 + 2, 3)
        rows = {row["id"]: row for row in version.table("samples").to_pylist()}
        chosen = sorted(rows, key=sample_key)[:16]
        for place, id in enumerate(chosen):
            latent = decode_array(rows[id]["latent_mean"], (3, 4, 4)).astype(np.float32)
            picture = np.rint((latent.clip(-1, 1) + 1) * 127.5).transpose(1, 2, 0)
            top, left = 2 + place // 4 * 6, 2 + place % 4 * 6
            np.testing.assert_allclose(sheet[top : top + 4, left : left + 4], picture, atol=1)

    def test_is_decoded_by_the_autoencoder_at_its_uri(self, ldm, tmp_path):
        new_autoencoder((8, 8), 4, 1, 8, seed=0).save_pretrained(tmp_path / "vae")
        autoencoder = load_autoencoder("vae")
        entry = EncoderEntry(name="autoencoder", uri="vae", digest=autoencoder.digest)
        version = sound_store(tmp_path / "latents", count=3, autoencoder=entry, shape=(4, 4, 4))
        result = ldm("store", "latents", "--verify", "--preview", "grid.png")
        assert result.exit_code == 0, result.output
        assert "grid.png: 3 of bucket 4x4x1, decoded" in result.stdout
        row = min(version.table("samples").to_pylist(), key=lambda row: sample_key(row["id"]))
        latent = decode_array(row["latent_mean"], (1, 4, 4, 4)).astype(np.float32)
        expected = to_image(autoencoder.decode(torch.from_numpy(latent))[0])
        sheet = np.asarray(Image.open("grid.png"))
        np.testing.assert_array_equal(sheet[2:10, 2:10], expected)

    def test_of_a_video_is_its_first_frame(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        wan = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1,
                               attn_scales=[], temperal_downsample=[True])  # fmt: skip
        wan.save_pretrained("vae")
        autoencoder = load_autoencoder("vae")
        entry = EncoderEntry(name="autoencoder", uri="vae", digest=autoencoder.digest)
        version = sound_store("latents", count=1, autoencoder=entry, shape=(4, 2, 4, 4))
        (row,) = version.table("samples").to_pylist()
        latent = decode_array(row["latent_mean"], (1, 4, 2, 4, 4)).astype(np.float32)
        video = autoencoder.decode(torch.from_numpy(latent))
        assert video.shape == (1, 3, 3, 8, 8)
        write_preview(version, "grid.png")
        sheet = np.asarray(Image.open("grid.png"))
        np.testing.assert_array_equal(sheet[2:10, 2:10], to_image(video[0, :, 0]))

    def test_of_a_video_of_an_autoencoder_of_pictures_too(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        new_autoencoder((8, 8), 4, 1, 8, seed=0).save_pretrained("vae")
        autoencoder = load_autoencoder("vae")
        entry = EncoderEntry(name="autoencoder", uri="vae", digest=autoencoder.digest)
        version = sound_store("latents", count=1, autoencoder=entry, shape=(4, 2, 4, 4))
        (row,) = version.table("samples").to_pylist()
        latent = decode_array(row["latent_mean"], (1, 4, 2, 4, 4)).astype(np.float32)
        write_preview(version, "grid.png")
        expected = to_image(autoencoder.decode(torch.from_numpy(latent[:, :, 0]))[0])
        sheet = np.asarray(Image.open("grid.png"))
        np.testing.assert_array_equal(sheet[2:10, 2:10], expected)
