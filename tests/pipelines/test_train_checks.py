"""A training is refused before its workers start where nothing could decode what it learns."""

from dataclasses import replace
from pathlib import Path

import pytest
from store_faults import sound_store

from ldm_core.autoencoders.autoencoder import autoencoder_digest
from ldm_core.autoencoders.training import new_autoencoder
from ldm_core.errors import UserError
from ldm_core.files import upload_folder
from ldm_core.latents.manifest import EncoderEntry
from ldm_core.latents.store import StoreVersion
from pipelines import train_denoiser
from pipelines.recipe_options import Arguments
from pipelines.stage import Options
from pipelines.train_checks import check_autoencoder


def save_autoencoder(folder: Path, seed: int) -> str:
    """A small one; returns its digest."""
    new_autoencoder((8, 8), 2, 1, 16, seed).save_pretrained(folder, safe_serialization=True)
    return autoencoder_digest(folder)


def store_of(folder: Path, uri: str, digest: str) -> StoreVersion:
    entry = EncoderEntry(name="autoencoder", uri=uri, digest=digest)
    return sound_store(folder, autoencoder=entry, shape=(2, 8, 8))


def test_another_autoencoder_is_refused_by_both_names_and_so_is_none(tmp_path):
    vae = tmp_path / "vae"
    first = save_autoencoder(vae, 1)
    version = store_of(tmp_path / "latents", str(vae), first)
    check_autoencoder(version)
    (vae / "README.md").write_text("cards do not count")
    check_autoencoder(version)
    second = save_autoencoder(vae, 2)
    assert first != second
    with pytest.raises(UserError, match=f"autoencoder {first}, but {vae} now holds {second}: put"):
        check_autoencoder(version)
    (vae / "config.json").unlink()
    with pytest.raises(UserError, match=f"autoencoder {first} at {vae}, where there is none now"):
        check_autoencoder(version)


def test_in_a_bucket_too(s3, tmp_path):
    digest = save_autoencoder(tmp_path / "vae", 1)
    upload_folder(tmp_path / "vae", f"{s3}/vae")
    version = store_of(tmp_path / "latents", f"{s3}/vae", digest)
    check_autoencoder(version)
    other = replace(version, manifest=version.manifest.model_copy(
        update={"autoencoder": EncoderEntry(name="autoencoder", uri=f"{s3}/no", digest=digest)}
    ))  # fmt: skip
    with pytest.raises(UserError, match="where there is none now"):
        check_autoencoder(other)


@pytest.mark.parametrize("dry_run", [False, True])
def test_the_stage_refuses_it_before_it_begins(tmp_path, monkeypatch, dry_run):
    vae = tmp_path / "vae"
    version = store_of(tmp_path / "run" / "latents", str(vae), save_autoencoder(vae, 1))
    save_autoencoder(vae, 2)
    monkeypatch.setattr(train_denoiser, "run_stage", pytest.fail)
    recipe = Arguments("image-tiny", root=str(tmp_path / "run"), overrides=("size=8",)).resolve()
    with pytest.raises(UserError, match=version.manifest.autoencoder.digest):
        train_denoiser.train_denoiser(recipe, Options(dry_run=dry_run))
