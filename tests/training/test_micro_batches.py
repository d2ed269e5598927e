"""One step of several micro-batches, by one worker; several workers are in test_parallel."""

import pytest
import torch
from torch import nn

from ldm_core.errors import UserError
from ldm_core.training.float8 import compute_in_float8
from ldm_core.training.guard import SpikeGuard
from ldm_core.training.layout import Layout
from ldm_core.training.optimizers import Muon, Optimizers, adamw, muon_and_adamw
from ldm_core.training.parallel import Parallel, parallelise
from ldm_core.training.step import TrainingStep

CPU = torch.device("cpu")
X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 3)


def new_step(network, clip_norm=1e9, **options):
    optimizers = Optimizers(torch.optim.SGD(network.parameters(), lr=1.0))
    return TrainingStep(network, optimizers, CPU, torch.float32, clip_norm, **options)


def squares(network, rows, scale=1.0):
    return lambda: scale * network(X[rows]).square().sum(1)


@pytest.mark.parametrize("cuts", [(8,), (4, 8), (1, 2, 8), (5, 6, 7, 8)])
def test_how_a_step_is_cut_does_not_matter(cuts):
    whole, parts = linear(), linear()
    expected = new_step(whole)(squares(whole, slice(8)), 0.1)
    starts = (0, *cuts)
    pieces = [slice(a, b) for a, b in zip(starts, cuts, strict=False)]
    result = new_step(parts)([squares(parts, piece) for piece in pieces], 0.1, total=8)
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert result.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-6)
    torch.testing.assert_close(parts.weight, whole.weight)


def test_passes_beyond_the_own_count_nothing():
    plain, filled, empty = linear(), linear(), linear()
    before = empty.weight.detach().clone()
    expected = new_step(plain)(squares(plain, slice(4)), 0.1)
    result = new_step(filled)([squares(filled, slice(4))], 0.1, total=4, passes=3)
    assert result == expected
    assert torch.equal(plain.weight, filled.weight)
    spare = squares(empty, slice(2))
    result = new_step(empty)([], 0.1, total=4, passes=1, spare=spare)
    assert (result.loss, result.gradient_norm, result.skipped) == (0.0, 0.0, False)
    assert torch.equal(empty.weight, before)


def test_samples_of_a_context_are_counted_once():
    parallel = Parallel(linear(), linear(), Layout(2, 3, 4), CPU)
    assert parallel.divisor(total=60) == pytest.approx(10)  # 60 samples over 6 groups


class TestGuard:
    def run(self, step, network, scales):
        return [step(squares(network, slice(8), scale), 1e-3).skipped for scale in scales]

    def test_a_spike_is_skipped_and_counted(self):
        network = linear()
        step = new_step(network, guard=SpikeGuard(10, least=4))
        assert self.run(step, network, [1.0] * 5) == [False] * 5
        before = network.weight.detach().clone()
        assert self.run(step, network, [100.0]) == [True]
        assert torch.equal(network.weight, before)
        assert self.run(step, network, [1.0, float("nan")]) == [False, True]
        assert (step.skipped, step.spikes) == (2, 1)

    def test_without_a_guard_it_is_taken(self):
        network = linear()
        assert not any(self.run(new_step(network), network, [1.0] * 20 + [1e4]))

    def test_restored_it_counts_and_decides_on(self):
        scales = [1.0, 1.0, 1.0, 50.0, 1.0, 9.0, float("nan"), 1.0, 50.0, 1.0]
        whole, network = linear(), linear()
        step = new_step(whole, guard=SpikeGuard(5, window=6, least=3))
        expected = self.run(step, whole, scales)
        first = new_step(network, guard=SpikeGuard(5, window=6, least=3))
        seen = self.run(first, network, scales[:4])
        again = new_step(network, guard=SpikeGuard(5, window=6, least=3))
        again.load_state_dict(first.state_dict())
        assert seen + self.run(again, network, scales[4:]) == expected
        assert again.state_dict() == step.state_dict()
        assert torch.equal(network.weight, whole.weight)
        assert sum(expected) >= 3

    def test_the_count_in_a_row_survives_a_restart(self):
        network = linear()
        step = new_step(network, max_skips=3)
        self.run(step, network, [float("nan")] * 2)
        again = new_step(network, max_skips=3)
        again.load_state_dict(step.state_dict())
        with pytest.raises(UserError, match="3 steps in a row"):
            self.run(again, network, [float("nan")])


def test_adamw_alone():
    network = linear()
    [optimizer] = adamw(network, 1e-2, 0.1).all
    assert not isinstance(optimizer, Muon)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_what_is_frozen_is_nobodys():
    network = linear()
    network.bias.requires_grad_(False)
    weights = [[network.weight], []]
    assert [group["params"] for group in adamw(network, 1e-2).all[0].param_groups] == weights
    pair = nn.Sequential(linear().requires_grad_(False), linear())
    muon, rest = muon_and_adamw(pair, [pair[0].weight, pair[1].weight], 1e-2).all
    assert muon.param_groups[0]["params"] == [pair[1].weight]
    assert [group["params"] for group in rest.param_groups] == [[], [pair[1].bias]]


def test_no_float8_on_a_cpu():
    with pytest.raises(UserError, match="compute capability 8.9 or more, and this is cpu"):
        compute_in_float8([linear()], CPU)
    with pytest.raises(UserError, match="use bf16"):
        parallelise(nn.Sequential(linear()), [], Layout(), CPU, float8=True)


def test_more_workers_than_there_are():
    with pytest.raises(UserError, match="is 4 workers, but there are 1"):
        parallelise(nn.Sequential(linear()), [], Layout(2, 2), CPU)
