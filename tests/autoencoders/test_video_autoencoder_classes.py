"""The classes of diffusers that encode videos, saved and loaded, against diffusers itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import diffusers
import pytest
import tiny_autoencoders as tiny
import torch

from ldm_core.autoencoders.autoencoder import (
    DiffusersAutoencoder,
    Posterior,
    autoencoder_facts,
    load_autoencoder,
)
from ldm_core.errors import UserError

GENERATOR = torch.Generator().manual_seed(0)
# Those of which diffusers tells no variance: it has none, or drops it.
DETERMINISTIC = ("AutoencoderKLCosmos", "AutoencoderKLKVAEVideo")


def pixels_of(frames: int, down: int = 8) -> torch.Tensor:
    """Two videos of 4 x 8 latents, or 2 x 4 where they are of many pixels."""
    side = 2 * down if down > 8 else 4 * down
    return torch.rand(2, 3, frames, side, 2 * side, generator=GENERATOR) * 2 - 1


@dataclass(frozen=True)
class Case:
    """diffusers' own, ours of the folder it saved, and both downsamplings."""

    module: torch.nn.Module
    ours: DiffusersAutoencoder
    down: int
    stride: int

    def frames(self, steps: int) -> int:
        """Of a video of so many frames of latents after the first."""
        return 1 + steps * self.stride

    @cached_property
    def encoded(self) -> tuple[torch.Tensor, Posterior]:
        """Two videos of three frames of latents, and what ours makes of them."""
        pixels = pixels_of(self.frames(2), self.down)
        return pixels, self.ours.encode(pixels)

    @cached_property
    def short(self) -> tuple[torch.Tensor, Posterior]:
        """The same of one video of two."""
        pixels = pixels_of(self.frames(1), self.down)[:1]
        return pixels, self.ours.encode(pixels)


@pytest.fixture(scope="module", params=tiny.OF_VIDEOS, ids=lambda each: each[0].__name__)
def case(request, tmp_path_factory) -> Case:
    new, down, stride = request.param
    folder = str(tmp_path_factory.mktemp(new.__name__))
    torch.manual_seed(0)
    module = new().eval()
    module.save_pretrained(folder)
    if new is tiny.hunyuan_video_15:
        module.enable_slicing()  # its attention fails at a batch
    return Case(module, load_autoencoder(folder), down, stride)


