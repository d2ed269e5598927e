import pytest
import tiny_diffusers as tiny
import torch

from ldm_core.backbones.class_dit import ClassDiT, ClassDiTConfig
from ldm_core.backbones.hooks import after, recorded, routed

SMALL = ClassDiTConfig(
    in_channels=3, latent_size=(8, 8), patch_size=2, width=16, depth=4, heads=2, classes=10
)
T, LABELS = torch.tensor([0.2, 0.7]), torch.tensor([1, 5])


def network():
    return tiny.shaken(ClassDiT(SMALL))


def test_outputs_are_recorded_and_trained_through():
    torch.manual_seed(0)
    net, x = network(), torch.randn(2, 3, 8, 8)
    plain = net(x, T, LABELS)
    with recorded(net, "blocks.1", "blocks.3") as seen:
        assert torch.equal(net(x, T, LABELS), plain)
    assert sorted(seen) == ["blocks.1", "blocks.3"]
    assert seen["blocks.1"].shape == (2, 16, 16)
    seen["blocks.1"].square().sum().backward()
    assert net.blocks[1].qkv.weight.grad is not None
    assert net.blocks[2].qkv.weight.grad is None  # behind the recorded block


def test_nothing_stays_behind():
    net, x = network(), torch.randn(2, 3, 8, 8)
    plain = net(x, T, LABELS)
    with after(net, "blocks.0", lambda y: 2 * y):
        assert not torch.equal(net(x, T, LABELS), plain)
    assert torch.equal(net(x, T, LABELS), plain)
    with pytest.raises(ZeroDivisionError), after(net, "blocks.0", lambda y: y / (1 // 0)):
        net(x, T, LABELS)
    assert torch.equal(net(x, T, LABELS), plain)


def test_all_tokens_routed_through_is_no_routing():
    net, x = network(), torch.randn(2, 3, 8, 8)
    kept = torch.stack([torch.randperm(16), torch.randperm(16)])
    with routed(net, "blocks.1", "blocks.2", kept):
        out = net(x, T, LABELS)
    torch.testing.assert_close(out, net(x, T, LABELS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["ours", "dit"])
def test_tokens_routed_past_blocks_come_out_as_they_went_in(name):
    if name == "ours":
        net, x, blocks = network(), torch.randn(2, 3, 8, 8), "blocks"
    else:
        model = tiny.dit(num_layers=4)
        blocks, x = "transformer_blocks", tiny.latents("dit")
        net = model
    kept = torch.tensor([[0, 3, 7], [2, 9, 15]])
    arguments = (x, T, LABELS) if name == "ours" else (x, 1000 * T, LABELS)
    with (
        recorded(net, f"{blocks}.0", f"{blocks}.2") as seen,
        routed(net, f"{blocks}.1", f"{blocks}.2", kept),
        recorded(net, f"{blocks}.2") as joined,
    ):
        net(*arguments)
    assert seen[f"{blocks}.2"].shape[1] == 3  # before the others come back
    entered, left = seen[f"{blocks}.0"], joined[f"{blocks}.2"]
    passed = torch.zeros(2, 16, dtype=torch.bool).scatter(1, kept, True)
    assert torch.equal(left[~passed], entered[~passed])
    assert (left - entered)[passed].abs().min(dim=-1).values.max() > 0
    assert torch.equal(left.gather(1, kept[..., None].expand(-1, -1, 16)), seen[f"{blocks}.2"])


def test_a_name_that_is_not_there_is_refused():
    with (
        pytest.raises(ValueError, match=r"no submodule 'layers\.0'; it has patch_embedding"),
        recorded(network(), "layers.0"),
    ):
        pass
