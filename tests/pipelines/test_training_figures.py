"""What a training tells of its speed is what it computed, however many workers it has."""

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from child_processes import PROCESSES
from figures_runs import (
    BATCHES,
    CONFIG,
    CPU,
    H100,
    LAYOUTS,
    PRICE,
    SECONDS,
    SHAPES,
    TOTAL,
    batch,
    be_one_of_two,
    figures_of,
    losses_of,
    read,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ldm_core.backbones.dit import DiTConfig
from ldm_core.training.layout import Layout
from ldm_core.training.loss_by_time import LossByTime
from ldm_core.training.parallel import Parallel
from pipelines import meter
from pipelines.backbones import new_backbone
from pipelines.recipes.sections import TrainSection
from pipelines.training_figures import CHECKSUM, GIB, Work, memory_gib, new_figures

DIT = DiTConfig(
    in_channels=4, latent_size=(8, 8), patch_size=2, width=64, depth=2, heads=4, text_width=24,
    pooled_width=16, frame_pairs=2,
)  # fmt: skip
LENGTHS = pytest.mark.parametrize(("length", "bucket"), [(7, "16x16x1"), (40, "16x16x9")])


def counted(config, found, backward: bool, frozen: bool = False) -> tuple[int, int]:
    """FLOPs that torch counts of a pass over a batch: in all, and of products of activations.

    Inputs have gradients, too, so that no layer's backward pass has less to do than another's.
    """
    network = new_backbone(config).requires_grad_(not frozen)
    t = torch.rand(len(found))
    condition = found.condition
    for each in (found.latents, t, condition.tokens, condition.pooled):
        each.requires_grad_()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = network(found.latents, t, condition)
        if backward:
            result.sum().backward()
    return counter.get_total_flops(), counter.get_flop_counts()["Global"][torch.ops.aten.bmm]


class TestWork:
    @LENGTHS
    @pytest.mark.parametrize("config", [CONFIG, DIT], ids=["mmdit", "dit"])
    def test_a_step_is_three_counted_forward_passes(self, config, length, bucket):
        """Of a sample alone: a DiT embeds the places once for all samples of a batch."""
        found = batch((1,), length, bucket)
        forward, _ = counted(config, found, backward=False)
        assert Work(config, SHAPES, 2).step_flops(found) == pytest.approx(3 * forward, rel=1e-9)

    @LENGTHS
    def test_it_is_a_counted_forward_and_backward_pass(self, length, bucket):
        found = batch((1, 2, 3), length, bucket)
        both, _ = counted(CONFIG, found, backward=True)
        assert Work(CONFIG, SHAPES, 2).step_flops(found) == pytest.approx(both, rel=1e-9)

    def test_frozen_weights_take_a_third_less_but_in_attention(self):
        """Which has no weights: torch counts its backward pass as two."""
        found = batch((1, 2, 3), 7)
        _, attention = counted(CONFIG, found, backward=False)
        both, _ = counted(CONFIG, found, backward=True, frozen=True)
        flops = Work(CONFIG, SHAPES, 2, passes=2).step_flops(found)
        assert flops + attention == pytest.approx(both, rel=1e-9)

    def test_tokens_are_the_latents(self):
        work = Work(CONFIG, SHAPES, 2)
        assert [work.tokens(each) for each in BATCHES] == [3 * 16, 2 * 48]


@pytest.fixture
def alone(monkeypatch) -> list[dict[str, float]]:
    monkeypatch.setattr(meter, "time", meter.time)  # which `read` replaces
    return read(Layout(), BATCHES)


def test_the_figures_of_one_worker(alone):
    first, _ = alone
    work = Work(CONFIG, SHAPES, 2)
    flops = sum(work.step_flops(each) for each in BATCHES)
    assert first["samples_per_second"] == TOTAL / SECONDS
    assert first["tokens_per_second"] == (3 * 16 + 2 * 48) / SECONDS
    assert first["tflops_per_worker"] == pytest.approx(flops / SECONDS / 1e12)
    assert first["mfu"] == pytest.approx(flops / SECONDS / (H100.tflops * 1e12))
    hours = 1e6 / TOTAL * SECONDS / 3600
    assert first["cost_per_million_samples"] == pytest.approx(hours * PRICE)
    ids = [key for each in BATCHES for key in each.ids.tolist()]
    assert first["samples_checksum"] == sum(key % (CHECKSUM + 1) for key in ids) % (CHECKSUM + 1)
    assert first["data_wait_share"] == 0


def bins(found: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if name.startswith("loss/t")}


def test_losses_are_told_by_time(alone):
    by_time = LossByTime()
    for each in BATCHES:
        by_time.add(*losses_of(each))
    assert bins(alone[0]) == pytest.approx({f"loss/{k}": v for k, v in by_time.read().items()})
    assert len(bins(alone[0])) >= 2


def test_reading_begins_anew(alone):
    _, second = alone
    assert second["samples_per_second"] == 1 / SECONDS
    for name in ("tokens_per_second", "tflops_per_worker", "mfu", "samples_checksum"):
        assert second[name] == 0
    assert bins(second) == {}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Sequence[dict[str, list[dict[str, float]]]]:
    """By worker, by layout: what it read."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.start_processes(
        be_one_of_two, (str(folder),), 2, start_method=PROCESSES.get_start_method()
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_workers_tell_what_one_does(two, alone, layout):
    """But for what is of a worker, or of all of them: the work of one, the price of two."""
    for worker in two:
        for ours, theirs in zip(worker[layout], alone, strict=True):
            expected = dict(theirs)
            for name in ("tflops_per_worker", "mfu"):
                expected[name] /= 2
            expected["cost_per_million_samples"] *= 2
            del expected["memory_gib"]
            assert ours.keys() - expected.keys() == {"memory_gib"}
            assert {name: ours[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_a_checksum_of_half_a_stretch_is_not_told(monkeypatch):
    """It would be taken for that of the whole one."""
    figures = figures_of(Layout(), log_every=10)
    told = []
    figures.begin(5)
    for done in (10, 20):
        figures.count(BATCHES[:1], 3)
        told.append("samples_checksum" in figures.read(done))
    assert told == [False, True]


def test_the_memory_is_what_the_system_says():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    assert memory_gib(CPU) == pytest.approx(pages * os.sysconf("SC_PAGESIZE") / GIB, rel=0.05)


@pytest.mark.parametrize(
    ("words", "price", "on", "passes"),
    [
        ({}, 0.0, None, 3),
        ({"accelerator": "H100-80"}, H100.hour_price, H100, 3),
        ({"accelerator": "H100-80", "worker_hour_price": 7.0}, 7.0, H100, 3),
        ({"lora_rank": 4, "initial": "x"}, 0.0, None, 2),
    ],
)
def test_what_the_recipe_says(words, price, on, passes):
    network = nn.Linear(1, 1)
    section, reader = TrainSection(**words), SimpleNamespace(shapes=SHAPES)
    parallel = Parallel(network, network, Layout(), CPU)
    figures = new_figures(section, CONFIG, reader, parallel)
    assert (figures.price, figures.on, figures.work.passes) == (price, on, passes)
    figures.count(BATCHES[:1], 3)
    told = figures.read(20).keys()
    assert ("mfu" in told, "cost_per_million_samples" in told) == (on is not None, price > 0)
