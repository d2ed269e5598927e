import pytest
import torch
import torch.nn.functional as F

from ldm_core.backbones.layers import (
    Attention,
    GridConvolution,
    TimeEmbedding,
    axial_rotary,
    rotate,
)

CPU = torch.device("cpu")


def test_rotary_logits_depend_on_the_offset_only():
    h, w, k = 3, 4, 16
    table = axial_rotary(h, w, k, CPU)
    query, key = torch.randn(2, 1, 1, 1, k)
    q, k_ = (rotate(x.expand(1, 1, h * w, k), table)[0, 0] for x in (query, key))
    logits = (q @ k_.T).view(h, w, h, w)
    torch.testing.assert_close(logits[:-1, :, :-1], logits[1:, :, 1:])
    torch.testing.assert_close(logits[:, :-1, :, :-1], logits[:, 1:, :, 1:])
    assert not torch.allclose(logits[0, 0], logits[0, 1])


def test_rotary_keeps_lengths():
    x = torch.randn(2, 3, 6, 8)
    turned = rotate(x, axial_rotary(2, 3, 8, CPU))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def layer_norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("qk_norm", [True, False])
def test_attention_is_its_formula(qk_norm):
    """softmax(turned queries . [memory keys, turned keys] / sqrt K) values, with scaled norms."""
    torch.manual_seed(0)
    attention = Attention(16, 2, qk_norm).double()
    if qk_norm:
        torch.nn.init.uniform_(attention.scale, 0.5, 2)
        scale_q, scale_k = attention.scale.view(2, 8)

    def normal(x, which):
        return layer_norm(x) * (scale_q, scale_k)[which] if qk_norm else x

    x, memory = torch.randn(3, 6, 16).double(), torch.randn(3, 4, 16).double()
    mask = torch.randn(3, 1, 1, 10).double()
    table = axial_rotary(2, 3, 8, CPU)
    q, k, v = attention.qkv(x).view(3, 6, 3, 2, 8).permute(2, 0, 3, 1, 4)  # (3, B, H, N, K)
    _, memory_k, memory_v = attention.qkv(memory).view(3, 4, 3, 2, 8).permute(2, 0, 3, 1, 4)
    queries = rotate(normal(q, 0), table)
    keys = torch.cat([normal(memory_k, 1), rotate(normal(k, 1), table)], 2)
    weights = (queries @ keys.mT / 8**0.5 + mask).softmax(-1)
    heads = weights @ torch.cat([memory_v, v], 2)
    expected = attention.out(heads.transpose(1, 2).reshape(3, 6, 16))
    torch.testing.assert_close(attention(x, mask, table, memory), expected, rtol=0, atol=1e-14)


def test_memory_is_attended_to_like_tokens_at_no_angle():
    """With keys and values of its own, and no queries: as the plain attention over all of them."""
    torch.manual_seed(0)
    attention = Attention(16, 2).double()
    x, memory = torch.randn(3, 6, 16).double(), torch.randn(3, 4, 16).double()
    cosines, sines = axial_rotary(2, 3, 8, CPU)
    padded = (F.pad(cosines, (0, 0, 4, 0), value=1.0), F.pad(sines, (0, 0, 4, 0)))
    joint = attention(torch.cat([memory, x], dim=1), table=padded)[:, 4:]
    torch.testing.assert_close(attention(x, None, (cosines, sines), memory), joint)


def test_a_grid_convolution_sums_each_channel_over_the_neighbours():
    torch.manual_seed(0)
    convolve, x = GridConvolution(2).double(), torch.randn(1, 4 * 5, 2).double()
    assert torch.equal(convolve(x, (1, 4, 5)), x)
    torch.nn.init.normal_(convolve.kernel.weight)
    near = convolve(x, (1, 4, 5)).view(4, 5, 2)[1, 2]  # rows 0..2 and columns 1..3 around it
    kernel = convolve.kernel.weight[:, 0].permute(1, 2, 0)  # (3, 3, D)
    expected = x.view(4, 5, 2)[1, 2] + (kernel * x.view(4, 5, 2)[0:3, 1:4]).sum(dim=(0, 1))
    torch.testing.assert_close(near, expected)
    video = torch.cat([x, 2 * x], dim=1)  # frames do not see one another
    first, second = convolve(video, (2, 4, 5)).chunk(2, dim=1)
    torch.testing.assert_close(first, convolve(x, (1, 4, 5)))
    torch.testing.assert_close(second, 2 * first)


def test_the_centre_keeps_its_angles():
    small, large = (axial_rotary(size, size, 8, CPU)[0] for size in (3, 5))
    assert torch.equal(large.view(5, 5, -1)[1:4, 1:4], small.view(3, 3, -1))


def test_time_embedding_tells_times_apart_smoothly():
    torch.manual_seed(0)
    embed = TimeEmbedding(32).double()
    t = torch.linspace(0, 1, 101, dtype=torch.float64)

    def at(time):
        return embed(time, torch.float64)

    out, slope = torch.func.jvp(at, (t,), (torch.ones_like(t),))
    assert torch.cdist(out, out)[~torch.eye(101, dtype=bool)].min() > 1e-3
    assert slope.norm(dim=-1).max() < 100 * out.norm(dim=-1).mean()
