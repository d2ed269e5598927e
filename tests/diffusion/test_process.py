import torch

from ldm_core.diffusion.process import FlowProcess, add_noise, batch_time, log_snr

T = torch.linspace(0, 1, 11, dtype=torch.float64)


def test_ends_are_data_and_noise():
    x0, eps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    x_t = add_noise(FlowProcess(), x0, eps, torch.tensor([0.0, 1.0]))
    assert torch.equal(x_t[0], x0[0])
    assert torch.equal(x_t[1], eps[1])
    assert torch.equal(add_noise(FlowProcess(), x0, eps, torch.tensor(1.0)), eps)


def test_derivatives_are_those_of_the_levels():
    process = FlowProcess()
    for level, derivative in (
        (process.alpha, process.alpha_derivative),
        (process.sigma, process.sigma_derivative),
    ):
        _, exact = torch.func.jvp(level, (T,), (torch.ones_like(T),))
        assert torch.equal(derivative(T), exact)


def test_log_snr():
    assert log_snr(FlowProcess(), torch.tensor(0.5)) == 0
    torch.testing.assert_close(log_snr(FlowProcess(), T[1:-1]), -2 * torch.logit(T[1:-1]))
    assert log_snr(FlowProcess(), T[0]) == torch.inf
    assert log_snr(FlowProcess(), T[-1]) == -torch.inf


def test_batch_time_takes_numbers_and_tensors():
    x = torch.zeros(3, 1, dtype=torch.bfloat16)
    for t in (0.25, torch.tensor(0.25), torch.full((3,), 0.25, dtype=torch.float64)):
        assert torch.equal(batch_time(t, x), torch.full((3,), 0.25))
