"""Steps that integrate the known part of the probability-flow ODE exactly.

In lambda = ln(alpha / sigma) the ODE is one integral, of the data estimate D or, mirrored, of eps
(Lu et al. 2022b, Prop. 4.1; Lu et al. 2022, Prop. 3.1):

    x_r = sigma_r / sigma_t x_t + alpha_r int e^(lambda - lambda_r) D dlambda         over [t, r]
    x_r = alpha_r / alpha_t x_t - sigma_r int e^(lambda_r - lambda) eps dlambda

The mirror swaps alpha with sigma and D with eps and turns lambda round, so one quadrature does for
both. A constant D gives DDIM, which is `ddim_step`. A polynomial through several estimates adds a
weighted sum of their differences from the newest, which is `bend`. Nothing but levels enters, so a
solver made of these takes the same path on every process.

lambda is -inf at pure noise and +inf at pure data. There the polynomial has no limit and steps are
of first order, as in the papers' own code; the step to the data then ends at the estimate D itself.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm_core.diffusion.process import Process, half_log_snr
from ldm_core.samplers.transition import transition_mean

Node = tuple[Tensor, Tensor]
"""lambda, 0-dim, and the (B, ...) estimate made there."""

StepFunction = Callable[[Tensor], Tensor]
"""B(h) of UniPC, any function h + O(h^2): `bh1`, `bh2`."""


def level(process: Process, t: Tensor) -> Tensor:
    """lambda_t in float64, whatever the grid is in: steps are differences of it."""
    return half_log_snr(process, t.double())


def ddim_step(process: Process, x: Tensor, x0: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """alpha_r x0 + sigma_r eps with eps from x_t = alpha_t x0 + sigma_t eps (Song et al. 2021,
    Eq. 12 with sigma = 0; DPM-Solver++(1S)): from x (B, ...) at t to r, exact for a constant x0.

    It is the `transition` that draws no noise.
    """
    return transition_mean(process, x, x0, t, r, keep=1.0)


def data_step(
    process: Process,
    x: Tensor,
    t: Tensor,
    r: Tensor,
    known: list[Node],
    step_function: StepFunction | None = None,
) -> Tensor:
    """From x (B, ...) at t to r along the polynomial in lambda through estimates of x0.

    Args:
        process: gives the levels.
        x: (B, ...) the state at t.
        t, r: 0-dim times.
        known: the estimate at t first, then others at any times.
        step_function: as in `bend`.

    Returns:
        (B, ...) the state at r; of local order len(known) + 1 if the levels are finite.
    """
    at, values = zip(*known, strict=True)
    straight = ddim_step(process, x, values[0], t, r)
    return straight + process.alpha(r) * bend(at, values, level(process, r), step_function)


def bend(
    at: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    to: Tensor,
    step_function: StepFunction | None = None,
) -> Tensor | float:
    """What a polynomial adds to its first value: int_[at_0, to] e^(s - to) (p(s) - p(at_0)) ds.

    Args:
        at: levels, 0-dim. Those at pure noise are left out, which is the limit of their weight.
        values: (B, ...) each, what p is there.
        to: where the integral ends.
        step_function: B(h) if the weight of a straight line is to be B(h) / 2 instead of exact
            (Zhao et al. 2023, UniPC); polynomials of degree 2 and above do not depend on it.

    Returns:
        (B, ...), or 0.0 if there is no second value or the interval is infinite.
    """
    h = to - at[0]
    others = [(a, v) for a, v in zip(at[1:], values[1:], strict=True) if not a.isinf()]
    if not others or h.isinf():
        return 0.0
    nodes = torch.stack([(a - at[0]) / h for a, _ in others])  # 0 at t, 1 at r
    if len(others) == 1 and step_function is not None:
        weights = step_function(h) / 2 / nodes
    else:
        powers = torch.stack([nodes**k for k in range(1, len(nodes) + 1)])
        weights = torch.linalg.solve(powers, moments(h, len(nodes))[1:])
    return sum(w * (v - values[0]) for w, (_, v) in zip(weights, others, strict=True))


def moments(h: Tensor, highest: int) -> Tensor:
    """int_0^h e^(s - h) (s / h)^k ds for k = 0..highest, by parts; h may be negative."""
    m = [-torch.expm1(-h)]
    for k in range(1, highest + 1):
        m.append(1 - k * m[-1] / h)
    return torch.stack(m)


def bh1(h: Tensor) -> Tensor:
    """B(h) = h."""
    return h


def bh2(h: Tensor) -> Tensor:
    """B(h) = 1 - e^-h, the moment of a constant; its straight line is DPM-Solver++(2M)'s."""
    return -torch.expm1(-h)


def order_at(index: int, order: int, grid: Tensor) -> int:
    """The order of a multistep solver at step `index`: no more than there are steps left if the
    last one goes to the data, where it can be only 1 (as in the code of Zhao et al. 2023).
    """
    return min(order, len(grid) - 1 - index) if grid[-1] == 0 else order
