"""Intervals of guidance in terms of noise, not of time (Kynkäänniemi et al. 2024, Eq. 5).

The paper's sigma is the noise of data that keeps its size: sigma_t / alpha_t here. An interval of
its logarithm means the same noise on every process; an interval in t, or in the fraction of steps
taken, does not.
"""

import math

import torch

from ldm_core.diffusion.process import Process
from ldm_core.guidance.guided import Interval


def log_sigma_interval(process: Process, low: float, high: float) -> Interval:
    """The times at which low <= ln(sigma_t / alpha_t) <= high.

    Args:
        process: says which times these are.
        low, high: ln(sigma / alpha); -inf reaches to the data, inf to the noise.

    Raises:
        ValueError: low is not below high.
    """
    if not low < high:
        raise ValueError(f"ln(sigma / alpha) runs from low to high: {low:g} < {high:g}, please")
    ends = process.time_of(-torch.tensor([low, high], dtype=torch.float64))
    first = 0.0 if low == -math.inf else float(ends[0])
    last = process.end if high == math.inf else float(ends[1])
    return first, last
