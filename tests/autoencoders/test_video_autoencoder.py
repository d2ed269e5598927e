"""A causal video autoencoder of diffusers behind our interface."""

import pytest
import torch
from diffusers import AutoencoderKL
from tiny_autoencoders import wan

from ldm_core.autoencoders.autoencoder import DiffusersAutoencoder, load_autoencoder
from ldm_core.errors import UserError

GENERATOR = torch.Generator().manual_seed(0)
VIDEO = torch.rand(2, 3, 9, 16, 16, generator=GENERATOR) * 2 - 1


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> DiffusersAutoencoder:
    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    wan().save_pretrained(folder)
    return load_autoencoder(str(folder))


def test_its_strides_are_found(autoencoder):
    assert (autoencoder.channels, autoencoder.downsampling) == (4, 4)
    assert autoencoder.temporal_downsampling == 4
    assert autoencoder.latents_mean == pytest.approx((0.1, 0.2, 0.3, 0.4))
    assert autoencoder.encode(VIDEO).mean.shape == (2, 4, 3, 4, 4)


@pytest.mark.parametrize(("changed", "first"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_a_frame_changes_no_earlier_latent(autoencoder, changed, first):
    other = VIDEO.clone()
    other[:, :, changed] += 0.5
    moved = (autoencoder.encode(other).mean - autoencoder.encode(VIDEO).mean).abs()
    by_frame = moved.amax(dim=(0, 1, 3, 4)).tolist()
    assert by_frame[:first] == [0.0] * first  # exactly: nothing of it was read
    assert min(by_frame[first:]) > 0


def test_a_beginning_is_encoded_and_decoded_as_part_of_the_whole(autoencoder):
    whole = autoencoder.encode(VIDEO).mean
    beginning = autoencoder.encode(VIDEO[:, :, :5]).mean
    torch.testing.assert_close(beginning, whole[:, :, :2], rtol=0, atol=1e-5)
    decoded = autoencoder.decode(whole)
    assert decoded.shape == VIDEO.shape
    torch.testing.assert_close(autoencoder.decode(beginning), decoded[:, :, :5], rtol=0, atol=1e-5)


def test_a_picture_is_a_video_of_one_frame(autoencoder):
    picture = VIDEO[:, :, 0]
    posterior = autoencoder.encode(picture)
    assert posterior.mean.shape == posterior.logvar.shape == (2, 4, 4, 4)
    assert torch.equal(posterior.mean, autoencoder.encode(VIDEO[:, :, :1]).mean[:, :, 0])
    assert autoencoder.decode(posterior.mean).shape == picture.shape


@pytest.mark.parametrize("frames", [2, 4, 8])
def test_frames_that_would_be_left_over_are_refused(autoencoder, frames):
    with pytest.raises(UserError, match=f"a video of {frames} frames: .* multiple of 4 frames"):
        autoencoder.encode(VIDEO[:, :, :frames])


def test_a_video_for_an_autoencoder_of_pictures_is_refused():
    of_pictures = DiffusersAutoencoder(AutoencoderKL(), "", "cpu")
    with pytest.raises(UserError, match="a video of 9 frames for an autoencoder of pictures"):
        of_pictures.encode(VIDEO)
    with pytest.raises(UserError, match="a video of 3 frames for an autoencoder of pictures"):
        of_pictures.decode(torch.zeros(1, 4, 3, 4, 4))


def test_frames_dropped_by_a_chunk_are_refused():
    autoencoder = DiffusersAutoencoder(wan(temperal_downsample=[False, True]), "", "cpu")
    assert autoencoder.temporal_downsampling == 2
    with pytest.raises(UserError, match="3 frames: this autoencoder would drop all after frame 1"):
        autoencoder.encode(VIDEO[:, :, :3])  # two are fewer than its chunks of four
