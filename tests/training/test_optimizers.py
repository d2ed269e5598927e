import copy

import pytest
import torch
from muon_steps import normal, train, weights_of
from torch import nn

from ldm_core.autoencoders.training import new_autoencoder
from ldm_core.backbones.dit import DiT, DiTConfig
from ldm_core.backbones.mmdit import MMDiT, MMDiTConfig
from ldm_core.training import muon_shares
from ldm_core.training.optimizers import (
    Muon,
    Optimizers,
    adamw,
    hidden_kernels,
    hidden_matrices,
    muon_and_adamw,
    orthogonalise,
    warmup_then_decay,
)


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (24, 48)])
def test_orthogonalise_keeps_directions_and_levels_sizes(shape):
    matrix = normal(*shape)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    seen = u.T @ orthogonalise(matrix) @ vt.T  # diagonal where the singular vectors are the same
    values = seen.diagonal()
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert (seen - values.diag()).abs().max() < 1e-4
    assert orthogonalise(1e4 * matrix).sub(orthogonalise(matrix)).abs().max() < 1e-4
    assert torch.equal(orthogonalise(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("steps", "tolerance"), [(1, 0.06), (6, 0.03)])
@pytest.mark.parametrize("shape", [(24, 64), (64, 24)])
def test_muon_is_that_of_torch(shape, steps, tolerance, dtype):
    ours, theirs = weights_of([shape]), weights_of([shape])
    train(Muon(ours, 0.05, weight_decay=0.1, dtype=dtype), ours, steps)
    reference = torch.optim.Muon(
        theirs, lr=0.05, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    train(reference, theirs, steps)
    moved = (theirs[0] - normal(*shape)).norm()
    assert (ours[0] - theirs[0]).norm() < tolerance * moved  # torch's is always bfloat16


def test_the_update_has_the_size_of_adamws():
    weights = weights_of([(64, 256)])
    train(Muon(weights, lr=1e-2), weights, 1)
    rms = (weights[0] - normal(64, 256)).square().mean().sqrt().item()
    assert rms == pytest.approx(0.2 * 1e-2, rel=0.15)


def test_kernels_are_matrices_of_their_outputs():
    kernel = [nn.Parameter(normal(8, 4, 3, 3))]
    matrix = [nn.Parameter(normal(8, 4, 3, 3).flatten(1))]
    kernel[0].grad = normal(8, 4, 3, 3, seed=1)
    matrix[0].grad = kernel[0].grad.flatten(1)
    for weights in (kernel, matrix):
        Muon(weights, 0.1).step()
    assert torch.equal(kernel[0].flatten(1), matrix[0])
    assert not torch.equal(kernel[0], normal(8, 4, 3, 3))


def small_dit() -> DiT:
    torch.manual_seed(0)
    return DiT(
        DiTConfig(
            in_channels=2, latent_size=(4, 4), patch_size=2, width=16, depth=2, heads=2,
            text_width=5, pooled_width=3,
        )
    )  # fmt: skip


def test_which_weights_of_a_transformer_are_whose():
    network = small_dit()
    names = {id(weight): name for name, weight in network.named_parameters()}
    muon, adamw = muon_and_adamw(network, hidden_matrices(network.blocks), 1e-3, 0.1).all
    [of_muon] = [[names[id(w)] for w in group["params"]] for group in muon.param_groups]
    assert sorted(of_muon) == sorted(
        f"blocks.{block}.{part}.weight"
        for block in (0, 1)
        for part in ("attention.qkv", "attention.out", "mlp.gate_and_value", "mlp.out")
    )
    decayed, plain = ([names[id(w)] for w in group["params"]] for group in adamw.param_groups)
    assert {"patch_embedding.weight", "final.weight", "blocks.0.modulation.weight"} <= set(decayed)
    assert {"patch_embedding.bias", "text_norm.weight", "blocks.0.attention.scale"} <= set(plain)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1, 0.0]
    assert sorted(of_muon + decayed + plain) == sorted(names.values())  # each exactly once


def test_the_scales_of_queries_and_keys_are_not_decayed():
    network = MMDiT(
        MMDiTConfig(
            in_channels=2, patch_size=2, width=16, depth=2, heads=2, single_depth=1, text_width=5,
            pooled_width=3,
        )
    )  # fmt: skip
    names = {id(weight): name for name, weight in network.named_parameters()}
    (optimizer,) = adamw(network, 1e-3, 0.1).all
    decayed, plain = ([names[id(w)] for w in g["params"]] for g in optimizer.param_groups)
    assert "blocks.0.image.scale" in plain
    assert sorted(plain) == sorted(n for n in names.values() if n.endswith(("bias", "scale")))
    assert sorted(decayed) == sorted(n for n in names.values() if n.endswith("weight"))


def test_which_kernels_of_an_autoencoder_are_muons():
    network = new_autoencoder((8, 16), 3, 1, 32, 0)
    names = {id(weight): name for name, weight in network.named_parameters()}
    chosen = [names[id(weight)] for weight in hidden_kernels(network)]
    assert "encoder.down_blocks.0.resnets.0.conv1.weight" in chosen
    ends = ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out")
    assert not [name for name in chosen if name.startswith(ends)]
    assert all(name.endswith(".weight") and "norm" not in name for name in chosen)


def test_both_follow_one_multiplier():
    network = small_dit()
    optimizers = muon_and_adamw(network, hidden_matrices(network.blocks), 0.1, 0.1)
    before = copy.deepcopy(network.state_dict())
    for multiplier in (0.0, 0.5):
        for weight in network.parameters():
            weight.grad = torch.ones_like(weight)
        optimizers.step(multiplier)
        rates = {group["lr"] for opt in optimizers.all for group in opt.param_groups}
        assert rates == {0.1 * multiplier}
        moved = [not torch.equal(before[name], w) for name, w in network.named_parameters()]
        assert all(moved) if multiplier else not any(moved)


def test_a_restored_pair_goes_on_as_if_nothing_had_happened():
    def steps(network: DiT, optimizers: Optimizers, first: int, end: int) -> None:
        for step in range(first, end):
            for i, weight in enumerate(network.parameters()):
                weight.grad = normal(*weight.shape, seed=100 * step + i)
            optimizers.step(warmup_then_decay(step, 6, 2, 0.5))

    def pair(network: DiT) -> Optimizers:
        return muon_and_adamw(network, hidden_matrices(network.blocks), 0.1, 0.1)

    whole, first, second = small_dit(), small_dit(), small_dit()
    steps(whole, pair(whole), 0, 6)
    optimizers = pair(first)
    steps(first, optimizers, 0, 3)
    second.load_state_dict(first.state_dict())
    restored = pair(second)
    restored.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    steps(second, restored, 3, 6)
    for mine, theirs in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.1), (4, 0.5), (9, 1), (50, 1), (70, 1), (85, 0.5), (99, 1 / 30)]
)
def test_schedule(step, expected):
    assert warmup_then_decay(step, 100, 10, 0.3) == pytest.approx(expected)


def test_schedule_without_ends():
    assert [warmup_then_decay(step, 5, 0, 0.0) for step in range(5)] == [1.0] * 5
    assert all(warmup_then_decay(step, 3, 50, 1.0) > 0 for step in range(3))


@pytest.mark.parametrize(
    ("most", "expected"),
    [(1, [[0], [2], [3], [1]]), (12, [[0, 2], [3], [1]]), (10**6, [[0, 2, 3], [1]])],
)
def test_matrices_of_a_shape_are_batched_up_to_so_many_numbers(most, expected, monkeypatch):
    monkeypatch.setattr(muon_shares, "TOGETHER", most)
    assert list(muon_shares.batches([(2, 3), (4, 4), (2, 3), (2, 3)])) == expected
