"""Pixels <-> latents, for autoencoders in diffusers' directory layout: of pictures, and causal ones
of videos.

Shapes: B batch, H W pixels, h w latents (h = H / downsampling), C latent channels; of a video T
frames and t = 1 + (T - 1) / temporal downsampling frames of latents, the first of one frame alone.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ldm_core.autoencoders.diffusers_calls import (
    NO_VARIANCE,
    OTHERS,
    decode_frames,
    decode_pixels,
    encode_moments,
    measure,
    own_statistics,
    per_channel,
)
from ldm_core.errors import UserError
from ldm_core.files import exists, folder_digest, join, local_copy, read_json


@dataclass(frozen=True)
class Posterior:
    """The diagonal Gaussian q(z | x): mean and log-variance, (B, C, h, w) or (B, C, t, h, w)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, eps: Tensor) -> Tensor:
        """mean + std * eps, with eps ~ N(0, I) of the mean's shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * eps


class Autoencoder(Protocol):
    """What the encode job and the sampler need of an autoencoder.

    Attributes:
        digest: of weights and configuration; latents of another digest are stale.
        downsampling: pixels per latent along a side.
        temporal_downsampling: frames per frame of latents after the first; None for pictures.
        channels: of the latent.
        latents_mean, latents_std: of each channel, if the directory tells both.
    """

    digest: str
    downsampling: int
    temporal_downsampling: int | None
    channels: int
    latents_mean: tuple[float, ...] | None
    latents_std: tuple[float, ...] | None

    def encode(self, pixels: Tensor) -> Posterior:
        """Pixels (B, 3, H, W), or (B, 3, T, H, W), in [-1, 1] to the posterior over latents."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w), or (B, C, t, h, w), not normalised, to pixels in [-1, 1]."""
        ...


class IdentityAutoencoder:
    """Pixel space: the latent is the picture, with no noise."""

    digest = "identity"
    downsampling = 1
    temporal_downsampling: int | None = None
    channels = 3
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def encode(self, pixels: Tensor) -> Posterior:
        """The pixels themselves, with a variance of zero (log-variance -60)."""
        return Posterior(pixels, torch.full_like(pixels, NO_VARIANCE))

    def decode(self, latents: Tensor) -> Tensor:
        """The latents themselves, clamped to [-1, 1]."""
        return latents.clamp(-1, 1)


class DiffusersAutoencoder:
    """A diffusers autoencoder (AutoencoderKL, AutoencoderDC, AutoencoderKLWan, …).

    One of videos takes pictures too, as videos of one frame.

    Raises:
        UserError: its class encodes neither pictures nor videos as the others do.
    """

    def __init__(self, module: torch.nn.Module, digest: str, device: str | torch.device) -> None:
        self.module = module.eval().requires_grad_(False).to(device)
        self.digest = digest
        found = measure(self.module)
        self.channels, self.downsampling = found.channels, found.downsampling
        self.temporal_downsampling = found.temporal_downsampling
        self._has_variance = found.has_variance
        own = own_statistics(self.module, self.channels)
        self.latents_mean = own[0] if own else None
        self.latents_std = own[1] if own else None

    def encode(self, pixels: Tensor) -> Posterior:
        """Pixels (B, 3, H, W) or (B, 3, T, H, W) in [-1, 1] to the posterior, in float32.

        Raises:
            UserError: a video for an autoencoder of pictures, or one with frames left over.
        """
        values = self._input(pixels)
        if pixels.ndim == 5:
            self._check_length(pixels.shape[2])
        mean, logvar = (moment.float() for moment in encode_moments(self.module, values))
        if not self._has_variance:
            logvar = torch.full_like(mean, NO_VARIANCE)
        if pixels.ndim == 5:
            self._check_kept(pixels.shape[2], mean.shape[2])
        elif mean.ndim == 5:
            mean, logvar = mean[:, :, 0], logvar[:, :, 0]
        return Posterior(mean, logvar)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pixels (B, 3, H, W), or (B, C, t, h, w) to (B, 3, T, H, W),
        clamped to [-1, 1].

        Raises:
            UserError: a video's latents for an autoencoder of pictures, or ones of which it makes
                another number of frames than it encodes.
        """
        values, stride = self._input(latents), self.temporal_downsampling
        if stride is None:
            pixels = decode_pixels(self.module, values)
        else:
            pixels = decode_frames(self.module, values, stride)
        if pixels.ndim > latents.ndim:
            pixels = pixels[:, :, 0]
        return pixels.float().clamp(-1, 1)

    def _input(self, values: Tensor) -> Tensor:
        """Pixels or latents as the module takes them: a module of videos takes nothing else."""
        of_videos = self.temporal_downsampling is not None
        if values.ndim == 5 and not of_videos:
            raise UserError(
                f"a video of {values.shape[2]} frames for an autoencoder of pictures: give it the "
                "frames one by one, or take an autoencoder of videos"
            )
        values = values[:, :, None] if of_videos and values.ndim == 4 else values
        return values.to(_device(self.module), _dtype(self.module))

    def _check_length(self, frames: int) -> None:
        """diffusers' autoencoders drop or repeat left-over frames, or fail in their own words."""
        stride = self.temporal_downsampling or 1
        if (frames - 1) % stride:
            raise UserError(
                f"a video of {frames} frames: {type(self.module).__name__} takes 1 more than a "
                f"multiple of {stride} frames"
            )

    def _check_kept(self, frames: int, latent_frames: int) -> None:
        """Some take more frames at once than one of latents stands for, and drop the others."""
        kept = 1 + (latent_frames - 1) * (self.temporal_downsampling or 1)
        if kept != frames:
            raise UserError(
                f"a video of {frames} frames: this autoencoder would drop all after frame {kept}; "
                "give it a few frames more"
            )


