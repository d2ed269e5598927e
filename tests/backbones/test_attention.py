"""Attention is torch's, whichever kernel computes it."""

import pytest
import torch
import torch.nn.functional as F

from ldm_core.backbones.attention import attention


def heads(channels: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(channels)
    shapes = [(2, 3, 5, channels), (2, 3, 7, channels), (2, 3, 7, channels)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


MASK = torch.zeros(2, 1, 1, 7).index_fill(3, torch.tensor([5, 6]), -torch.inf)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("channels", [8, 24, 32, 40])
def test_in_16_bits_it_is_that_of_32_bits_rounded(channels, mask):
    """Under autocast as in training, and the gradients too."""
    ours, exact = heads(channels, torch.bfloat16), heads(channels, torch.bfloat16)
    low = None if mask is None else mask.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(*ours, low)
    expected = F.scaled_dot_product_attention(*(x.float() for x in exact), attn_mask=mask)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02)
    for output in (y.float(), expected):
        output.square().sum().backward()
    for mine, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.grad.float(), other.grad.float(), rtol=0.05, atol=0.05)


def test_heads_of_other_sizes_are_rounded_once():
    """The result is the float32 result, rounded to 16 bits: bit for bit."""
    q, k, v = heads(24, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(q, k, v)
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert torch.equal(y, exact.bfloat16())


@pytest.mark.parametrize("channels", [24, 32])
def test_in_32_bits_it_is_torchs_own(channels):
    q, k, v = heads(channels, torch.float32)
    assert torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_compiled_under_autocast_it_is_the_same():
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    ours, theirs = heads(24, torch.bfloat16), heads(24, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = compiled(*ours), attention(*theirs)
    torch.testing.assert_close(y, expected)
    for output in (y, expected):
        output.float().square().sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
