"""How an autoencoder of diffusers is called, and what it makes of what it is given.

Its classes differ in what `encode` returns, in what `decode` asks for and in how frames are
counted; here is what they have in common. Shapes are those of `autoencoder.py`.
"""

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_core.errors import UserError

NO_VARIANCE = -60.0  # a log-variance whose deviation adds nothing to a mean in 32 bits
_FRAMES = 24  # after the first: a multiple of temporal downsamplings 1 to 4, 6, 8 and 12
_SIDE = 64  # a multiple of the downsampling of all but some of AutoencoderDC, which tell theirs
OTHERS = "take one of pictures, as AutoencoderKL, or a causal one of videos, as AutoencoderKLWan"
_FAILURES = (  # of the many ways in which diffusers' classes refuse what they are not made for
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
)

Channels = tuple[float, ...]


@dataclass(frozen=True)
class Measures:
    """What a probe finds; attributes as of `Autoencoder`.

    Attributes:
        has_variance: whether its posterior tells one.
    """

    channels: int
    downsampling: int
    temporal_downsampling: int | None
    has_variance: bool


@torch.no_grad()
def encode_moments(module: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of what the module takes as it is; one without gets `NO_VARIANCE`."""
    _forget(module)
    out = module.encode(pixels)
    posterior: Any = getattr(out, "latent_dist", None)
    if hasattr(posterior, "logvar"):
        return posterior.mean, posterior.logvar
    if posterior is not None:  # of Cosmos, which is deterministic
        mean = posterior.mode()
    else:  # of DC, Tiny and VQ, which are too
        mean = out.latent if hasattr(out, "latent") else out.latents
    return mean, torch.full_like(mean, NO_VARIANCE)


@torch.no_grad()
def decode_pixels(module: Any, latents: Tensor) -> Tensor:
    """Pixels of latents that the module takes as they are."""
    _forget(module)
    pixels: Tensor = module.decode(latents, **_decoding(module, latents)).sample
    return pixels


@torch.no_grad()
def decode_frames(module: Any, latents: Tensor, stride: int) -> Tensor:
    """Pixels (B, 3, 1 + (t - 1) * stride, H, W) of latents (B, C, t, h, w).

    CogVideoX's decoder makes one frame of the first frame of latents where their number is odd, and
    as many as of the others where it is even; so the last is repeated, and its frames are dropped.

    Raises:
        UserError: another number of frames even so.
    """
    frames = 1 + (latents.shape[2] - 1) * stride
    pixels = decode_pixels(module, latents)
    if pixels.shape[2] != frames:
        longer = torch.cat([latents, latents[:, :, -1:]], dim=2)
        pixels = decode_pixels(module, longer)[:, :, :frames]
    if pixels.shape[2] != frames:
        raise UserError(
            f"{type(module).__name__} made {pixels.shape[2]} frames of {latents.shape[2]} of "
            f"latents, not {frames}: decode them with diffusers"
        )
    return pixels


def measure(module: Any) -> Measures:
    """Encode a picture, and a video where it takes them, to see what comes of it.

    Raises:
        UserError: it takes neither, or makes something else of them than the other classes do.
    """
    try:
        return _measured(module)
    except (torch.OutOfMemoryError, UserError):
        raise
    except _FAILURES as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        weights = next(module.parameters())
        exact = weights.dtype == torch.float32
        remedy = OTHERS if exact else f"set encode.precision=fp32 for {weights.device}, or {OTHERS}"
        raise UserError(
            f"{type(module).__name__} does not encode pictures or videos here ({told}): {remedy}"
        ) from error


def own_statistics(module: Any, channels: int) -> tuple[Channels, Channels] | None:
    """Mean and deviation of each channel, of the configuration or of buffers, as LTX has them.

    Those that nobody has set do not count, nor those of every frame, as Cosmos has them.
    """
    buffers = dict(module.named_buffers())
    told = [buffers.get(name) for name in ("latents_mean", "latents_std")]
    mean, std = (None if values is None else values.float().tolist() for values in told)
    if mean == [0.0] * channels and std == [1.0] * channels:
        return None
    config = module.config
    return per_channel(
        config.get("latents_mean") or mean, config.get("latents_std") or std, channels
    )


def per_channel(mean: Any, std: Any, channels: int) -> tuple[Channels, Channels] | None:
    """Both as tuples, if there is one value for each channel."""
    if not mean or not std or len(mean) != channels or len(std) != channels:
        return None
    return tuple(map(float, mean)), tuple(map(float, std))


def _measured(module: Any) -> Measures:
    of_videos = _of_videos(module)
    side = max(_SIDE, getattr(module, "spatial_compression_ratio", 1))
    shape = (1, side, 2 * side) if of_videos else (side, 2 * side)
    mean, logvar = _moments_of_two(module, _ramp(module, 2, *shape))
    down = side // mean.shape[-2]
    if mean.shape[-1] * down != 2 * side or mean.shape[-2] * down != side:
        raise UserError(
            f"{type(module).__name__} made {mean.shape[-2]} x {mean.shape[-1]} latents of "
            f"{side} x {2 * side} pixels, which keeps no shape: {OTHERS}"
        )
    stride = _stride_in_time(module) if of_videos else None
    # KVAE's tells zeros, which would be noise as strong as the latents, of a variance it drops
    return Measures(mean.shape[1], down, stride, bool(logvar.any()))


def _moments_of_two(module: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Of a batch; HunyuanVideo 1.5's attention takes one video at a time, so it is to slice."""
    try:
        return encode_moments(module, pixels)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        if not hasattr(module, "use_slicing"):
            raise
        module.use_slicing = True
        return encode_moments(module, pixels)


def _of_videos(module: Any) -> bool:
    """Whether its encoder's convolutions are 3-D."""
    kinds = (torch.nn.Conv2d, torch.nn.Conv3d)
    first = next(part for part in module.encoder.modules() if isinstance(part, kinds))
    return isinstance(first, torch.nn.Conv3d)


def _stride_in_time(module: Any) -> int:
    """Frames per frame of latents after the first.

    Raises:
        UserError: frames are not counted as a causal autoencoder counts them.
    """
    later = _latent_frames(module, 1 + _FRAMES) - 1
    if later < 1 or _FRAMES % later:
        raise _not_causal(module, 1 + _FRAMES, 1 + later)
    stride = _FRAMES // later
    some = stride * math.ceil(8 / stride)  # one that encodes in clips counts fewer of few frames
    found = _latent_frames(module, 1 + some)
    if found != 1 + some // stride:
        raise _not_causal(module, 1 + some, found)
    return stride


def _latent_frames(module: Any, frames: int) -> int:
    return encode_moments(module, _ramp(module, 1, frames, _SIDE, _SIDE))[0].shape[2]


def _not_causal(module: Any, frames: int, found: int) -> UserError:
    return UserError(
        f"{type(module).__name__} made {found} frames of latents of {frames}, "
        "not one for the first and one for every few after it: take a causal video autoencoder"
    )


def _ramp(module: Any, count: int, *shape: int) -> Tensor:
    """Pixels (count, 3, *shape) from black to white, of the module's device and precision."""
    weights = next(module.parameters())
    row = torch.linspace(-1, 1, shape[-1], device=weights.device, dtype=weights.dtype)
    return row.repeat(count, 3, *shape[:-1], 1)


def _decoding(module: Any, latents: Tensor) -> dict[str, Any]:
    """What `decode` asks for beside latents."""
    asked = inspect.signature(module.decode).parameters
    if "num_frames" in asked:  # of AutoencoderKLTemporalDecoder: every picture by itself
        return {"num_frames": 1}
    if module.config.get("timestep_conditioning"):  # of LTX: a time of 0, its pipelines' default
        return {"temb": latents.new_zeros(len(latents))}
    return {}


def _forget(module: Any) -> None:
    """Drop the frames that Magvit's convolutions keep when a call has failed midway."""
    if hasattr(module, "_clear_conv_cache"):
        module._clear_conv_cache()
