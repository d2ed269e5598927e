import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ldm_core.backbones.dit import DiT, DiTConfig, forward_flops
from ldm_core.conditioning.text import TextCondition
from ldm_core.errors import UserError

SMALL = DiTConfig(
    in_channels=3, latent_size=(8, 8), patch_size=2, width=32, depth=2, heads=2,
    text_width=10, pooled_width=6,
)  # fmt: skip
FLOW_MAP = SMALL.model_copy(update={"flow_map": True})
VIDEO = SMALL.model_copy(update={"frame_pairs": 4})
WITHOUT_NORM = SMALL.model_copy(update={"qk_norm": False})
B = 4


def opened(config, seed=0):
    """A network in float64 whose zero-initialised parts are not zero."""
    torch.manual_seed(seed)
    network = DiT(config).double()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network


def inputs(size=(8, 8), lengths=(5, 2, 0, 4), dtype=torch.float64):
    torch.manual_seed(1)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    tokens = torch.randn(B, max(lengths), 10, dtype=dtype) * mask[..., None]
    cond = TextCondition(tokens, mask, torch.randn(B, 6, dtype=dtype))
    return torch.randn(B, 3, *size, dtype=dtype), torch.rand(B, dtype=dtype), cond


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [SMALL, FLOW_MAP], ids=["one time", "two times"])
def test_starts_at_zero(config):
    x_t, t, cond = inputs(dtype=torch.float32)
    out = DiT(config)(x_t, t, cond)
    assert torch.equal(out, torch.zeros_like(x_t))


def test_padding_changes_nothing():
    network, (x_t, t, cond) = opened(SMALL), inputs()
    out = network(x_t, t, cond)
    garbage = torch.where(cond.mask[..., None], cond.tokens, torch.randn_like(cond.tokens))
    assert torch.equal(network(x_t, t, TextCondition(garbage, cond.mask, cond.pooled)), out)
    close(network(x_t, t, cond.pad_to(9)), out)
    alone = TextCondition(cond.tokens[1:2, :2], cond.mask[1:2, :2], cond.pooled[1:2])
    close(network(x_t[1:2], t[1:2], alone), out[1:2])


def test_captions_and_times_matter():
    network, (x_t, t, cond) = opened(SMALL), inputs()
    out = network(x_t, t, cond)
    tokens = TextCondition(cond.tokens.flip(2), cond.mask, cond.pooled)
    pooled = TextCondition(cond.tokens, cond.mask, cond.pooled.flip(0))
    for other in (network(x_t, t, tokens), network(x_t, t, pooled), network(x_t, 1 - t, cond)):
        assert (other - out)[0].abs().max() > 1e-3


def test_samples_are_independent_of_their_order():
    network, (x_t, t, cond) = opened(SMALL), inputs()
    order = torch.tensor([2, 0, 3, 1])
    close(network(x_t[order], t[order], cond[order]), network(x_t, t, cond)[order])


def test_a_patch_comes_back_where_it_was():
    network, (x_t, t, cond) = opened(SMALL), inputs((6, 12))
    for block in network.blocks:
        torch.nn.init.zeros_(block.attention.out.weight)  # tokens no longer see one another,
        torch.nn.init.zeros_(block.neighbours.kernel.weight)  # not even the nearest
    other = x_t.clone()
    other[..., 2:4, 6:8] += 1
    moved = (network(other, t, cond) - network(x_t, t, cond)).abs().amax(dim=(0, 1)) > 1e-12
    assert moved[2:4, 6:8].all()
    assert moved.sum() == 4


@pytest.mark.parametrize("size", [(4, 4), (6, 12), (16, 8)])
def test_other_sizes(size):
    x_t, t, cond = inputs(size)
    assert opened(SMALL)(x_t, t, cond).shape == x_t.shape


def test_indivisible_size_is_refused_by_name():
    x_t, t, cond = inputs((8, 7))
    with pytest.raises(UserError, match=r"8 x 7 .* 2 x 2"):
        opened(SMALL)(x_t, t, cond)


def test_indivisible_width_is_refused_by_name():
    with pytest.raises(ValueError, match=r"width 36 .* \(2\): try width 40"):
        DiTConfig.model_validate({**SMALL.model_dump(), "width": 36})


def test_config_survives_json():
    assert DiTConfig.model_validate_json(FLOW_MAP.model_dump_json()) == FLOW_MAP


def test_without_qk_norm_only_the_scales_are_gone():
    normal, plain, (x_t, t, cond) = opened(SMALL), DiT(WITHOUT_NORM).double(), inputs()
    weights = normal.state_dict()
    scales = {name for name in weights if name.endswith("attention.scale")}
    assert len(scales) == SMALL.depth + SMALL.text_depth
    assert weights.keys() - plain.state_dict().keys() == scales
    assert plain.state_dict().keys() <= weights.keys()
    plain.load_state_dict({name: w for name, w in weights.items() if name not in scales})
    assert (plain(x_t, t, cond) - normal(x_t, t, cond)).abs().max() > 1e-3


