import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, UNet2DModel, VQModel
from safetensors.torch import load_file, save_file

from ldm_core.autoencoders.autoencoder import (
    IdentityAutoencoder,
    Posterior,
    autoencoder_digest,
    autoencoder_facts,
    load_autoencoder,
)
from ldm_core.errors import UserError
from ldm_core.files import upload_folder

WEIGHTS = "diffusion_pytorch_model.safetensors"
GENERATOR = torch.Generator().manual_seed(0)
PIXELS = torch.rand(2, 3, 32, 32, generator=GENERATOR) * 2 - 1


def new_kl() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.18215,
        shift_factor=0.3,
    )


def new_tiny() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )


def new_vq() -> VQModel:
    return VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        num_vq_embeddings=16,
    )


def new_dc() -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
    )


@pytest.fixture(scope="module")
def kl_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kl")
    torch.manual_seed(0)
    new_kl().save_pretrained(folder)
    return folder


@pytest.fixture
def changed(kl_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kl_folder, tmp_path / "copy"))


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_it_computes_what_diffusers_does(kl_folder):
    theirs, ours = AutoencoderKL.from_pretrained(kl_folder), load_autoencoder(str(kl_folder))
    with torch.no_grad():
        expected = theirs.encode(PIXELS).latent_dist
        posterior = ours.encode(PIXELS)
        assert torch.equal(posterior.mean, expected.mean)  # as encoded: not shifted, not scaled
        assert torch.equal(posterior.logvar, expected.logvar)
        decoded = ours.decode(10 * posterior.mean)
        assert torch.equal(decoded, theirs.decode(10 * posterior.mean).sample.clamp(-1, 1))
    assert (ours.channels, ours.downsampling) == (4, 2)
    assert ours.latents_mean is None


def test_channels_last_is_another_layout_of_the_same(tmp_path):
    new_kl().save_pretrained(tmp_path)
    plain = load_autoencoder(str(tmp_path)).encode(PIXELS)
    last = load_autoencoder(str(tmp_path), channels_last=True)
    assert next(last.module.parameters()).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last.encode(PIXELS).mean, plain.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last.encode(PIXELS).logvar, plain.logvar, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_near_and_tells_float32(tmp_path):
    new_kl().save_pretrained(tmp_path)
    exact = load_autoencoder(str(tmp_path)).encode(PIXELS)
    near = load_autoencoder(str(tmp_path), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in near.module.parameters()} == {torch.bfloat16}
    found = near.encode(PIXELS)
    assert found.mean.dtype == found.logvar.dtype == near.decode(found.mean).dtype == torch.float32
    assert 0 < (found.mean - exact.mean).norm() < 0.03 * exact.mean.norm()


@pytest.mark.parametrize("new", [new_tiny, new_vq, new_dc])
def test_an_autoencoder_without_a_posterior(new, tmp_path):
    torch.manual_seed(0)
    module = new().eval()
    module.save_pretrained(tmp_path)
    ours = load_autoencoder(str(tmp_path))
    with torch.no_grad():
        encoded = module.encode(PIXELS, return_dict=False)[0]
        expected = module.decode(encoded).sample.clamp(-1, 1)
    posterior = ours.encode(PIXELS)
    assert torch.equal(posterior.mean, encoded)
    assert torch.equal(posterior.sample(torch.ones_like(encoded)), encoded)  # no spread
    assert torch.equal(ours.decode(encoded), expected)
    assert encoded.shape == (2, ours.channels, *(32 // ours.downsampling,) * 2)
    assert autoencoder_facts(str(tmp_path)).downsampling == ours.downsampling


def test_the_digest_covers_weights_and_configuration(kl_folder, changed):
    digest = load_autoencoder(str(kl_folder)).digest
    assert autoencoder_digest(changed) == digest
    weights = load_file(changed / WEIGHTS)
    name = "decoder.conv_out.bias"
    save_file({**weights, name: weights[name] + 1e-3}, changed / WEIGHTS)
    assert autoencoder_digest(changed) != digest
    save_file(weights, changed / WEIGHTS, metadata={"format": "pt"})
    assert autoencoder_digest(changed) == digest
    edit_config(changed, act_fn="relu")
    assert autoencoder_digest(changed) != digest


def test_the_digest_leaves_out_what_changes_no_latent(kl_folder, changed):
    edit_config(changed, latents_mean=[1, 2, 3, 4], latents_std=[1, 1, 1, 2.5])
    edit_config(changed, _diffusers_version="9.9", _name_or_path="elsewhere")
    (changed / "README.md").write_text("a card")
    ours = load_autoencoder(str(changed))
    assert ours.digest == load_autoencoder(str(kl_folder)).digest
    assert (ours.latents_mean, ours.latents_std) == ((1, 2, 3, 4), (1, 1, 1, 2.5))


def test_from_a_bucket(kl_folder, s3):
    upload_folder(kl_folder, f"{s3}/autoencoder")
    remote, local = load_autoencoder(f"{s3}/autoencoder"), load_autoencoder(str(kl_folder))
    assert remote.digest == local.digest
    assert torch.equal(remote.encode(PIXELS).mean, local.encode(PIXELS).mean)


def test_what_the_files_tell_is_what_the_model_says(kl_folder, s3):
    upload_folder(kl_folder, f"{s3}/facts")
    for uri in (str(kl_folder), f"{s3}/facts", "identity"):
        facts, model = autoencoder_facts(uri), load_autoencoder(uri)
        for name in ("digest", "downsampling", "latents_mean", "latents_std"):
            assert getattr(facts, name) == getattr(model, name), name


def test_the_identity_is_exact():
    identity = load_autoencoder("identity")
    assert isinstance(identity, IdentityAutoencoder)
    posterior = identity.encode(PIXELS)
    drawn = posterior.sample(torch.randn(PIXELS.shape, generator=GENERATOR))
    assert torch.equal(identity.decode(drawn), PIXELS)
    assert torch.equal(identity.decode(3 * PIXELS), (3 * PIXELS).clamp(-1, 1))


def test_posterior_sample():
    mean, std = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    eps = torch.randn(200_000, 2, generator=GENERATOR, dtype=torch.float64)
    drawn = Posterior(mean.expand_as(eps), (2 * std.log()).expand_as(eps)).sample(eps)
    torch.testing.assert_close(drawn.mean(0), mean.double(), rtol=0, atol=0.03)
    torch.testing.assert_close(drawn.std(0), std.double(), rtol=0.01, atol=0)
    assert torch.equal(Posterior(mean, std).sample(torch.zeros(2)), mean)


def test_what_is_no_autoencoder_is_refused_by_name(tmp_path):
    missing = str(tmp_path / "missing")
    with pytest.raises(UserError, match=f"no autoencoder at {missing}"):
        load_autoencoder(missing)
    UNet2DModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} holds a UNet2DModel, not an autoencoder"):
        load_autoencoder(str(tmp_path))


def test_a_refusal_names_the_bucket_not_the_copy(tmp_path, s3):
    (tmp_path / "config.json").write_text("{}")
    upload_folder(tmp_path, f"{s3}/something")
    with pytest.raises(UserError, match=f"{s3}/something holds a model without _class"):
        load_autoencoder(f"{s3}/something")


def test_pickled_weights_are_refused_with_a_way_out(tmp_path):
    torch.manual_seed(0)
    new_kl().save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(UserError, match=r"no \.safetensors .*AutoencoderKL.*save_pretrained"):
        load_autoencoder(str(tmp_path))
