"""A network of another process, asked for the flow's velocity.

A state is a sample of every process at once, up to a factor: what counts is its ratio of signal to
noise (Karras et al. 2022, App. B; Kingma et al. 2021, Sec. 5.1). So x_t of the flow, at

    s with alpha_s / sigma_s = (1 - t) / t,    x_s = x_t |(alpha_s, sigma_s)| / |(1 - t, t)|

is what the network was trained on at its own time s, and what it says of data and noise there holds
for x_t. The factor is alpha_s / (1 - t), written so that it is finite at pure noise too.

An error of a predicted eps is 1 / (1 - t) times as large in the velocity, at most 1 + sigma / alpha
at the process' end: a loss of the velocity weighs times near pure noise so much more.
"""

import torch
from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, Network
from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.diffusion.process import FlowProcess, Process, half_log_snr, over_dimensions

_FLOW = FlowProcess()


def flow_velocity(
    network: Network,
    process: Process,
    prediction: Prediction,
    x_t: Tensor,
    t: Tensor,
    cond: Condition,
) -> Tensor:
    """eps - x0 at a state of the flow, by one evaluation of a network of `process`.

    Where the flow has more noise than the process has at its end, as a table without zero terminal
    SNR leaves some signal, the network is asked at that end.

    Args:
        network: predicts `prediction` of `process`.
        process: that it was trained on.
        prediction: what it predicts.
        x_t: (B, ...) state of the flow.
        t: (B,) in (0, 1], the flow's time.
        cond: passed on.

    Returns:
        (B, ...), in the dtype of `x_t`.
    """
    if isinstance(process, FlowProcess) and prediction is Prediction.VELOCITY:
        return network(x_t, t, cond)
    s = process.time_of(half_log_snr(_FLOW, t))
    scale = torch.hypot(process.alpha(s), process.sigma(s)) / torch.hypot(1 - t, t)
    x_s = (over_dimensions(scale, x_t) * x_t).to(x_t.dtype)
    value = network(x_s, s, cond)
    x0, eps = (
        convert(value, x_s, s, process, prediction, target)
        for target in (Prediction.X0, Prediction.EPS)
    )
    return (eps - x0).to(x_t.dtype)
