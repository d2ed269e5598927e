import pytest
import torch
from planned_networks import CASES, DIT, MMDIT, build

from ldm_core.planning.weights import muon_flops, weights_of
from ldm_core.training.optimizers import hidden_matrices, orthogonalise


@pytest.mark.parametrize("config", [case[0] for case in CASES.values()], ids=CASES)
def test_parameters_are_those_of_the_network(config):
    network, weights = build(config), weights_of(build(config, "meta"))
    assert weights.total == sum(parameter.numel() for parameter in network.parameters())
    blocks = [*network.blocks, *getattr(network, "text_blocks", [])]
    blocks += [*getattr(network, "single_blocks", [])]
    sizes = [sum(weight.numel() for weight in block.parameters()) for block in blocks]
    assert weights.largest_block == max(sizes)
    assert weights.rest == weights.total - sum(sizes)
    matrices = hidden_matrices(*blocks)
    assert weights.hidden == sum(matrix.numel() for matrix in matrices)
    assert weights.fewest_rows == min(len(matrix) for matrix in matrices)


def test_by_kind():
    kinds = weights_of(build(MMDIT, "meta")).by_kind()
    assert {name: count for name, (count, _) in kinds.items()} == {
        "blocks": 2, "single_blocks": 2, "": 1,
    }  # fmt: skip
    assert sum(total for _, total in kinds.values()) == weights_of(build(MMDIT, "meta")).total


def test_a_shared_weight_counts_once():
    network = build(DIT, "meta")
    before = weights_of(network).total
    shared = network.blocks[0].mlp.out
    network.blocks[1].mlp.out = shared
    assert weights_of(network).total == before - shared.weight.numel()


def test_flops_of_muon_are_those_counted():
    from torch.utils.flop_counter import FlopCounterMode

    shapes = ((12, 12), (36, 12), (12, 20))
    with FlopCounterMode(display=False) as counter:
        for shape in shapes:
            orthogonalise(torch.randn(shape))
    assert muon_flops(shapes) == counter.get_total_flops()
