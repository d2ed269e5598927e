"""The deployment that speaks HTTP: validates, bounds the queue, answers in OpenAI's shapes."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi.responses import HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatus, ReplicaState

from pipelines.serving.api import (
    ApiError,
    ImageGenerationRequest,
    ImagesResponse,
    ModelCard,
    ModelList,
    images_response,
    not_ready,
    order,
    queue_full,
)
from pipelines.serving.messages import Order, Picture, Refused
from pipelines.serving.metrics import meter
from pipelines.serving.web import GENERATIONS, app


@serve.ingress(app)
class Ingress:
    """HTTP in front of the samplers.

    Args:
        sampler: handle on the `Sampler` deployment.
        name: the served model's id.
        room: pictures that may be asked for and not drawn yet; more are refused.
        max_pictures, max_steps: the most one request may ask for.
    """

    def __init__(
        self,
        sampler: DeploymentHandle,
        name: str,
        room: int,
        max_pictures: int,
        max_steps: int,
    ) -> None:
        self._sampler = sampler
        self._room, self._open = room, 0
        self._limits: dict[str, Any] = {
            "id": name,
            "max_pictures": max_pictures,
            "max_steps": max_steps,
        }
        self._page = Path(__file__).with_name("page.html").read_text()
        self._known: ModelCard | None = None

    @app.post(GENERATIONS)
    async def generate(self, request: ImageGenerationRequest) -> ImagesResponse:
        """Make `n` pictures of a prompt."""
        start = time.perf_counter()
        card = await self._card()
        wanted = order(request, card)
        with self._place(len(wanted.seeds)):
            pictures = await self._draw(wanted)
        meter().drew(
            time.perf_counter() - start,
            max(picture.sampling_s for picture in pictures),
            [picture.batch_size for picture in pictures],
        )
        return images_response(card, wanted, pictures)

    @app.get("/v1/models")
    async def models(self) -> ModelList:
        """The one model served here: its defaults, limits and lineage."""
        return ModelList(data=[await self._card()])

    @app.get("/health")
    def health(self) -> dict[str, str]:
        """200 when a model is loaded (or asleep at zero replicas), else 503."""
        name = serve.get_replica_context().app_name
        sampler = serve.status().applications[name].deployments["Sampler"]
        running = sampler.replica_states.get(ReplicaState.RUNNING, 0)
        if sampler.status != DeploymentStatus.HEALTHY and not running:
            raise not_ready(f"no model is loaded: {sampler.status.value} {sampler.message}")
        return {"status": "ok"}

    @app.get("/metrics")
    def metrics(self) -> Response:
        """This ingress's numbers in Prometheus' text format."""
        return Response(meter().text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page(self) -> str:
        """A page to try the model from."""
        return self._page

    async def _card(self) -> ModelCard:
        if self._known is None:
            described = await self._ask("describe")
            self._known = ModelCard(**described, **self._limits)
        return self._known

    @contextlib.contextmanager
    def _place(self, pictures: int) -> Iterator[None]:
        """Room for an order until it is drawn or its client leaves; alone, it always has some."""
        if self._open and self._open + pictures > self._room:
            raise queue_full()
        self._open += pictures
        try:
            yield
        finally:
            self._open -= pictures

    async def _draw(self, wanted: Order) -> list[Picture]:
        result: list[Picture] | Refused = await self._ask("generate", wanted)
        if isinstance(result, Refused):
            raise ApiError(422, result.message, code="unsupported_by_model")
        return result

    async def _ask(self, method: str, *args: Any) -> Any:
        """Call a sampler; when the client leaves, Serve cancels this and the call with it."""
        try:
            return await getattr(self._sampler, method).remote(*args)
        except (DeploymentUnavailableError, RayActorError) as error:
            raise not_ready("the model's worker was lost; send the request again") from error
