"""How each family of diffusers' models is called, and what its answer means.

A call takes (model, x_t, timestep, cond) and returns the prediction in the shape of x_t. Before it,
a clock turns our time into the family's timestep: 1000 t, t, 1 - t or a row of its table of betas.
Where a family's pipeline has no mask for text, its models have learnt to read the padding.

Shapes: B batch, C channels, T x H x W latent size, L text tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from torch import Tensor

from ldm_core.backbones.diffusers_tables import prediction_of, table_of
from ldm_core.backbones.embeddings import patchify, unpatchify
from ldm_core.conditioning.text import TextCondition
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess, Process
from ldm_core.diffusion.variance_preserving import linear_betas, scaled_linear_betas
from ldm_core.errors import UserError


@dataclass(frozen=True)
class Family:
    """A way to call a model.

    Attributes:
        call: (model, x_t, timestep, cond, options of its own) -> prediction.
        channels: of the latents it takes.
        clock: our time (B,) -> its timestep (B,).
        process, prediction: how the prediction is to be read.
        takes_labels: whether a condition is labels (B,) and not captions.
    """

    call: Callable[..., Tensor]
    channels: int
    clock: Callable[[Tensor], Tensor]
    process: Process
    prediction: Prediction
    takes_labels: bool = False


def family_of(model: torch.nn.Module, scheduler: Mapping[str, Any]) -> Family:
    """The family of a model.

    Args:
        model: of one of the classes below.
        scheduler: content of its `scheduler_config.json`; read by families with a table of betas,
            for what it says of the table and of the prediction.

    Raises:
        UserError: another class, or a table or prediction that is not known here.
    """
    channels = getattr(model, "config", {}).get("in_channels", 0)

    def flow(call: Callable[..., Tensor], clock: Callable[[Tensor], Tensor]) -> Family:
        return Family(call, channels, clock, FlowProcess(), Prediction.VELOCITY)

    def table(call: Callable[..., Tensor], default: Tensor) -> Family:
        process = table_of(scheduler, default)
        return Family(call, channels, process.step_of, process, prediction_of(scheduler))

    match model:
        case SD3Transformer2DModel():
            return flow(call_sd3, thousandths)
        case FluxTransformer2DModel():
            return replace(flow(call_flux, same), channels=channels // 4)  # 2 x 2 packed
        case WanTransformer3DModel():
            return flow(call_wan, thousandths)
        case HunyuanVideoTransformer3DModel():
            return flow(call_hunyuan_video, thousandths)
        case LTXVideoTransformer3DModel():
            return flow(call_ltx, thousandths)
        case Lumina2Transformer2DModel():
            return flow(call_lumina2, from_noise)
        case DiTTransformer2DModel():
            return replace(table(call_dit, linear_betas()), takes_labels=True)
        case PixArtTransformer2DModel():
            return table(call_pixart, linear_betas())
        case UNet2DConditionModel():
            return table(call_unet, scaled_linear_betas())
    raise UserError(
        f"{type(model).__name__} is not among the models with a call here: DiT, PixArt, SD3, Flux, "
        "Lumina2, Wan, HunyuanVideo, LTX transformers and UNet2DConditionModel"
    )


def same(t: Tensor) -> Tensor:
    """t, where the model itself multiplies by 1000."""
    return t


def thousandths(t: Tensor) -> Tensor:
    """1000 t."""
    return 1000 * t


def from_noise(t: Tensor) -> Tensor:
    """1 - t, where the data is at 1."""
    return 1 - t


def _all_read(mask: Tensor) -> bool:
    """Whether no token is padding; of a mask without content (meta device) it is taken so."""
    return mask.is_meta or bool(mask.all())


def call_dit(model: Any, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
    """DiT: a class label (B,) instead of a caption; learned variances are dropped."""
    return model(x, timestep, labels, return_dict=False)[0][:, : x.shape[1]]


def call_pixart(
    model: Any, x: Tensor, timestep: Tensor, cond: TextCondition, downsampling: int = 8
) -> Tensor:
    """PixArt: masked captions; alpha at 1024 pixels is told size and aspect ratio in pixels."""
    height, width = (downsampling * size for size in x.shape[-2:])
    size = x.new_tensor([height, width]).expand(len(x), 2)
    known = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
    out = model(
        x,
        cond.tokens.to(x),
        timestep,
        added_cond_kwargs=known if model.use_additional_conditions else None,
        encoder_attention_mask=cond.mask,
        return_dict=False,
    )[0]
    return out[:, : x.shape[1]]  # without learned variances


def call_sd3(model: Any, x: Tensor, timestep: Tensor, cond: TextCondition) -> Tensor:
    """SD3: CLIP's tokens and T5's in one sequence, all of them read.

    Raises:
        UserError: a padded caption, since the model has no mask.
    """
    if not _all_read(cond.mask):
        raise UserError(
            f"SD3 reads every token it is given, but only {int(cond.mask.sum())} of "
            f"{cond.mask.numel()} are captions: embed all captions at one length, padding included"
        )
    return model(x, cond.tokens.to(x), cond.pooled.to(x), timestep, return_dict=False)[0]


def call_flux(
    model: Any, x: Tensor, timestep: Tensor, cond: TextCondition, guidance: float = 3.5
) -> Tensor:
    """Flux: latents packed 2 x 2; its pipeline reads the padding, here masked tokens are not read.

    `guidance` is told to models distilled with it (dev), others have no use for it.
    """
    packed, (_, h, w) = patchify(x, 2)
    axes = [torch.arange(size, device=x.device) for size in (1, h, w)]
    places = torch.cartesian_prod(*axes)  # (h w, 3)
    attention = None
    if not _all_read(cond.mask):  # a mask keeps the attention from its fastest kernels
        attention = {"attention_mask": F.pad(cond.mask, (0, h * w), value=True)[:, None, None]}
    out = model(
        packed,
        cond.tokens.to(x),
        cond.pooled.to(x),
        timestep,
        img_ids=places,
        txt_ids=places.new_zeros(cond.tokens.shape[1], 3),
        guidance=x.new_full((len(x),), guidance) if model.config.guidance_embeds else None,
        joint_attention_kwargs=attention,
        return_dict=False,
    )[0]
    return unpatchify(out, (1, h, w), 2).squeeze(2)


def call_lumina2(model: Any, x: Tensor, timestep: Tensor, cond: TextCondition) -> Tensor:
    """Lumina 2: its velocity points from noise to data."""
    mask = torch.ones_like(cond.mask, device="cpu") if cond.mask.is_meta else cond.mask
    return -model(x, timestep, cond.tokens.to(x), mask, return_dict=False)[0]


def call_wan(
    model: Any, x: Tensor, timestep: Tensor, cond: TextCondition, max_tokens: int = 512
) -> Tensor:
    """Wan: videos; captions are zeros up to `max_tokens`, which are read.

    Raises:
        UserError: a longer caption.
    """
    if cond.tokens.shape[1] > max_tokens:
        raise UserError(f"{cond.tokens.shape[1]} tokens of text are more than Wan's {max_tokens}")
    tokens = (cond.tokens * cond.mask[..., None]).to(x)
    tokens = F.pad(tokens, (0, 0, 0, max_tokens - tokens.shape[1]))
    return model(x, timestep, tokens, return_dict=False)[0]


def call_hunyuan_video(
    model: Any, x: Tensor, timestep: Tensor, cond: TextCondition, guidance: float = 6.0
) -> Tensor:
    """HunyuanVideo: masked captions; `guidance` is told to models distilled with it."""
    embedded = model.config.guidance_embeds
    return model(
        x,
        timestep,
        cond.tokens.to(x),
        cond.mask,
        cond.pooled.to(x),
        guidance=x.new_full((len(x),), 1000 * guidance) if embedded else None,
        return_dict=False,
    )[0]


def call_ltx(
    model: Any,
    x: Tensor,
    timestep: Tensor,
    cond: TextCondition,
    frame_rate: float = 25.0,
    downsampling: tuple[int, int] = (8, 32),
) -> Tensor:
    """LTX: a token per latent, placed in seconds and pixels by `downsampling` in time and space."""
    tokens, (frames, h, w) = patchify(x, 1)
    seconds, pixels = downsampling[0] / frame_rate, downsampling[1]
    out = model(
        tokens,
        cond.tokens.to(x),
        timestep,
        cond.mask,
        num_frames=frames,
        height=h,
        width=w,
        rope_interpolation_scale=(seconds, pixels, pixels),
        return_dict=False,
    )[0]
    return unpatchify(out, (frames, h, w), 1)


def call_unet(
    model: Any, x: Tensor, timestep: Tensor, cond: TextCondition, downsampling: int = 8
) -> Tensor:
    """Stable Diffusion 1, 2 and XL; XL is told the size in pixels, as original and as target."""
    known = None
    if model.config.addition_embed_type == "text_time":
        height, width = (downsampling * size for size in x.shape[-2:])
        sizes = x.new_tensor([height, width, 0, 0, height, width]).expand(len(x), 6)
        known = {"text_embeds": cond.pooled.to(x), "time_ids": sizes}
    return model(
        x,
        timestep,
        cond.tokens.to(x),
        added_cond_kwargs=known,
        encoder_attention_mask=cond.mask,
        return_dict=False,
    )[0]
