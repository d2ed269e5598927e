"""A generator without a model: a picture is noise from its request, a slow one takes its time."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldm_core.errors import UserError
from ldm_core.generation import PictureRequest


class FakeGenerator:
    """Stands in for `PictureGenerator`; writes every batch's prompts to a log in its folder."""

    digest = "0123456789abcdef"
    size = 32
    default_steps = 4
    default_guidance = 1.0
    kind = "student"
    lineage = {"teacher": "fedcba9876543210"}

    def __init__(self, uri: str, device: str) -> None:
        self.uri, self.device = uri, device

    def generate(self, requests: Sequence[PictureRequest], on_step=None) -> np.ndarray:
        prompts = [request.prompt for request in requests]
        with Path(self.uri, "batches.jsonl").open("a") as log:
            log.write(json.dumps(prompts) + "\n")
        time.sleep(0.5 if any("slow" in prompt for prompt in prompts) else 0.05)
        if "a bug" in prompts:
            raise RuntimeError("the device is on fire")
        return np.stack([self._noise(request) for request in requests])

    def check(self, request: PictureRequest) -> None:
        if request.guidance != 1.0:
            raise UserError(f"guidance is {request.guidance} but this student has it folded in: 1")

    def _noise(self, request: PictureRequest) -> np.ndarray:
        key = hashlib.sha256(repr(request).encode()).digest()
        rng = np.random.default_rng(int.from_bytes(key[:8], "big"))
        return rng.integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)


def drawn(folder: Path) -> list[str]:
    """The prompts of all pictures begun so far."""
    lines = (folder / "batches.jsonl").read_text().splitlines()
    return [prompt for line in lines for prompt in json.loads(line)]
