"""What recomputation keeps in memory, and that it changes no bit."""

import copy

import pytest
import torch
from parallel_runs import Case, sample_losses, video_dit
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm_core.training.layout import Layout
from ldm_core.training.parallel import parallelise
from ldm_core.training.recomputation import recompute_all, recompute_cheap

CASE = Case(Layout())
CPU = torch.device("cpu")


class Memory(TorchDispatchMode):
    """Counts the bytes of the tensors made inside it that are still there."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages.setdefault(
                    storage._cdata, (StorageWeakRef(storage), storage.nbytes())
                )
        self.peak = max(self.peak, self.held())
        return out

    def held(self):
        self.storages = {k: pair for k, pair in self.storages.items() if not pair[0].expired()}
        return sum(size for _, size in self.storages.values())


def after_backward(recompute):
    """Loss, gradients, bytes held between forward and backward, and the most at any time."""
    network = video_dit(depth=4)
    parallelise(network, network.blocks, Layout(), CPU, recompute=recompute)
    with Memory() as memory:
        loss = sample_losses(network, CASE, 3, list(range(16))).mean()
        held = memory.held()
        loss.backward()
    gradients = {name: weight.grad for name, weight in network.named_parameters()}
    return loss.detach(), gradients, held, memory.peak


@pytest.mark.parametrize(
    ("recompute", "share", "of_peak"), [(recompute_all, 0.2, 0.5), (recompute_cheap, 0.55, 0.7)]
)
def test_it_halves_the_memory_and_changes_nothing(recompute, share, of_peak):
    loss, gradients, held, peak = after_backward(None)
    again, others, less_held, lower_peak = after_backward(recompute)
    assert torch.equal(again, loss)
    assert others.keys() == gradients.keys()
    assert all(torch.equal(others[name], gradient) for name, gradient in gradients.items())
    assert less_held < share * held
    assert lower_peak < of_peak * peak  # one block's activations, and gradients


def test_names_stay_and_a_copy_is_its_own():
    plain, network = video_dit(), video_dit()
    for block in network.blocks:
        recompute_all(block)
    assert network.state_dict().keys() == plain.state_dict().keys()
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for weight in network.parameters():
            weight.zero_()
    expected = sample_losses(plain, CASE, 0, [1, 2])
    assert torch.equal(sample_losses(twin, CASE, 0, [1, 2]), expected)
