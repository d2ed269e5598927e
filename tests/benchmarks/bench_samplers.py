"""Samplers beside diffusers' and k-diffusion's: evaluations against the error to the exact map.

`make bench-samplers` prints a markdown table. Data is a one-dimensional Gaussian mixture, whose
denoiser and flow map are known, so the error is the solver's alone: the largest over 41 starts at
t = 0.98, carried to the data. All run on the same times of the flow process. diffusers has its
sigmas overwritten; k-diffusion sees sigma / alpha and x / alpha, where Heun's is another method.
A `nan` is theirs: DEIS there has no step to sigma = 0, UniPC's bh1 takes 0 times an infinite B(h).
"""

import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable
from functools import partial

import diffusers
import numpy as np
import torch
from analytic import Mixture
from solvers import ALL

from ldm_core.diffusion.grids import karras_grid
from ldm_core.diffusion.process import FlowProcess
from ldm_core.diffusion.variance_exploding import VarianceExploding

START, BUDGETS = 0.98, (5, 8, 12, 20, 40, 60, 80)
X = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]


class Counted:
    """A function that counts its calls."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments, **keywords):
        self.calls += 1
        return self.function(*arguments, **keywords)


def linear_times(steps):
    return torch.linspace(START, 0, steps + 1, dtype=torch.float64)


def karras_times(steps):
    return karras_grid(FlowProcess(), steps, 0.02, START / (1 - START))


def ours(sample):
    def run(grid):
        denoiser = Mixture().denoiser()
        denoiser.network = Counted(denoiser.network)
        return sample(denoiser, X, grid, None), denoiser.network.calls

    return run


def of_diffusers(make, **config):
    """A scheduler that works on flow levels, walking our times."""

    def run(grid):
        scheduler = make(use_flow_sigmas=True, prediction_type="sample", **config)
        scheduler.set_timesteps(len(grid) - 1)
        scheduler.sigmas, scheduler.timesteps = grid.float(), torch.arange(len(grid) - 1)
        x = X
        for t, row in zip(grid, scheduler.timesteps, strict=False):
            x = scheduler.step(Mixture().x0(x, t, None), row, x).prev_sample
        return x, len(grid) - 1

    return run


def of_diffusers_velocity(make, order):
    """FlowMatch schedulers predict the velocity; those of order 2 call twice a step."""

    def run(grid):
        scheduler, denoiser, x = make(), Mixture().denoiser(), X
        scheduler.set_timesteps(len(grid) - 1)
        inner = grid[1:-1].repeat_interleave(order)
        sigmas = torch.cat([grid[:1], inner, grid[-1:]])
        scheduler.sigmas, scheduler.timesteps = sigmas.float(), 1000 * sigmas[:-1]
        for index, t in enumerate(sigmas[:-1]):
            scheduler._step_index = index
            x = scheduler.step(denoiser.velocity(x, t, None), 1000 * t, x).prev_sample
        return x, len(sigmas) - 1

    return run


def k_diffusion_sampling() -> types.ModuleType | None:
    """k_diffusion.sampling without the package around it, whose images need torchvision."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None:
        return None
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(found.submodule_search_locations or [])
    sys.modules["k_diffusion"] = package
    for name in ("torchvision", "torchvision.transforms"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["torchvision.transforms"].functional = None
    return importlib.import_module("k_diffusion.sampling")


def of_k_diffusion(sampling, name, **keywords):
    def run(grid):
        model = Counted(Mixture(VarianceExploding(math.inf)).x0)
        sigmas = grid / (1 - grid)
        sample = getattr(sampling, name)
        x = sample(
            lambda x, sigma: model(x, sigma, None),
            X / (1 - grid[0]),
            sigmas,
            disable=True,
            **keywords,
        )
        return x, model.calls

    return run


def rows(sampling) -> dict[str, dict[str, Callable]]:
    """Sampler -> who -> run(grid) giving the result and its number of evaluations."""
    multi = partial(of_diffusers, diffusers.DPMSolverMultistepScheduler)
    unipc = partial(of_diffusers, diffusers.UniPCMultistepScheduler)
    deis = partial(of_diffusers, diffusers.DEISMultistepScheduler)
    table = {name: {"ours": ours(sample)} for name, sample in ALL.items()}
    theirs = {
        "Euler": of_diffusers_velocity(diffusers.FlowMatchEulerDiscreteScheduler, 1),
        "Heun": of_diffusers_velocity(diffusers.FlowMatchHeunDiscreteScheduler, 2),
        "DDIM": multi(solver_order=1),
        "DPM++ 2M": multi(),
        "DPM++ 2M heun": multi(solver_type="heun"),
        "DPM++ 3M": multi(solver_order=3),
        "UniPC-1": unipc(solver_order=1),
        "UniPC-2": unipc(),
        "UniPC-2 bh1": unipc(solver_type="bh1"),
        "UniPC-2 predictor": unipc(disable_corrector=list(range(99))),
        "UniPC-3": unipc(solver_order=3),
        "DEIS-2": deis(),
        "DEIS-3": deis(solver_order=3),
    }
    for name, run in theirs.items():
        table[name]["diffusers"] = run
    if sampling is not None:
        k = partial(of_k_diffusion, sampling)
        table["Euler"]["k-diffusion"] = k("sample_euler")
        table["Heun"]["k-diffusion"] = k("sample_heun")
        table["DPM-Solver-2"]["k-diffusion"] = k("sample_dpm_2")
        table["DPM++ 2S"]["k-diffusion"] = k("sample_dpmpp_2s_ancestral", eta=0.0)
        table["DPM++ 2M"]["k-diffusion"] = k("sample_dpmpp_2m")
        table["DPM++ 3M"]["k-diffusion"] = k("sample_dpmpp_3m_sde", eta=0.0)
    return table


def error(run, times, budget) -> float:
    """With as many steps as the budget of evaluations allows; nan if not even one."""
    exact = torch.from_numpy(Mixture().flow_map(X[:, 0].numpy(), START, 0.0))
    steps = budget
    while steps:
        result, calls = run(times(steps))
        if calls <= budget:
            return float((result[:, 0].double() - exact).abs().max())
        steps = min(steps - 1, steps * budget // calls + 1)
    return math.nan


def main() -> None:
    sampling = k_diffusion_sampling()
    if sampling is None:
        print("k-diffusion is not installed (`make bench-samplers` does), so it has no rows.\n")
    with np.errstate(all="ignore"), torch.no_grad():
        for title, times in (("Equal steps in t", linear_times), ("Karras", karras_times)):
            print(f"### {title}: largest error at so many evaluations\n")
            print("| Sampler | by |", " | ".join(map(str, BUDGETS)), "|")
            print("|---|---|" + "---|" * len(BUDGETS))
            for name, runs in rows(sampling).items():
                for who, run in runs.items():
                    cells = [f"{error(run, times, budget):.2e}" for budget in BUDGETS]
                    print(f"| {name} | {who} |", " | ".join(cells), "|")
            print()


if __name__ == "__main__":
    main()
