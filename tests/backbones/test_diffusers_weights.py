"""With the same weights, the same output as diffusers' classes."""

import pytest
import tiny_diffusers as tiny
import torch
from torch import nn

from ldm_core.backbones import diffusers_weights
from ldm_core.backbones.diffusers_adapter import DiffusersNetwork
from ldm_core.backbones.diffusers_weights import class_dit_from, mmdit_from_flux, mmdit_from_sd3
from ldm_core.backbones.mmdit import MMDiT, MMDiTConfig
from ldm_core.errors import UserError

T = torch.tensor([0.25, 0.9])
COND = tiny.captions()


def close(ours, theirs):
    assert theirs.std() > 0.05  # there is something to compare
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("config", [{}, {"num_layers": 3, "norm_eps": 1e-3, "patch_size": 1}])
def test_dit(config):
    model, x, labels = tiny.dit(**config), tiny.latents("dit"), tiny.condition("dit")
    theirs = model(x, 1000 * T - 1, labels).sample[:, :4]
    close(class_dit_from(model)(x, T, labels), theirs)


@torch.no_grad()
def test_dit_of_another_size():
    model, labels = tiny.dit(), tiny.condition("dit")
    x = torch.randn(2, 4, 12, 12)
    close(class_dit_from(model)(x, T, labels), model(x, 1000 * T - 1, labels).sample[:, :4])


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
@pytest.mark.parametrize("size", [(8, 8), (12, 6), (24, 2)])
def test_sd3(qk_norm, size):
    model, x = tiny.sd3(qk_norm=qk_norm, num_layers=3), torch.randn(2, 4, *size)
    theirs = model(x, COND.tokens, COND.pooled, 1000 * T).sample
    close(mmdit_from_sd3(model)(x, T, COND), theirs)


@torch.no_grad()
@pytest.mark.parametrize(("joint", "single"), [(1, 1), (2, 3)])
def test_flux(joint, single):
    model, x = tiny.flux(num_layers=joint, num_single_layers=single), torch.randn(2, 4, 8, 12)
    packed = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(2, 24, 16)
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(6.0))
    theirs = model(
        packed, COND.tokens, COND.pooled, T, img_ids=places, txt_ids=torch.zeros(tiny.L, 3)
    ).sample
    ours = mmdit_from_flux(model)(x, T, COND)
    ours = ours.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(2, 24, 16)
    close(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "converted"),
    [("dit", class_dit_from), ("sd3", mmdit_from_sd3), ("flux", mmdit_from_flux)],
)
def test_both_ways_to_published_weights_tell_the_same_time(name, converted):
    """The model itself behind the adapter's clock, and its weights in our network."""
    model, x, cond = tiny.FAMILIES[name](), tiny.latents(name), tiny.condition(name)
    close(converted(model)(x, T, cond), DiffusersNetwork(model)(x, T, cond))


class PlainText(nn.Module):
    """In place of HunyuanVideo's refiner of captions: one layer, as MMDiT has it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(tiny.TEXT, 16)

    def forward(self, tokens, timestep, mask):
        return self.linear(tokens)


def video_mmdit(model):
    """HunyuanVideo is Flux in three dimensions."""
    weights = diffusers_weights
    order = weights.half_apart(2, 8)
    state = weights._conditions(model) | weights._named("patch_embedding", model.x_embedder.proj)
    modulations = weights._joint_modulations(model)
    modulations += [block.norm.linear for block in model.single_transformer_blocks]
    state |= weights._modulation(modulations, swapped=[model.norm_out.linear])
    state |= weights._named("final", model.proj_out)
    for i, block in enumerate(model.transformer_blocks):
        state |= weights._joint_block(f"blocks.{i}", block, order)
    for i, block in enumerate(model.single_transformer_blocks):
        state |= weights._single_block(f"single_blocks.{i}", block, order)
    config = MMDiTConfig(
        in_channels=4, patch_size=2, width=16, depth=2, single_depth=2, heads=2, rotary=(2, 2, 4),
        rotary_base=256.0, text_width=tiny.TEXT, pooled_width=tiny.POOLED,
    )  # fmt: skip
    return weights._loaded(MMDiT(config), state)


@torch.no_grad()
def test_video_with_padded_captions():
    model = tiny.hunyuan_video(num_layers=2, num_single_layers=2, guidance_embeds=False)
    model.context_embedder = tiny.shaken(PlainText())
    cond, x = tiny.captions((5, 2)), tiny.latents("hunyuan_video")
    theirs = model(x, 1000 * T, cond.tokens, cond.mask, cond.pooled).sample
    model.context_embedder = model.context_embedder.linear
    close(video_mmdit(model)(x, T, cond), theirs)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "careless", "check"),
    [
        ("half_apart", lambda heads, k: torch.arange(heads * k), lambda: test_flux(1, 1)),
        ("_final", lambda layer, p, c: named("final", layer), lambda: test_sd3(None, (8, 8))),
        ("_modulation", lambda straight, swapped: modulation([*straight, *swapped], []),
         lambda: test_sd3(None, (8, 8))),
    ],
    ids=["pairs", "patches", "scale and shift"],
)  # fmt: skip
def test_every_change_of_order_is_needed(name, careless, check, monkeypatch):
    check()
    monkeypatch.setattr(diffusers_weights, name, careless)
    with pytest.raises(AssertionError, match="not close"):
        check()


named, modulation = diffusers_weights._named, diffusers_weights._modulation


def test_what_mmdit_lacks_is_refused():
    with pytest.raises(ValueError, match=r"blocks \(0,\) have a second attention"):
        mmdit_from_sd3(tiny.sd3(dual_attention_layers=(0,)))
    with pytest.raises(ValueError, match="guidance"):
        mmdit_from_flux(tiny.flux(guidance_embeds=True))


@pytest.mark.parametrize("part", ["timestep_embedder.linear_1.bias", "class_embedder"])
def test_blocks_that_embed_otherwise_are_refused(part):
    model = tiny.dit(num_layers=3)
    parameters = dict(model.transformer_blocks[2].norm1.emb.named_parameters())
    name = next(name for name in parameters if name.startswith(part))
    parameters[name].data += 1e-3
    with pytest.raises(UserError, match=rf"block 2 .* block 0 \({name} differs\).*Diffusers"):
        class_dit_from(model)
