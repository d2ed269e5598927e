import pytest
import torch
from small_dit import POOLED, B, batch, opened, trained_dit

from ldm_core.conditioning.numbers import NumberConditioned
from ldm_core.conditioning.size_and_crop import (
    NAME,
    size_and_crop,
    size_and_crop_conditioned,
)

ORIGINAL = torch.tensor([[480, 640], [1024, 1024], [64, 64], [3000, 2000]])
CROP = torch.tensor([[0, 80], [0, 0], [0, 0], [12, 7]])
TARGET = torch.full((B, 2), 512)


def network():
    torch.manual_seed(0)
    return size_and_crop_conditioned(trained_dit(), POOLED).double()


def test_six_numbers_in_their_order():
    assert size_and_crop(ORIGINAL, CROP, TARGET)[0].tolist() == [480, 640, 0, 80, 512, 512]
    with pytest.raises(ValueError, match=r"\(B, 2\) each, got \[\(4, 2\), \(4, 1\), \(4, 2\)\]"):
        size_and_crop(ORIGINAL, CROP[:, :1], TARGET)


def test_nothing_is_heard_at_first_and_everything_can_be_learnt():
    x_t, t, cond = batch()
    sized = cond.with_extra(NAME, size_and_crop(ORIGINAL, CROP, TARGET))
    wrapped = network()
    out = wrapped(x_t, t, sized)
    assert torch.equal(out, trained_dit()(x_t, t, cond))
    out.square().sum().backward()
    assert wrapped.out.weight.grad.abs().max() > 0
    opened(wrapped)(x_t, t, sized).square().sum().backward()
    assert (wrapped.hidden.weight.grad.abs().amax(dim=0) > 0).all()


@pytest.mark.parametrize("column", range(6))
def test_one_pixel_of_any_size_makes_a_difference(column):
    wrapped, (x_t, t, cond) = opened(network()), batch()
    sizes = size_and_crop(ORIGINAL, CROP, TARGET)
    out = wrapped(x_t, t, cond.with_extra(NAME, sizes))
    sizes[:, column] += 1
    changed = (wrapped(x_t, t, cond.with_extra(NAME, sizes)) - out).abs().amax(dim=(1, 2, 3))
    assert changed.min() > 1e-5


def test_no_two_sizes_have_the_same_waves():
    low, high = network().frequencies
    frequencies = torch.logspace(torch.tensor(low).log2(), torch.tensor(high).log2(), 128, 2.0)
    angles = torch.arange(1.0, 2049.0, dtype=torch.float64)[:, None] * frequencies
    waves = torch.cat([angles.cos(), angles.sin()], dim=1)
    distances = torch.cdist(waves, waves) + 9 * torch.eye(len(waves))
    assert distances.min() > 1  # of a circle's radius 1


def test_absent_is_dropped_and_strength_scales_the_vector():
    wrapped, (x_t, t, cond) = opened(network()), batch()
    sizes = size_and_crop(ORIGINAL, CROP, TARGET)
    sized = cond.with_extra(NAME, sizes)
    assert torch.equal(wrapped(x_t, t, sized.scaled(NAME, 0.0)), wrapped(x_t, t, cond))
    half = wrapped(x_t, t, sized.scaled(NAME, 0.5))
    pooled = cond.pooled + wrapped.embed(sizes, torch.float64) / 2
    expected = wrapped.network(x_t, t, type(cond)(cond.tokens, cond.mask, pooled))
    torch.testing.assert_close(half, expected, rtol=0, atol=1e-13)


def test_further_times_are_handed_on():
    seen = []

    class Network(torch.nn.Module):
        def forward(self, x_t, t, cond, *times):
            seen.append(times)
            return x_t

    x_t, t, cond = batch()
    wrapped = NumberConditioned(Network(), "fps", 1, POOLED, (0.01, 1.0)).double()
    wrapped(x_t, t, cond.with_extra("fps", torch.ones(B, 1)), t / 2)
    assert torch.equal(seen[0][0], t / 2)


def test_a_wrong_count_is_refused_with_both():
    x_t, t, cond = batch()
    with pytest.raises(ValueError, match=r"'size_and_crop' is \(4, 2\), expected \(4, 6\)"):
        network()(x_t, t, cond.with_extra(NAME, ORIGINAL.float()))


def test_the_slowest_wave_turns_once_in_20000_pi_pixels():
    """(1e-4, 1) radians a pixel, 128 pairs: what SDXL's own embedding has but for its last step."""
    wrapped = network()
    assert (wrapped.frequencies, wrapped.pairs) == ((1e-4, 1.0), 128)


def test_waves_are_computed_in_float32_at_least():
    """4001 is no bfloat16, which holds 4000 and 4016: the two would have the same waves."""
    torch.manual_seed(0)
    wrapped = opened(NumberConditioned(torch.nn.Identity(), "n", 1, POOLED, (1e-4, 1.0)))
    wrapped = wrapped.bfloat16()
    seen = []
    wrapped.hidden.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    wrapped.embed(torch.tensor([[4000.0], [4001.0]]), torch.bfloat16)
    angles = torch.tensor([4000.0, 4001.0]).double()  # of the fastest wave, one radian a unit
    expected = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = seen[0][:, [63, 127]].double()
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