@pytest.mark.parametrize("config", [SMALL, WITHOUT_NORM], ids=["norm", "without"])
def test_the_norm_takes_the_length_of_queries_out(config):
    """Twice their weights are another picture only without it."""
    network, (x_t, t, cond) = opened(config), inputs()
    for block in network.blocks:
        block.attention.norm.eps = 0.0
    expected = network(x_t, t, cond)
    for block in network.blocks:
        block.attention.qkv.weight.data[: config.width] *= 2
    moved = (network(x_t, t, cond) - expected).abs().max()
    assert moved < 1e-12 if config.qk_norm else moved > 1e-3


def test_what_was_written_before_qk_norm_was_a_choice_has_it():
    written = SMALL.model_dump(exclude={"qk_norm"})
    assert DiTConfig.model_validate(written) == SMALL
    assert SMALL.qk_norm


@pytest.mark.parametrize("config", [FLOW_MAP, WITHOUT_NORM], ids=["flow map", "without norm"])
def test_gradient_reaches_every_parameter(config):
    network, (x_t, t, cond) = opened(config), inputs()
    network(x_t, t, cond, t / 2 if config.flow_map else None).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_second_time_needs_a_flow_map():
    x_t, t, cond = inputs()
    with pytest.raises(UserError, match="flow_map=True takes a second time"):
        opened(SMALL)(x_t, t, cond, r=t / 2)


def test_a_flow_map_starts_as_its_teacher():
    x_t, t, cond = inputs()
    teacher, student = opened(SMALL), DiT(FLOW_MAP).double()
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert all(name.startswith("interval_embedding.") for name in missing)
    assert unexpected == []
    expected = teacher(x_t, t, cond)
    for r in (None, t, t / 3, torch.zeros_like(t)):
        assert torch.equal(student(x_t, t, cond, r), expected)


def test_no_second_time_means_equal_times():
    network, (x_t, t, cond) = opened(FLOW_MAP), inputs()
    assert torch.equal(network(x_t, t, cond), network(x_t, t, cond, t))
    assert (network(x_t, t, cond, t / 2) - network(x_t, t, cond)).abs().max() > 1e-3


def test_autocast_stays_near():
    network, (x_t, t, cond) = opened(SMALL).float(), inputs(dtype=torch.float32)
    expected = network(x_t, t, cond)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x_t, t, cond)
    assert (out - expected).std() < 0.05 * expected.std()


def test_a_picture_is_a_video_of_one_frame():
    x_t, t, cond = inputs()
    for config in (SMALL, VIDEO):
        network = opened(config)
        close(network(x_t[:, :, None], t, cond)[:, :, 0], network(x_t, t, cond))


def test_frames_see_one_another_and_their_order():
    network, (x_t, t, cond) = opened(VIDEO), inputs()
    video = torch.stack([x_t, 2 * x_t, -x_t], dim=2)
    out = network(video, t, cond)
    assert out.shape == video.shape
    other = network(video[:, :, [0, 2, 1]], t, cond)[:, :, [0, 2, 1]]
    assert (other - out)[:, :, 0].abs().max() > 1e-3
    for block in network.blocks:
        torch.nn.init.zeros_(block.attention.out.weight)  # only there
    apart = [network(frame, t, cond) for frame in video.unbind(2)]
    close(network(video, t, cond), torch.stack(apart, dim=2))


def test_a_network_of_pictures_refuses_a_video():
    x_t, t, cond = inputs()
    with pytest.raises(UserError, match="a video of 2 frames for a network with frame_pairs 0"):
        opened(SMALL)(x_t[:, :, None].repeat(1, 1, 2, 1, 1), t, cond)
    for pairs in (3, 8):
        with pytest.raises(ValueError, match=f"frame_pairs {pairs} of a head's 8: .* up to 6"):
            DiTConfig.model_validate({**SMALL.model_dump(), "frame_pairs": pairs})


def test_flops_of_a_video_are_those_counted():
    network, (x_t, t, cond) = opened(VIDEO), inputs((4, 8))
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        network(x_t[:1, :, None].repeat(1, 1, 3, 1, 1), t[:1], cond[:1])
    counted = counter.get_total_flops()
    assert forward_flops(VIDEO, text_tokens=5, latent_size=(4, 8), frames=3) == counted


@pytest.mark.parametrize("config", [SMALL, FLOW_MAP], ids=["one time", "two times"])
def test_flops_are_those_counted(config):
    network, (x_t, t, cond) = opened(config), inputs((4, 8))
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        network(x_t[:1], t[:1], cond[:1])
    assert forward_flops(config, text_tokens=5, latent_size=(4, 8)) == counter.get_total_flops()


def test_another_number_of_channels_is_refused_by_both():
    x_t, t, cond = inputs()
    with pytest.raises(ValueError, match="latents of 2 channels for a network of 3"):
        opened(SMALL)(x_t[:, :2], t, cond)
