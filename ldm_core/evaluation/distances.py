"""Distances between sets of features: Fréchet's, of their Gaussians, and the kernels' (MMD^2).

Features are any embedding of pictures, (N, D); the distances say nothing about which is right.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], Tensor]
"""((N, D), (M, D)) -> (N, M)."""


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> Tensor:
    """|m_a - m_b|^2 + tr(A + B - 2 (A^(1/2) B A^(1/2))^(1/2)) (Dowson & Landau 1982; FID: Heusel et
    al. 2017, Eq. 6).

    Args:
        mean_a, mean_b: (D,).
        cov_a, cov_b: (D, D), symmetric; singular ones are fine.

    Returns:
        0-dim, at least 0 up to rounding: give float64.

    Raises:
        ValueError: shapes that do not fit.
    """
    size = len(mean_a)
    shapes = [tuple(each.shape) for each in (mean_b, cov_a, cov_b)]
    if shapes != [(size,), (size, size), (size, size)]:
        raise ValueError(f"a mean of {size} numbers needs ({size},) and ({size}, {size}): {shapes}")
    root = square_root(cov_a)
    cross = square_root(root @ cov_b @ root).trace()
    return (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross


def square_root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite (D, D); rounding below 0 counts as 0."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def squared_mmd(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """The unbiased estimate of MMD^2, which may be below 0 (Gretton et al. 2012, Eq. 3).

    Args:
        x, y: (N, D) and (M, D) features, at least two each.
        kernel: positive definite.

    Returns:
        0-dim.

    Raises:
        ValueError: fewer than two rows.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"at least two of each are needed, got {len(x)} and {len(y)}")
    return _among(kernel(x, x)) + _among(kernel(y, y)) - 2 * kernel(x, y).mean()


def _among(gram: Tensor) -> Tensor:
    """Mean over the pairs of different rows; a row beside itself is what makes it biased."""
    count = len(gram)
    return (gram.sum() - gram.diagonal().sum()) / (count * (count - 1))