@dataclass(frozen=True)
class AutoencoderFacts:
    """What is to be known of an `Autoencoder` by who does not use it; attributes as there."""

    digest: str
    downsampling: int
    temporal_downsampling: int | None
    latents_mean: tuple[float, ...] | None
    latents_std: tuple[float, ...] | None


def autoencoder_facts(uri: str) -> AutoencoderFacts:
    """The facts of an autoencoder, from its files alone where they tell: diffusers takes seconds
    to import. Damaged weights are then found by who loads them.

    Raises:
        UserError: nothing there, not an autoencoder of diffusers, or pickled weights.
    """
    there = uri != "identity" and exists(join(uri, "config.json"))
    config = read_json(join(uri, "config.json")) if there else {}
    if config.get("_class_name") != "AutoencoderKL":  # others shrink pictures in ways of their own
        model = load_autoencoder(uri)
        return AutoencoderFacts(
            model.digest,
            model.downsampling,
            model.temporal_downsampling,
            model.latents_mean,
            model.latents_std,
        )
    with local_copy(uri) as folder:
        _check_weights(folder, uri, "AutoencoderKL")
        told = (config.get("latents_mean"), config.get("latents_std"))
        mean, std = per_channel(*told, config.get("latent_channels", 4)) or (None, None)
        downsampling = 2 ** (len(config.get("block_out_channels", (64,))) - 1)
        return AutoencoderFacts(autoencoder_digest(folder), downsampling, None, mean, std)


def load_autoencoder(
    uri: str,
    device: str | torch.device = "cpu",
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Autoencoder:
    """Load "identity" or a diffusers autoencoder directory, local or remote.

    Args:
        uri: the directory's.
        device: to compute on.
        channels_last: the memory layout in which 2-D convolutions are fastest; it rounds otherwise.
        dtype: of weights and computation; pixels and latents are float32 whatever it is.

    Raises:
        UserError: nothing there, not an autoencoder of diffusers, or pickled weights.
    """
    if uri == "identity":
        return IdentityAutoencoder()
    if not exists(join(uri, "config.json")):
        raise UserError(
            f"no autoencoder at {uri} (no config.json there); train one with `ldm autoencoder`, or "
            "set autoencoder.source to a diffusers autoencoder directory or to identity"
        )
    with local_copy(uri) as folder:
        module = _load_module(folder, uri, dtype)
        model = DiffusersAutoencoder(module, autoencoder_digest(folder), device)
    if channels_last and model.temporal_downsampling is None:
        model.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def autoencoder_digest(folder: Path) -> str:
    """Digest of weights and configuration; statistics and cards beside them do not count."""
    config = json.loads((folder / "config.json").read_text())
    for key in ("latents_mean", "latents_std", "_diffusers_version", "_name_or_path"):
        config.pop(key, None)
    text = json.dumps(config, sort_keys=True) + folder_digest(folder, ".safetensors")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _load_module(folder: Path, uri: str, dtype: torch.dtype) -> torch.nn.Module:
    import diffusers

    name = json.loads((folder / "config.json").read_text()).get("_class_name", "")
    known = name.startswith(("Autoencoder", "AsymmetricAutoencoder", "VQ"))
    kind = getattr(diffusers, name, None) if known else None
    if kind is None:
        raise UserError(
            f"{uri} holds a {name or 'model without _class_name'}, not an autoencoder of "
            "diffusers; expected a folder that `AutoencoderKL.save_pretrained` or a relative wrote"
        )
    _check_weights(folder, uri, name)
    try:
        module: torch.nn.Module = kind.from_pretrained(
            folder,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
        )
    except ValueError as error:  # of a class that is not loaded so, or of other weights
        raise UserError(f"{uri} holds a {name} that is not loaded ({error}): {OTHERS}") from error
    return module


def _check_weights(folder: Path, uri: str, name: str) -> None:
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{uri} has no .safetensors weights, and pickled ones are never loaded; where you "
            f"trust them, load them with diffusers' {name} and save_pretrained() to a new folder"
        )


def _device(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device


def _dtype(module: torch.nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
