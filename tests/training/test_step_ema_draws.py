import threading
from pathlib import Path

import pytest
import torch
from scipy.stats import kstest
from torch import nn

from ldm_core.errors import UserError
from ldm_core.training.draws import draw
from ldm_core.training.ema import Ema
from ldm_core.training.optimizers import Optimizers
from ldm_core.training.prefetch import prefetch
from ldm_core.training.step import TrainingStep, autocast, compute_dtype

CPU = torch.device("cpu")
X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 3)


def training_step(network: nn.Module, clip_norm: float = 1e9, **options) -> TrainingStep:
    """By plain gradient descent at rate 1."""
    optimizers = Optimizers(torch.optim.SGD(network.parameters(), lr=1.0))
    return TrainingStep(
        network, optimizers, CPU, options.pop("dtype", torch.float32), clip_norm, **options
    )


class TestEma:
    def test_closed_form_with_warmup(self):
        network = linear().double()
        first = network.weight.detach().clone()
        ema = Ema(network, decay=0.3)
        share = 1.0  # of the initial weights, which the network leaves at once
        with torch.no_grad():
            network.weight.fill_(5.0)
        for k in range(8):
            ema.update(network)
            share *= min(0.3, (1 + k) / (10 + k))
        expected = share * first + (1 - share) * 5.0
        torch.testing.assert_close(ema.state_dict()["weight"], expected, rtol=0, atol=1e-12)

    def test_a_constant_network_is_its_own_average(self):
        network = linear()
        ema = Ema(network, decay=0.999)
        for _ in range(5):
            ema.update(network)
        assert all(torch.equal(ema.shadow[name], w) for name, w in network.state_dict().items())

    def test_it_averages_copies(self):
        network = linear()
        ema = Ema(network, decay=0.5)
        kept = ema.state_dict()["weight"].clone()
        with torch.no_grad():
            network.weight.add_(1.0)
        assert torch.equal(ema.state_dict()["weight"], kept)

    def test_counters_keep_still(self):
        network = nn.BatchNorm1d(3)
        ema = Ema(network, decay=0.5)
        network(X)
        ema.update(network)
        assert ema.shadow["num_batches_tracked"] == 0
        assert ema.shadow["running_mean"].abs().max() > 0

    def test_restored_it_goes_on(self):
        network = linear()
        whole, halves = Ema(network, 0.9), Ema(network, 0.9)
        for k in range(6):
            with torch.no_grad():
                network.weight.add_(k)
            whole.update(network)
            halves.update(network)
            if k == 2:
                saved = {name: value.clone() for name, value in halves.state_dict().items()}
                restored = Ema(linear(), 0.9)
                restored.load_state_dict(saved, halves.updates)
                halves = restored
        assert torch.equal(halves.shadow["weight"], whole.shadow["weight"])


class TestStep:
    def test_the_mean_of_the_losses_is_descended(self):
        network, theirs = linear(), linear()
        result = training_step(network)(lambda: network(X).square().sum(1), 0.25)
        loss = theirs(X).square().sum(1).mean()
        loss.backward()
        assert result.loss == loss.item()
        expected = theirs.weight - 0.25 * theirs.weight.grad
        torch.testing.assert_close(network.weight, expected)
        assert not result.skipped
        assert network.weight.grad is None

    def test_clipping(self):
        network = linear()
        before = torch.cat([w.detach().flatten() for w in network.parameters()])
        result = training_step(network, clip_norm=0.5)(lambda: 100 * network(X).square().sum(1), 1)
        after = torch.cat([w.detach().flatten() for w in network.parameters()])
        assert result.gradient_norm > 50
        assert (after - before).norm().item() == pytest.approx(0.5, rel=1e-3)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_is_not_finite_is_skipped_and_counted(self, bad):
        network = linear()
        step, before = training_step(network), network.weight.detach().clone()
        result = step(lambda: network(X * bad).square().sum(1), 1.0)
        assert result.skipped
        assert step.skipped == 1
        assert torch.equal(network.weight, before)
        assert not step(lambda: network(X).square().sum(1), 0.1).skipped
        assert torch.isfinite(network.weight).all()
        assert not torch.equal(network.weight, before)

    def test_too_many_in_a_row_end_the_run(self):
        network = linear()
        step = training_step(network, max_skips=3)
        losses = {
            True: lambda: network(X).square().sum(1),
            False: lambda: network(X * float("nan")).sum(1),
        }
        for good in (False, False, True, False, False):  # never three in a row
            step(losses[good], 1e-3)
        with pytest.raises(UserError, match=r"3 steps in a row .* learning rate"):
            step(losses[False], 1e-3)
        assert step.skipped == 5

    def test_mixed_precision_keeps_master_weights(self):
        network, seen = linear(), []

        def losses():
            out = network(X)
            seen.append(out.dtype)
            return out.float().square().sum(1)

        training_step(network, dtype=torch.bfloat16)(losses, 1e-4)
        training_step(network)(losses, 1e-4)
        assert seen == [torch.bfloat16, torch.float32]
        assert network.weight.dtype == torch.float32


