import pytest
import torch
from tiny_diffusers import shaken

from ldm_core.backbones.mmdit import MMDiT, MMDiTConfig
from ldm_core.conditioning.text import TextCondition

PICTURES = MMDiTConfig(
    in_channels=3, patch_size=2, width=32, depth=2, heads=2, text_width=10, pooled_width=6,
    qk_norm=False, position_grid=8, position_span=8,
)  # fmt: skip
NORMALISED = PICTURES.model_copy(update={"qk_norm": True})
VIDEOS = PICTURES.model_copy(update={"qk_norm": True, "rotary": (4, 6, 6)})
SINGLE = VIDEOS.model_copy(update={"single_depth": 2})
EVERY = pytest.mark.parametrize(
    "config", [PICTURES, NORMALISED, VIDEOS, SINGLE], ids=["pictures", "norm", "videos", "single"]
)
B = 4


def opened(config):
    return shaken(MMDiT(config).double(), size=0.1)


def inputs(size=(8, 8), lengths=(5, 2, 0, 4), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    cond = TextCondition(randn(B, max(lengths), 10) * mask[..., None], mask, randn(B, 6))
    return randn(B, 3, *size), torch.rand(B, generator=generator, dtype=dtype), cond


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@EVERY
def test_starts_at_zero(config):
    x_t, t, cond = inputs(dtype=torch.float32)
    assert torch.equal(MMDiT(config)(x_t, t, cond), torch.zeros_like(x_t))


@EVERY
def test_padding_changes_nothing(config):
    network, (x_t, t, cond) = opened(config), inputs()
    out = network(x_t, t, cond)
    garbage = torch.where(cond.mask[..., None], cond.tokens, torch.randn_like(cond.tokens))
    close(network(x_t, t, TextCondition(garbage, cond.mask, cond.pooled)), out)
    close(network(x_t, t, cond.pad_to(9)), out)
    alone = TextCondition(cond.tokens[1:2, :2], cond.mask[1:2, :2], cond.pooled[1:2])
    close(network(x_t[1:2], t[1:2], alone), out[1:2])


@EVERY
def test_samples_are_independent_of_their_order(config):
    network, (x_t, t, cond) = opened(config), inputs()
    order = torch.tensor([2, 0, 3, 1])
    close(network(x_t[order], t[order], cond[order]), network(x_t, t, cond)[order])


@EVERY
def test_captions_and_times_matter(config):
    network, (x_t, t, cond) = opened(config), inputs()
    out = network(x_t, t, cond)
    tokens = TextCondition(cond.tokens.flip(2), cond.mask, cond.pooled)
    pooled = TextCondition(cond.tokens, cond.mask, cond.pooled.flip(0))
    for other in (network(x_t, t, tokens), network(x_t, t, pooled), network(x_t, 1 - t, cond)):
        assert (other - out)[0].abs().max() > 1e-3


@EVERY
def test_gradient_reaches_every_parameter(config):
    network, (x_t, t, cond) = opened(config), inputs()
    network(x_t, t, cond).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("config", [VIDEOS, SINGLE], ids=["videos", "single"])
def test_a_picture_is_a_video_of_one_frame(config):
    network, (x_t, t, cond) = opened(config), inputs()
    close(network(x_t[:, :, None], t, cond)[:, :, 0], network(x_t, t, cond))


@pytest.mark.parametrize("config", [VIDEOS, SINGLE], ids=["videos", "single"])
def test_frames_are_told_apart_by_their_order(config):
    """Turning the video around is another video, and every frame sees every other."""
    network, (x_t, t, cond) = opened(config), inputs((3, 4, 6))
    out = network(x_t, t, cond)
    assert out.shape == x_t.shape
    assert (network(x_t.flip(2), t, cond).flip(2) - out).abs().max() > 1e-4
    other = x_t.clone()
    other[:, :, 2] += 1
    assert ((network(other, t, cond) - out).abs().amax(dim=(1, 3, 4)) > 1e-6).all()


@pytest.mark.parametrize("config", [PICTURES, VIDEOS], ids=["pictures", "videos"])
def test_a_patch_comes_back_where_it_was(config):
    network, (x_t, t, cond) = opened(config), inputs((6, 12))
    for block in network.blocks:
        torch.nn.init.zeros_(block.image.out.weight)  # image tokens no longer see one another
    other = x_t.clone()
    other[..., 2:4, 6:8] += 1
    moved = (network(other, t, cond) - network(x_t, t, cond)).abs().amax(dim=(0, 1)) > 1e-12
    assert moved[2:4, 6:8].all()
    assert moved.sum() == 4


@pytest.mark.parametrize("config", [NORMALISED, SINGLE], ids=["norm", "single"])
def test_autocast_stays_near(config):
    network, (x_t, t, cond) = opened(config).float(), inputs(dtype=torch.float32)
    expected = network(x_t, t, cond)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x_t, t, cond)
    assert (out - expected).std() < 0.05 * expected.std()


def test_what_fixed_positions_cannot_place_is_refused():
    x_t, t, cond = inputs((18, 4))
    with pytest.raises(ValueError, match=r"1 frames of 9 x 2 .* 8 x 8: set `rotary`"):
        opened(PICTURES)(x_t, t, cond)
    x_t, t, cond = inputs((2, 4, 4))
    with pytest.raises(ValueError, match=r"2 frames of 2 x 2"):
        opened(PICTURES)(x_t, t, cond)


def test_angles_that_do_not_fill_a_head_are_refused():
    with pytest.raises(ValueError, match=r"rotary \(4, 4, 4\) .* head width 16"):
        MMDiTConfig.model_validate({**PICTURES.model_dump(), "rotary": (4, 4, 4)})


def test_another_number_of_channels_is_refused_by_both():
    x_t, t, cond = inputs()
    with pytest.raises(ValueError, match="latents of 2 channels for a network of 3"):
        opened(PICTURES)(x_t[:, :2], t, cond)