def their_moments(module: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        posterior = module.encode(pixels).latent_dist
    mean = posterior.mode()
    if type(module).__name__ in DETERMINISTIC:
        return mean, torch.full_like(mean, -60.0)
    return mean, posterior.logvar


def their_frames(module: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    time = {"temb": torch.zeros(2)} if module.config.get("timestep_conditioning") else {}
    with torch.no_grad():
        return module.decode(latents, **time).sample.clamp(-1, 1)


def test_what_it_takes_is_found(case):
    ours, (pixels, posterior) = case.ours, case.encoded
    assert (ours.downsampling, ours.temporal_downsampling) == (case.down, case.stride)
    sides = (side // case.down for side in pixels.shape[-2:])
    assert posterior.mean.shape == (2, ours.channels, 3, *sides)


def test_a_video_is_what_diffusers_makes_of_it(case):
    pixels, posterior = case.encoded
    mean, logvar = their_moments(case.module, pixels)
    assert torch.equal(posterior.mean, mean)  # as encoded: neither shifted nor scaled
    assert torch.equal(posterior.logvar, logvar)
    decoded = case.ours.decode(mean)
    assert decoded.shape == pixels.shape
    assert torch.equal(decoded, their_frames(case.module, mean))


def test_a_picture_is_a_video_of_one_frame(case):
    pixels = pixels_of(1, case.down)
    mean, logvar = their_moments(case.module, pixels)
    posterior = case.ours.encode(pixels[:, :, 0])
    assert torch.equal(posterior.mean, mean[:, :, 0])
    assert torch.equal(posterior.logvar, logvar[:, :, 0])
    decoded = case.ours.decode(posterior.mean)
    assert torch.equal(decoded, their_frames(case.module, mean)[:, :, 0])


def test_as_many_frames_come_back_as_went_in(case):
    """Of every length that is encoded, though not all of diffusers' decoders count so."""
    long = pixels_of(case.frames(3), case.down)[:1]
    for steps, (pixels, posterior) in {1: case.short, 3: (long, case.ours.encode(long))}.items():
        assert posterior.mean.shape[2] == 1 + steps
        assert case.ours.decode(posterior.mean).shape == pixels.shape


def test_other_lengths_are_refused_whatever_diffusers_does(case):
    stride, (video, before) = case.stride, case.short
    for frames in {2, stride, stride + 2} - {1, 1 + stride} if stride > 1 else ():
        told = f"{frames} frames: {type(case.module).__name__} takes .* multiple of {stride} frames"
        with pytest.raises(UserError, match=told):
            case.ours.encode(pixels_of(frames, case.down))
    assert torch.equal(case.ours.encode(video).mean, before.mean)


@pytest.mark.parametrize("new", [tiny.cogvideox, tiny.hunyuan_video, tiny.ltx])
def test_in_16_bits_it_is_near(new, tmp_path):
    new().save_pretrained(tmp_path)
    picture = pixels_of(1, 32)[:, :, 0]
    exact, rounded = (
        load_autoencoder(str(tmp_path), dtype=dtype).encode(picture).mean
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() < 0.1 * exact.norm()


def test_what_is_not_done_in_16_bits_is_told(tmp_path):
    """torch pools no volumes in bfloat16 on a CPU."""
    tiny.cosmos().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="AutoencoderKLCosmos .*set encode.precision=fp32 for cpu"):
        load_autoencoder(str(tmp_path), dtype=torch.bfloat16)


def test_normalised_by_its_own_statistics_as_ltx_pipelines_do(tmp_path):
    tiny.ltx().save_pretrained(tmp_path)
    module, ours = (
        diffusers.AutoencoderKLLTXVideo.from_pretrained(tmp_path),
        autoencoder_facts(str(tmp_path)),
    )
    latents = torch.randn(2, 8, 3, 2, 2, generator=GENERATOR)
    mean, std = (
        torch.tensor(values).view(8, 1, 1, 1) for values in (ours.latents_mean, ours.latents_std)
    )
    expected = diffusers.LTXPipeline._normalize_latents(
        latents, module.latents_mean, module.latents_std, module.config.scaling_factor
    )
    torch.testing.assert_close((latents - mean) / std, expected, rtol=1e-6, atol=1e-6)


def untouched_ltx() -> torch.nn.Module:
    module = tiny.ltx()
    module.latents_mean.zero_()
    module.latents_std.fill_(1)
    return module


@pytest.mark.parametrize("new", [untouched_ltx, tiny.cosmos, tiny.mochi, tiny.cogvideox])
def test_statistics_that_are_not_of_its_channels_are_left_to_be_measured(new, tmp_path):
    """LTX's that nobody set, Cosmos' of every frame, Mochi's of 12 channels for 4, and none."""
    new().save_pretrained(tmp_path)
    facts = autoencoder_facts(str(tmp_path))
    assert facts.temporal_downsampling is not None
    assert (facts.latents_mean, facts.latents_std) == (None, None)


def test_a_call_that_failed_midway_leaves_nothing_behind(tmp_path):
    """As one does for which there is no memory; Magvit keeps frames between its convolutions."""
    torch.manual_seed(0)
    tiny.magvit().save_pretrained(tmp_path)
    ours = load_autoencoder(str(tmp_path))
    videos = pixels_of(5)
    latents = ours.encode(videos).mean
    pixels = ours.decode(latents)
    with without_memory(ours.module.encoder):
        ours.encode(pixels_of(5))
    assert torch.equal(ours.encode(videos).mean, latents)
    with without_memory(ours.module.decoder):
        ours.decode(-latents)
    assert torch.equal(ours.decode(latents), pixels)


@contextmanager
def without_memory(part: torch.nn.Module) -> Iterator[None]:
    """In its last layer, when the others have done their work."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    hook = part.conv_out.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        yield
    hook.remove()


@pytest.mark.parametrize("new", tiny.REFUSED)
def test_what_cannot_be_used_is_refused_by_name_with_a_remedy(new, tmp_path: Path):
    module = new()
    module.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{type(module).__name__} .*: take .* video"):
        load_autoencoder(str(tmp_path))


def test_one_that_encodes_in_clips_is_refused_though_some_lengths_fit():
    """25 frames become 7 of latents and 5 become 2, as if it was causal, but 9 become 2."""
    with pytest.raises(UserError, match="AutoencoderKLMiniMaxH3 made 2 frames of latents of 9"):
        DiffusersAutoencoder(tiny.minimax(), "", "cpu")
