"""What goes over the wire: OpenAI's images API, plus seed, steps and guidance."""

import base64
import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from pipelines.serving.messages import Order, Picture

RETRY_AFTER_S = 1
MAX_SEED = 2**53 - 1  # every JSON client reads integers up to here exactly
MAX_RANDOM_SEED = 2**31  # ours are short enough to be typed again by hand


class ImageGenerationRequest(BaseModel):
    """Body of `POST /v1/images/generations`; picture i of `n` has the seed `seed + i`.

    Attributes:
        model: the served model's id, or nothing.
        size: "64x64": nothing but what the model makes.
        seed: nothing lets the server choose; the answer says which it was.
        steps, guidance_scale: nothing takes the model's defaults.
        user: accepted for OpenAI's clients, not used.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)]
    model: str | None = None
    n: int = Field(1, ge=1)
    size: str | None = Field(None, max_length=20)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0, allow_inf_nan=False)
    response_format: Literal["b64_json"] = "b64_json"
    user: str | None = Field(None, max_length=200)


class ImageData(BaseModel):
    """One picture: a base64 PNG and the seed that makes it again."""

    b64_json: str
    seed: int


class ImagesResponse(BaseModel):
    """Answer of `POST /v1/images/generations`: with the request, all it takes to repeat it."""

    created: int
    data: list[ImageData]
    model: str
    model_digest: str
    size: str
    steps: int
    guidance_scale: float


class ModelCard(BaseModel):
    """A served model in OpenAI's list, with what a client must know to ask it for pictures."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "latent-diffusion-on-ray"
    kind: str
    digest: str
    size: str
    default_steps: int
    default_guidance: float
    max_steps: int
    max_pictures: int
    lineage: dict[str, str]


class ModelList(BaseModel):
    """Answer of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ApiError(Exception):
    """A request that gets no pictures, and why, in OpenAI's error shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s
        self.body = {
            "error": {"message": message, "type": kind, "param": param, "code": code},
        }

    @property
    def headers(self) -> dict[str, str]:
        """`Retry-After`, where waiting helps."""
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


def invalid(details: Sequence[Any]) -> ApiError:
    """Pydantic's findings about a body as one 422 that names every wrong field."""
    fields = [".".join(str(part) for part in detail["loc"][1:]) for detail in details]
    messages = [_explain(field, detail) for field, detail in zip(fields, details, strict=True)]
    return ApiError(422, "; ".join(messages), param=fields[0] or None, code=str(details[0]["type"]))


def _explain(field: str, detail: Any) -> str:
    if detail["type"] == "extra_forbidden":
        return f"{field}: unknown field; known are {', '.join(ImageGenerationRequest.model_fields)}"
    if detail["type"] == "json_invalid":
        return f"the body is no JSON: {detail.get('ctx', {}).get('error', detail['msg'])}"
    if not field:
        return "the body must be a JSON object, sent with Content-Type: application/json"
    return f"{field}: {detail['msg']}, got {_short(detail['input'])}"


def _short(value: Any, length: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}… ({len(text)} characters)"


def order(request: ImageGenerationRequest, card: ModelCard) -> Order:
    """What a request asks this model for, with nothing left to a default.

    Raises:
        ApiError: 404 for another model, 422 for more than this endpoint gives.
    """
    steps = card.default_steps if request.steps is None else request.steps
    guidance = card.default_guidance if request.guidance_scale is None else request.guidance_scale
    if request.model not in (None, card.id):
        message = f"model: there is no {request.model!r} here, only {card.id!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    _at_most("n", request.n, card.max_pictures)
    _at_most("steps", steps, card.max_steps)
    if request.size not in (None, card.size):
        message = f"size: {card.id} makes {card.size} pictures only, got {request.size!r}"
        raise ApiError(422, message, param="size", code="unsupported_size")
    seed = secrets.randbelow(MAX_RANDOM_SEED) if request.seed is None else request.seed
    return Order(request.prompt, tuple(range(seed, seed + request.n)), steps, guidance)


def images_response(card: ModelCard, wanted: Order, pictures: Sequence[Picture]) -> ImagesResponse:
    """The pictures of an order, seed by seed, and how they were made."""
    data = [
        ImageData(b64_json=base64.b64encode(picture.png).decode(), seed=seed)
        for seed, picture in zip(wanted.seeds, pictures, strict=True)
    ]
    return ImagesResponse(
        created=int(time.time()),
        data=data,
        model=card.id,
        model_digest=pictures[0].digest,
        size=card.size,
        steps=wanted.steps,
        guidance_scale=wanted.guidance,
    )


def queue_full() -> ApiError:
    """429: as many pictures wait as the endpoint lets wait."""
    return ApiError(
        429,
        "the queue is full; send the request again a little later, or ask for fewer pictures",
        kind="rate_limit_error",
        code="queue_full",
        retry_after_s=RETRY_AFTER_S,
    )


def not_ready(message: str) -> ApiError:
    """503: no sampler can answer now, one will."""
    return ApiError(
        503, message, kind="server_error", code="not_ready", retry_after_s=RETRY_AFTER_S
    )


def _at_most(field: str, value: int, limit: int) -> None:
    if value > limit:
        message = f"{field}: this endpoint allows at most {limit}, got {value}"
        raise ApiError(422, message, param=field, code="less_than_equal")
