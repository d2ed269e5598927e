"""Pixels <-> latents, for autoencoders in diffusers' directory layout: of pictures, and causal ones
of videos.

Shapes: B batch, H W pixels, h w latents (h = H / downsampling), C latent channels; of a video T
frames and t = 1 + (T - 1) / temporal downsampling frames of latents, the first of one frame alone.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm_core.errors import UserError
from ldm_core.files import exists, folder_digest, join, local_copy, read_json

_PROBE = 24  # frames after the first: a multiple of temporal downsamplings 1 to 4, 6, 8 and 12


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
        latents_mean, latents_std: per channel, if the directory's config has them.
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
        return Posterior(pixels, torch.full_like(pixels, -60.0))

    def decode(self, latents: Tensor) -> Tensor:
        """The latents themselves, clamped to [-1, 1]."""
        return latents.clamp(-1, 1)


class DiffusersAutoencoder:
    """A diffusers autoencoder (AutoencoderKL, AutoencoderDC, AutoencoderKLWan, …).

    One of videos takes pictures too, as videos of one frame.
    """

    def __init__(self, module: torch.nn.Module, digest: str, device: str | torch.device) -> None:
        self.module = module.eval().requires_grad_(False).to(device)
        self.digest = digest
        config: Any = module.config
        self.temporal_downsampling = _temporal_downsampling(self.module)
        probe = self.encode(torch.zeros(1, 3, 64, 64)).mean
        self.channels = probe.shape[1]
        self.downsampling = 64 // probe.shape[-1]
        self.latents_mean = _channels(config.get("latents_mean"))
        self.latents_std = _channels(config.get("latents_std"))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Posterior:
        """Pixels (B, 3, H, W) or (B, 3, T, H, W) in [-1, 1] to the posterior, in float32.

        Raises:
            UserError: a video for an autoencoder of pictures, or one with frames left over.
        """
        module: Any = self.module
        out = module.encode(self._input(pixels))
        if hasattr(out, "latent_dist"):
            mean, logvar = out.latent_dist.mean, out.latent_dist.logvar
        else:  # deterministic autoencoders (DC, Tiny) have no posterior
            mean = out.latent if hasattr(out, "latent") else out.latents
            logvar = torch.full_like(mean, -60.0)
        if pixels.ndim == 5:
            self._check_frames(pixels.shape[2], mean.shape[2])
        elif mean.ndim == 5:
            mean, logvar = mean[:, :, 0], logvar[:, :, 0]
        return Posterior(mean.float(), logvar.float())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to pixels (B, 3, H, W), or (B, C, t, h, w) to (B, 3, T, H, W),
        clamped to [-1, 1].

        Raises:
            UserError: a video's latents for an autoencoder of pictures.
        """
        module: Any = self.module
        pixels: Tensor = module.decode(self._input(latents)).sample
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

    def _check_frames(self, frames: int, latent_frames: int) -> None:
        """diffusers' autoencoders drop left-over frames without a word."""
        stride = self.temporal_downsampling or 1
        if (latent_frames - 1) * stride != frames - 1:
            least = 1 + (latent_frames - 1) * stride
            raise UserError(
                f"a video of {frames} frames: this autoencoder would drop all after frame {least}; "
                f"give it 1 more than a multiple of {stride} frames"
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
        return AutoencoderFacts(
            autoencoder_digest(folder),
            2 ** (len(config.get("block_out_channels", (64,))) - 1),
            None,
            _channels(config.get("latents_mean")),
            _channels(config.get("latents_std")),
        )


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
    kind = getattr(diffusers, name, None) if name.startswith(("Autoencoder", "VQ")) else None
    if kind is None:
        raise UserError(
            f"{uri} holds a {name or 'model without _class_name'}, not an autoencoder of "
            "diffusers; expected a folder that `AutoencoderKL.save_pretrained` or a relative wrote"
        )
    _check_weights(folder, uri, name)
    module: torch.nn.Module = kind.from_pretrained(
        folder,
        torch_dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        low_cpu_mem_usage=False,
    )
    return module


def _check_weights(folder: Path, uri: str, name: str) -> None:
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{uri} has no .safetensors weights, and pickled ones are never loaded; where you "
            f"trust them, load them with diffusers' {name} and save_pretrained() to a new folder"
        )


def _temporal_downsampling(module: Any) -> int | None:
    """Frames per frame of latents, found by a probe; None where the encoder's convolutions are 2-D.

    Raises:
        UserError: the probe's frames are not counted as a causal autoencoder counts them.
    """
    convolutions = (torch.nn.Conv2d, torch.nn.Conv3d)
    first = next(part for part in module.encoder.modules() if isinstance(part, convolutions))
    if isinstance(first, torch.nn.Conv2d):
        return None
    probe = torch.zeros(1, 3, 1 + _PROBE, 64, 64, device=_device(module), dtype=_dtype(module))
    with torch.no_grad():
        later = module.encode(probe).latent_dist.mean.shape[2] - 1
    if later < 1 or _PROBE % later:
        raise UserError(
            f"{type(module).__name__} made {1 + later} frames of latents of {1 + _PROBE}, "
            "not one for the first and one for every few after it: take a causal video autoencoder"
        )
    return _PROBE // later


def _channels(values: Any) -> tuple[float, ...] | None:
    return tuple(float(v) for v in values) if values else None


def _device(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device


def _dtype(module: torch.nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
