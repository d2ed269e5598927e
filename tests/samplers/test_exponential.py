import math

import pytest
import torch
from scipy.integrate import quad

from ldm_core.diffusion.process import FlowProcess
from ldm_core.samplers import exponential
from ldm_core.samplers.exponential import bend, bh1, bh2, data_step, level, moments

START, END = -0.4, 0.9


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def nodes(polynomial, at):
    return tuple(number(a) for a in at), tuple(number([[polynomial(a)]]) for a in at)


@pytest.mark.parametrize("h", [-2.0, -0.1, 0.1, 3.0])
def test_moments_are_their_integrals(h):
    for k, moment in enumerate(moments(number(h), 4).tolist()):
        integral, _ = quad(lambda s, k=k: math.exp(s - h) * (s / h) ** k, 0, h)
        assert moment == pytest.approx(integral, abs=1e-10)


@pytest.mark.parametrize("at", [[START, -1.1], [START, -1.1, -1.5], [START, END, -1.1, -1.5]])
def test_polynomials_are_integrated_exactly(at):
    """Through as many points as they have coefficients, with the corrector's point or without."""

    def p(s):
        return sum((-0.7) ** k * (k + 1) * s**k for k in range(len(at)))

    exact, _ = quad(lambda s: math.exp(s - END) * (p(s) - p(START)), START, END)
    assert float(bend(*nodes(p, at), number(END))) == pytest.approx(exact, abs=1e-12)


def test_a_step_is_the_integral_of_the_data():
    """Lu et al. 2022b, Prop. 4.1, for an x0 that is a parabola in lambda."""
    process, x = FlowProcess(), number([[0.3]])

    def p(s):
        return 1 - s + 2 * s**2

    at, values = nodes(p, [START, -1.1, -1.5])
    t, r = process.time_of(number([START, END]))
    integral, _ = quad(lambda s: math.exp(s - END) * p(s), START, END)
    exact = process.sigma(r) / process.sigma(t) * x + process.alpha(r) * integral
    result = data_step(process, x, t, r, list(zip(at, values, strict=True)))
    torch.testing.assert_close(result, exact, rtol=0, atol=1e-12)


def test_a_wrong_lambda_is_not_exact(monkeypatch):
    """log-SNR where half of it is meant, the likeliest slip."""
    monkeypatch.setattr(exponential, "level", lambda process, t: 2 * level(process, t))
    with pytest.raises(AssertionError):
        test_a_step_is_the_integral_of_the_data()


def test_step_functions_weigh_lines_only():
    line, parabola = nodes(lambda s: s, [START, -1.1]), nodes(lambda s: s**2, [START, -1.1, -1.5])
    h, to = number(END - START), number(END)
    for step_function, b in ((bh1, h), (bh2, 1 - (-h).exp())):
        assert float(bend(*line, to, step_function)) == pytest.approx(float(b * h / 2))
        assert torch.equal(bend(*parabola, to, step_function), bend(*parabola, to))


def test_at_infinite_levels_the_order_falls():
    noise, data = number(-math.inf), number(math.inf)
    at, values = nodes(lambda s: s, [START, -1.1])
    assert bend((at[0], noise), values, number(END)) == 0
    assert bend((noise,), values[:1], number(END)) == 0
    assert bend(at, values, data) == 0
