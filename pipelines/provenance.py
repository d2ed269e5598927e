"""Where and with what something was made: machine, packages, version of the code."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

PROJECT = Path(__file__).parents[1]
PACKAGES = ("torch", "diffusers", "transformers", "ray", "mlflow")


def machine() -> str:
    """Cores and the GPU's model, or the processor's where there is no GPU; of this machine."""
    cores = f"{os.cpu_count()} cores"
    if not torch.cuda.is_available():
        return f"{cores} of {_processor()}"
    return f"{cores} and {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def packages() -> str:
    """The packages that decide most, with their versions."""
    names = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"Python {platform.python_version()}, {names}"


def code(project: Path = PROJECT) -> str:
    """The commit of a checkout, "-dirty" if it was changed since; else the package's version."""
    # without .git here, git would find the repository that holds the environment
    if (project / ".git").exists() and shutil.which("git"):
        words = ["git", "-C", str(project), "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return version("latent-diffusion-on-ray")


def _processor() -> str:
    """The model as Linux tells it on most processors, else the architecture."""
    told = Path("/proc/cpuinfo")
    for line in told.read_text().splitlines() if told.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