def test_bfloat16_is_chosen_on_a_cpu_with_units_for_it():
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("needs Linux to say what the CPU has")
    has_units = "amx_tile" in cpuinfo.read_text()
    assert compute_dtype(CPU, "auto") == (torch.bfloat16 if has_units else torch.float32)
    assert compute_dtype(CPU, "bf16") == torch.bfloat16
    assert compute_dtype(CPU, "fp32") == torch.float32
    with autocast(CPU, torch.float32):
        assert not torch.is_autocast_enabled("cpu")


class TestDraws:
    ids = torch.arange(1000, 1064) ** 3
    shape = (2, 4, 3)

    def at(self, step: int = 7, ids: torch.Tensor | None = None, seed: int = 3):
        return draw(seed, step, self.ids if ids is None else ids, self.shape, caption_drop=0.25)

    def test_a_samples_draws_do_not_depend_on_its_batch(self):
        whole = self.at()
        order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
        for rows in (order, torch.arange(0, 64, 2), torch.arange(1, 64, 2), torch.tensor([5])):
            part = self.at(ids=self.ids[rows])
            for name in ("eps", "u", "v", "drop"):
                assert torch.equal(getattr(part, name), getattr(whole, name)[rows])

    def test_steps_and_seeds_and_samples_differ(self):
        draws = self.at()
        for other in (self.at(step=8), self.at(seed=4), self.at(ids=self.ids + 1)):
            assert (other.u != draws.u).all()
            assert (other.eps != draws.eps).float().mean() > 0.99

    def test_distributions(self):
        draws = draw(0, 1, torch.arange(4000), (2, 3, 3), caption_drop=0.25)
        assert kstest(draws.eps.flatten(), "norm").pvalue > 1e-3
        assert kstest(draws.u, "uniform").pvalue > 1e-3
        assert kstest(draws.v, "uniform").pvalue > 1e-3
        assert abs(torch.corrcoef(torch.stack([draws.u, draws.v]))[0, 1]) < 0.05
        assert draws.drop.float().mean().item() == pytest.approx(0.25, abs=0.03)


class TestPrefetch:
    def test_yields_every_step_in_order(self):
        assert list(prefetch(lambda step: step**2, 3, 7)) == [(3, 9), (4, 16), (5, 25), (6, 36)]
        assert list(prefetch(lambda step: step, 4, 4)) == []

    def test_reads_one_ahead_in_another_thread(self):
        reading = [threading.Event() for _ in range(4)]
        threads = set()

        def read(step: int) -> int:
            threads.add(threading.current_thread())
            reading[step].set()
            return step

        batches = prefetch(read, 0, 4)
        assert next(batches) == (0, 0)
        assert reading[1].wait(10)  # while we hold step 0
        assert not reading[2].wait(0.05)
        assert list(batches) == [(1, 1), (2, 2), (3, 3)]
        assert threading.current_thread() not in threads

    def test_an_error_is_raised_at_its_step(self):
        def read(step: int) -> int:
            if step == 2:
                raise OSError("step 2 cannot be read")
            return step

        batches = prefetch(read, 0, 5)
        assert [next(batches), next(batches)] == [(0, 0), (1, 1)]
        with pytest.raises(OSError, match="step 2 cannot be read"):
            next(batches)
