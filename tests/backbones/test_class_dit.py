import pytest
import torch
from tiny_diffusers import shaken

from ldm_core.backbones.class_dit import ClassDiT, ClassDiTConfig
from ldm_core.backbones.embeddings import place_waves
from ldm_core.errors import UserError

SMALL = ClassDiTConfig(
    in_channels=3, latent_size=(8, 8), patch_size=2, width=32, depth=2, heads=2, classes=10
)
B = 4


def inputs(size=(8, 8), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(B, 3, *size, generator=generator, dtype=dtype)
    return x_t, torch.rand(B, generator=generator, dtype=dtype), torch.tensor([0, 3, 9, 10])


def opened():
    return shaken(ClassDiT(SMALL).double(), size=0.1)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_starts_at_zero():
    x_t, t, labels = inputs(dtype=torch.float32)
    assert torch.equal(ClassDiT(SMALL)(x_t, t, labels), torch.zeros_like(x_t))


def test_samples_are_independent_of_their_order():
    network, (x_t, t, labels) = opened(), inputs()
    order = torch.tensor([2, 0, 3, 1])
    close(network(x_t[order], t[order], labels[order]), network(x_t, t, labels)[order])


def test_labels_and_times_matter():
    network, (x_t, t, labels) = opened(), inputs()
    out = network(x_t, t, labels)
    for other in (network(x_t, t, labels.flip(0)), network(x_t, 1 - t, labels)):
        assert (other - out)[0].abs().max() > 1e-3


def test_gradient_reaches_every_parameter():
    network, (x_t, t, labels) = opened(), inputs()
    network(x_t, t, labels).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("size", [(4, 4), (6, 12), (16, 8)])
def test_other_sizes_lie_over_the_same_positions(size):
    x_t, t, labels = inputs(size)
    assert opened()(x_t, t, labels).shape == x_t.shape


def test_a_patch_comes_back_where_it_was():
    network, (x_t, t, labels) = opened(), inputs((6, 12))
    for block in network.blocks:
        torch.nn.init.zeros_(block.out.weight)  # tokens no longer see one another
    other = x_t.clone()
    other[..., 2:4, 6:8] += 1
    moved = (network(other, t, labels) - network(x_t, t, labels)).abs().amax(dim=(0, 1)) > 1e-12
    assert moved[2:4, 6:8].all()
    assert moved.sum() == 4


def test_frames_are_told_apart_and_a_picture_is_a_video_of_one():
    network, (x_t, t, labels) = opened(), inputs()
    video = torch.stack([x_t, x_t, x_t], dim=2)
    out = network(video, t, labels)
    assert out.shape == video.shape
    assert (out[:, :, 1] - out[:, :, 0]).abs().max() > 1e-3
    other = network(torch.stack([x_t, x_t, -x_t], dim=2), t, labels)
    assert (other - out)[:, :, 0].abs().max() > 1e-3
    close(network(video[:, :, :1], t, labels)[:, :, 0], network(x_t, t, labels))


def test_autocast_stays_near():
    network, (x_t, t, labels) = opened().float(), inputs(dtype=torch.float32)
    expected = network(x_t, t, labels)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x_t, t, labels)
    assert (out - expected).std() < 0.05 * expected.std()


def test_indivisible_width_is_refused_by_name():
    with pytest.raises(ValueError, match=r"width 36 .* heads 5"):
        ClassDiTConfig(width=36, heads=5)


def test_another_number_of_channels_is_refused_by_both():
    x_t, t, cond = inputs()
    with pytest.raises(ValueError, match="latents of 2 channels for a network of 3"):
        opened()(x_t[:, :2], t, cond)


def test_a_label_out_of_range_is_refused_by_its_number():
    x_t, t, _ = inputs()
    for label in (11, -1):
        with pytest.raises(UserError, match=f"label {label} of 10 classes: give 0 to 9, or 10"):
            opened()(x_t, t, torch.tensor([1, 2, label, 3]))


def test_positions_of_an_oblong_are_stretched_along_their_own_axis():
    """A grid of (8, 4) tokens for a latent of (16, 8): one unit apart on both axes."""
    network = ClassDiT(SMALL.model_copy(update={"latent_size": (16, 8)}))
    found = network._positions((1, 8, 4), torch.device("cpu"))
    expected = place_waves(torch.arange(8), torch.arange(4), SMALL.width).reshape(32, -1)
    torch.testing.assert_close(found, expected.to(found), rtol=0, atol=1e-6)
