"""The deterministic samplers, by name, as tests and the benchmark ask for them."""

from functools import partial

from ldm_core.samplers.ddim import sample_ddim
from ldm_core.samplers.deis import sample_deis
from ldm_core.samplers.dpm_solver_multistep import sample_dpmpp_2m, sample_dpmpp_3m
from ldm_core.samplers.dpm_solver_singlestep import sample_dpm_solver_2, sample_dpmpp_2s
from ldm_core.samplers.euler import sample_euler
from ldm_core.samplers.exponential import bh1
from ldm_core.samplers.heun import sample_heun
from ldm_core.samplers.runge_kutta import sample_rk4
from ldm_core.samplers.unipc import sample_unipc

VELOCITY = {"Euler": sample_euler, "Heun": sample_heun, "RK4": sample_rk4}
"""Work on dx/dt, so their path depends on how the process runs through its levels."""

EXPONENTIAL = {
    "DDIM": sample_ddim,
    "DPM-Solver-2": sample_dpm_solver_2,
    "DPM++ 2S": sample_dpmpp_2s,
    "DPM++ 2M": sample_dpmpp_2m,
    "DPM++ 2M heun": partial(sample_dpmpp_2m, step_function=None),
    "DPM++ 3M": sample_dpmpp_3m,
    "UniPC-1": partial(sample_unipc, order=1),
    "UniPC-2": sample_unipc,
    "UniPC-2 bh1": partial(sample_unipc, step_function=bh1),
    "UniPC-2 predictor": partial(sample_unipc, corrector=False),
    "UniPC-3": partial(sample_unipc, order=3),
    "DEIS-2": partial(sample_deis, order=2),
    "DEIS-3": sample_deis,
    "DEIS-3 seeded": partial(sample_deis, seeded=True),
}
"""Work on levels only."""

ALL = VELOCITY | EXPONENTIAL
