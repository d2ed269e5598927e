"""The deployment that holds the model: batches pictures on its device and returns them as PNG."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ldm_core.errors import UserError
from ldm_core.generation import PictureGenerator, PictureRequest, annotate
from pipelines.serving.batcher import Batcher
from pipelines.serving.messages import Order, Picture, Refused

Load = Callable[[str, str], PictureGenerator]


class Sampler:
    """One replica: one model on one device.

    Args:
        model: URI of the model directory.
        threads: of torch.
        device: "cpu" or "cuda".
        load: makes the generator from (URI, device).
    """

    def __init__(self, model: str, threads: int, device: str, load: Load) -> None:
        torch.set_num_threads(threads)
        self._generator = load(model, device)
        self._loaded_at = int(time.time())
        self._batcher: Batcher[PictureRequest, np.ndarray] = Batcher(self._draw)

    def reconfigure(self, config: dict[str, Any]) -> None:
        """Take new batching limits; Ray Serve calls it at the start and when they change."""
        self._batcher.max_batch_size = config["max_batch_size"]
        self._batcher.wait_s = config["batch_wait_s"]

    def describe(self) -> dict[str, Any]:
        """What the ingress tells clients about the model."""
        generator = self._generator
        return {
            "created": self._loaded_at,
            "kind": generator.kind,
            "digest": generator.digest,
            "size": f"{generator.size}x{generator.size}",
            "default_steps": generator.default_steps,
            "default_guidance": generator.default_guidance,
            "lineage": generator.lineage,
        }

    async def generate(self, order: Order) -> list[Picture] | Refused:
        """The order's pictures; other callers' pictures may share their batches."""
        requests = [
            PictureRequest(order.prompt, seed, order.steps, order.guidance) for seed in order.seeds
        ]
        try:
            for request in requests:
                self._generator.check(request)
        except UserError as error:
            return Refused(str(error))
        return await asyncio.gather(*(self._picture(request) for request in requests))

    def _draw(self, requests: list[PictureRequest]) -> list[np.ndarray]:
        return list(self._generator.generate(requests))

    async def _picture(self, request: PictureRequest) -> Picture:
        done = await self._batcher.submit(request)
        png = await asyncio.to_thread(annotate, done.result, request, self._generator)
        return Picture(png, self._generator.digest, done.batch_size, done.seconds)
