import pytest
import torch

from ldm_core.objectives.regression import mean_square, pseudo_huber


def test_pseudo_huber():
    x = torch.zeros(4, 5, dtype=torch.float64)
    sizes = torch.tensor([0.0, 1e-9, 3e-4, 2.0], dtype=torch.float64)
    loss = pseudo_huber(x + sizes[:, None], x, 3e-4)
    assert loss[0] == 0
    assert loss[1].item() == pytest.approx(1e-18 / 6e-4, rel=1e-8)  # e^2 / 2c
    assert loss[2].item() == pytest.approx(3e-4 * (2**0.5 - 1), rel=1e-12)
    assert loss[3].item() == pytest.approx(2 - 3e-4, rel=1e-6)  # e - c


def test_pseudo_huber_is_the_papers_over_the_root_of_the_dimension():
    x, y = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64) * 1e-3
    c = 0.00054 * 48**0.5
    theirs = ((x - y).square().flatten(1).sum(1) + c**2).sqrt() - c
    torch.testing.assert_close(pseudo_huber(x, y), theirs / 48**0.5)
    assert (pseudo_huber(x, y) <= mean_square(x, y).sqrt()).all()
