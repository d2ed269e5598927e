"""A sampler by the name its users know it by, for command lines and requests.

Code imports the functions themselves; here their noise is made from the pictures' seeds.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ldm_core.diffusion.process import Process
from ldm_core.errors import UserError
from ldm_core.samplers.ancestral import sample_dpmpp_2s_ancestral, sample_euler_ancestral
from ldm_core.samplers.churn import sample_churn
from ldm_core.samplers.ddpm import sample_ddim_eta, sample_ddpm
from ldm_core.samplers.deis import sample_deis
from ldm_core.samplers.dpm_solver_multistep import sample_dpmpp_2m, sample_dpmpp_3m
from ldm_core.samplers.dpm_solver_sde import sample_dpmpp_2m_sde, sample_dpmpp_sde
from ldm_core.samplers.dpm_solver_singlestep import sample_dpm_solver_2, sample_dpmpp_2s
from ldm_core.samplers.er_sde import sample_er_sde
from ldm_core.samplers.euler import sample_euler
from ldm_core.samplers.euler_maruyama import sample_euler_maruyama
from ldm_core.samplers.heun import sample_heun
from ldm_core.samplers.noise import seeded_noise, seeded_path
from ldm_core.samplers.unipc import sample_unipc


def _sigma(process: Process, t: Tensor) -> Tensor:
    """A diffusion that is finite at pure noise and ends with the noise (Ma et al. 2024, SiT)."""
    return process.sigma(t)


ODE: dict[str, Callable[..., Tensor]] = {
    "euler": sample_euler,
    "heun": sample_heun,
    "dpm-solver-2": sample_dpm_solver_2,
    "dpmpp-2s": sample_dpmpp_2s,
    "dpmpp-2m": sample_dpmpp_2m,
    "dpmpp-3m": sample_dpmpp_3m,
    "deis": sample_deis,
    "unipc": sample_unipc,
}
BY_DRAWS: dict[str, Callable[..., Tensor]] = {
    "ddim": partial(sample_ddim_eta, eta=0.0),
    "ddpm": sample_ddpm,
    "euler-ancestral": sample_euler_ancestral,
    "dpmpp-2s-ancestral": sample_dpmpp_2s_ancestral,
    "euler-maruyama": partial(sample_euler_maruyama, diffusion=_sigma),
    "churn": sample_churn,
    "er-sde": sample_er_sde,
}
BY_PATH: dict[str, Callable[..., Tensor]] = {
    "dpmpp-2m-sde": sample_dpmpp_2m_sde,
    "dpmpp-sde": sample_dpmpp_sde,
}
SAMPLERS = ODE | BY_DRAWS | BY_PATH


@dataclass(frozen=True)
class SamplerChoice:
    """Which sampler, and how much noise it draws anew.

    Attributes:
        name: a key of `SAMPLERS`.
        eta: 0 is the ODE, 1 the reverse SDE; None takes the sampler's own, 0 of "ddim", else 1.

    Raises:
        UserError: another name, eta outside [0, 1], or one for a sampler that has none.
    """

    name: str
    eta: float | None = None

    def __post_init__(self) -> None:
        if self.name not in SAMPLERS:
            raise UserError(f"sampler {self.name!r}: choose one of {', '.join(SAMPLERS)}")
        if self.eta is None:
            return
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta is {self.eta:g}; choose 0, the ODE, to 1, the reverse SDE")
        if not _takes_eta(self.name):
            kind = "an ODE solver" if self.name in ODE else "a sampler with a noise of its own"
            able = ", ".join(filter(_takes_eta, SAMPLERS))
            raise UserError(
                f"eta is {self.eta:g}, but {self.name} is {kind}: leave eta out, or choose {able}"
            )

    def sample(
        self,
        denoiser: Any,
        x_T: Tensor,
        grid: Tensor,
        cond: Any,
        seeds: Sequence[int],
        on_step: Any = None,
    ) -> Tensor:
        """As `sample_ddim`; `seeds` are the pictures', one each, and decide their noise alone."""
        options: dict[str, Any] = {} if self.eta is None else {"eta": self.eta}
        if self.name in BY_DRAWS:
            options["noise"] = seeded_noise(seeds, x_T)
        elif self.name in BY_PATH:
            options["path"] = seeded_path(seeds, x_T, denoiser.process.end)
        return SAMPLERS[self.name](denoiser, x_T, grid, cond, on_step, **options)


def _takes_eta(name: str) -> bool:
    return "eta" in inspect.signature(SAMPLERS[name]).parameters
